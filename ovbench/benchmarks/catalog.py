"""What lies in ``dataset_configs``, read as data. An unfinished file there is left out with a warning, not an end of all."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

from ovbench.benchmarks.config import read_config, read_words, validate_config
from ovbench.errors import DataError, OvbenchWarning
from ovbench.paths import config_dir


class Definition(NamedTuple):
    """Validated content of a config, and of its word list."""

    values: dict[str, Any]
    lists: dict[str, Any]


@cache
def _read() -> tuple[dict[str, Definition], dict[str, DataError]]:
    """Definitions by name in the customary order, and what is wrong with the others."""
    found: dict[str, Definition] = {}
    broken: dict[str, DataError] = {}
    for path in sorted(config_dir().glob("[!_]*.py")):
        name, words = path.stem, path.parent / "words" / f"{path.stem}.json"
        try:
            values = read_config(path)
            validate_config(values, path.name)
            facts = values["benchmark"]
            lists = read_words(words, name=name, version=facts["version"], num_classes=facts["num_classes"])
            found[name] = Definition(values, lists)
        except DataError as error:
            broken[name] = error
            warnings.warn(f"The benchmark '{name}' is left out: {error}", OvbenchWarning, stacklevel=2)
    return dict(sorted(found.items(), key=lambda item: (item[1].values["benchmark"]["order"], item[0]))), broken


def definitions() -> dict[str, Definition]:
    """The definitions of all benchmarks that can be read, by name, in the customary order; warns once of the others."""
    return _read()[0]


def require_whole(name: str) -> None:
    """Nothing, unless there is a definition of that name which cannot be read.

    Raises:
        DataError: It says what is wrong.
    """
    if name in _read()[1]:
        raise _read()[1][name]


def with_split(split: str = "train") -> list[str]:
    """The names of the benchmarks that have a split: all have "val"."""
    return [name for name, found in definitions().items() if split == "val" or found.values.get(split) is not None]


cache_clear = _read.cache_clear  # for those who change the configs
