"""The loss of CAT-Seg: binary cross-entropy of every class at every pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = 255


def binary_cross_entropy(logits: Tensor, labels: Tensor, ignored_as_negative: bool = True) -> Tensor:
    """Mean over pixels and classes of the binary cross-entropy with one-hot labels.

    With targets y of 0 and 1 it is ``softplus(x) - y x``, so no one-hot map is made.

    Args:
        logits: (B, K, h, w), resized bilinearly to the labels' size.
        labels: (B, H, W), int64, 255 ignored.
        ignored_as_negative: An ignored pixel counts as one without any class, as in the public code; else not at all.
    """
    logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    valid = labels != IGNORED
    own = logits.gather(1, labels.where(valid, 0)[:, None])[:, 0]  # (B, H, W)
    cost = F.softplus(logits)
    if ignored_as_negative:
        return (cost.sum() - (own * valid).sum()) / logits.numel()
    cost = (cost.sum(dim=1) - own) * valid
    return cost.sum() / (valid.sum().clamp_min(1) * logits.shape[1])


def share_of_loss(labels: Tensor, part: slice, ignored_as_negative: bool = True) -> float:
    """Which share of :func:`binary_cross_entropy` of a batch is that of some of its images, times their own.

    Args:
        labels: (B, H, W), int64, 255 ignored.
        part: Which images.
        ignored_as_negative: As there.
    """
    if ignored_as_negative:
        return len(labels[part]) / len(labels)
    valid = labels != IGNORED
    return float(valid[part].sum() / valid.sum().clamp_min(1))
