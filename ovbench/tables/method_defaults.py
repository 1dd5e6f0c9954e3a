"""A method's own options read from its source text: the defaults that a published number is taken to mean.

Importing a method would load torch, and a table must not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ovbench.errors import UsageError
from ovbench.models.backbone_constants import backbone_named, constants_of
from ovbench.paths import methods_dir
from ovbench.registry import MethodInfo, method_info

_BASE = "base."  # prefix of the options of a wrapped method, which option "base" names


@dataclass(frozen=True)
class _Module:
    """The classes of a source file, and where other names come from."""

    classes: Mapping[str, ast.ClassDef]
    imported: Mapping[str, str]


def changed_options(method: str, options: Mapping[str, Any], arch: str | None) -> dict[str, Any] | None:
    """The options that are not a method's defaults; None where its source does not tell the defaults.

    Options without a literal default are left out, and so are those that say where weights are read from.

    Args:
        method: Method id.
        options: As recorded.
        arch: Architecture, on which some defaults depend; of an unknown one, those of any backbone are defaults.
    """
    allowed = _defaults(method, arch)
    if allowed is None:
        return None
    changed = {}
    for name, value in sorted(options.items()):
        known = allowed.get(name)
        if name.startswith(_BASE):
            known = (_defaults(str(options.get("base")), arch) or {}).get(name.removeprefix(_BASE))
        if known is not None and value not in known and not name.endswith("weights"):
            changed[name] = value
    return changed


def inferred_constants(method: str, options: Mapping[str, Any], arch: str | None) -> str | None:
    """What a method's constants (or its base's) are inferred from on this backbone; None where they were published for it."""
    for name in (method, str(options.get("base"))):
        table, elsewhere = _backbones(name)
        backbone = backbone_named(arch)
        if table and backbone is not None:
            found = constants_of(table, backbone, elsewhere)
            if found.inferred:
                return f"constants {found.told}"
    return None


def option_names(method: str) -> list[str]:
    """The options of a method that have a literal default; empty where its source does not tell them."""
    return list(_defaults(method, None) or {})


def default_option(method: str, name: str) -> Any:
    """An option's default, lists for tuples; None also where the source does not tell it."""
    known = (_defaults(method, None) or {}).get(name)
    return None if known is None else known[0]


@cache
def _defaults(method: str, arch: str | None) -> dict[str, tuple[Any, ...]] | None:
    """The values that each option may have by default, tuples as lists; None where the source does not tell."""
    source = _source(method)
    found = None if source is None else _config_of(*source)
    if source is None or found is None:
        return None
    config, literals = found
    defaults = {} if config is None else _literals(source[0], config)
    allowed = {name: (_plain(value), *literals) for name, value in defaults.items()}
    table, _ = _backbones(method)
    backbone = backbone_named(arch)
    used = [entry["values"] for entry in table.values()]
    if table and backbone is not None:
        used = [constants_of(table, backbone).values]
    for values in used:
        for name, value in values.items():
            allowed[name] = (*allowed.get(name, ()), _plain(value))
    return allowed


@cache
def _backbones(method: str) -> tuple[Mapping[str, Any], str]:
    """``BACKBONES`` and ``ELSEWHERE`` of a method's class or of the nearest of its bases; empty where there are none."""
    source = _source(method)
    if source is None:
        return {}, ""
    return _assigned(*source, "BACKBONES") or {}, _assigned(*source, "ELSEWHERE") or ""


def _source(method: str) -> tuple[_Module, str] | None:
    """The module of a method's source and its class; None where it cannot be read."""
    try:
        info = method_info(method)
        path = _file_of(info)
        return None if path is None else (_module(path), info.cls)
    except (UsageError, OSError, SyntaxError, ValueError):
        return None


def _assigned(module: _Module, name: str, attribute: str) -> Any:
    """The literal that a class, or the nearest of its bases, binds to an attribute; None where there is none."""
    if name not in module.classes:
        where, _, original = module.imported.get(name, "").rpartition(".")
        path = _ovbench_file(where) if where else None
        return None if path is None else _assigned(_module(path), original, attribute)
    for node in module.classes[name].body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == attribute and getattr(node, "value", None) is not None:
            try:
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except ValueError:
                return None
    found = (_assigned(module, base.id, attribute) for base in module.classes[name].bases if isinstance(base, ast.Name))
    return next((value for value in found if value is not None), None)


def _file_of(info: MethodInfo) -> Path | None:
    if info.source is not None:
        return info.source
    return _ovbench_file(info.module)


def _ovbench_file(module: str) -> Path | None:
    """The source file of one of ovbench's own modules; None for others and for packages."""
    parts = module.split(".")
    if parts[0] != "ovbench":
        return None
    root = methods_dir() if parts[1:2] == ["methods"] else Path(__file__).resolve().parents[1]
    path = root.joinpath(*parts[2 if parts[1:2] == ["methods"] else 1 :]).with_suffix(".py")
    return path if path.is_file() else None


@cache
def _module(path: Path) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return _Module({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}, imported)


def _config_of(module: _Module, name: str) -> tuple[str | None, tuple[Any, ...]] | None:
    """Name of a method's config class (None for a method without options) and literals that may override defaults.

    A config that a call makes is taken for the inherited one in which the call's literal arguments are defaults.
    """
    if module.imported.get(name) == "ovbench.models.method.Method":
        return None, ()
    if name not in module.classes:
        return None
    literals: tuple[Any, ...] = ()
    for node in module.classes[name].body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if not (isinstance(target, ast.Name) and target.id == "Config"):
            continue
        if isinstance(value, ast.Name):
            return value.id, ()
        if isinstance(value, ast.Call):
            literals = tuple(part.value for part in value.args if isinstance(part, ast.Constant))
    bases = [base.id for base in module.classes[name].bases if isinstance(base, ast.Name)]
    found = _config_of(module, bases[0]) if bases else None
    return None if found is None else (found[0], (*found[1], *literals))


def _literals(module: _Module, name: str) -> dict[str, Any]:
    """The literal defaults of a dataclass and of its bases, in other modules of ovbench as well."""
    if name not in module.classes:
        where, _, original = module.imported.get(name, "").rpartition(".")
        path = _ovbench_file(where) if where else None
        return {} if path is None else _literals(_module(path), original)
    values: dict[str, Any] = {}
    for base in module.classes[name].bases:
        if isinstance(base, ast.Name):
            values |= _literals(module, base.id)
    for node in module.classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values.pop(node.target.id, None)
            try:
                values[node.target.id] = ast.literal_eval(node.value)
            except ValueError:
                continue  # no literal: what it is cannot be told
    return values


def _plain(value: Any) -> Any:
    """As it comes back from JSON, which has no tuples."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
