"""The benchmarks: which images, which classes under which words, and how label files become training ids.

Importing this module needs neither torch nor mmengine nor cv2; see ``readers`` for the mmseg datasets.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ovbench.benchmarks import catalog, own
from ovbench.benchmarks.benchmark import Benchmark, Split, SynthRules
from ovbench.benchmarks.catalog import definitions, with_split
from ovbench.benchmarks.definition import fields_of
from ovbench.benchmarks.layout import Layout, Pair
from ovbench.benchmarks.own import OwnBenchmark
from ovbench.errors import UsageError, unknown_name

__all__ = [
    "Benchmark",
    "Layout",
    "OwnBenchmark",
    "Pair",
    "Split",
    "SynthRules",
    "expand",
    "get",
    "names",
    "own_root",
    "with_split",
]


def names(group: str | None = None) -> list[str]:
    """The ids of all benchmarks, or of one group, in the order in which papers print them.

    Args:
        group: "eight" for the customary eight benchmarks of open-vocabulary papers, "large-vocabulary" or "closed-set".
    """
    return [name for name, found in definitions().items() if group in (None, found.values["benchmark"].get("group"))]


def expand(given: Iterable[str]) -> list[str]:
    """Ids for names of benchmarks and of groups, each once; ``all`` is all of them.

    Raises:
        UsageError: No such benchmark.
    """
    found: list[str] = []
    for name in given:
        group = names(None if name == "all" else name)
        if not group:
            get(name)
        found += group or [name]
    return list(dict.fromkeys(found))


def get(name: str) -> Benchmark:
    """The benchmark of that id, or the user's own at that path (a folder or a config; see ``own``).

    Raises:
        UsageError: No benchmark is called that, or nothing lies there; the message names the nearest.
        DataError: Its config, folder or word list is damaged.
    """
    if not own.is_path(name):
        return _built_in(name)
    found = own.read(name)  # read anew every time: the user may be working on it
    if found.name in definitions():
        raise UsageError(
            f"'{name}' would be called '{found.name}', but that is one of ovbench's benchmarks and their results must not "
            "mix. Rename the folder or file, or give a 'name' in its dataset.json."
        )
    return found


def own_root(benchmark: Benchmark) -> Path | None:
    """The data root that the user's own benchmark brings along; None where it has to be given."""
    return benchmark.home if isinstance(benchmark, OwnBenchmark) else None


@cache
def _built_in(name: str) -> Benchmark:
    if name not in definitions():
        catalog.require_whole(name)
        if Path(name).is_dir():
            raise UsageError(f"Unknown dataset '{name}'. For the folder of that name write './{name}'.")
        raise unknown_name("dataset", name, names(), "ovbench list datasets")
    return Benchmark(**fields_of(name, *definitions()[name]))


def cache_clear() -> None:
    """Forgets what was read, for those who change the configs."""
    catalog.cache_clear()
    _built_in.cache_clear()


get.cache_clear = cache_clear  # type: ignore[attr-defined]
