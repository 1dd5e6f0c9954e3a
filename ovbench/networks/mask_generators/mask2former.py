"""Mask2Former (Cheng et al., CVPR 2022) through transformers: masks and objectness, its classes ignored.

Images are taken at the size they come in (the protocol resizes: short side 800, long at most 1333), normalised and padded
with zeros at the right and bottom to multiples of 32, as detectron2's ``ImageList`` does in the authors' code. transformers'
own processor resizes to such multiples instead; its ``pixel_mask`` changes nothing, for the model ignores it. Everything runs
in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.hashing import sha256_of
from ovbench.networks.mask_generators.generator import MaskGenerator, Proposals

MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB 0..255
STD = (58.395, 57.12, 57.375)
DIVISOR = 32


class Mask2Former(MaskGenerator):
    """One mask per query: M is 100 for the published ones, 200 with Swin-L.

    Args:
        name: Its id.
        model: transformers' ``Mask2FormerForUniversalSegmentation``.
        weights: For records.
        weights_sha256: Content hash of configuration and weights.
    """

    def __init__(self, name: str, model: Any, weights: str, weights_sha256: str) -> None:
        super().__init__()
        self.name, self.weights, self.weights_sha256 = name, weights, weights_sha256
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def identity(self) -> str:
        """Of the configuration and weights, and of the preparation of images."""
        return sha256_of(["mask2former", self.weights_sha256, "zero padding", DIVISOR, MEAN, STD])

    def software(self) -> list[str]:
        """Those of torch and of transformers."""
        return [*super().software(), f"transformers {version('transformers')}"]

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """Masks at a quarter of the image's size."""
        height, width = images.shape[-2:]
        with torch.autocast(images.device.type, enabled=False):
            pixels = (images.float() - self.mean) / self.std  # type: ignore[operator]
            pixels = F.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR))
            out = self.model(pixels)
            masks = without_padding(
                out.masks_queries_logits.float(), (pixels.shape[-2], pixels.shape[-1]), (height, width)
            )
            objectness = 1 - out.class_queries_logits.float().softmax(dim=-1)[..., -1]
        return [Proposals(*pair) for pair in zip(masks, objectness, strict=True)]


def without_padding(masks: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The part (B, M, h', w') of masks (B, M, H', W') of a padded image that spans the image, on the same stride.

    Where the image ends between two samples, h' is rounded up and the samples are moved a little, bilinearly.

    Args:
        masks: Maps of the padded image.
        padded: Its size in pixels.
        size: Size of the image, which lies at its top left.
    """
    stride = [whole // cells for whole, cells in zip(padded, masks.shape[-2:], strict=True)]
    rows, columns = (-(-side // step) for side, step in zip(size, stride, strict=True))
    if size == (rows * stride[0], columns * stride[1]):
        return masks[..., :rows, :columns].contiguous()
    centres = [
        (torch.arange(cells, device=masks.device) + 0.5) / cells * (side / whole) * 2 - 1
        for cells, side, whole in zip((rows, columns), size, padded, strict=True)
    ]
    y, x = torch.meshgrid(*centres, indexing="ij")
    grid = torch.stack([x, y], dim=-1).expand(len(masks), -1, -1, -1)
    return F.grid_sample(masks, grid, mode="bilinear", padding_mode="border", align_corners=False)
