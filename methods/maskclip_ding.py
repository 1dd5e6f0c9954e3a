"""MaskCLIP (Ding et al., arXiv 2208.08984): mask tokens with masked attention in a frozen CLIP, without any training.

A token for each mask, at first the CLS token, goes through CLIP's blocks beside the image tokens; image tokens never see it. So
all masks share one pass: their tokens use the image tokens' keys and values. As in the public code (``mlpc-ucsd/MaskCLIP``,
commit 43049d1) a mask token sees CLS, always, and the patches that its mask touches at CLIP's input resolution; so the token of
an empty mask sees CLS alone. This is FISA's baseline.

The public numbers are of another network: its relative mask attention, trained on COCO, is not part of this untrained form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.models.mask_method import Classified, MaskMethod, Words
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.mask_generators.mask2former import MEAN
from ovbench.networks.recompute import recomputed
from ovbench.ops.full_precision import product
from ovbench.ops.masks import touched_patches

# Looked at for what is inferred: arXiv 2208.08984 and its public code; FISA's Eq. 5.
METHODS = {
    "maskclip-ding": {
        "cls": "MaskCLIPDing",
        "summary": "mask tokens with masked attention in a frozen CLIP; untrained, without relative mask attention",
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
    PAD_COLOUR = MEAN  # CLIP is shown the generator's input, which ends in zeros behind its normalisation

    def __init__(self, clip: DenseCLIP, config: object = None, *, seed: int = 0) -> None:
        if not isinstance(clip, DenseCLIP):
            raise WeightsError(
                f"Mask tokens need a CLIP ViT, not {clip.arch}: use e.g. --arch ViT-L-14-336, or fc-clip."
            )
        super().__init__(clip, config, seed=seed)

    @property
    def sees_cls(self) -> bool:
        """Whether mask tokens attend to CLS beside their patches."""
        return True

    def classify(self, images: Tensor, masks: Tensor, words: Words) -> Classified:
        """Cosines of the mask tokens with the words."""
        embeddings = self.mask_embeddings(images, masks, words.text).float()
        cosines = product(F.normalize(embeddings, dim=-1), words.text.T)
        return Classified(cosines * words.logit_scale, masks, embeddings)

    def mask_embeddings(self, images: Tensor, masks: Tensor, text: Tensor) -> Tensor:
        """Embeddings (B, M, D), not normalised, of masks (B, M, h, w) in normalised images (B, 3, H, W)."""
        clip = self.clip
        x, grid = clip.embed(images)
        visible = self.visible(masks, grid, (images.shape[-2], images.shape[-1]))[:, None]  # the same for all heads
        m = x[:, :1].expand(-1, masks.shape[1], -1)

        def block(x: Tensor, m: Tensor, index: int) -> tuple[Tensor, Tensor]:
            q, k, v = self.image_qkv(x, index)
            m = self.injected(m, text, index)
            keys, values = self.mask_keys(x, k, v, index)
            seen = F.scaled_dot_product_attention(self.mask_queries(m, index), keys, values, attn_mask=visible)
            m = self.finished(m, seen, index, of_masks=True)
            if index < clip.depth - 1:  # nobody looks at the image tokens behind the last keys and values
                x = self.finished(x, F.scaled_dot_product_attention(q, k, v), index, of_masks=False)
            return x, m

        for index in range(clip.depth):
            x, m = recomputed(clip.recompute, block, x, m, index)
        return clip.project(m)

    def visible(self, masks: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Which image tokens each mask token attends to (B, M, 1 + N), bool, CLS first.

        Where CLS is hidden, a mask that touches no patch attends to all: the softmax needs one, and what it covers is
        nothing anyway (as Mask2Former's masked attention does).

        Args:
            masks: Logits (B, M, h, w).
            grid: Patch grid (h, w).
            size: The input (H, W) in pixels.
        """
        touched = touched_patches(masks, grid, size)
        if not self.sees_cls:
            touched = touched | ~touched.any(dim=-1, keepdim=True)
        return torch.cat([torch.full_like(touched[..., :1], self.sees_cls), touched], dim=-1)

    def image_qkv(self, x: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, 1 + N, d) of the image tokens (B, 1 + N, C) that enter a block."""
        return self.clip.qkv(x, index)

    def mask_queries(self, m: Tensor, index: int) -> Tensor:
        """Queries (B, heads, M, d) of mask tokens (B, M, C) in a block."""
        return self.clip.queries(m, index)

    def mask_keys(self, x: Tensor, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values that mask tokens attend to, of image tokens (B, 1 + N, C) and their own ones: the same."""
        return k, v

    def finished(self, x: Tensor, heads: Tensor, index: int, *, of_masks: bool) -> Tensor:
        """Output (B, T, C) of a block from its input and what its attention gave (B, heads, T, d)."""
        return self.clip.finish_block(index, x, heads)

    def injected(self, m: Tensor, text: Tensor, index: int) -> Tensor:
        """Mask tokens (B, M, C) as they attend in a block, which may know the classes' embeddings (Q, D): as they are."""
        return m
