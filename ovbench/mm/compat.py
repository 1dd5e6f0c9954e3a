"""Makes mmsegmentation 1.2.2 importable on current torch, numpy and Python.

Call :func:`prepare` (or :func:`import_mmseg`) before the first ``import mmseg``. It mends exactly three things and
touches nothing that is whole:

* ``mmseg`` imports ``mmcv.ops``, which needs the compiled extension ``mmcv._ext``. ``mmcv-lite`` has none, so a
  stand-in module takes its place. Operators written in Python (``point_sample``, criss-cross attention) then work; a
  compiled one raises an error with its name when it is called, not before.
* ``mmengine`` looks up installed packages through ``pkg_resources``, which setuptools 82 removed. The lookups are
  replaced by ones on ``importlib.metadata``.
* ``mmengine`` imports ``distutils.errors`` when it logs the environment; Python 3.12 removed it. Where setuptools does
  not supply it, a stand-in holds the one exception class that is asked for.

Warnings of these libraries about their own age are silenced by message and origin, so that others still show.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ovbench.errors import RunError

_EXTENSION = "mmcv._ext"

# (message, category, module): regular expressions matched from the start, as warnings.filterwarnings takes them.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # mmcv.cnn.bricks.transformer tells its own importers about a class that moved.
    (r"``MultiScaleDeformableAttention`` has been moved", ImportWarning, r"mmcv\.cnn\.bricks\.transformer"),
    # mmengine asks for mmcv._ext through a function that Python 3.12 deprecates and 3.14 removes.
    (r"'pkgutil\.find_loader' is deprecated", DeprecationWarning, r"mmengine\.|mmcv\."),
    (r"pkg_resources is deprecated as an API", UserWarning, r"mmengine\."),
    (r"pkg_resources is deprecated as an API", DeprecationWarning, r"mmengine\."),
    (r"The distutils package is deprecated", DeprecationWarning, r"mmengine\."),
    # mmseg's transformer backbones and heads call torch.meshgrid without saying how it indexes.
    (r"torch\.meshgrid: in an upcoming release", UserWarning, r"torch\."),
    # mmseg calls its own functions that it announces as deprecated.
    (r"``build_(loss|head|neck|backbone|pixel_sampler)`` would be deprecated soon", UserWarning, r"mmseg\."),
    # Said by every cross-entropy head, also when only testing.
    (r"Default ``avg_non_ignore`` is False", UserWarning, r"mmseg\.models\.losses\."),
    # Python 3.13 on mmengine's docstring splitting.
    (r"'maxsplit' is passed as positional argument", DeprecationWarning, r"mmengine\."),
)


class _Extension(ModuleType):
    """A module in the place of ``mmcv._ext`` whose every attribute is a callable that raises, naming the operator."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        # Python's own machinery (inspect, copy, importlib) probes modules for dunder names and must be told "no".
        if name.startswith("__"):
            raise AttributeError(f"module {_EXTENSION!r} has no attribute {name!r}")

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise RunError(
                f"The compiled mmcv operator '{name}' was called, but this installation has mmcv-lite, which has no "
                "compiled operators. Use a module that does not need it, or install an mmcv that is compiled for this "
                "torch in place of mmcv-lite."
            )

        missing.__name__ = missing.__qualname__ = name
        setattr(self, name, missing)
        return missing


def prepare() -> None:
    """Readies this process for ``import mmseg``; calling it again changes nothing.

    Raises:
        RunError: mmcv or mmengine is not installed, or the Python is one that mmengine cannot run on.
    """
    if sys.version_info >= (3, 14):
        raise RunError(
            f"mmengine does not run on Python {sys.version.split()[0]} (it uses pkgutil.find_loader, removed in 3.14). "
            "Use Python 3.10 to 3.13."
        )
    _silence_known_warnings()
    _supply_extension()
    _supply_distutils_errors()
    _replace_package_lookups()


def import_mmseg() -> Any:
    """The ``mmseg`` package with its models, datasets, transforms and metrics registered.

    The first call of a process takes several seconds.

    Raises:
        RunError: mmsegmentation or one of its dependencies is missing or broken.
    """
    prepare()
    try:
        for name in ("models", "datasets", "engine", "evaluation", "structures", "visualization"):
            importlib.import_module(f"mmseg.{name}")
        return importlib.import_module("mmseg")
    except (ImportError, AssertionError) as error:  # mmseg asserts the versions of mmcv and mmengine
        raise RunError(
            f"mmsegmentation cannot be imported: {error}. ovbench needs mmsegmentation 1.2.2 with mmcv-lite 2.1 and "
            "mmengine 0.10; install them with 'pip install --force-reinstall ovbench'."
        ) from error


@contextmanager
def quiet_mmengine() -> Iterator[None]:
    """Keeps mmengine's notices (a line for each initialised parameter) off the terminal; warnings of its logger too."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def has_compiled_ops() -> bool:
    """Whether a real, compiled ``mmcv._ext`` is installed (looked up without importing mmcv)."""
    return PathFinder.find_spec(_EXTENSION, _search_locations("mmcv")) is not None


def _search_locations(package: str) -> list[str]:
    """The folders that hold the submodules of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        distribution = "mmcv-lite" if package == "mmcv" else package
        raise RunError(
            f"The package '{package}' is not installed in {sys.prefix}. Evaluation runs on mmsegmentation: install it "
            f"with 'pip install ovbench' (or 'pip install {distribution}')."
        )
    return list(spec.submodule_search_locations)


def _supply_extension() -> None:
    if _EXTENSION in sys.modules or has_compiled_ops():
        return
    module = _Extension(_EXTENSION, "Stand-in for mmcv's compiled operators; see ovbench.mm.compat.")
    # With a loader of None, pkgutil.find_loader("mmcv._ext") answers None and mmengine rightly says that the full mmcv
    # is not there; without a spec it would raise.
    module.__spec__ = ModuleSpec(_EXTENSION, None)
    sys.modules[_EXTENSION] = module


def _supply_distutils_errors() -> None:
    if "distutils.errors" in sys.modules or importlib.util.find_spec("distutils") is not None:
        return
    package = ModuleType("distutils", "Stand-in for what mmengine asks of distutils; see ovbench.mm.compat.")
    package.__path__ = []
    package.__spec__ = ModuleSpec("distutils", None, is_package=True)
    errors = ModuleType("distutils.errors")
    errors.__spec__ = ModuleSpec("distutils.errors", None)
    vars(errors)["DistutilsPlatformError"] = type("DistutilsPlatformError", (Exception,), {})
    vars(package)["errors"] = errors
    sys.modules.update({"distutils": package, "distutils.errors": errors})


def _replace_package_lookups() -> None:
    """Puts lookups without ``pkg_resources`` wherever mmengine holds the ones that need it."""
    _search_locations("mmengine")
    if importlib.util.find_spec("pkg_resources") is not None:
        return
    importlib.import_module("mmengine.hub")  # the last of mmengine's modules that copies these names
    source = importlib.import_module("mmengine.utils.package_utils")
    for replacement in (is_installed, get_installed_path, package2module):
        name = replacement.__name__
        original = getattr(source, name)
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == "mmengine" and vars(module).get(name) is original:
                setattr(module, name, replacement)


def is_installed(package: str) -> bool:
    """Whether a distribution or an importable module of that name is installed (stands in for mmengine's)."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def get_installed_path(package: str) -> str:
    """The folder of an installed package, given its module or distribution name (stands in for mmengine's).

    Raises:
        ModuleNotFoundError: Nothing of that name is installed.
        RuntimeError: The name is a namespace package, which has no folder of its own.
    """
    module_name = package if importlib.util.find_spec(package) is not None else package2module(package)
    spec = importlib.util.find_spec(module_name)
    if spec is None:
        raise ModuleNotFoundError(f"No package '{package}' is installed", name=package)
    if spec.origin is None:
        raise RuntimeError(f"'{package}' is a namespace package and has no folder of its own")
    return str(Path(spec.origin).parent)


def package2module(package: str) -> str:
    """The first top-level module that a distribution installs (stands in for mmengine's).

    Raises:
        importlib.metadata.PackageNotFoundError: No distribution of that name is installed.
        ValueError: The distribution does not say which modules it has.
    """
    names = (importlib.metadata.distribution(package).read_text("top_level.txt") or "").split()
    if not names:
        raise ValueError(f"The distribution '{package}' does not say which modules it installs")
    return names[0]


def _silence_known_warnings() -> None:
    for message, category, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
