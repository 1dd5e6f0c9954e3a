"""MaskCLIP (Ding et al., arXiv 2208.08984): mask tokens with masked attention in a frozen CLIP, without any training.

A token for each mask, at first the CLS token, goes through CLIP's blocks beside the image tokens and attends only to the
patches that its mask touches; image tokens never see it. So all masks share one pass: their tokens use the image tokens' keys
and values. This is FISA's baseline, and what FISA is before training.

Inferred: mask tokens attend to patches alone, neither to CLS nor to themselves (as FISA's equation has it); patches that a
mask touches are found at the mask's own resolution; a mask that touches none attends to all.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.models.mask_method import Classified, MaskMethod, Words
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.recompute import recomputed
from ovbench.ops.masks import touched_patches

# Looked at for what is inferred: arXiv 2208.08984 and its public code; FISA's Eq. 5.
METHODS = {
    "maskclip-ding": {
        "cls": "MaskCLIPDing",
        "summary": "mask tokens with masked attention in a frozen CLIP; no training",
        "paper": "Ding et al. 2023, arXiv 2208.08984",
        "protocol": "fisa",
        "track": "mask-based",
    }
}


class MaskCLIPDing(MaskMethod):
    """MaskCLIP on any CLIP ViT.

    Args:
        clip: The CLIP.
        config: Switches.
        seed: Of random weights.

    Raises:
        WeightsError: The CLIP is no ViT.
    """

    POS_INTERP = "bilinear"

    def __init__(self, clip: DenseCLIP, config: object = None, *, seed: int = 0) -> None:
        if not isinstance(clip, DenseCLIP):
            raise WeightsError(
                f"Mask tokens need a CLIP ViT, not {clip.arch}: use e.g. --arch ViT-L-14-336, or fc-clip."
            )
        super().__init__(clip, config, seed=seed)

    def classify(self, images: Tensor, masks: Tensor, words: Words) -> Classified:
        """Cosines of the mask tokens with the words."""
        embeddings = F.normalize(self.mask_embeddings(images, masks, words.text).float(), dim=-1)
        return Classified(embeddings @ words.text.T * words.logit_scale, masks)

    def mask_embeddings(self, images: Tensor, masks: Tensor, text: Tensor) -> Tensor:
        """Embeddings (B, M, D), not normalised, of masks (B, M, h, w) in normalised images (B, 3, H, W)."""
        clip = self.clip
        x, grid = clip.embed(images)
        touched = touched_patches(masks, grid)[:, None]  # (B, 1, M, N), the same for all heads
        m = x[:, :1].expand(-1, masks.shape[1], -1)

        def block(x: Tensor, m: Tensor, index: int) -> tuple[Tensor, Tensor]:
            q, k, v = self.image_qkv(x, index)
            m = self.injected(m, text, index)
            seen = F.scaled_dot_product_attention(
                self.mask_queries(m, index), k[:, :, 1:], v[:, :, 1:], attn_mask=touched
            )
            m = clip.finish_block(index, m, seen)
            if index < clip.depth - 1:  # nobody looks at the image tokens behind the last keys and values
                x = clip.finish_block(index, x, F.scaled_dot_product_attention(q, k, v))
            return x, m

        for index in range(clip.depth):
            x, m = recomputed(clip.recompute, block, x, m, index)
        return clip.project(m)

    def image_qkv(self, x: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, 1 + N, d) of the image tokens (B, 1 + N, C) that enter a block."""
        return self.clip.qkv(x, index)

    def mask_queries(self, m: Tensor, index: int) -> Tensor:
        """Queries (B, heads, M, d) of mask tokens (B, M, C) in a block."""
        return self.clip.queries(m, index)

    def injected(self, m: Tensor, text: Tensor, index: int) -> Tensor:
        """Mask tokens (B, M, C) as they attend in a block, which may know the classes' embeddings (Q, D): as they are."""
        return m
