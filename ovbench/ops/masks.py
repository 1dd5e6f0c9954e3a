"""What masks do to patches and to label maps: membership, pooling, semantic and panoptic output.

Masks are logits; a pixel is inside where the sigmoid is at least .5, which is where the logit is at least 0. Masks are brought
to the output's size in strips of rows, so that no mask has a map of its own at image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.ops.assemble import linear_weights, strips
from ovbench.ops.full_precision import product

NOWHERE = -1e4  # logit of a mask that is inside nowhere: what rows are padded with


class Overlaid(NamedTuple):
    """Masks of one image laid over each other.

    Attributes:
        winner: (H, W), int64: the mask with the largest score times probability.
        inside: (H, W), bool: whether the pixel is inside its winner.
        area: (M,), int64: pixels inside each mask.
    """

    winner: Tensor
    inside: Tensor
    area: Tensor


def padded(masks: list[Tensor], count: int) -> Tensor:
    """Masks (B, count, h, w) of images with (M, h, w) each, those that are missing inside nowhere.

    Masks of another size than the first image's are resized to it bilinearly.
    """
    size = (masks[0].shape[-2], masks[0].shape[-1])
    rows = [resized(own.float(), size) if len(own) else own.new_zeros(0, *size, dtype=torch.float32) for own in masks]
    return torch.stack([F.pad(row, (0, 0, 0, 0, 0, count - len(row)), value=NOWHERE) for row in rows])


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (M, H, W) at ``size`` of masks (M, h, w), bilinear."""
    if tuple(masks.shape[-2:]) == size or not masks.shape[0]:
        return masks
    found: Tensor = F.interpolate(masks[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return found


def touched_patches(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches have a pixel of a mask (B, M, N), bool, row-major over ``grid``; N = h * w.

    Taken at the masks' own resolution. A mask that touches no patch counts as touching all: the softmax over its patches
    needs one, and what it covers is nothing anyway (as Mask2Former's masked attention does).

    Args:
        masks: Logits (B, M, h, w).
        grid: Patch grid (h, w).
    """
    if not masks.shape[1]:
        return torch.zeros(len(masks), 0, grid[0] * grid[1], dtype=torch.bool, device=masks.device)
    touched = F.adaptive_max_pool2d(masks, grid).flatten(2) >= 0
    return touched | ~touched.any(dim=-1, keepdim=True)


def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Mean features (B, M, C), float32, of the places inside each mask; zeros for a mask that is inside nowhere.

    Args:
        features: (B, C, h, w).
        masks: Logits (B, M, H, W); resized bilinearly to (h, w) first, as FC-CLIP does.
    """
    grid = (features.shape[-2], features.shape[-1])
    if not masks.shape[1]:
        return features.new_zeros(len(masks), 0, features.shape[1], dtype=torch.float32)
    if tuple(masks.shape[-2:]) != grid:
        masks = F.interpolate(masks, size=grid, mode="bilinear", align_corners=False)
    inside = (masks >= 0).flatten(2).float()  # (B, M, N)
    area = inside.sum(dim=-1, keepdim=True).clamp(min=1)
    pooled: Tensor = product(inside, features.flatten(2).transpose(1, 2)) / area
    return pooled


def semantic_labels(probabilities: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map (H, W), int64: the class with the largest sum, over masks, of its probability times the mask's.

    Without masks, class 0 everywhere.

    Args:
        probabilities: Of the classes (M, K), float32.
        masks: Logits (M, h, w).
        size: (H, W).
    """
    labels = torch.zeros(size, dtype=torch.int64, device=masks.device)
    if not masks.shape[0]:
        return labels
    for first, part in _at(masks, size):
        labels[first : first + part.shape[0]] = (part.sigmoid() @ probabilities).argmax(dim=-1)
    return labels


def overlaid(scores: Tensor, masks: Tensor, size: tuple[int, int]) -> Overlaid:
    """Masks (M, h, w), M > 0, with scores (M,) laid over each other at ``size``."""
    winner = torch.empty(size, dtype=torch.int64, device=masks.device)
    inside = torch.empty(size, dtype=torch.bool, device=masks.device)
    area = torch.zeros(masks.shape[0], dtype=torch.int64, device=masks.device)
    for first, part in _at(masks, size):
        rows = slice(first, first + part.shape[0])
        winner[rows] = (part.sigmoid() * scores).argmax(dim=-1)
        within = part >= 0
        inside[rows] = within.gather(-1, winner[rows][..., None])[..., 0]
        area += within.sum(dim=(0, 1))
    return Overlaid(winner, inside, area)


def panoptic_ids(
    probabilities: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    things: Tensor,
    *,
    object_thd: float = 0.0,
    overlap_thd: float = 0.8,
) -> tuple[Tensor, Tensor]:
    """Segments of one image: ids (H, W), int64, -1 for none, and the class (S,), int64, of each.

    Mask2Former's inference: each pixel goes to the mask with the largest score times probability; a mask that keeps less than
    ``overlap_thd`` of its own area is dropped; masks of one class that is no thing become one segment.

    Args:
        probabilities: Of the classes (M, K), float32.
        masks: Logits (M, h, w).
        size: (H, W).
        things: (K,), bool.
        object_thd: Masks whose best class is not more probable are left out.
        overlap_thd: See above.
    """
    nothing = torch.full(size, -1, dtype=torch.int64, device=masks.device)
    none = torch.zeros(0, dtype=torch.int64, device=masks.device)
    if not masks.shape[0]:
        return nothing, none
    scores, classes = probabilities.max(dim=-1)
    kept = scores > object_thd
    if not bool(kept.any()):
        return nothing, none
    scores, classes, masks = scores[kept], classes[kept], masks[kept]
    found = overlaid(scores, masks, size)
    count = masks.shape[0]
    won = torch.bincount(found.winner.flatten(), minlength=count)
    shown = torch.bincount(found.winner[found.inside], minlength=count)
    alive = (shown > 0) & (won >= overlap_thd * found.area)
    if not bool(alive.any()):
        return nothing, none
    # stuff of one class is one segment: the first of its masks stands for all
    index = torch.arange(count, device=masks.device)
    same = (classes[:, None] == classes) & alive & ~things[classes]
    owner = torch.where(things[classes] | ~alive, index, same.int().argmax(dim=-1))
    chosen = (alive & (owner == index)).nonzero()[:, 0]
    place = torch.full((count,), -1, dtype=torch.int64, device=masks.device)
    place[chosen] = torch.arange(len(chosen), device=masks.device)
    segment = torch.where(alive, place[owner], -1)
    return torch.where(found.inside, segment[found.winner], -1), classes[chosen]


def mask_iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union (M, S), float64, of masks (M, N) and (S, N), bool; 0 where both are empty."""
    a, b = one.double(), other.double()
    both = a @ b.T
    union = a.sum(dim=1)[:, None] + b.sum(dim=1)[None] - both
    return both / union.clamp(min=1)


def _at(masks: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Mask logits (s, W, M) at ``size``, strip by strip with the first row of each."""
    values = masks.float().permute(1, 2, 0).contiguous()
    weights = (linear_weights(masks.shape[1], size[0]), linear_weights(masks.shape[2], size[1]))
    return strips(values, weights)
