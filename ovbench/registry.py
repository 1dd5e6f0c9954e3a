"""Names to methods, without importing torch: the method table of every module in ``methods/`` is read as text.

A method module holds a literal ``METHODS = {"name": {...}}`` (keys of :class:`MethodInfo`); other people's packages add
methods through the entry-point group ``ovbench.methods`` (``name = "package.module:Class"``).
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ovbench.errors import OvbenchError, unknown_name
from ovbench.paths import methods_dir

if TYPE_CHECKING:
    from ovbench.method import Method

ENTRY_POINT_GROUP = "ovbench.methods"


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before its module is imported.

    Attributes:
        name: Method id of the command line.
        module: Module that holds the class.
        cls: Name of the :class:`ovbench.method.Method` subclass in it.
        summary: One line for ``ovbench list methods``.
        paper: Authors, title or arXiv number.
        protocol: The preset that ``--protocol paper`` means for this method.
    """

    name: str
    module: str
    cls: str
    summary: str
    paper: str = ""
    protocol: str = "common"


def _method_table(source: str) -> dict[str, dict[str, str]]:
    """The literal bound to ``METHODS`` at the top of a module's source, or an empty dict."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "METHODS" for target in targets):
            table: dict[str, dict[str, str]] = ast.literal_eval(value)
            return table
    return {}


@lru_cache(maxsize=1)
def _methods() -> dict[str, MethodInfo]:
    found: dict[str, MethodInfo] = {}
    for path in sorted(methods_dir().glob("*.py")):
        for name, fields in _method_table(path.read_text(encoding="utf-8")).items():
            found[name] = MethodInfo(name=name, module=f"ovbench.methods.{path.stem}", **fields)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in found:
            raise OvbenchError(
                f"The installed package '{point.value}' registers a method '{point.name}', but that name is taken by "
                f"'{found[point.name].module}'. Rename its entry point or uninstall it."
            )
        module, _, cls = point.value.partition(":")
        found[point.name] = MethodInfo(point.name, module, cls, summary=f"from {point.value}")
    return dict(sorted(found.items()))


def method_names() -> list[str]:
    """All method ids, sorted; imports no method."""
    return list(_methods())


def method_info(name: str) -> MethodInfo:
    """What is known of one method without importing it.

    Raises:
        UsageError: No such method; names the nearest ones.
    """
    methods = _methods()
    if name not in methods:
        raise unknown_name("method", name, methods, "ovbench list methods")
    return methods[name]


def method_class(name: str) -> type[Method]:
    """The class of a method, its module imported now.

    Raises:
        UsageError: No such method.
        OvbenchError: Its module does not hold the promised class.
    """
    info = method_info(name)
    found = getattr(importlib.import_module(info.module), info.cls, None)
    if found is None:
        raise OvbenchError(f"Method '{name}' should be '{info.cls}' in '{info.module}', but there is no such class.")
    cls: type[Method] = found
    return cls
