"""The interface of attention sources, and what all vision transformers among them share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError
from ovbench.networks.dense_clip import Grid

# Looked at for what is inferred: arXiv 2604.07723 (layer-wise averaged, no numbers of blocks), docs/discrepancy.md.
LAST_BLOCKS = 3  # blocks whose attention is averaged, from the trial on DINOv2-S/14; inferred
# Scores held at once while attention is added up: what stays in a CPU's cache; few launches on a GPU (64 MiB).
CPU_SCORES, GPU_SCORES = 2**20, 2**24


class AttentionSource(nn.Module, ABC):
    """One source.

    Attributes:
        name: Id of the source, see :func:`ovbench.networks.attention.source_names`.
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
        """Last layer's patch tokens (B, h, w, C), float32, of RGB images (B, 3, H, W) with values 0..255.

        Raises:
            UsageError: The source has attention only.
        """

    @abstractmethod
    def attention(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Self-attention between patches (B, N, N), float32, rows summing to 1, and the grid (h, w), N = h * w.

        The tensor is new at every call: the caller may change it.

        Args:
            images: RGB images (B, 3, H, W) with values 0..255.
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
    """A source that is a plain vision transformer: blocks over [prefix tokens, patches row-major].

    Attributes:
        depth: Number of blocks.
        prefix: Tokens before the patches: CLS and registers.
        averaged: The blocks whose attention is averaged, with all their heads.
    """

    depth: int
    prefix: int
    averaged: range

    def average(self, blocks: str | None) -> None:
        """Sets ``averaged``.

        Args:
            blocks: ``N`` for the last N, ``A-B`` for the blocks A to B (the first is 0); None is what the source is best
                at, see :meth:`default_blocks`.

        Raises:
            UsageError: Not so written, or blocks that are not there.
        """
        chosen = self.default_blocks()
        if blocks is not None:
            found = re.fullmatch(r"(\d+)(?:-(\d+))?", blocks)
            chosen = range(0)
            if found and found[2]:
                chosen = range(int(found[1]), int(found[2]) + 1)
            elif found:
                chosen = range(self.depth - int(found[1]), self.depth)
            if not chosen or chosen[0] < 0 or chosen[-1] >= self.depth:
                raise UsageError(
                    f"attention_blocks={blocks}: {self.name} has {self.depth} blocks, give 1 .. {self.depth} for so many "
                    f"of the last, or two from 0 to {self.depth - 1} as in 4-7."
                )
        self.averaged = chosen

    def default_blocks(self) -> range:
        """The last :data:`LAST_BLOCKS`."""
        return range(max(0, self.depth - LAST_BLOCKS), self.depth)

    def record(self) -> dict[str, Any]:
        """What a record should say of the source."""
        return {**super().record(), "attention_averaged": f"{self.averaged[0]}-{self.averaged[-1]}"}

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

    def attention(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Mean attention (B, N, N) of the chosen blocks' heads between patches, float32, rows rescaled to sum 1."""
        x, grid = self.embed(images)
        total = torch.zeros(x.shape[0], x.shape[1], x.shape[1], device=x.device)
        for index in range(self.averaged[-1] + 1):
            if index in self.averaged:
                add_attention(total, *self.query_key(index, x))
            if index < self.averaged[-1]:
                x = self.block(index, x)
        return between_patches(total, self.prefix), grid


def to_whole_patches(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) with sides resized bilinearly to the nearest multiple of ``patch``, at least one patch."""
    size = tuple(max(1, round(side / patch)) * patch for side in images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def add_attention(total: Tensor, q: Tensor, k: Tensor) -> None:
    """Adds every head's softmax(q k^T / sqrt d) to ``total`` (B, T, T), in float32 whatever the dtype of q and k.

    A few rows of one head are in memory at a time, so the extra memory does not grow with T^2. The products are float32
    too: they are a small part of the work, and scores rounded to bfloat16 would be wrong by several per cent.

    Args:
        total: Changed in place.
        q: Queries (B, heads, T, d).
        k: Keys (B, heads, T, d).
    """
    batch, heads, length, width = q.shape
    rows = max(1, (GPU_SCORES if q.is_cuda else CPU_SCORES) // (batch * length))
    with torch.autocast(q.device.type, enabled=False):
        for head in range(heads):
            keys = k[:, head].float().transpose(1, 2)  # (B, d, T)
            for start in range(0, length, rows):
                queries = q[:, head, start : start + rows].float() * width**-0.5
                total[:, start : start + rows] += (queries @ keys).softmax(dim=-1)


def between_patches(attention: Tensor, prefix: int) -> Tensor:
    """Attention (B, N, N) between patches, rows summing to 1, from sums of attention (B, prefix + N, prefix + N)."""
    patches = attention[:, prefix:, prefix:]
    return patches / patches.sum(dim=-1, keepdim=True)
