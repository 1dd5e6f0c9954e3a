"""MaskCLIP: the value projection of the last block alone (Zhou et al., arXiv 2112.01071).

Every token attends to itself only, so the last block is its value and output projection; residual and MLP are left out.
The paper's training-free model; its key smoothing and prompt denoising, and MaskCLIP+, are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.dense_clip import Grid, LastBlock

# Looked at for what is inferred: the public MaskCLIP (configs/maskclip: mmseg 0.x, 520 x 520 or 512 x 512, sizes by
# benchmark); SCLIP's and NACLIP's papers, which print it as a baseline under their own settings.
METHODS = {
    "maskclip": {
        "cls": "MaskCLIP",
        "summary": "value projection of the last block alone, no attention",
        "paper": "Zhou et al. 2022, arXiv 2112.01071",
        "protocol": "sclip",  # inferred: its own code evaluates in another framework; SCLIP's paper has it as a baseline
    }
}


@dataclass(frozen=True)
class MaskCLIPConfig:
    """The switch in which public codes differ."""

    residual: bool = False  # MaskCLIP's paper; True keeps residual and MLP, as a switch of ClearCLIP's code does


def itself(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Identity attention (B, heads, T, d): the values."""
    return v


class MaskCLIP(Method):
    """MaskCLIP on any CLIP ViT."""

    Config = MaskCLIPConfig

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W)."""
        keep: bool = self.config.residual
        return self.clip.dense(images, LastBlock(itself, residual=keep, mlp=keep))
