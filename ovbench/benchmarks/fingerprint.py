"""A fingerprint over the content of a benchmark's files, for when names and sizes are not enough."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.layout import Pair
from ovbench.errors import DataError
from ovbench.hashing import sha256_of_file


def content_fingerprint(
    benchmark: Benchmark,
    root: Path | str,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """sha256 (hex) over name, version and split and, in order, stem and sha256 of every image and label.

    Equal for equal content wherever it lies and however many workers read it. Times and other files do not matter.

    Args:
        benchmark: In the split that is meant.
        root: Data root or a folder above it.
        workers: Threads; by default one per core, at most 16 (hashing runs outside Python's lock).
        progress: Called with (pairs done, pairs in all).

    Raises:
        DataError: No data, a missing file, or one that cannot be read.
    """
    pairs = benchmark.pairs(root)
    digest = hashlib.sha256(f"content\n{benchmark.name}\n{benchmark.version}\n{benchmark.split}\n".encode())
    executor = ThreadPoolExecutor(max_workers=workers or min(16, os.cpu_count() or 1))
    try:
        for done, (pair, hashes) in enumerate(zip(pairs, executor.map(_hashes, pairs), strict=True), 1):
            digest.update(f"{pair.stem}\t{hashes[0]}\t{hashes[1]}\n".encode())
            if progress:
                progress(done, len(pairs))
    except OSError as error:
        raise DataError(f"'{error.filename}' cannot be read: {error.strerror or error}.") from error
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C must not wait for thousands of files
    return digest.hexdigest()


def _hashes(pair: Pair) -> tuple[str, str]:
    return sha256_of_file(pair.image), sha256_of_file(pair.label)
