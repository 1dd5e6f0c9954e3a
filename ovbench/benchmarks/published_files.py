"""What is publicly known of the files that benchmarks are prepared from: ``dataset_configs/downloads/<dataset>.json``.

A benchmark's config names its files in ``downloads``; size, address, checksum and licence of a file stand once, with the
dataset that it belongs to. What is not known is null and is said to be unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import DataError
from ovbench.paths import config_dir

Access = Literal["direct", "registration"]
# The strongest first: where several are known, the first is compared.
ALGORITHMS = {"sha256": 64, "sha1": 40, "md5": 32}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Dataset:
    """A dataset as its makers publish it.

    Attributes:
        access: "direct" where files have public addresses, "registration" where an account or a request is needed.
        licence: In a few words; None where its pages do not say.
        licence_page: Where it stands.
    """

    title: str
    homepage: str
    access: Access
    licence: str | None
    licence_page: str | None


@dataclass(frozen=True)
class Download:
    """One file.

    Attributes:
        name: File name.
        holds: What is in it.
        size: For people, e.g. "2.0 GB"; None where unknown.
        url: Public direct address; None where there is none.
        page: Where it can be fetched with a browser.
        bytes: Exact size; None where no public source prints it.
        checksums: Hexadecimal by algorithm; empty where no public source prints one.
        checksum_from: The source that prints it.
        note: What else one should know.
    """

    name: str
    dataset: Dataset
    holds: str
    size: str | None
    url: str | None
    page: str | None
    bytes: int | None
    checksums: Mapping[str, str]
    checksum_from: str | None
    note: str | None

    @property
    def checksum(self) -> tuple[str, str] | None:
        """The strongest known algorithm and its hexadecimal value."""
        return next(((name, self.checksums[name]) for name in ALGORITHMS if name in self.checksums), None)

    @property
    def where(self) -> str:
        """The page to go to."""
        return self.page or self.dataset.homepage

    def to_json(self) -> dict[str, Any]:
        """Plain strings and numbers; null where unknown."""
        return {
            "name": self.name,
            "holds": self.holds,
            "size": self.size,
            "bytes": self.bytes,
            "url": self.url,
            "page": self.where,
            **{name: self.checksums.get(name) for name in ALGORITHMS},
            "checksum_from": self.checksum_from,
            "dataset": self.dataset.title,
            "access": self.dataset.access,
            "licence": self.dataset.licence,
            "licence_page": self.dataset.licence_page,
            "note": self.note,
        }


def downloads(benchmark: Benchmark, split: str = "val") -> tuple[Download, ...]:
    """The files that a split is prepared from; empty where no config says.

    Raises:
        DataError: The config names a file that no dataset has, or a file of facts is damaged.
    """
    known = all_downloads()
    found = []
    for name in benchmark.downloads.get(split, ()):
        if name not in known:
            raise DataError(f"The config of {benchmark.name} names the download '{name}', which has no facts.")
        found.append(known[name])
    return tuple(found)


@cache
def all_downloads() -> dict[str, Download]:
    """Every known file by name.

    Raises:
        DataError: A damaged file of facts, or two files of one name.
    """
    found: dict[str, Download] = {}
    for path in sorted((config_dir() / "downloads").glob("*.json")):
        for download in read(path):
            if download.name in found:
                raise DataError(f"'{path.name}' has '{download.name}', which another dataset has as well.")
            found[download.name] = download
    return found


def read(path: Path) -> list[Download]:
    """The files of one dataset.

    Raises:
        DataError: Not to be read, or with unknown, missing or ill-formed entries; all of them are named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"The facts '{path}' cannot be read: {error}.") from error
    faults = _faults(content, _DATASET, "")
    if not faults:
        for name, entry in content["files"].items():
            faults += [] if _NAME.fullmatch(name) else [f"'{name}' is no plain file name"]
            faults += _faults(entry, _FILE, f"{name}.")
            faults += [] if faults else _contradictions(name, entry, content["access"])
    if faults:
        raise DataError(f"The facts '{path.name}' are not valid: {'; '.join(faults)}.")
    dataset = Dataset(**{key: content[key] for key in _DATASET if key != "files"})
    return [_download(name, entry, dataset) for name, entry in content["files"].items()]


def _download(name: str, entry: Mapping[str, Any], dataset: Dataset) -> Download:
    plain = {key: entry.get(key) for key in ("holds", "size", "url", "page", "bytes", "checksum_from", "note")}
    checksums = {algorithm: entry[algorithm] for algorithm in ALGORITHMS if algorithm in entry}
    return Download(name=name, dataset=dataset, checksums=checksums, **plain)  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_text_or_none(value: object) -> bool:
    return value is None or _is_text(value)


def _is_address(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None


def _is_address_or_none(value: object) -> bool:
    return value is None or _is_address(value)


def _is_hex(digits: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


_Tests = Mapping[str, tuple[bool, Callable[[object], bool]]]
# key -> (required, test)
_DATASET: _Tests = {
    "title": (True, _is_text),
    "homepage": (True, _is_address),
    "access": (True, lambda value: value in ("direct", "registration")),
    "licence": (True, _is_text_or_none),
    "licence_page": (True, _is_address_or_none),
    "files": (True, lambda value: isinstance(value, dict) and value != {}),
}
_FILE: _Tests = {
    "holds": (True, _is_text),
    "size": (True, _is_text_or_none),
    "url": (True, _is_address_or_none),
    "page": (False, _is_address),
    "bytes": (False, lambda value: type(value) is int and value > 0),
    "checksum_from": (False, _is_text),
    "note": (False, _is_text),
    **{algorithm: (False, _is_hex(digits)) for algorithm, digits in ALGORITHMS.items()},
}


def _faults(given: Any, tests: _Tests, prefix: str) -> list[str]:
    if not isinstance(given, dict):
        return [f"'{prefix.rstrip('.')}' is no object" if prefix else "it is no object"]
    faults = [f"unknown key {prefix}{key}" for key in given if key not in tests]
    for key, (required, test) in tests.items():
        if key not in given:
            faults += [f"{prefix}{key} is missing"] if required else []
        elif not test(given[key]):
            faults.append(f"{prefix}{key} is {given[key]!r}")
    return faults


def _contradictions(name: str, entry: Mapping[str, Any], access: str) -> list[str]:
    faults = []
    if entry["url"] is not None and access != "direct":
        faults.append(f"{name} has a direct address, but needs registration")
    if any(algorithm in entry for algorithm in ALGORITHMS) != ("checksum_from" in entry):
        faults.append(f"{name} needs both a checksum and checksum_from, or neither")
    return faults
