"""Second image encoders that show what some of their blocks say of an image: SAM and DINOv2, frozen, or none.

LSMSeg fuses such maps with CLIP's. An encoder takes RGB images 0..255, normalises them itself and answers on its own grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import unknown_name
from ovbench.networks.attention_names import VITS
from ovbench.networks.attention_vit import ViTSource, load_vit

NONE = "none"
SAM = ("sam-b", "sam-l")
DINO = {"dinov2-b": "dinov2-b14"}  # name here: name of the attention source with the same network


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


class DinoEncoder(VisualEncoder):
    """DINOv2, all of whose blocks attend globally: those at the depths of the last three global ones of SAM-B (inferred).

    Args:
        name: Its id.
        source: The network.
    """

    def __init__(self, name: str, source: ViTSource) -> None:
        super().__init__()
        self.name, self.source = name, source
        self.weights, self.weights_sha256 = source.weights, source.weights_sha256
        self.width, self.patch = int(source.model.embed_dim), source.patch
        self.blocks = tuple(source.depth * quarter // 4 - 1 for quarter in (2, 3, 4))  # 5, 8, 11 of 12
        self.requires_grad_(False).eval()

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs (B, C, h, w), float32, of the blocks, before the final norm."""
        x, grid = self.source.embed(images)
        found = []
        for index in range(self.blocks[-1] + 1):
            x = self.source.block(index, x)
            if index in self.blocks:
                found.append(x[:, self.source.prefix :].float().transpose(1, 2).unflatten(2, grid))
        return tuple(found)


def visual_names() -> list[str]:
    """Ids of all encoders, and ``none``."""
    return [NONE, *SAM, *DINO]


def load_visual(name: str, weights: str | None = None, *, seed: int = 0) -> VisualEncoder | None:
    """A frozen encoder in float32 and evaluation mode on the CPU; None for ``none``.

    Args:
        name: See :func:`visual_names`.
        weights: None, or the repository's name, fetches the published weights from the hub (or its cache); ``"random"``
            gives the architecture alone; else a file, or for SAM a folder in transformers' layout.
        seed: Seed of random weights.

    Raises:
        UsageError: Unknown name, or transformers is missing for SAM.
        WeightsError: The download failed, or the file is missing, unreadable or does not fit.
    """
    if name not in visual_names():
        raise unknown_name("visual encoder", name, visual_names())
    if name == NONE:
        return None
    if name in DINO:
        weights = None if weights == VITS[DINO[name]].hub else weights  # as records name it
        return DinoEncoder(name, load_vit(DINO[name], weights, seed=seed))
    from ovbench.networks.sam import load_sam

    return load_sam(name, weights, seed=seed)
