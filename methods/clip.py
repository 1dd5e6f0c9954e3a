"""Vanilla CLIP read out densely: every patch token through the ordinary last block, then into the text space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020); the dense
read-out is the baseline of every training-free paper. Attention, residual and MLP are CLIP's own; CLS is dropped after.
"""

from __future__ import annotations

from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.dense_clip import LastBlock

# Looked at for what is inferred: the public SCLIP (clip_segmentor.py and its configs), CLIP's paper and code, which
# segment nothing.
METHODS = {
    "clip": {
        "cls": "Clip",
        "summary": "vanilla CLIP, dense read-out of its patch tokens",
        "paper": "Radford et al. 2021, arXiv 2103.00020",
        "protocol": "sclip",  # inferred: SCLIP's code is where the baseline's configs come from
    }
}


class Clip(Method):
    """Vanilla CLIP's patch tokens."""

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W)."""
        return self.clip.dense(images, LastBlock())
