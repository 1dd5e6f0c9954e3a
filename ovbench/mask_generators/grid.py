"""Proposals without a network: overlapping rectangles at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovbench.hashing import sha256_of
from ovbench.mask_generators.generator import MaskGenerator, Proposals
from ovbench.mask_generators.oracle import as_logits


class Grid(MaskGenerator):
    """Rectangles of a half, a quarter ... of the image, each moved by half of itself, and the whole image.

    Args:
        levels: Number of sizes behind the whole image; 1, 2, 3 give 10, 59, 284 rectangles.
        side: Longer side of the masks.
        seed: Of what is drawn.
    """

    name = "grid"

    def __init__(self, levels: int = 2, side: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.levels, self.side, self.seed = levels, side, seed

    def identity(self) -> str:
        """Of the fields."""
        return sha256_of([self.name, self.levels, self.side, self.seed])

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """Logits of +-10."""
        height, width = images.shape[-2:]
        scale = min(1.0, self.side / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        masks = as_logits(rectangles(size, self.levels).to(images.device))
        return [Proposals(masks) for _ in images]


def rectangles(size: tuple[int, int], levels: int) -> Tensor:
    """Masks (M, h, w), bool: the whole, then for each level all rectangles of 2**-level of the sides at half steps."""
    found = []
    for level in range(levels + 1):
        spans = []
        for side in size:
            starts = torch.arange(2 ** (level + 1) - 1)[:, None] * (side / 2 ** (level + 1))
            centres = torch.arange(side) + 0.5
            spans.append((centres >= starts) & (centres < starts + side / 2**level))
        found.append((spans[0][:, None, :, None] & spans[1][None, :, None, :]).flatten(0, 1))
    return torch.cat(found)
