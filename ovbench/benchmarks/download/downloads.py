"""Fetches what of a benchmark has public addresses, and says what has to be fetched by hand."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovbench.benchmarks import get, own_root
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.download.fetch import Fetched, Progress, fetch
from ovbench.benchmarks.published_files import Download, downloads
from ovbench.errors import UsageError
from ovbench.paths import user_path


@dataclass(frozen=True)
class Downloaded:
    """The outcome of a download.

    Attributes:
        folder: Where the files are.
        fetched: Files that are there, in the order in which they are needed.
        pending: Files with a public address that are not there; only of a dry run.
        by_hand: Files without a public direct address that are not there.
        next_command: What makes the benchmark of them.
    """

    benchmark: str
    folder: Path
    files: tuple[Download, ...]
    fetched: tuple[Fetched, ...]
    pending: tuple[Download, ...]
    by_hand: tuple[Download, ...]
    next_command: str

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain dicts, lists, strings and numbers."""
        return {
            "benchmark": self.benchmark,
            "folder": str(self.folder),
            "fetched": [
                {
                    "name": one.name,
                    "path": str(one.path),
                    "there_before": one.there,
                    "address": one.address,
                    "bytes": one.bytes,
                    "sha256": one.sha256,
                    "verified": one.verified,
                }
                for one in self.fetched
            ],
            "pending": [one.to_json() for one in self.pending],
            "by_hand": [one.to_json() for one in self.by_hand],
            "next": self.next_command,
        }


def needed(benchmark: Benchmark, split: str = "val") -> tuple[Download, ...]:
    """The files of a split, or with "all" of every split, each once.

    Raises:
        UsageError: The benchmark has no such split, or its config does not say where it comes from.
    """
    splits = list(benchmark.splits) if split == "all" else [benchmark.for_split(split).split]
    files = {one.name: one for name in splits for one in downloads(benchmark, name)}
    if not files:
        raise UsageError(
            f"Nothing is known of where {benchmark.name} can be fetched. {benchmark.labels_from}. 'ovbench data check' tells "
            "whether a copy is whole."
        )
    return tuple(files.values())


def download(
    name: str,
    folder: Path | str,
    *,
    split: str = "val",
    dry_run: bool = False,
    bar: Callable[[Download], AbstractContextManager[Progress]] = lambda one: nullcontext(lambda done, total: None),
    pause: Callable[[float], None] = time.sleep,
) -> Downloaded:
    """Fetches the files of a benchmark that have a public address. Repeated or resumed, it fetches only what is missing.

    Args:
        name: Benchmark id.
        folder: Where the files go.
        split: "val", "train" or "all".
        dry_run: Only look.
        bar: Gives a progress callback for one file.
        pause: Waits some seconds.

    Raises:
        UsageError: Unknown benchmark or split, or nothing is known of its files.
        DataError: A server has another file than is known, or one of that name is there already and is another.
        RunError: No connection, no space; what was fetched is kept.
    """
    benchmark = get(name)
    if own_root(benchmark) is not None or name != benchmark.name:
        raise UsageError(f"'{name}' is a dataset of your own: there is nothing to download.")
    files, home = needed(benchmark, split), user_path(folder)
    if home.exists() and not home.is_dir():
        raise UsageError(f"'{home}' is a file: give a folder as --out.")
    fetched: list[Fetched] = []
    pending: list[Download] = []
    for one in files:
        if one.url is None:
            continue
        if dry_run:
            pending += [] if (home / one.name).exists() else [one]
            continue
        with bar(one) as progress:
            fetched.append(fetch(one, home, progress=progress, pause=pause))
    by_hand = tuple(one for one in files if one.url is None and not (home / one.name).is_file())
    sources = [f"--source {shlex.quote(str(home / one.name))}" for one in files]
    command = f"ovbench data prepare {name} {' '.join(sources)} --out {shlex.quote(f'data/{name}')}"
    return Downloaded(name, home, files, tuple(fetched), tuple(pending), by_hand, command)
