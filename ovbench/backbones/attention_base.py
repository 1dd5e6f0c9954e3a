"""The interface of attention sources, and what all vision transformers among them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.backbones.dense_clip import Grid
from ovbench.errors import UsageError

LAST_BLOCKS = 3  # blocks whose attention is averaged, from the trial on DINOv2-S/14; inferred


class AttentionSource(nn.Module, ABC):
    """One source.

    Attributes:
        name: Id of the source, see :func:`ovbench.backbones.attention.source_names`.
        patch: Side of a cell of its grid in pixels.
        weights: ``random``, a hub repository or a file's name, for records.
        weights_sha256: Content hash of the weights.
    """

    name: str
    patch: int
    weights: str
    weights_sha256: str

    @property
    def params(self) -> int:
        """Number of parameters that run."""
        return sum(parameter.numel() for parameter in self.parameters())

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Last layer's patch tokens (B, h, w, C), float32, of RGB images (B, 3, H, W) with values 0..255."""

    @abstractmethod
    def attention(self, images: Tensor, last_blocks: int = LAST_BLOCKS) -> tuple[Tensor, Grid]:
        """Self-attention between patches (B, N, N), float32, rows summing to 1, and the grid (h, w), N = h * w.

        Args:
            images: RGB images (B, 3, H, W) with values 0..255.
            last_blocks: How many of the last blocks are averaged, with all their heads.
        """

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the blocks' matrices in ``dtype``, so that autocast need not convert them at every forward."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def record(self) -> dict[str, Any]:
        """What a record should say of the source."""
        return {
            "attention": self.name,
            "attention_weights": self.weights,
            "attention_weights_sha256": self.weights_sha256,
            "attention_random": self.weights == "random",
            "attention_patch": self.patch,
            "attention_params": self.params,
        }


class TransformerSource(AttentionSource):
    """A source that is a plain vision transformer: blocks over [prefix tokens, patches row-major]."""

    depth: int
    prefix: int  # tokens before the patches: CLS and registers

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, prefix + N, C) that enter the first block, and the grid, from RGB images 0..255."""

    @abstractmethod
    def block(self, index: int, x: Tensor) -> Tensor:
        """Output (B, T, C) of one block."""

    @abstractmethod
    def query_key(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key of one block, each (B, heads, T, d), from its input (B, T, C)."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Final layer norm."""

    def features(self, images: Tensor) -> Tensor:
        """Last block's patch tokens (B, h, w, C) behind the final norm, float32."""
        x, grid = self.embed(images)
        for index in range(self.depth):
            x = self.block(index, x)
        return self.patch_features(x, grid)

    def patch_features(self, x: Tensor, grid: Grid) -> Tensor:
        """Patch features (B, h, w, C), float32, from the last block's output (B, T, C)."""
        features: Tensor = self.norm(x[:, self.prefix :]).float().unflatten(1, grid)
        return features

    def attention(self, images: Tensor, last_blocks: int = LAST_BLOCKS) -> tuple[Tensor, Grid]:
        """Mean attention (B, N, N) of the last blocks' heads between patches, float32, rows rescaled to sum 1.

        Raises:
            UsageError: Fewer than one block, or more than there are.
        """
        if not 1 <= last_blocks <= self.depth:
            raise UsageError(f"last_blocks={last_blocks}: {self.name} has {self.depth} blocks, give 1 .. {self.depth}.")
        x, grid = self.embed(images)
        total = torch.zeros(x.shape[0], x.shape[1], x.shape[1], device=x.device)
        for index in range(self.depth):
            if index >= self.depth - last_blocks:
                add_attention(total, *self.query_key(index, x))
            if index < self.depth - 1:
                x = self.block(index, x)
        return between_patches(total, self.prefix), grid


def to_whole_patches(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) with sides resized bilinearly to the nearest multiple of ``patch``, at least one patch."""
    size = tuple(max(1, round(side / patch)) * patch for side in images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def add_attention(total: Tensor, q: Tensor, k: Tensor) -> None:
    """Adds every head's softmax(q k^T / sqrt d), in float32, to ``total`` (B, T, T); one head at a time in memory.

    Args:
        total: Changed in place.
        q: Queries (B, heads, T, d).
        k: Keys (B, heads, T, d).
    """
    with torch.autocast(q.device.type, enabled=False):
        scale = q.shape[-1] ** -0.5
        for head in range(q.shape[1]):
            scores = (q[:, head].float() * scale) @ k[:, head].float().transpose(1, 2)
            total += scores.softmax(dim=-1)


def between_patches(attention: Tensor, prefix: int) -> Tensor:
    """Attention (B, N, N) between patches, rows summing to 1, from sums of attention (B, prefix + N, prefix + N)."""
    patches = attention[:, prefix:, prefix:]
    return patches / patches.sum(dim=-1, keepdim=True)
