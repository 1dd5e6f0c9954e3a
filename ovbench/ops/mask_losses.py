"""Losses of masks and their classes, and which proposal is which true segment (Mask2Former's; Cheng et al., arXiv 2112.01527)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.ops.panoptic import NO_SEGMENT, Segments


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses and, as in Mask2Former, of the matching's costs."""

    cross_entropy: float = 2.0
    dice: float = 5.0
    bce: float = 5.0


def coverage(truth: Segments, size: tuple[int, int]) -> Tensor:
    """Share of each place (h, w) that each segment covers (S, h, w), float32, in 0..1."""
    index = torch.arange(len(truth.classes), device=truth.ids.device)
    whole = (truth.ids[None] == index[:, None, None]).float()
    return F.adaptive_avg_pool2d(whole, size) if len(index) else whole.new_zeros(0, *size)


def without_crowds(truth: Segments) -> Segments:
    """The segments that are one thing each, or stuff: a crowd is nothing that a mask could learn."""
    kept = (~truth.crowd).nonzero()[:, 0]
    place = torch.full((len(truth.classes) + 1,), NO_SEGMENT, dtype=torch.int64, device=truth.ids.device)
    place[kept] = torch.arange(len(kept), device=truth.ids.device)
    return Segments(place[truth.ids], truth.classes[kept], truth.crowd[kept])  # -1 is the last entry


def dice_cost(masks: Tensor, truth: Tensor) -> Tensor:
    """Dice losses (M, S) of mask logits (M, N) against segments (S, N) in 0..1."""
    inside = masks.sigmoid()
    return 1 - (2 * (inside @ truth.T) + 1) / (inside.sum(dim=1)[:, None] + truth.sum(dim=1)[None] + 1)


def bce_cost(masks: Tensor, truth: Tensor) -> Tensor:
    """Mean binary cross-entropies (M, S) of mask logits (M, N) against segments (S, N) in 0..1."""
    return (F.softplus(masks).sum(dim=1)[:, None] - masks @ truth.T) / masks.shape[1]


@torch.no_grad()
def match(masks: Tensor, logits: Tensor, truth: Segments, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """Proposals and segments (n,) each that belong together at the least cost, n = min(M, S); Hungarian.

    Args:
        masks: Logits (M, h, w).
        logits: Of the classes (M, K).
        truth: S segments.
        weights: Of the costs.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    device = masks.device
    if not len(truth.classes):
        return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    flat, segments = masks.float().flatten(1), coverage(truth, (masks.shape[-2], masks.shape[-1])).flatten(1)
    cost = weights.dice * dice_cost(flat, segments) + weights.bce * bce_cost(flat, segments)
    cost = cost - weights.cross_entropy * logits.float().softmax(dim=-1)[:, truth.classes]
    rows, columns = linear_sum_assignment(cost.cpu().double().numpy())
    return torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device)


def mask_losses(
    masks: Tensor, logits: Tensor, truth: Segments, chosen: tuple[Tensor, Tensor], weights: LossWeights
) -> dict[str, Tensor]:
    """Weighted losses of one image over the proposals that were matched; a proposal without a segment counts nowhere.

    Args:
        masks: Logits (M, h, w).
        logits: Of the classes (M, K), scaled.
        truth: The segments.
        chosen: As :func:`match` gives it.
        weights: Of the losses; of masks that have no gradient only the class counts.
    """
    rows, columns = chosen
    if not len(rows):
        nothing = logits.sum() * 0
        return {"loss_class": nothing, **({"loss_dice": nothing, "loss_bce": nothing} if masks.requires_grad else {})}
    found = {"loss_class": weights.cross_entropy * F.cross_entropy(logits[rows], truth.classes[columns])}
    if masks.requires_grad:
        segments = coverage(truth, (masks.shape[-2], masks.shape[-1])).flatten(1)[columns]
        flat = masks[rows].float().flatten(1)
        inside = flat.sigmoid()
        dice = 1 - (2 * (inside * segments).sum(1) + 1) / (inside.sum(1) + segments.sum(1) + 1)
        found["loss_dice"] = weights.dice * dice.mean()
        found["loss_bce"] = weights.bce * F.binary_cross_entropy_with_logits(flat, segments)
    return found
