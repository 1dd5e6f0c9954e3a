"""Runs a user's own method file, once per content, and says so first; nothing else of ovbench runs foreign code by a path."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ovbench.errors import OvbenchWarning, UsageError

if TYPE_CHECKING:
    from ovbench.registry import MethodInfo

# Hashes of the files that the user was told of; processes inherit it.
_ANNOUNCED = "OVBENCH_TOLD_OF_CODE"
# Modules of own files by path and content: an edited file is run again, an unchanged one is the same class.
_loaded: dict[tuple[str, str], ModuleType] = {}


def run_file(info: MethodInfo, content: bytes) -> ModuleType:
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


def own_frame(error: BaseException) -> str | None:
    """Where in the user's own method file an error arose, e.g. ``"my_method.py line 12, in features"``; None elsewhere."""
    files = {module.__file__ for module in _loaded.values()}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f"{Path(frame.filename).name} line {frame.lineno}, in {frame.name}"
    return None


def _say_that_it_runs(info: MethodInfo) -> None:
    """A warning before the code of a file is run, once for the command and the processes that it starts."""
    told = os.environ.get(_ANNOUNCED, "").split()
    digest = str(info.source_sha256)
    if digest not in told:
        os.environ[_ANNOUNCED] = " ".join([*told, digest])
        warnings.warn(f"'{info.source}' is code and is run now, with all your rights.", OvbenchWarning, stacklevel=4)
