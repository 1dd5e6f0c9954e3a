"""ClearCLIP: q-q attention without residual and MLP (Lan et al., arXiv 2407.12442).

The last block is its attention alone, softmax(q q^T / sqrt d) v with CLS among the keys and values; the residual stream,
which carries the noise of the earlier blocks, and the MLP are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.dense_clip import Grid, LastBlock

METHODS = {
    "clearclip": {
        "cls": "ClearCLIP",
        "summary": "q-q attention, no residual, no MLP in the last block",
        "paper": "Lan et al. 2024, arXiv 2407.12442",
        "protocol": "clearclip",
    }
}


@dataclass(frozen=True)
class ClearCLIPConfig:
    """The switch of the public code."""

    residual: bool = False  # the paper's model; True keeps residual and MLP (``ignore_residual`` off in its code)


def query_query(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Output (B, heads, T, d) of q-q attention."""
    return F.scaled_dot_product_attention(q, q, v)


class ClearCLIP(Method):
    """ClearCLIP on any CLIP ViT."""

    Config = ClearCLIPConfig

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W)."""
        keep: bool = self.config.residual
        return self.clip.dense(images, LastBlock(query_query, residual=keep, mlp=keep))
