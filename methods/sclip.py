"""SCLIP: correlative self-attention in the last block (Wang et al., arXiv 2312.01597).

Attention is softmax(q q^T / sqrt d) + softmax(k k^T / sqrt d), CLS included: the sum of both, not their mean, so rows sum
to 2. Residual and MLP stay; CLS is dropped after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.dense_clip import Grid, LastBlock

METHODS = {
    "sclip": {
        "cls": "SCLIP",
        "summary": "correlative self-attention: q-q plus k-k in the last block",
        "paper": "Wang et al. 2023, arXiv 2312.01597",
        "protocol": "sclip",
    }
}


@dataclass(frozen=True)
class SCLIPConfig:
    """The switch in which public codes differ."""

    residual: bool = True  # SCLIP's own code; False leaves residual and MLP out, as ClearCLIP's and NACLIP's codes can


def correlative(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Output (B, heads, T, d) of the summed q-q and k-k attention."""
    return F.scaled_dot_product_attention(q, q, v) + F.scaled_dot_product_attention(k, k, v)


class SCLIP(Method):
    """SCLIP on any CLIP ViT."""

    Config = SCLIPConfig

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W)."""
        keep: bool = self.config.residual
        return self.clip.dense(images, LastBlock(correlative, residual=keep, mlp=keep))
