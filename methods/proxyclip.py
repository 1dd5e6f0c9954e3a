"""ProxyCLIP: a second backbone says where CLIP's last block looks (Lan et al., arXiv 2408.04883).

S = cosine similarity of the second backbone's patch features (last layer's output tokens) on that backbone's own grid;
A = softmax(gamma (S - beta mean S)), entries below 0 cut, mean S over this image. CLIP's last-block values are resized
bilinearly to that grid before A is applied, so the features come out at the finer grid; no residual, no MLP, no CLS.

Deviations from the public code: its resize of the values swaps h and w, and its first release takes the mean over the
whole batch, right only for one square image; ours is per image and any shape. Where beta mean S exceeds every similarity
(a flat image), a patch keeps itself, and the public code gives NaN. Sizes that are no multiple of the second backbone's
patch are resized to one; the public code pads windows to multiples of 56.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.models.method import Method
from ovbench.networks.attention import AttentionSource, ClipSource, load_source
from ovbench.networks.dense_clip import DenseCLIP, Grid, LastBlock

METHODS = {
    "proxyclip": {
        "cls": "ProxyCLIP",
        "summary": "CLIP's values spread by the patch similarity of a second backbone (DINO B/8)",
        "paper": "Lan et al. 2024, arXiv 2408.04883",
        "protocol": "proxyclip",
    }
}


@dataclass(frozen=True)
class ProxyCLIPConfig:
    """Constants of the public code."""

    attention: str = "dino-b8"  # source of the similarity: ``vfm_model`` of its configs, ViT-B/8 in its code
    attention_weights: str | None = None  # None: published weights from the hub; a file; or "random"
    beta: float = 1.2  # factor on the mean similarity, the threshold
    gamma: float = 3.0  # sharpness of the softmax


def proxy_attention(guide: Tensor, beta: float, gamma: float) -> Tensor:
    """Attention (B, N, N), float32, rows summing to 1, from features (B, C, h, w) of the second backbone, N = h * w."""
    with torch.autocast(guide.device.type, enabled=False):  # near the threshold, low precision decides at random
        x = F.normalize(guide.float().flatten(2), dim=1)  # (B, C, N)
        similarity = x.transpose(1, 2) @ x  # (B, N, N)
        scores = similarity.sub_(beta * similarity.mean(dim=(1, 2), keepdim=True)).mul_(gamma)
        cut = scores < 0
        cut.diagonal(dim1=1, dim2=2).fill_(False)  # a patch is most similar to itself: no row is cut to nothing
        attention: Tensor = scores.masked_fill_(cut, float("-inf")).softmax(dim=-1)
    return attention


def spread(values: Tensor, grid: Grid, attention: Tensor, size: Grid) -> Tensor:
    """Values (B, heads, H*W, d) on the grid ``size`` = (H, W), mixed by ``attention`` (B, H*W, H*W).

    Args:
        values: The last block's values (B, heads, 1 + h*w, d), CLS first.
        grid: CLIP's grid (h, w).
        attention: Row-stochastic, shared by all heads.
        size: The attention's grid.
    """
    batch, heads, _, width = values.shape
    image = values[:, :, 1:].permute(0, 1, 3, 2).reshape(batch, heads * width, *grid)  # (B, heads*d, h, w)
    if size != grid:
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    mixed = attention.to(image.dtype) @ image.flatten(2).transpose(1, 2)  # (B, H*W, heads*d)
    by_head: Tensor = mixed.unflatten(2, (heads, width)).transpose(1, 2)
    return by_head


def proxy_features(clip: DenseCLIP, x: Tensor, grid: Grid, guide: Tensor, beta: float, gamma: float) -> Tensor:
    """Dense features (B, H, W, D) on the grid of the second backbone's features ``guide`` (B, C, H, W).

    Args:
        clip: The CLIP.
        x: Input (B, 1 + h*w, C) of its last block.
        grid: CLIP's grid (h, w).
        guide: Features of the second backbone.
        beta: Factor on the mean similarity.
        gamma: Sharpness.
    """
    size = (guide.shape[-2], guide.shape[-1])
    attention = proxy_attention(guide, beta, gamma)
    rule = LastBlock(lambda q, k, v, _: spread(v, grid, attention, size), residual=False, mlp=False)
    dense: Tensor = clip.project(clip.apply_block(clip.depth - 1, x, grid, rule)).unflatten(1, size)
    return dense


class ProxyCLIP(Method):
    """ProxyCLIP on any CLIP ViT with any attention source."""

    Config = ProxyCLIPConfig
    OFFLINE_OPTIONS = {"attention": "clip"}  # noqa: RUF012 (declared as a ClassVar in Method)
    # its config names three backbones, and beta and gamma are the same for all (H/14 with laion2b_s32b_b79k)
    BACKBONES: ClassVar[dict[str, dict[str, Any]]] = {
        "ViT-B/16": {"source": "public code, configs/base_config.py", "values": {}},
        "ViT-L/14": {"source": "public code, configs/base_config.py", "values": {}},
        "ViT-H/14": {"source": "public code, configs/base_config.py", "values": {}},
    }

    def __init__(self, clip: DenseCLIP, config: ProxyCLIPConfig | None = None) -> None:
        super().__init__(clip, config)
        c = self.config
        self.source: AttentionSource = load_source(c.attention, c.attention_weights, clip=clip)

    def options(self) -> dict[str, Any]:
        """Constants in force, and what the second backbone was."""
        return {**super().options(), **self.source.record()}

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the matrices of both backbones in ``dtype``."""
        super().use_precision(dtype)
        self.source.use_precision(dtype)

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, H, W, D) on the second backbone's grid of normalised images (B, 3, h, w)."""
        clip, last = self.clip, self.clip.depth - 1
        tokens = clip.tokens(images, [last - 1])
        x, grid = tokens.after[last - 1], tokens.grid
        if isinstance(self.source, ClipSource):  # its tokens are one block away
            guide = self.source.patch_features(self.source.block(last, x), grid)
        else:  # both see the same pixels: CLIP drops what is beyond its last whole patch
            seen = images[..., : grid[0] * clip.patch, : grid[1] * clip.patch]
            guide = self.source.features(clip.denormalise(seen))
        return proxy_features(clip, x, grid, guide.permute(0, 3, 1, 2), self.config.beta, self.config.gamma)
