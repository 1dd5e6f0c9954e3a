"""The file that a download grows in: hashed as it grows, kept when the process ends, held by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ovbench.benchmarks.published_files import ALGORITHMS
from ovbench.errors import RunError

WORK = ".ovbench-download"
CHUNK = 1 << 20


class Digests:
    """All known hashes of bytes that come piece by piece."""

    def __init__(self) -> None:
        # Not for secrecy: the published checksums are what they are.
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name in ALGORITHMS}

    def update(self, chunk: bytes) -> None:
        for one in self._hashes.values():
            one.update(chunk)

    def __getitem__(self, algorithm: str) -> str:
        return self._hashes[algorithm].hexdigest()


def digests_of(file: IO[bytes]) -> Digests:
    """The hashes of a file from where it is read on."""
    found = Digests()
    while chunk := file.read(CHUNK):
        found.update(chunk)
    return found


class Part:
    """What is there of a file so far.

    Attributes:
        size: Bytes.
        digests: Their hashes.
        told: What the server said of the file that these bytes are of: ``url``, ``etag``, ``last_modified``, ``total``.
    """

    def __init__(self, file: IO[bytes], facts: Path) -> None:
        self._file, self._facts = file, facts
        self.told = read_object(facts)
        self.digests = digests_of(file)
        self.size = file.tell()

    def begin(self, told: Mapping[str, Any]) -> None:
        """Drops what is there: these are the bytes of another file."""
        self._file.seek(0)
        self._file.truncate()
        self.size, self.digests, self.told = 0, Digests(), dict(told)
        write_object(self._facts, self.told)

    def append(self, chunk: bytes) -> None:
        """Adds bytes, which survive the end of the process."""
        self._file.write(chunk)
        self._file.flush()
        self.digests.update(chunk)
        self.size += len(chunk)

    def move(self, target: Path, part: Path) -> None:
        """Writes through to the disk and gives the file its name."""
        os.fsync(self._file.fileno())
        os.replace(part, target)
        self._facts.unlink(missing_ok=True)


@contextmanager
def held(path: Path) -> Iterator[Part]:
    """A part that no other process grows meanwhile.

    Raises:
        RunError: Another process does.
    """
    # No link is followed: the bytes of a stranger's server go into this folder and nowhere else.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"Another process downloads '{path.stem}': wait for its end.") from None
        yield Part(file, path.with_suffix(".json"))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read, which costs no more than a fresh start."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(dict(content), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
