"""The append-only file of one run: areas and timings per image, one JSON line each, so that no finished image is lost.

The first line says which run it belongs to. Areas are stored for the classes that occur, as integers.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovbench.errors import DataError, RunError
from ovbench.ops.areas import Areas
from ovbench.ops.panoptic import Quality

SUFFIX = ".areas.jsonl"
VERSION = 1
PATIENCE_S = 30.0  # a run that was killed may take as long to let go of its file


@dataclass(frozen=True)
class ImageResult:
    """One finished image.

    Attributes:
        index: Place in the dataset.
        name: File name for people.
        areas: Pixel counts per class (K,), int64.
        times_ms: Milliseconds per stage and in ``total``.
        quality: Parts of panoptic quality per class (K,); None where truth or prediction has no segments.
    """

    index: int
    name: str
    areas: Areas
    times_ms: dict[str, float]
    quality: Quality | None = None


class Shard:
    """Reads and appends the results of one run; the file is this process' alone until :meth:`close`.

    Args:
        path: The file; created with its header unless it exists.
        header: What identifies the run (``spec_hash``, ``dataset_fingerprint``, ``run_id``, ``started``).
        num_classes: K.

    Raises:
        RunError: The file cannot be written, or another process writes it.
        DataError: An existing file belongs to another run.
    """

    def __init__(self, path: Path, header: dict[str, Any], num_classes: int) -> None:
        self.path = path
        self.num_classes = num_classes
        self.done: dict[int, ImageResult] = {}
        try:
            if path.exists():
                self._file = path.open("a", encoding="utf-8")
                self._hold()
                self._load(header)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("x", encoding="utf-8")
                self._hold()
                self._line({"version": VERSION, **header})
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _hold(self) -> None:
        """Locks the file; the system unlocks it when the process ends, however it ends."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > give_up:
                    self._file.close()
                    raise RunError(
                        f"Another process evaluates the run of '{self.path}': wait for its end, or start a new run "
                        "without --resume."
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system that has no locks
                return

    def _load(self, header: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a line that a killed process did not finish
            with self.path.open("r+b") as file:
                file.truncate(whole)
        lines = content[:whole].decode("utf-8").splitlines()
        stored = json.loads(lines[0]) if lines else {}
        different = [key for key in ("spec_hash", "dataset_fingerprint") if stored.get(key) != header.get(key)]
        if different or stored.get("version") != VERSION:
            raise DataError(f"'{self.path}' belongs to another run ({', '.join(different) or 'version'} differs).")
        for line in lines[1:]:
            result = _from_json(json.loads(line), self.num_classes)
            self.done[result.index] = result

    def append(self, results: Sequence[ImageResult]) -> None:
        """Adds finished images; they survive the end of the process.

        Raises:
            RunError: No space or no permission; what was stored before stays.
        """
        try:
            for result in results:
                self._line(_to_json(result))
                self.done[result.index] = result
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _line(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write through to the disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

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


def find_unfinished(folder: Path, spec_hash: str, fingerprint: str) -> Path | None:
    """The newest shard file of the same spec and data whose run has no complete record, or None."""
    for path in sorted(folder.glob(f"*{SUFFIX}"), reverse=True):
        try:
            with path.open(encoding="utf-8") as file:
                header = json.loads(file.readline())
        except (OSError, ValueError, RecursionError):
            continue
        if not isinstance(header, dict) or path.name != f"{header.get('run_id')}{SUFFIX}":
            continue  # the id becomes a path: it is believed where it is this file's own name
        if header.get("spec_hash") != spec_hash or header.get("dataset_fingerprint") != fingerprint:
            continue
        record = path.with_name(path.name.removesuffix(SUFFIX) + ".json")
        if not record.exists() or json.loads(record.read_text(encoding="utf-8")).get("status") != "ok":
            return path
    return None


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a shard file."""
    with path.open(encoding="utf-8") as file:
        header: dict[str, Any] = json.loads(file.readline())
    return header


def _to_json(result: ImageResult) -> dict[str, Any]:
    used = ((result.areas.pred > 0) | (result.areas.label > 0)).nonzero()[:, 0]
    panoptic = {} if result.quality is None else {"panoptic": _quality_to_json(result.quality)}
    return {
        "index": result.index,
        "name": result.name,
        "classes": used.tolist(),
        "intersect": result.areas.intersect[used].tolist(),
        "pred": result.areas.pred[used].tolist(),
        "label": result.areas.label[used].tolist(),
        **panoptic,
        "times_ms": {key: round(value, 4) for key, value in result.times_ms.items()},
    }


def _from_json(content: dict[str, Any], num_classes: int) -> ImageResult:
    def spread(part: dict[str, Any], name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        used, values = torch.tensor(part["classes"], dtype=torch.int64), torch.tensor(part[name], dtype=dtype)
        return torch.zeros(num_classes, dtype=dtype).index_put((used,), values)

    areas = Areas(spread(content, "intersect"), spread(content, "pred"), spread(content, "label"))
    quality, part = None, content.get("panoptic")
    if part is not None:
        quality = Quality(spread(part, "iou", torch.float64), *(spread(part, name) for name in ("tp", "fp", "fn")))
    return ImageResult(content["index"], content["name"], areas, content["times_ms"], quality)


def _quality_to_json(quality: Quality) -> dict[str, Any]:
    used = (quality.tp + quality.fp + quality.fn > 0).nonzero()[:, 0]
    return {"classes": used.tolist(), **{name: part[used].tolist() for name, part in quality._asdict().items()}}


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot write '{path}': {error.strerror or error}. Finished images are kept; make room or permission, or "
        "choose another folder with --results DIR, and continue with --resume."
    )
