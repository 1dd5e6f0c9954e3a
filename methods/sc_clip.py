"""SC-CLIP: self-calibrated CLIP without training (Bai et al., arXiv 2411.15869).

Five steps on the frozen ViT, ``X_l`` the tokens after block l (``feats[i]`` = output of block i + 1, from 0):

1. Anomaly tokens: patches of the penultimate output whose local outlier factor is above its 0.95 quantile become the
   mean of their normal 8-neighbours; the same positions are mended in ``feats[pre]``.
2. Similarity S of the mended mid-level features, thresholded at beta and row-normalised, aggregates the deep tokens.
3. Last-block attention = mean of softmax(3 (S - mean S), negatives cut) and the k-k attention; plus 0.3 CLS.
4. The result is aggregated once more by S' of the shallow ``feats[post]``.
5. The sum of ``feats[3..9]`` takes the same path and is added.

Deviations from the public code: any batch and any h x w (it handles one square image); distances from one Gram matrix
instead of an N x N x C difference tensor; fewer than k + 2 patches lower k. Block indices and the share of CLS are
published for ViT-B/16 (the code) and ViT-L/14 (its author, in an issue); elsewhere indices are scaled by depth: inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.dense_clip import DenseCLIP

# Looked at for what is inferred: SC-CLIP's public code and the issues of its repository.
METHODS = {
    "sc-clip": {
        "cls": "SCCLIP",
        "summary": "self-calibrated CLIP: outlier repair, self-adjusted features, multi-level aggregation",
        "paper": "Bai et al. 2024, arXiv 2411.15869",
        "protocol": "sc-clip",
    }
}
SCALED_FROM = 12  # blocks of the tower whose indices are scaled to others


@dataclass(frozen=True)
class SCClipConfig:
    """Constants of the public code; None: the backbone's own, :attr:`SCCLIP.BACKBONES`. Block indices count from 0."""

    neighbours: int = 30  # k of the local outlier factor, in patches
    contamination: float = 0.05  # share of patches called anomalous
    beta: float = 0.4  # similarities below are cut
    pre: int | None = None  # block whose features give S
    post: int | None = None  # block whose features give S'
    multi_first: int | None = None  # first block of the multi-level sum, inclusive
    multi_last: int | None = None  # last block of the multi-level sum, inclusive
    sharpness: float = 3.0  # factor on S - mean(S) before its softmax
    cls_weight: float | None = None  # share of the CLS token added to every patch
    scale_indices: bool | None = None  # block indices are of a tower of 12 blocks and are scaled by depth / 12


def local_outlier_factor(x: Tensor, neighbours: int) -> Tensor:
    """Local outlier factor (B, N) of points (B, N, C) with squared Euclidean distances.

    Args:
        x: Points, float32.
        neighbours: k nearest neighbours, self excluded; lowered to N - 1 where there are fewer.
    """
    k = min(neighbours, x.shape[1] - 1)
    if k < 1:
        return torch.ones(x.shape[:2], device=x.device)
    x = x - x.mean(dim=1, keepdim=True)  # distances stay, cancellation in the Gram form shrinks
    squares = x.square().sum(dim=-1)
    distance = squares[:, :, None] + squares[:, None, :] - 2 * x @ x.transpose(1, 2)  # (B, N, N)
    distance.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    nearest, index = distance.clamp_min(0).topk(k, dim=-1, largest=False)  # (B, N, k)
    reach = torch.maximum(nearest[..., -1:], nearest)
    density = k / reach.mean(dim=-1).clamp_min(1e-12)  # (B, N)
    around = density.gather(1, index.flatten(1)).view_as(nearest)
    return around.mean(dim=-1) / density


def outliers(x: Tensor, neighbours: int, contamination: float) -> Tensor:
    """Mask (B, N) of the points whose outlier factor is above its (1 - contamination) quantile, per image."""
    factor = local_outlier_factor(x, neighbours)
    return factor > torch.quantile(factor, 1 - contamination, dim=1, keepdim=True)


def repair(x: Tensor, outlier: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, C) with every outlier replaced by the mean of its normal 8-neighbours on the grid.

    An outlier without a normal neighbour keeps its value.
    """
    good = (~outlier).to(x.dtype)
    stack = torch.cat([x * good[..., None], good[..., None]], dim=-1)  # sums and counts in one pass
    image = F.pad(stack.unflatten(1, grid), (0, 0, 1, 1, 1, 1))  # (B, h+2, w+2, C+1)
    h, w = grid
    total = torch.zeros_like(stack).unflatten(1, grid)
    for dy in range(3):
        for dx in range(3):
            if (dy, dx) != (1, 1):
                total += image[:, dy : dy + h, dx : dx + w]
    total = total.flatten(1, 2)
    count = total[..., -1:]
    mean = total[..., :-1] / count.clamp_min(1)
    return torch.where(outlier[..., None] & (count > 0), mean, x)


def cosine_similarity(x: Tensor) -> Tensor:
    """Cosine similarities (B, N, N) between the points of (B, N, C)."""
    x = F.normalize(x, dim=-1)
    return x @ x.transpose(1, 2)


def aggregation(similarity: Tensor, beta: float) -> Tensor:
    """Row-normalised aggregation weights (B, N, N): similarities below beta set to 0."""
    kept = torch.where(similarity < beta, 0.0, similarity)
    return kept / (kept.sum(dim=-1, keepdim=True) + 1e-6)


def similarity_attention(similarity: Tensor, sharpness: float) -> Tensor:
    """softmax(sharpness (S - mean S)) over the entries above the image's mean, (B, N, N)."""
    centred = (similarity - similarity.mean(dim=(1, 2), keepdim=True)) * sharpness
    return centred.masked_fill(centred < 0, float("-inf")).softmax(dim=-1)


class SCCLIP(Method):
    """SC-CLIP on any CLIP ViT."""

    Config = SCClipConfig
    BACKBONES: ClassVar[dict[str, dict[str, Any]]] = {
        "ViT-B/16": {
            "source": "public code, clip/model.py and configs/base_config.py",
            "values": {
                "pre": 8, "post": 3, "multi_first": 3, "multi_last": 9, "cls_weight": 0.3, "scale_indices": True
            },
        },
        # its multi_end_idx is exclusive: 19 there is 18 here; constants that it does not name are those of ViT-B/16
        "ViT-L/14": {
            "source": "its author, issue 5 of SuleBai/SC-CLIP",
            "values": {
                "pre": 16, "post": 6, "multi_first": 8, "multi_last": 18, "cls_weight": 0.1, "scale_indices": False
            },
        },
    }  # fmt: skip
    ELSEWHERE = "with block indices scaled by depth"

    def __init__(self, clip: DenseCLIP, config: SCClipConfig | None = None) -> None:
        super().__init__(clip, config)
        c = self.config
        scale = clip.depth / SCALED_FROM if c.scale_indices else 1.0
        last = clip.depth - 2
        self.pre, self.post, self.first, self.last = (
            min(round(index * scale), last) for index in (c.pre, c.post, c.multi_first, c.multi_last)
        )

    def options(self) -> dict[str, Any]:
        """Constants in force; the block indices as used, and whether they are inferred."""
        return {
            **super().options(),
            "blocks_used": {"pre": self.pre, "post": self.post, "multi": [self.first, self.last]},
            "blocks_inferred": bool(self.config.scale_indices) and self.clip.depth != SCALED_FROM,
        }

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D), float32, of normalised images (B, 3, H, W)."""
        c, clip = self.config, self.clip
        deep = clip.depth - 2
        multi = range(self.first, self.last + 1)
        tokens = clip.tokens(images, {deep, self.pre, self.post, *multi})
        grid, feats = tokens.grid, {index: x.float() for index, x in tokens.after.items()}

        with torch.autocast(images.device.type, enabled=False):  # neighbour ranks and means need float32
            outlier = outliers(feats[deep][:, 1:], c.neighbours, c.contamination)
            similarity = cosine_similarity(repair(feats[self.pre][:, 1:], outlier, grid))
            attention = similarity_attention(similarity, c.sharpness)
            shallow = aggregation(cosine_similarity(feats[self.post][:, 1:]), c.beta)
            patches = aggregation(similarity, c.beta) @ repair(feats[deep][:, 1:], outlier, grid)
            levels = torch.stack([feats[index] for index in multi]).sum(dim=0)
        out = self._last_block(patches, feats[deep][:, :1], attention)
        out = out + self._last_block(levels[:, 1:], levels[:, :1], attention)
        with torch.autocast(images.device.type, enabled=False):
            out = shallow @ out
        dense: Tensor = clip.project(out).unflatten(1, grid)
        return dense

    def _last_block(self, patches: Tensor, cls: Tensor, attention: Tensor) -> Tensor:
        """Value aggregation (B, N, C) by the mean of ``attention`` and the k-k attention, plus a share of CLS."""
        _, k, v = self.clip.qkv(patches)
        kk = F.scaled_dot_product_attention(k, k, v)
        shared = attention.to(v.dtype)[:, None] @ v
        weight: float = self.config.cls_weight
        return self.clip.merge_heads((kk + shared) / 2).float() + weight * cls
