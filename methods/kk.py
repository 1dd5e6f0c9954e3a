"""Plain k-k attention without residual and MLP: the logits that the discrepancy solvers start from (arXiv 2604.07723).

Attention is softmax(k k^T / sqrt d), CLS included and dropped after: NACLIP's last block without its neighbourhood term.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.dense_clip import Grid, LastBlock

# Looked at for what is inferred: arXiv 2604.07723, which names the attention and no sizes; NACLIP's public code and
# configs, which has k-k attention.
METHODS = {
    "kk": {
        "cls": "KeyKey",
        "summary": "k-k attention, no residual, no MLP: default input of the discrepancy solvers",
        "paper": "Direct Segmentation without Logits Optimization, arXiv 2604.07723",
        "protocol": "naclip",  # inferred: the attention is a variant of NACLIP's code; solvers set whole images themselves
    }
}


def key_key(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Output (B, heads, T, d) of k-k attention."""
    return F.scaled_dot_product_attention(k, k, v)


class KeyKey(Method):
    """The k-k read-out on any CLIP ViT."""

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W)."""
        return self.clip.dense(images, LastBlock(key_key, residual=False, mlp=False))
