"""What a second image encoder beside CLIP is; :mod:`ovbench.networks.visual` knows them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisualEncoder(nn.Module, ABC):
    """One frozen encoder.

    Attributes:
        name: Its id.
        weights: ``random``, a hub repository or a file's name, for records.
        weights_sha256: Content hash of the weights.
        width: Channels C of every map.
        patch: Side of a patch in pixels.
        blocks: Indices of the blocks that are shown, the first block is 0.
    """

    name: str
    weights: str
    weights_sha256: str
    width: int
    patch: int
    blocks: tuple[int, ...]

    @abstractmethod
    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs (B, C, h, w), float32, of :attr:`blocks`, first to last.

        Args:
            images: RGB images (B, 3, H, W), values 0..255, sides that are multiples of :attr:`patch`.
        """

    def sized(self, images: Tensor, size: int) -> Tensor:
        """Images resized to a square of ``size`` pixels; 0: each side to the nearest multiple of :attr:`patch`."""
        sides = (size, size) if size else images.shape[-2:]
        wanted = [max(1, round(side / self.patch)) * self.patch for side in sides]
        if list(images.shape[-2:]) == wanted:
            return images
        return F.interpolate(images.float(), size=wanted, mode="bilinear", align_corners=False)

    def train(self, mode: bool = True) -> VisualEncoder:
        """Evaluation mode, whatever the method around it is in."""
        return super().train(False)

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the blocks' matrices in ``dtype``, so that autocast need not convert them at every forward."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def record(self) -> dict[str, Any]:
        """What a record should say of the encoder."""
        return {
            "visual_weights": self.weights,
            "visual_weights_sha256": self.weights_sha256,
            "visual_random": self.weights == "random",
            "visual_params": sum(parameter.numel() for parameter in self.parameters()),
        }
