"""The append-only file of one run: areas and timings per image, one JSON line each, so that no finished image is lost.

The first line says which run it belongs to. Areas are stored for the classes that occur, as integers. Every line ends with
a checksum of itself; a line that does not have it right (cut off by a kill, damaged on the disk) is dropped, and its image
is evaluated again. Of several processes each has a file of its own, which the first takes in (:meth:`Shard.absorb`).

A shard that is open is locked; the lock goes with its process, however that ends.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ovbench.errors import DataError, OvbenchWarning, RunError
from ovbench.evaluate.shard_lines import ImageResult, failure_entry, opened, result_entry, result_of, sealed
from ovbench.evaluate.signals import held_back
from ovbench.ops.areas import Areas
from ovbench.ops.panoptic import Quality

try:
    import fcntl
except ImportError:  # no Unix: runs are not guarded against each other
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".areas.jsonl"
VERSION = 1
PATIENCE_S = 30.0  # a run that was killed may take as long to let go of its file
_OF_RANK = re.compile(r"\.rank\d+$")
_IDENTITY = ("spec_hash", "dataset_fingerprint")


class Shard:
    """Reads and appends the results of one run; the file is this process' alone until :meth:`close`.

    Args:
        path: The file; created with its header unless it exists.
        header: What identifies the run (``spec_hash``, ``dataset_fingerprint``, ``run_id``, ``started``).
        num_classes: K.
        wait: Seconds to wait for another process to let go of the file; None is :data:`PATIENCE_S`.

    Attributes:
        done: Finished images by index.
        failed: (name, reason) of images that were skipped, by index.
        damaged: Lines that were dropped when the file was read.

    Raises:
        RunError: The file cannot be written, or another process has it open.
        DataError: An existing file belongs to another run.
    """

    def __init__(self, path: Path, header: dict[str, Any], num_classes: int, wait: float | None = None) -> None:
        self.path = path
        self.num_classes = num_classes
        self.done: dict[int, ImageResult] = {}
        self.failed: dict[int, tuple[str, str]] = {}
        self.damaged = 0
        self._header = {"version": VERSION, **header}
        self._fd = -1
        try:
            existed = path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | (0 if existed else os.O_EXCL), 0o666)
            _open_shards.add(self)
            self._lock(wait)
            if existed:
                self._load()
            else:
                self._line(self._header)
        except OSError as error:
            self.close()
            raise _cannot_write(path, error) from error
        except (DataError, RunError):
            self.close()
            raise

    def _lock(self, wait: float | None) -> None:
        if fcntl is None:
            return
        until = time.monotonic() + (PATIENCE_S if wait is None else wait)
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                raise RunError(
                    f"Another process is evaluating this run ('{self.path}'): wait for its end, or leave --resume away to "
                    "start a run of its own."
                ) from None
            except OSError:  # file systems without locks
                warnings.warn(
                    f"The file system of '{self.path}' has no locks: do not resume this run twice at once.",
                    OvbenchWarning,
                    stacklevel=4,
                )
            break
        if not self._in_place():
            raise RunError(f"'{self.path}' was just replaced by another process, which is evaluating this run.")

    def _in_place(self) -> bool:
        """Whether the open file is still the one at the path."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        return False

    def _load(self) -> None:
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        rest = lines.pop()  # what a killed process did not finish, else empty
        header = opened(lines[0]) if lines else None
        different = [key for key in _IDENTITY if header is None or header.get(key) != self._header.get(key)]
        if header is None or different or header.get("version") != VERSION:
            raise DataError(f"'{self.path}' belongs to another run ({', '.join(different) or 'version'} differs).")
        self._header = header
        for line in lines[1:]:
            entry = opened(line)
            try:
                self._take(entry)
            except (KeyError, TypeError, ValueError, IndexError, RuntimeError):
                self.damaged += 1
        self.failed = {index: why for index, why in self.failed.items() if index not in self.done}
        if rest or self.damaged:
            self._rewrite()

    def _take(self, entry: dict[str, Any] | None) -> None:
        """An entry of the file into memory; raises one of several errors where it is none."""
        if entry is None:
            raise ValueError("not a line of a shard")
        if "error" in entry:
            self.failed[int(entry["index"])] = str(entry["name"]), str(entry["error"])
            return
        result = result_of(entry, self.num_classes)
        self.done[result.index] = result

    def _rewrite(self) -> None:
        """The file anew from memory, in place of what lies at the path, at no moment less than it was."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        old = self._fd
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fd = os.open(partial, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o666)
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in [
                self._header,
                *map(result_entry, self.done.values()),
                *map(failure_entry, self.failed.items()),
            ]:
                self._line(entry)
            os.fsync(self._fd)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
            os.close(old)

    def append(self, results: Sequence[ImageResult]) -> None:
        """Adds finished images; they survive the end of the process.

        Raises:
            RunError: No space or no permission; what was stored before stays.
        """
        try:
            with held_back():
                for result in results:
                    self._line(result_entry(result))
                    self.done[result.index] = result
                    self.failed.pop(result.index, None)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def append_failure(self, index: int, name: str, reason: str) -> None:
        """Adds an image that was skipped; a resumed run tries it again.

        Raises:
            RunError: As :meth:`append`.
        """
        try:
            with held_back():
                self._line(failure_entry((index, (name, reason))))
                self.failed[index] = name, reason
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _line(self, content: dict[str, Any]) -> None:
        data = sealed(content)
        start = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            with suppress(OSError):  # half a line would be dropped when it is read, but need not be there
                os.ftruncate(self._fd, start)
            raise

    def absorb(self, path: Path, wait: float | None = None) -> int:
        """Takes in the shard of another process of the same run, removes it, and returns how many images it had.

        Raises:
            RunError: That process still writes to it after ``wait`` seconds, or this file cannot be written.
        """
        try:
            other = Shard(path, self._header, self.num_classes, wait)
        except DataError as error:
            if path.stat().st_size == 0:  # killed before its first line
                path.unlink()
            else:
                os.replace(path, path.with_name(f"{path.name}.damaged"))
                warnings.warn(f"{error} It is put aside.", OvbenchWarning, stacklevel=2)
            return 0
        try:
            self.append([result for index, result in other.done.items() if index not in self.done])
            for index, (name, reason) in other.failed.items():
                if index not in self.done:
                    self.append_failure(index, name, reason)
            self.sync()
            path.unlink(missing_ok=True)
        finally:
            other.close()
        return len(other.done)

    def sync(self) -> None:
        """Writes through to the disk; a file that was removed meanwhile is there again.

        Raises:
            RunError: No space or no permission.
        """
        try:
            os.fsync(self._fd)
            if not self._in_place():
                self._rewrite()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Lets go of the file."""
        _open_shards.discard(self)
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def total(self) -> Areas:
        """Sum of the areas of all finished images, each image once."""
        zero = torch.zeros(self.num_classes, dtype=torch.int64)
        total = Areas(zero, zero, zero)
        for result in self.done.values():
            total = Areas(*(a + b for a, b in zip(total, result.areas, strict=True)))
        return total

    def total_quality(self) -> Quality | None:
        """Sum of the parts of panoptic quality; None unless every finished image has them.

        Images are added in dataset order, because sums of floats depend on it: a resumed run gives the same.
        """
        found = [self.done[index].quality for index in sorted(self.done)]
        if not found or None in found:
            return None
        parts = zip(*(quality for quality in found if quality is not None), strict=True)
        return Quality(*(functools.reduce(torch.add, part) for part in parts))


_open_shards: weakref.WeakSet[Shard] = weakref.WeakSet()


def _let_go() -> None:
    """A forked process (one that reads images) gives the files back: else it would hold the lock of a parent that died."""
    for shard in list(_open_shards):
        shard.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def rank_path(path: Path, rank: int) -> Path:
    """The shard of a process beside the run's own, which is the first process'."""
    return path if rank == 0 else path.with_name(f"{path.name.removesuffix(SUFFIX)}.rank{rank}{SUFFIX}")


def others_of(path: Path) -> list[Path]:
    """The shards that other processes of a run have left."""
    return sorted(path.parent.glob(f"{path.name.removesuffix(SUFFIX)}.rank*{SUFFIX}"))


def find_unfinished(folder: Path, spec_hash: str, fingerprint: str) -> Path | None:
    """The newest shard file of the same spec and data whose run has no complete record, or None."""
    for path in sorted(folder.glob(f"*{SUFFIX}"), reverse=True):
        stem = path.name.removesuffix(SUFFIX)
        if _OF_RANK.search(stem):
            continue
        header = read_header(path)
        if header is None:
            if path.stat().st_size:  # empty: killed before its first line
                text = f"'{path}' is passed over: its first line, which says whose it is, is damaged."
                warnings.warn(text, OvbenchWarning, stacklevel=2)
            continue
        if path.name != f"{header.get('run_id')}{SUFFIX}":
            continue  # the id becomes a path: it is believed where it is this file's own name
        if header.get("spec_hash") != spec_hash or header.get("dataset_fingerprint") != fingerprint:
            continue
        if _status(path.with_name(f"{stem}.json")) != "ok":
            return path
    return None


def _status(record: Path) -> str | None:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or damaged: it is written anew
        return None
    return content.get("status") if isinstance(content, dict) else None


def read_header(path: Path) -> dict[str, Any] | None:
    """The first line of a shard file; None where there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            return opened(file.readline().rstrip(b"\n"))
    except OSError:
        return None


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot write '{path}': {error.strerror or error}. Finished images are kept; make room or permission, or "
        "choose another folder with --results DIR, and continue with --resume."
    )
