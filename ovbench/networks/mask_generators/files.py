"""Masks of one's own as proposals: what another tool has found in each image, read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ovbench.errors import DataError, UsageError
from ovbench.hashing import sha256_of, sha256_of_file
from ovbench.networks.mask_generators.generator import MaskGenerator, Proposals
from ovbench.networks.mask_generators.mask_files import (
    Annotated,
    MaskArrays,
    read_folder,
    read_ids,
    read_json,
    read_npz,
)
from ovbench.paths import user_path

SUFFIXES = (".npz", ".png", ".json")


class _Place(NamedTuple):
    """Where an image's masks may lie."""

    kind: str
    path: Path


class Files(MaskGenerator):
    """Masks from files, found by the stem of the image's file name; docs/masks.md describes the layouts.

    Args:
        path: A folder with ``STEM.npz``, ``STEM/*.png``, ``STEM.png`` or ``STEM.json`` for each image or a JSON file for
            all; or such a JSON file, or one image's npz or PNG.

    Raises:
        DataError: There is nothing at the path, or nothing that could hold masks.
    """

    name = "files"
    needs_names = True

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = user_path(path)
        self._of_all: list[Annotated] | None = None
        self._only: str | None = None  # the image that a file of one image has served
        if not self.path.exists():
            raise DataError(f"No masks at '{self.path}': -o generator_path= names a folder, or a file.")
        if not self._files():
            raise DataError(f"'{self.path}' holds no masks: no file that ends in {', '.join(SUFFIXES)}.")

    def _files(self) -> list[Path]:
        every = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return [path for path in every if path.suffix.lower() in SUFFIXES and path.is_file()]

    def identity(self) -> str:
        """Of the content of all files with their names within the folder."""
        root = self.path if self.path.is_dir() else self.path.parent
        return sha256_of(
            [self.name, *([path.relative_to(root).as_posix(), sha256_of_file(path)] for path in self._files())]
        )

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """Raises ``UsageError``: pixels do not tell which file an image came from."""
        raise UsageError(
            "The mask generator 'files' finds masks by the image's file name, and here images have none: it serves "
            "'ovbench run' and 'ovbench predict'."
        )

    @torch.no_grad()
    def propose(
        self,
        images: Sequence[Tensor],
        truths: Sequence[Tensor | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Proposals]:
        """The masks of images by their file names.

        Args:
            images: Counted only; masks span them at any resolution.
            truths: Not looked at.
            names: File name or path of each image.

        Raises:
            UsageError: No names.
            DataError: An image without masks, two places with masks of one, or files that are not in their layout.
        """
        if names is None:
            self.propose_same_size(torch.empty(0), [])
        assert names is not None
        if len(names) != len(images):
            raise ValueError(f"{len(images)} images but {len(names)} names.")
        found = [self.read(name) for name in names]
        return [
            Proposals(torch.from_numpy(own.masks), None if own.scores is None else torch.from_numpy(own.scores)).to(
                self.device
            )
            for own in found
        ]

    def read(self, name: str) -> MaskArrays:
        """The masks of one image by its file's name or path."""
        stem = Path(name).stem
        if self.path.is_file() and self.path.suffix.lower() != ".json":
            if self._only not in (None, stem):
                raise DataError(
                    f"'{self.path}' holds the masks of one image, which was '{self._only}'; '{stem}' needs its own: give a "
                    "folder."
                )
            self._only = stem
            return read_npz(self.path) if self.path.suffix.lower() == ".npz" else read_ids(self.path)
        places = [] if self.path.is_file() else self._own_places(stem)
        if len(places) > 1:
            held = " and ".join(f"'{place.path}'" for place in places)
            raise DataError(f"Two places hold masks of '{stem}': {held}. Take one away.")
        if places:
            return _read(places[0])
        for annotated in self._shared():
            annotations = annotated.of(stem)
            if annotations is not None:
                return annotated.masks(annotations)
        raise DataError(
            f"No masks of the image '{name}' in '{self.path}': there is no {stem}.npz, no folder {stem}/ of PNGs, no "
            f"{stem}.png and no {stem}.json, and no JSON file that mentions it."
        )

    def _own_places(self, stem: str) -> list[_Place]:
        """The files and folders that are an image's own."""
        if not stem:
            return []
        tried = [_Place(suffix, self.path / f"{stem}{suffix}") for suffix in SUFFIXES]
        found = [place for place in tried if place.path.is_file()]
        folder = self.path / stem
        return [*found, _Place("folder", folder)] if folder.is_dir() else found

    def _shared(self) -> list[Annotated]:
        """The JSON files that hold masks of several images."""
        if self._of_all is None:
            files = sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path]
            self._of_all = [read_json(path) for path in files]
        return self._of_all


def _read(place: _Place) -> MaskArrays:
    if place.kind == "folder":
        return read_folder(place.path)
    if place.kind == ".json":
        annotated = read_json(place.path)
        own = annotated.of(place.path.stem)
        if own is None and len(annotated.by_image) > 1:
            raise DataError(f"'{place.path}' is of several images, and none of them is '{place.path.stem}'.")
        return annotated.masks(next(iter(annotated.by_image.values()), []) if own is None else own)
    return read_npz(place.path) if place.kind == ".npz" else read_ids(place.path)
