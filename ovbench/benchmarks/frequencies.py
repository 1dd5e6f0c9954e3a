"""How often each class occurs in a split: pixels and images, counted once and kept in ovbench's cache folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import OvbenchWarning
from ovbench.paths import cache_dir

Counts = npt.NDArray[np.int64]

_FORMAT = 1
_FILES_PER_TASK = 32


@dataclass(frozen=True)
class Frequencies:
    """Occurrence of each class in one split.

    Attributes:
        pixels: Pixels per class (K,), int64.
        images: Images that show the class (K,), int64.
        ignored: Pixels that no class has.
        files: Images in the split.
    """

    pixels: Counts
    images: Counts
    ignored: int
    files: int


class Thirds(NamedTuple):
    """Class indices by falling number of pixels, cut into three parts; classes that never occur are in none."""

    head: tuple[int, ...]
    middle: tuple[int, ...]
    tail: tuple[int, ...]


def class_pixels(
    benchmark: Benchmark,
    root: Path | str,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Counts:
    """Pixels per class (K,), int64, in the labels of the benchmark's split; see :func:`frequencies`."""
    return frequencies(benchmark, root, workers=workers, progress=progress).pixels


def frequencies(
    benchmark: Benchmark,
    root: Path | str,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Frequencies:
    """Pixels and images per class in the labels of the benchmark's split.

    Counted once: the result is kept under the split's fingerprint, which follows names and sizes of the files.

    Args:
        benchmark: Looked at in the split that is to be counted.
        root: Data root or a folder above it.
        workers: Processes that read labels; 0 reads them in this one.
        progress: Called with (labels done, labels in all).

    Raises:
        DataError: Missing data, or a label file that is damaged or holds ids that the benchmark does not have.
    """
    path = cache_dir() / "frequencies" / f"{benchmark.fingerprint(root)}.json"
    found = _read(path, benchmark.num_classes)
    if found is None:
        found = _count(benchmark, [str(pair.label) for pair in benchmark.pairs(root)], workers, progress)
        _write(path, benchmark, found)
    elif progress:
        progress(found.files, found.files)
    return found


def thirds(pixels: Counts) -> Thirds:
    """Head, middle and tail: the classes that occur by falling number of pixels, the earlier parts never smaller.

    Args:
        pixels: Pixels per class (K,) in the training split.
    """
    order = np.lexsort((np.arange(len(pixels)), -np.asarray(pixels)))  # ties in label order
    parts = np.array_split(order[: int(np.count_nonzero(pixels))], 3)
    return Thirds(*(tuple(part.tolist()) for part in parts))


def _count_file(path: str, benchmark: Benchmark) -> Counts:
    """Pixels per training id of one label, (K + 1,); the last are those that are ignored."""
    label = benchmark.load_label(path)
    counts = np.bincount(label.ravel(), minlength=benchmark.ignore_index + 1).astype(np.int64)
    return np.append(counts[: benchmark.num_classes], counts[benchmark.ignore_index])


@contextmanager
def _mapped(workers: int, function: Callable[[str], Counts], paths: list[str]) -> Iterator[Iterator[Counts]]:
    """``map(function, paths)``, in processes where there are workers."""
    if not workers:
        yield map(function, paths)
        return
    # Not a fork: the caller may have threads (torch's, OpenCV's) that would be missing in the child.
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield executor.map(function, paths, chunksize=_FILES_PER_TASK)
    finally:
        executor.shutdown(cancel_futures=True)


def _count(
    benchmark: Benchmark, paths: list[str], workers: int, progress: Callable[[int, int], None] | None
) -> Frequencies:
    pixels, images = (np.zeros(benchmark.num_classes + 1, np.int64) for _ in range(2))
    with _mapped(workers, partial(_count_file, benchmark=benchmark), paths) as counted:
        for done, counts in enumerate(counted, 1):
            pixels += counts
            images += counts > 0
            if progress:
                progress(done, len(paths))
    return Frequencies(pixels[:-1], images[:-1], int(pixels[-1]), len(paths))


def _read(path: Path, num_classes: int) -> Frequencies | None:
    """What the cache has; None where it has nothing, or, after a warning, where its file is damaged."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Frequencies(
            pixels=_counts(content["pixels"], num_classes),
            images=_counts(content["images"], num_classes),
            ignored=int(content["ignored"]),
            files=int(content["files"]),
        )
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"The class frequencies in '{path}' are damaged ({error}): counted again."
        warnings.warn(text, OvbenchWarning, stacklevel=3)
        return None
    return found


def _counts(values: Any, num_classes: int) -> Counts:
    if not isinstance(values, list) or len(values) != num_classes:
        raise ValueError(f"not a list of {num_classes} counts")
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("a count is no whole number from 0")
    return np.array(values, np.int64)


def _write(path: Path, benchmark: Benchmark, found: Frequencies) -> None:
    """Keeps a count; a cache folder that cannot be written costs only the next count."""
    content = {
        "format": _FORMAT,
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "files": found.files,
        "ignored": found.ignored,
        "pixels": found.pixels.tolist(),
        "images": found.images.tolist(),
    }
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial_path, path)
    except OSError as error:
        text = f"The class frequencies cannot be kept in '{path}': {error.strerror}."
        warnings.warn(text, OvbenchWarning, stacklevel=3)
        with suppress(OSError):
            partial_path.unlink()
