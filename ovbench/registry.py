"""Names to methods, without importing torch: the method table of every module in ``methods/`` is read as text.

A method module holds a literal ``METHODS = {"name": {...}}`` (keys of :class:`MethodInfo`). Other people's packages add
methods through the entry-point group ``ovbench.methods`` (``name = "package.module:Class"``), and ``PATH.py:Class`` names
a class in a file of one's own. Both may hold the same table, of which the entry for their class counts.

Using a method that is given by a path runs that file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ovbench.errors import OvbenchError, OvbenchWarning, UsageError, first_line, unknown_name
from ovbench.paths import methods_dir, user_path

if TYPE_CHECKING:
    from ovbench.models.closed_set import ClosedSetMethod
    from ovbench.models.method import Method

ENTRY_POINT_GROUP = "ovbench.methods"
TRACKS = OPEN_VOCABULARY, MASK_BASED, CLOSED_SET = "open-vocabulary", "mask-based", "closed-set"
# By class of the base, what a method of it must override one of.
_BASES = {
    "ovbench.models.mask_method.MaskMethod": ("classify",),
    "ovbench.models.method.Method": ("features", "patch_logits"),
    "ovbench.models.closed_set.ClosedSetMethod": ("model_config",),
}
SOLVER = "discrepancy-"  # method ids of the solvers begin so
ALIASES = {"clip-kk": "kk"}  # names that papers use
_TOLD = ("summary", "paper", "protocol", "track")
_RECORDED = re.compile(r"\w+:\w+")
# What a half-written module or METHODS table raises when it is read as text.
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError)


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before its module is imported.

    Attributes:
        name: Method id of the command line; ``stem:Class`` for a file of one's own, wherever it lies.
        module: Module that holds the class, or the file.
        cls: Name of the :class:`ovbench.models.method.Method` subclass in it.
        summary: One line for ``ovbench list methods``.
        paper: Authors, title or arXiv number.
        protocol: The preset that ``--protocol paper`` means for this method.
        track: ``open-vocabulary``: any words at every pixel; ``mask-based``: any words for masks of a generator;
            ``closed-set``: the classes it was trained on.
        source: The file, for methods that are not part of ovbench.
        source_sha256: Its hash, for the record: no commit of ovbench tells what is in it.
    """

    name: str
    module: str
    cls: str
    summary: str
    paper: str = ""
    protocol: str = "common"
    track: str = OPEN_VOCABULARY
    source: Path | None = None
    source_sha256: str | None = None

    @property
    def takes_words(self) -> bool:
        """Whether any words can be its classes; else those it was trained on."""
        return self.track != CLOSED_SET

    def recorded(self) -> dict[str, str]:
        """What a record says of the source, beside the method's options; empty for ovbench's own methods."""
        return {} if self.source_sha256 is None else {"source_sha256": self.source_sha256}


def _method_table(source: str) -> dict[str, dict[str, Any]]:
    """The literal bound to ``METHODS`` at the top of a module's source, or an empty dict."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "METHODS" for target in targets):
            table: dict[str, dict[str, Any]] = ast.literal_eval(value)
            return table
    return {}


@lru_cache(maxsize=1)
def _read() -> tuple[dict[str, MethodInfo], dict[str, OvbenchError]]:
    """The methods by id, and what is wrong with modules (by file name) and entry points (by id) that cannot be read."""
    found: dict[str, MethodInfo] = {}
    broken: dict[str, OvbenchError] = {}
    for path in sorted(methods_dir().glob("*.py")):
        try:
            table = _method_table(path.read_text(encoding="utf-8"))
            infos = {
                name: MethodInfo(name=name, module=f"ovbench.methods.{path.stem}", **fields)
                for name, fields in table.items()
            }
        except _UNREADABLE as error:
            broken[path.stem] = OvbenchError(f"The methods of '{path}' cannot be read: {first_line(error)}.")
            warnings.warn(f"{broken[path.stem]} They are left out.", OvbenchWarning, stacklevel=2)
        else:
            found |= infos
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            if point.name in found:
                raise OvbenchError(
                    f"The installed package '{point.value}' registers a method '{point.name}', but that name is taken by "
                    f"'{found[point.name].module}'. Rename its entry point or uninstall it."
                )
            found[point.name] = _of_entry_point(point)
        except (OvbenchError, *_UNREADABLE) as error:
            told = (
                f"The method '{point.name}' of an installed package ({point.value}) cannot be read: {first_line(error)}"
            )
            broken[point.name] = error if isinstance(error, OvbenchError) else OvbenchError(told)
            warnings.warn(f"{broken[point.name]} It is left out.", OvbenchWarning, stacklevel=2)
    return dict(sorted(found.items())), broken


def _methods() -> dict[str, MethodInfo]:
    return _read()[0]


def method_names(track: str | None = OPEN_VOCABULARY) -> list[str]:
    """The method ids of a track, or with None of all, sorted; imports no method."""
    return [name for name, info in _methods().items() if track in (None, info.track)]


def solver_names() -> list[str]:
    """The discrepancy solvers, as ``--solver`` names them: ``op`` is the method ``discrepancy-op``."""
    return [name.removeprefix(SOLVER) for name in method_names() if name.startswith(SOLVER)]


def expand_methods(given: Iterable[str]) -> list[str]:
    """Method ids for names of methods and of tracks, each once; ``all`` is the open-vocabulary track.

    Raises:
        UsageError: No such method.
    """
    found: list[str] = []
    for name in given:
        track = OPEN_VOCABULARY if name == "all" else name
        if track in TRACKS:
            found += method_names(track)
        else:
            method_info(name)
            found.append(name)
    return list(dict.fromkeys(found))


def method_info(name: str) -> MethodInfo:
    """What is known of one method without importing it.

    Args:
        name: Method id, or ``PATH.py:Class`` for a file of one's own.

    Raises:
        UsageError: No such method; names the nearest ones. No such file, or no such class in it.
    """
    if is_path(name):
        return _of_file(name)[0]
    methods = _methods()
    name = ALIASES.get(name, name)
    broken = _read()[1]
    if name in broken:
        raise broken[name]
    if name not in methods:
        if _RECORDED.fullmatch(name):
            stem, _, cls = name.partition(":")
            raise UsageError(
                f"Unknown method '{name}'. This is how a record names a method from a file: give the file's path, e.g. "
                f"./{stem}.py:{cls}."
            )
        unknown = unknown_name("method", name, methods, "ovbench list methods")
        raise UsageError(" ".join([str(unknown), *map(str, broken.values())]))
    return methods[name]


def closed_set_class(name: str) -> type[ClosedSetMethod]:
    """The class of a method of the closed-set track; see :func:`method_class`.

    Raises:
        UsageError: Also for a method of another track.
    """
    if method_info(name).track != CLOSED_SET:
        raise UsageError(f"'{name}' is no closed-set method: see 'ovbench list methods'.")
    found: Any = class_of(name)
    return found  # type: ignore[no-any-return]


def method_class(name: str) -> type[Method]:
    """The class of a method, its module imported (a file of one's own: run) now.

    Raises:
        UsageError: No such method, one of the closed-set track, or a file that cannot be run or holds no such method;
            with file and line.
        OvbenchError: The module of a registered method does not hold the promised class.
    """
    if method_info(name).track == CLOSED_SET:
        raise UsageError(
            f"'{name}' is a closed-set method, whose classes are fixed when it is trained: it takes no words."
        )
    found: Any = class_of(name)
    return found  # type: ignore[no-any-return]


def class_of(name: str) -> type[Any]:
    """The class of a method of any track.

    Raises:
        UsageError: No such method, or a file that cannot be run or holds no such method; with file and line.
        OvbenchError: The module of a registered method does not hold the promised class.
    """
    if is_path(name):
        info, content = _of_file(name)
        module = _run_file(info, content)
    else:
        info = method_info(name)
        try:
            module = importlib.import_module(info.module)
        except Exception as error:
            if info.source is None and info.module.startswith("ovbench."):
                raise
            raise OvbenchError(
                f"The method '{name}' ({info.module}:{info.cls}) of an installed package cannot be imported: "
                f"{type(error).__name__}: {error}."
            ) from error
    found = getattr(module, info.cls, None)
    if found is None:
        raise OvbenchError(f"Method '{name}' should be '{info.cls}' in '{info.module}', but there is no such class.")
    return _require_method(found, info)


def own_frame(error: BaseException) -> str | None:
    """Where in the user's own method file an error arose, e.g. ``"my_method.py line 12, in features"``; None elsewhere."""
    files = {module.__file__ for module in _loaded.values()}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f"{Path(frame.filename).name} line {frame.lineno}, in {frame.name}"
    return None


# Hashes of the files that the user was told of; processes inherit it.
_ANNOUNCED = "OVBENCH_TOLD_OF_CODE"
# Modules of own files by path and content: an edited file is run again, an unchanged one is the same class.
_loaded: dict[tuple[str, str], ModuleType] = {}


def is_path(name: str) -> bool:
    """Whether a method is given as a file: ``PATH.py``, ``PATH.py:Class``, or anything with a folder in it."""
    return name.partition(":")[0].endswith(".py") or ".py:" in name or "/" in name or os.sep in name


def _of_file(name: str) -> tuple[MethodInfo, bytes]:
    """What is known of a class in a file, and the file's content; nothing is run."""
    given, colon, cls = name.rpartition(":")
    if not colon or not given or "/" in cls or os.sep in cls:
        given, cls = name, ""
    path = Path(os.path.abspath(user_path(given)))
    if path.suffix != ".py" or not path.is_file():
        there = "is a folder" if path.is_dir() else "is no .py file" if path.is_file() else "does not exist"
        raise UsageError(
            f"The method file '{given}' {there}. A method of one's own is PATH.py:Class, e.g. ./my_method.py:MyMethod."
        )
    try:
        content = path.read_bytes()
        tree = ast.parse(content, filename=str(path))
    except OSError as error:
        raise UsageError(f"Cannot read the method file '{given}': {error.strerror}.") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise UsageError(
            f"The method file '{given}' is not Python: {getattr(error, 'msg', error)} (line {line})."
        ) from None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if not cls:
        example = next((entry for entry in reversed(classes)), "MyMethod")
        raise UsageError(f"Which class of '{given}' is the method? Say e.g. {given}:{example}.")
    if cls not in _bound(tree):
        unknown = unknown_name("class", cls, classes) if classes else f"Unknown class '{cls}': there is none."
        raise UsageError(f"{unknown} The file is '{given}'.")
    info = MethodInfo(
        name=f"{path.stem}:{cls}",
        module=given,
        cls=cls,
        source=path,
        source_sha256=hashlib.sha256(content).hexdigest(),
        **{"summary": f"from {given}", **_told(content.decode("utf-8", "replace"), cls, given)},
    )
    return info, content


def _bound(tree: ast.Module) -> set[str]:
    """The names that a module's source may bind: classes, imports, assignments."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _told(source: str, cls: str, where: str) -> dict[str, str]:
    """Summary, paper and protocol that the ``METHODS`` table of a source gives for a class; empty without a table."""
    try:
        table = _method_table(source)
        entries = [fields for fields in table.values() if fields.get("cls") == cls]
        return {key: str(entries[0][key]) for key in _TOLD if key in entries[0]} if entries else {}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise UsageError(
            f"METHODS in '{where}' must be a literal dict of dicts, as in ovbench's methods: {error}."
        ) from None


def _run_file(info: MethodInfo, content: bytes) -> ModuleType:
    """The module of a user's file, run once per content.

    Compiled from the bytes that were hashed: Python's own import would keep a cache beside the user's file, and take an
    old one where a file was changed twice within a second.
    """
    key = (str(info.source), str(info.source_sha256))
    if key in _loaded:
        return _loaded[key]
    _say_that_it_runs(info)
    name = f"ovbench_own_{info.name.partition(':')[0]}_{key[1][:12]}"
    module = ModuleType(name)
    module.__file__ = key[0]
    sys.modules[name] = module  # dataclasses look their module up
    _loaded[key] = module
    try:
        exec(compile(content, key[0], "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        frame = own_frame(error)
        del sys.modules[name], _loaded[key]
        lost = isinstance(error, ModuleNotFoundError) and (Path(key[0]).parent / f"{error.name}.py").is_file()
        hint = " Its neighbours are not searched: put all into one file, or install a package." if lost else ""
        raise UsageError(
            f"The method file '{info.module}' cannot be run: {type(error).__name__}: {error} ({frame}).{hint}"
        ) from error
    return module


def _say_that_it_runs(info: MethodInfo) -> None:
    """A warning before the code of a file is run, once for the command and the processes that it starts."""
    told = os.environ.get(_ANNOUNCED, "").split()
    digest = str(info.source_sha256)
    if digest not in told:
        os.environ[_ANNOUNCED] = " ".join([*told, digest])
        warnings.warn(f"'{info.source}' is code and is run now, with all your rights.", OvbenchWarning, stacklevel=4)


def _require_method(found: object, info: MethodInfo) -> type:
    """The class, if it is a method.

    Raises:
        UsageError: It is no class, not derived from Method, or does not define what a method must.
    """
    what = f"'{info.cls}' in '{info.module}'"
    # by name: importing ovbench.models.method would load torch for everyone who asks for names
    lineage = found.__mro__ if isinstance(found, type) else ()
    bases = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in lineage}
    name = next((name for name in _BASES if name in bases), None)
    if name is None:
        raise UsageError(
            f"{what} is not a method: derive it from ovbench.models.method.Method and override features()."
        )
    if name.startswith("ovbench.models.closed_set") != (info.track == CLOSED_SET):
        raise UsageError(f"{what} derives from {name}, but its track is '{info.track}': give the right one in METHODS.")
    cls: type = found  # type: ignore[assignment]
    if all(getattr(cls, wanted) is getattr(bases[name], wanted) for wanted in _BASES[name]):
        gives = {"features": "gives a method's dense features", "classify": "says what is in each mask"}.get(
            _BASES[name][0], "gives the network"
        )
        raise UsageError(f"{what} does not override {_BASES[name][0]}(), which {gives}.")
    return cls


def _of_entry_point(point: EntryPoint) -> MethodInfo:
    """What is known of a method of an installed package; the module's source is read, nothing is imported."""
    source = _source_of(point.module)
    told = {"summary": f"from {point.value}"}
    digest = None
    if source is not None:
        content = source.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        told |= _told(content.decode("utf-8", "replace"), point.attr, point.value)
    return MethodInfo(point.name, point.module, point.attr, source=source, source_sha256=digest, **told)


def _source_of(module: str) -> Path | None:
    """The source file of a module, found without importing its packages; None where there is none."""
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
        for count in range(2, len(parts) + 1):
            if spec is None:
                return None
            places = list(spec.submodule_search_locations or [])
            spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:count]), places)
    except (ImportError, ValueError):
        return None
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    return origin if origin is not None and origin.suffix == ".py" and origin.is_file() else None
