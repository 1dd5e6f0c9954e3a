"""The branches of a closed-set network under a protocol: label maps of classifiers that are trained but do not decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.models.closed_set import ClosedSetModel, ClosedSetNetwork
from ovbench.spec import Protocol


class _Joined(ClosedSetNetwork):
    """A network whose output is its branches', one after the other along the channels."""

    def __init__(self, network: ClosedSetNetwork) -> None:
        super().__init__(network.segmentor, network.mean.flatten().tolist(), network.std.flatten().tolist())
        self.to(network.mean.device)
        self.inner = network

    def forward(self, batch: Tensor) -> Tensor:
        """Logits (B, N K, h, w) of N branches, on the finest of their grids."""
        found = [logits.float() for logits in self.inner.branch_logits(batch).values()]
        height, width = max((logits.shape[-2:] for logits in found), key=lambda grid: grid[0] * grid[1])
        return torch.cat(
            [F.interpolate(logits, (height, width), mode="bilinear", align_corners=False) for logits in found], dim=1
        )


class Branches:
    """All branches of a network in one forward, through the windows and sizes of its evaluation.

    Args:
        network: With branches; in evaluation mode from now.
        classes: Names of its K classes.
        protocol: With one view of an image.
    """

    def __init__(self, network: ClosedSetNetwork, classes: Sequence[str], protocol: Protocol) -> None:
        self.names, self.classes = network.branches(), len(classes)
        self.model = ClosedSetModel(_Joined(network), classes, protocol)
        self.device = self.model.device

    def labels(self, image: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Label maps (H, W), int64, by branch, of an RGB image (3, h, w)."""
        (found,) = self.model.patch_logits([image])
        ends = range(0, len(self.names) * self.classes, self.classes)
        return {
            name: self.model.decide(replace(found, values=found.values[..., start : start + self.classes]), size)
            for name, start in zip(self.names, ends, strict=True)
        }
