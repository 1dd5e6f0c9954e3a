"""Proposals kept on disk, one file per image, so that a frozen generator sees each image once.

Files hold float32 as it was computed, so a run with the cache and one without are the same to the bit. A key is the hash of
everything that can move a mask: the image, the generator's identity, the versions of its libraries, the kind of device and,
where the generator reads it, the truth.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovbench.hashing import sha256_of
from ovbench.networks.mask_generators.generator import MaskGenerator, Proposals
from ovbench.paths import cache_dir

STALE = 3600  # seconds after which a temporary file is one that a killed process left
ROOM = 0.9  # of the limit that eviction leaves, so that it is not needed at every file


def proposals_dir() -> Path:
    """The default folder."""
    return cache_dir() / "proposals"


class CachedGenerator(MaskGenerator):
    """A generator whose proposals are read from a folder where they are there already.

    Several processes may share the folder: a file appears whole or not at all. A damaged file is made anew. A folder that
    cannot be written costs time, never a run.

    Args:
        inner: The generator.
        folder: Where the files are.
        limit: Size of the folder in bytes; the files that were not read for longest go first. Processes that write at the
            same time may exceed it by a sixteenth each.
    """

    def __init__(self, inner: MaskGenerator, folder: Path, limit: int) -> None:
        super().__init__()
        self.inner, self.folder, self.limit = inner, folder, limit
        self.name, self.weights, self.weights_sha256 = inner.name, inner.weights, inner.weights_sha256
        self.needs_truth = inner.needs_truth
        self.to(inner.device)
        self._size: int | None = None  # of the folder when it was last looked at, and what was written since
        self._written = 0

    def identity(self) -> str:
        """That of the generator: its masks are the same."""
        return self.inner.identity()

    def software(self) -> list[str]:
        """Those of the generator."""
        return self.inner.software()

    def propose(self, images: Sequence[Tensor], truths: Sequence[Tensor | None] | None = None) -> list[Proposals]:
        """As the generator's own, which is asked for what no file has."""
        known: Sequence[Tensor | None] = [None] * len(images)
        if self.needs_truth:
            known = self._truths(len(images), truths)
        keys = [self.key(image, truth) for image, truth in zip(images, known, strict=True)]
        found = {key: proposals for key in dict.fromkeys(keys) if (proposals := self._read(key)) is not None}
        missing = {key: row for row, key in enumerate(keys) if key not in found}  # equal images are made once
        rows = list(missing.values())
        made = self.inner.propose([images[row] for row in rows], [known[row] for row in rows]) if rows else []
        for key, proposals in zip(missing, made, strict=True):
            self._write(key, proposals)
            found[key] = proposals
        return [found[key].to(self.device) for key in keys]

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """The generator's own, not cached."""
        return self.inner.propose_same_size(images, truths)

    def key(self, image: Tensor, truth: Tensor | None) -> str:
        """Name of an image's file."""
        return sha256_of(
            [
                self.identity(),
                self.software(),
                self.device.type,
                _content(image),
                None if truth is None else _content(truth),
            ]
        )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> Proposals | None:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                checksum = (file.metadata() or {}).get("crc32")
        except (OSError, SafetensorError, RuntimeError):  # torch's, where the file goes while it is mapped
            return None
        if checksum != _crc32(tensors) or "masks" not in tensors:
            return None
        with suppress(OSError):  # evicted by another process, or a folder that is only read
            os.utime(path)  # the last use, which eviction goes by
        return Proposals(tensors["masks"], tensors.get("objectness"))

    def _write(self, key: str, proposals: Proposals) -> None:
        tensors = {"masks": proposals.masks.cpu().contiguous()}
        if proposals.objectness is not None:
            tensors["objectness"] = proposals.objectness.cpu().contiguous()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.limit * ROOM:
            return
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            os.close(handle)
            save_file(tensors, temporary, metadata={"crc32": _crc32(tensors)})
            os.replace(temporary, self._path(key))
        except (OSError, SafetensorError):
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            return
        self._written += size
        if self._size is None or self._written > self.limit / 16 or self._size + self._written > self.limit:
            self._evict(self._path(key))

    def _evict(self, newest: Path) -> None:
        """Brings the folder below its limit; ``newest`` stays."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except OSError:
                continue  # gone since
            if path.suffix == ".tmp" and time.time() - status.st_mtime > STALE:
                path.unlink(missing_ok=True)
            elif path.suffix == ".safetensors":
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        if total > self.limit:
            for _, size, path in sorted(files):
                if total <= self.limit * ROOM:
                    break
                if path != newest:
                    path.unlink(missing_ok=True)
                    total -= size
        self._size, self._written = total, 0


def _content(tensor: Tensor) -> str:
    """Hash of a tensor's values, type and shape."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _crc32(tensors: dict[str, Tensor]) -> str:
    """Checksum of all values: finds what the format cannot, such as zeros that a full disk or a crash left."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().data if tensors[name].numel() else b"", value)
    return f"{value:08x}"
