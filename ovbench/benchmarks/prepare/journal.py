"""What a data root was given by ``ovbench data prepare``: one line per finished file, appended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ovbench.benchmarks.prepare.convert import VERSION
from ovbench.benchmarks.prepare.recipes import Job

# Hidden, below the data root: the journal and the files that are being written.
WORK = ".ovbench-prepare"


class Journal:
    """The finished files of a data root."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / WORK / "done.jsonl"
        self.entries = dict(_entries(self.path))

    def is_ours(self, job: Job) -> bool:
        """Whether an earlier call wrote this output."""
        return job.output in self.entries

    def is_done(self, job: Job) -> bool:
        """Whether the output is there, complete, and made by the same rule from the same source."""
        size, *made_from = self.entries.get(job.output, (-1, "", ""))
        path = self.root / job.output
        return made_from == [_rule(job), _stamp(job)] and path.is_file() and path.stat().st_size == size

    @contextmanager
    def appending(self) -> Iterator[TextIO]:
        """The journal's file, open for :meth:`record`; a line that a kill cut off is closed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" if cut else "")
            yield file

    def record(self, file: TextIO, job: Job, size: int) -> None:
        """Adds a finished output."""
        entry = (size, _rule(job), _stamp(job))
        self.entries[job.output] = entry
        file.write(json.dumps([job.output, *entry]) + "\n")
        file.flush()


def _rule(job: Job) -> str:
    return f"{job.rule}-{VERSION}"


def _stamp(job: Job) -> str:
    return f"{job.source.path}:{job.source.stamp}"


def _entries(path: Path) -> Iterator[tuple[str, tuple[int, str, str]]]:
    """The readable lines of a journal. Any other line costs only that its file is made again."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            output, size, rule, stamp = json.loads(line)
            yield str(output), (int(size), str(rule), str(stamp))
        except (ValueError, TypeError, RecursionError):
            continue
