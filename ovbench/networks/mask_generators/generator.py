"""What a mask generator is: images in, proposals out, each image by itself.

A generator is frozen, whatever the method around it does; no class label of it is ever seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError


@dataclass(frozen=True)
class Proposals:
    """Mask proposals of one image.

    Attributes:
        masks: Logits (M, h, w), float32, at any resolution that spans the whole image; a pixel is inside where the logit
            is at least 0 (probability .5). M may be 0.
        objectness: (M,) float32, 1 - the probability of "no object"; None where the generator knows none.
    """

    masks: Tensor
    objectness: Tensor | None = None

    def to(self, device: torch.device | str) -> Proposals:
        """The same on another device."""
        return Proposals(self.masks.to(device), None if self.objectness is None else self.objectness.to(device))


class MaskGenerator(nn.Module, ABC):
    """One frozen generator. A subclass says :meth:`identity` and :meth:`propose_same_size`.

    Attributes:
        name: Its id.
        weights: ``random``, a hub repository, a folder's name, or ``none`` where there are no weights; for records.
        weights_sha256: Content hash of the weights, or None.
        needs_truth: Reads the true segments of the image, as upper bounds do.
        needs_names: Is asked with ``propose(images, names=...)``, for it knows images by their file names.
    """

    name: str
    weights: str = "none"
    weights_sha256: str | None = None
    needs_truth: bool = False
    needs_names: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_place", torch.empty(0), persistent=False)  # follows .to(device), as parameters do

    @abstractmethod
    def identity(self) -> str:
        """Hash (hex) of everything but the image that can move a mask by more than rounding."""

    @abstractmethod
    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """Proposals of images (B, 3, h, w), uint8 RGB; ``truths`` is empty unless :attr:`needs_truth`."""

    @torch.no_grad()  # not inference_mode: a trained adapter keeps the masks for its backward pass
    def propose(self, images: Sequence[Tensor], truths: Sequence[Tensor | None] | None = None) -> list[Proposals]:
        """Proposals of every image on :attr:`device`, in order; an image's do not depend on the others.

        Args:
            images: uint8 RGB images (3, h, w) of any sizes; those of one size are run together.
            truths: For each image a map (H, W) of segment ids, int64, -1 = none; any resolution that spans the image.
                Read by generators that :attr:`needs_truth` alone.

        Raises:
            UsageError: The generator needs the truth and there is none.
        """
        for image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"Images are (3, h, w) uint8; got {tuple(image.shape)} {image.dtype}.")
        known = self._truths(len(images), truths) if self.needs_truth else []
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(index)
        found: dict[int, Proposals] = {}
        for rows in groups.values():
            batch = torch.stack([images[row].to(self.device) for row in rows])
            proposals = self.propose_same_size(batch, [known[row] for row in rows] if known else [])
            found.update(zip(rows, proposals, strict=True))
        return [found[index] for index in range(len(images))]

    @property
    def device(self) -> torch.device:
        """Where the generator is and its masks lie."""
        return self._place.device  # type: ignore[return-value]

    def software(self) -> list[str]:
        """Versions of what can move a mask by rounding, for the keys of a cache."""
        return [f"torch {torch.__version__}"]

    def train(self, mode: bool = True) -> MaskGenerator:
        """Evaluation mode, whatever the method around it is in."""
        return super().train(False)

    def _truths(self, count: int, truths: Sequence[Tensor | None] | None) -> list[Tensor]:
        given = list(truths or [None] * count)
        if len(given) != count:
            raise ValueError(f"{count} images but {len(given)} truths.")
        known = [truth for truth in given if truth is not None]
        if len(known) < count:
            raise UsageError(
                f"The mask generator '{self.name}' makes its masks from the true segments, and an image has none: it "
                "serves 'ovbench run' and 'ovbench train' on a dataset with labels. Use another generator, e.g. grid or "
                "mask2former-swin-b."
            )
        return [truth.to(self.device) for truth in known]


def truth_masks(truth: Tensor) -> Tensor:
    """Masks (M, H, W), bool, of the segments of a map (H, W) of ids, in ascending order of id; -1 is none."""
    ids = truth.unique()
    ids = ids[ids >= 0]
    masks: Tensor = truth == ids[:, None, None]
    return masks
