"""What masks do to patches and to label maps: membership, pooling, ensemble, semantic and panoptic output.

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
OUTSIDE = -10.0  # logit in the padding of an image
MASKS_AT_ONCE = 10  # at the size of CLIP's input
EPSILON = 1e-8  # of FC-CLIP's public code: beside areas, and in the logarithm of its ensemble


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


def with_padding(masks: Tensor, size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """Mask logits (M, h', w') that span a padded image, of masks (M, h, w) that span the image at its top left.

    In the padding a mask is outside. Where the image ends between two samples they are moved a little, bilinearly.

    Args:
        masks: Logits (M, h, w).
        size: The image's (H, W) in pixels.
        padded_size: With its padding.
    """
    if size == padded_size or not len(masks):
        return masks
    cells = zip(masks.shape[-2:], size, padded_size, strict=True)
    height, width = (max(1, round(count * whole / side)) for count, side, whole in cells)
    return _respanned(masks, (height, width), size, padded_size)


def without_padding(
    masks: Tensor, grid: tuple[int, int], size: tuple[int, int], padded_size: tuple[int, int]
) -> Tensor:
    """Masks (M, h, w) on the ``grid`` that spans the image, of masks (M, h', w') as :func:`with_padding` makes them."""
    return masks if size == padded_size or not len(masks) else _respanned(masks, grid, padded_size, size)


def _respanned(masks: Tensor, grid: tuple[int, int], old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Masks (M, *grid) that span ``new`` pixels, of masks that span ``old`` pixels from the same corner."""
    rows, columns = masks.shape[-2:]
    if grid[0] * old[0] == rows * new[0] and grid[1] * old[1] == columns * new[1]:  # the same stride, an exact cut
        return F.pad(masks, (0, grid[1] - columns, 0, grid[0] - rows), value=OUTSIDE)
    centres = [
        (torch.arange(count, device=masks.device) + 0.5) * whole / (count * side)
        for count, side, whole in zip(grid, old, new, strict=True)
    ]
    y, x = torch.meshgrid(*centres, indexing="ij")  # 1 is where the old span ends
    places = torch.stack([x, y], dim=-1)[None] * 2 - 1
    moved = F.grid_sample(masks[None].float(), places, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return moved.masked_fill((x > 1) | (y > 1), OUTSIDE)


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (M, H, W) at ``size`` of masks (M, h, w), bilinear."""
    if tuple(masks.shape[-2:]) == size or not masks.shape[0]:
        return masks
    found: Tensor = F.interpolate(masks[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return found


@torch.no_grad()
def touched_patches(masks: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which patches have a pixel of a mask (B, M, N), bool, row-major over ``grid``; N = h * w.

    The masks are first resized bilinearly to CLIP's input, as MaskCLIP's public code does: along edges this adds patches
    that the small mask does not touch. A mask that is inside nowhere touches none.

    Args:
        masks: Logits (B, M, h, w).
        grid: Patch grid (h, w).
        size: CLIP's input (H, W) in pixels.
    """
    found = torch.zeros(*masks.shape[:2], grid[0] * grid[1], dtype=torch.bool, device=masks.device)
    for first in range(0, masks.shape[1], MASKS_AT_ONCE):  # at the input's size all masks at once take gigabytes
        part = masks[:, first : first + MASKS_AT_ONCE].float()
        if tuple(part.shape[-2:]) != size:
            part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        if part.shape[-2] % grid[0] or part.shape[-1] % grid[1]:
            pooled = F.adaptive_max_pool2d(part, grid)
        else:  # the same, faster
            pooled = F.max_pool2d(part, (part.shape[-2] // grid[0], part.shape[-1] // grid[1]))
        found[:, first : first + MASKS_AT_ONCE] = pooled.flatten(2) >= 0
    return found


def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Mean features (B, M, C), float32, of the places inside each mask; zeros for a mask that is inside nowhere.

    Args:
        features: (B, C, h, w).
        masks: Logits (B, M, H, W); resized bilinearly to (h, w) first, and inside where they are above 0, both as in
            FC-CLIP's public code: a place whose logits average to 0 is outside.
    """
    grid = (features.shape[-2], features.shape[-1])
    if not masks.shape[1]:
        return features.new_zeros(len(masks), 0, features.shape[1], dtype=torch.float32)
    if tuple(masks.shape[-2:]) != grid:
        masks = F.interpolate(masks, size=grid, mode="bilinear", align_corners=False)
    inside = (masks > 0).flatten(2).float()  # (B, M, N)
    area = inside.sum(dim=-1, keepdim=True) + EPSILON
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


def geometric_ensemble(
    inner: Tensor, outer: Tensor, seen: Tensor, alpha: float = 0.4, beta: float = 0.8, valid: Tensor | None = None
) -> Tensor:
    """FC-CLIP's ensemble of two classifiers of masks: log(p_in^(1-w) p_out^w) (..., K), whose softmax are probabilities.

    w is ``alpha`` where a class was seen in training and ``beta`` elsewhere. With void, logarithms of probabilities
    (..., K + 1): void keeps the inner classifier's probability v, and the classes share 1 - v by the softmax of the above.

    Args:
        inner: Logits (..., K) of the trained classifier, or (..., K + 1) with void last.
        outer: Logits (..., K) of frozen CLIP; of a last column for void nothing is taken.
        seen: Which classes were seen (K,), bool.
        alpha: Share of frozen CLIP for seen classes.
        beta: The same for all others.
        valid: Masks (...,) that cover at least one cell of the feature map, bool; all others take the inner classifier alone
            (the public code does so on a ResNet). None: all.
    """
    count = len(seen)
    if inner.shape[-1] not in (count, count + 1) or outer.shape[-1] not in (count, count + 1):
        raise ValueError(f"{inner.shape[-1]} and {outer.shape[-1]} columns for {count} classes, with or without void.")
    share = torch.where(seen, alpha, beta).to(inner)
    if valid is not None:
        share = share * valid[..., None]
    ours, clips = (logits[..., :count].log_softmax(dim=-1) for logits in (inner, outer))
    mixed = ours + share * (clips - ours)
    if inner.shape[-1] == count:
        return mixed
    void = inner.softmax(dim=-1)[..., -1:]
    return torch.cat([mixed.softmax(dim=-1) * (1 - void), void], dim=-1).add(EPSILON).log()


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
