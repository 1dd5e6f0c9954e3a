"""Masks from the true segments: an upper bound, and a noisy version of it to learn from."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.hashing import sha256_of
from ovbench.networks.mask_generators.generator import MaskGenerator, Proposals, truth_masks

LOGIT = 10.0  # of a pixel inside; probability .99995
SHARE = 0.15  # of a segment's side by which it is moved at most


class Oracle(MaskGenerator):
    """One mask per true segment, at the truth's resolution: what perfect masks would give."""

    name = "oracle"
    needs_truth = True

    def identity(self) -> str:
        """The same for all."""
        return sha256_of([self.name, LOGIT])

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """Logits of +-10."""
        return [Proposals(as_logits(truth_masks(truth))) for truth in truths]


def as_logits(inside: Tensor) -> Tensor:
    """Logits +-10, float32, of masks, bool."""
    return torch.where(inside, LOGIT, -LOGIT)


class NoisyOracle(MaskGenerator):
    """True segments spoiled at random, and masks of nothing, in random order: to learn from where there is no network.

    What happens to an image follows from its pixels and the seed. At strength 0 and without distractors the masks are the
    oracle's in another order.

    Args:
        strength: How far, 0 .. 1: a boundary moves in or out by up to ``strength`` x .15 of the segment's side (root of its
            area), the whole by as much, and with probability ``strength`` / 4 a straight cut makes two masks of it.
        distractors: Number of masks of nothing: ellipses, and every second one the union of two segments.
        seed: Of all that is drawn.
    """

    name = "noisy-oracle"
    needs_truth = True

    def __init__(self, strength: float = 0.5, distractors: int = 8, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= strength <= 1 or distractors < 0:
            raise UsageError(f"noisy-oracle: strength {strength} must be 0 .. 1, distractors {distractors} at least 0.")
        self.strength, self.distractors, self.seed = strength, distractors, seed

    def identity(self) -> str:
        """Of the fields."""
        return sha256_of([self.name, LOGIT, SHARE, self.strength, self.distractors, self.seed])

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        """Logits of +-10."""
        return [Proposals(as_logits(self._spoiled(*pair))) for pair in zip(images, truths, strict=True)]

    def _spoiled(self, image: Tensor, truth: Tensor) -> Tensor:
        digest = hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()
        rng = random.Random(f"{self.seed} {digest}")
        segments = list(truth_masks(truth))
        masks: list[Tensor] = []
        for mask in segments:
            reach = self.strength * SHARE * float(mask.sum()) ** 0.5
            mask = shifted(grown(mask, round(rng.uniform(-reach, reach))), _pair(rng, reach))
            masks += cut(mask, rng.uniform(0, math.pi)) if rng.random() < self.strength / 4 else [mask]
        for index in range(self.distractors):
            if index % 2 and len(segments) > 1:
                first, second = rng.sample(segments, 2)
                masks.append(first | second)
            else:
                masks.append(ellipse(truth, [rng.random() for _ in range(4)]))
        masks = [mask for mask in masks if bool(mask.any())]
        rng.shuffle(masks)
        return torch.stack(masks) if masks else truth.new_zeros((0, *truth.shape), dtype=torch.bool)


def _pair(rng: random.Random, reach: float) -> tuple[int, int]:
    return round(rng.uniform(-reach, reach)), round(rng.uniform(-reach, reach))


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask (H, W), bool, whose boundary is moved outwards by a square of ``pixels``, or inwards if negative."""
    if pixels == 0:
        return mask
    values = (mask if pixels > 0 else ~mask).float()[None, None]
    reach = abs(pixels)
    values = F.max_pool2d(values, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    values = F.max_pool2d(values, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    moved: Tensor = values[0, 0] > 0
    return moved if pixels > 0 else ~moved


def shifted(mask: Tensor, by: tuple[int, int]) -> Tensor:
    """A mask (H, W), bool, moved down and right by pixels; what comes in is outside."""
    height, width = mask.shape
    down, right = max(-height, min(height, by[0])), max(-width, min(width, by[1]))
    room = F.pad(mask, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return room[max(-down, 0) :, max(-right, 0) :][:height, :width]


def cut(mask: Tensor, angle: float) -> list[Tensor]:
    """The two parts of a mask (H, W), bool, on both sides of a line through its centre; ``angle`` in radians."""
    y, x = mask.nonzero(as_tuple=True)
    if not len(y):
        return [mask]
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None] - y.float().mean()
    columns = torch.arange(mask.shape[1], device=mask.device) - x.float().mean()
    side = rows * math.cos(angle) + columns * math.sin(angle) >= 0
    return [mask & side, mask & ~side]


def ellipse(like: Tensor, where: Sequence[float]) -> Tensor:
    """A mask, bool, of the shape of ``like`` (H, W): centre (y, x) and half axes (of .05 to .4 of a side) from 0 .. 1."""
    height, width = like.shape
    y, x = torch.arange(height, device=like.device)[:, None], torch.arange(width, device=like.device)
    down, across = ((0.05 + 0.35 * share) * side for share, side in zip(where[2:], (height, width), strict=True))
    return ((y - where[0] * height) / down) ** 2 + ((x - where[1] * width) / across) ** 2 <= 1
