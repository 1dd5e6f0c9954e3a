"""FC-CLIP's way of classifying masks (Yu et al., arXiv 2308.02487): CLIP's own dense features, averaged inside each mask.

With a ConvNeXt CLIP, features before the head are pooled and go through the head as the pooled image does. FC-CLIP's own mask
decoder, its classifier and its class "void" are trained; here a frozen generator gives the masks, so this is FC-CLIP's
out-of-vocabulary half, whose numbers are none of FC-CLIP's, and SCN's base. Templates, the best of a class's words, pooling,
padding and thresholds are the public code's (``bytedance/fc-clip``, commit 2b0bbe2); the ensemble of both halves is
:func:`ovbench.ops.masks.geometric_ensemble`. On a ViT (inferred, for small weights: the public code refuses one) the dense
features are the values of the last block, as in :mod:`ovbench.methods.maskclip`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ovbench.models.mask_method import Classified, MaskMethod, Words
from ovbench.networks.dense_clip import DenseCLIP, Grid, LastBlock
from ovbench.ops.full_precision import product
from ovbench.ops.masks import mask_pool

# Looked at for what is inferred: the public FC-CLIP, which takes ConvNeXt or ResNet CLIP alone.
METHODS = {
    "fc-clip": {
        "cls": "FCCLIP",
        "summary": "FC-CLIP's out-of-vocabulary half: CLIP's dense features averaged in each mask; no training",
        "paper": "Yu et al. 2023, arXiv 2308.02487",
        "protocol": "fc-clip",
        "track": "mask-based",
    }
}


class FCCLIP(MaskMethod):
    """Mask pooling on a CLIP."""

    def classify(self, images: Tensor, masks: Tensor, words: Words) -> Classified:
        """Cosines of pooled features with the words."""
        embeddings = self.embeddings(self.maps(images), masks)
        cosines = product(F.normalize(embeddings, dim=-1), words.text.T)
        return Classified(cosines * words.logit_scale, masks, embeddings)

    def maps(self, images: Tensor) -> Tensor:
        """Dense features (B, C, h, w) of normalised images (B, 3, H, W); of a ViT in the joint space."""
        if isinstance(self.clip, DenseCLIP):
            return self.clip.dense(images, LastBlock(attend=_values, residual=False, mlp=False)).permute(0, 3, 1, 2)
        clip: Any = self.clip
        maps: Tensor = clip.dense(images)
        return maps

    def embeddings(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Embeddings (B, M, D), float32, not normalised, of masks (B, M, H, W) from dense features."""
        pooled = mask_pool(maps, masks)
        if not isinstance(self.clip, DenseCLIP):
            clip: Any = self.clip
            pooled = clip.project(pooled)
        return pooled.float()


def _values(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    return v
