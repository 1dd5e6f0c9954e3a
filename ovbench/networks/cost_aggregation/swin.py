"""Aggregation in space: a pair of Swin blocks on the map of every class, guided by the image's features."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError
from ovbench.networks.cost_aggregation.guidance import guided_linear, over_classes

MASKED = -100.0  # added to scores between parts of a window that are no neighbours, as in Swin


@lru_cache(maxsize=16)
def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Added scores (windows, N, N), 0 or -100, float32, of the N = window^2 positions after a cyclic shift of the grid."""
    region = torch.zeros(height, width)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for row, rows in enumerate(cuts):
        for column, columns in enumerate(cuts):
            region[rows, columns] = 3 * row + column
    parts = windowed(region[None, None, :, :, None], window)[0, 0, :, :, 0]  # (windows, N)
    return (parts[:, None, :] != parts[:, :, None]).float() * MASKED


def windowed(x: Tensor, window: int) -> Tensor:
    """Windows (B, T, windows, N, C) of tokens (B, T, h, w, C), row by row, N = window^2."""
    batch, classes, height, width, channels = x.shape
    x = x.view(batch, classes, height // window, window, width // window, window, channels)
    return x.transpose(3, 4).reshape(batch, classes, -1, window * window, channels)


def unwindowed(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Tokens (B, T, h, w, C) of windows (B, T, windows, N, C)."""
    batch, classes, _, _, channels = x.shape
    x = x.view(batch, classes, height // window, width // window, window, window, channels)
    return x.transpose(3, 4).reshape(batch, classes, height, width, channels)


class WindowAttention(nn.Module):
    """Attention among the positions of a window; guidance joins queries and keys, not values.

    Args:
        dim: Width C.
        guidance_dim: Width G of the guidance.
        heads: Attention heads.
    """

    def __init__(self, dim: int, guidance_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim + guidance_dim, dim)
        self.k = nn.Linear(dim + guidance_dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.repeat = False

    def forward(self, x: Tensor, guidance: Tensor | None, mask: Tensor | None) -> Tensor:
        """Windows (B, T, windows, N, C) of windows; guidance (B, 1, windows, N, G), mask (windows, N, N)."""
        q = guided_linear(x, guidance, self.q.weight, self.q.bias, repeat=self.repeat)
        k = guided_linear(x, guidance, self.k.weight, self.k.bias, repeat=self.repeat)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in (q, k, self.v(x)))
        if self.repeat:  # attention as products of matrices that a counter sees
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, T, windows, heads, N, N)
            scores = scores if mask is None else scores + mask[:, None].to(scores)
            out = scores.softmax(dim=-1) @ v
        else:  # in four dimensions, for which there are fused kernels
            shape = q.shape
            keep = 3 if mask is None else 2  # windows beside heads where each window has its own mask
            q, k, v = (part.flatten(2, 3).flatten(0, 1) if keep == 2 else part.flatten(0, 2) for part in (q, k, v))
            added = None if mask is None else mask.repeat_interleave(self.heads, dim=0)[None].to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=added).view(shape)
        mixed: Tensor = self.proj(out.transpose(-2, -3).flatten(-2))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        dim: Width in and out.
        hidden: Width between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., C) of features."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwinBlock(nn.Module):
    """Window attention and MLP with residuals, pre-norm.

    Args:
        dim: Width C.
        guidance_dim: Width G of the guidance.
        heads: Attention heads.
        window: Side of a window in positions; a grid that is not larger is one window.
        shift: Cyclic shift in positions.
        mlp_ratio: Hidden width of the MLP over C (Swin's 4).
    """

    def __init__(self, dim: int, guidance_dim: int, heads: int, window: int, shift: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, guidance_dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Tokens (B, T, h, w, C) of tokens; guidance (B, 1, h, w, G), normalised already."""
        height, width = x.shape[2:4]
        window, shift = (self.window, self.shift) if min(height, width) > self.window else (min(height, width), 0)
        if height % window or width % window:
            raise UsageError(
                f"A grid of {height} x {width} does not divide into windows of {window}: choose another window size."
            )
        mask = shift_mask(height, width, window, shift).to(x.device) if shift else None

        def split(tokens: Tensor) -> Tensor:
            return windowed(tokens.roll((-shift, -shift), dims=(2, 3)) if shift else tokens, window)

        mixed = self.attn(split(self.norm1(x)), None if guidance is None else split(guidance), mask)
        back = unwindowed(mixed, window, height, width)
        x = x + (back.roll((shift, shift), dims=(2, 3)) if shift else back)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SwinPair(nn.Module):
    """A plain and a shifted Swin block; the guidance has one norm for both.

    Args:
        dim: Width C.
        guidance_dim: Width G of the guidance; 0: none.
        heads: Attention heads.
        window: Side of a window in positions.
    """

    def __init__(self, dim: int, guidance_dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.block_1 = SwinBlock(dim, guidance_dim, heads, window, 0)
        self.block_2 = SwinBlock(dim, guidance_dim, heads, window, window // 2)
        self.guidance_norm = nn.LayerNorm(guidance_dim) if guidance_dim else None

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Tokens (B, T, h, w, C) of tokens; guidance (B, h, w, G)."""
        if guidance is not None and self.guidance_norm is not None:
            guidance = self.guidance_norm(guidance)[:, None]
        return over_classes(lambda part: self.block_2(self.block_1(part, guidance), guidance), x)
