"""Category filtering of LSMSeg beside the choice of classes that the aggregator makes itself.

The aggregator's own choice (:func:`ovbench.networks.cost_aggregation.aggregator.most_similar`) is that of LSMSeg: the k classes
whose largest similarity over positions and prompts is highest, image by image. Here is what LSMSeg does with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovbench.networks.cost_aggregation.losses import IGNORED

RENORMALISE = ("text", "cost")
EPSILON = 1e-6


def rescaled(cost: Tensor) -> Tensor:
    """Costs (B, P, T, h, w) of each image linearly spread over 0 .. 1."""
    low, high = cost.amin(dim=(1, 2, 3, 4), keepdim=True), cost.amax(dim=(1, 2, 3, 4), keepdim=True)
    return (cost - low) / (high - low).clamp_min(EPSILON)


def kept_labels(labels: Tensor, kept: Tensor) -> Tensor:
    """Labels (B, H, W) as places in ``kept``; 255 where the label is ignored or its class was dropped.

    Args:
        labels: (B, H, W), int64, 255 ignored.
        kept: Classes of each image (B, k).
    """
    batch, k = kept.shape
    place = labels.new_full((batch, IGNORED + 1), IGNORED)
    place.scatter_(1, kept, torch.arange(k, device=kept.device).expand(batch, k))
    return place.gather(1, labels.flatten(1)).view_as(labels)
