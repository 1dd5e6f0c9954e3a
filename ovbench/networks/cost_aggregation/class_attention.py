"""Aggregation across classes: linear attention among the classes at every position, guided by the text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.networks.cost_aggregation.guidance import guided_linear, over_positions

EPSILON = 1e-6  # of the public linear attention's normaliser


def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, the positive map of linear attention (Katharopoulos et al. 2020)."""
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """Linear attention; guidance joins queries and keys, not values.

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

    def forward(
        self,
        x: Tensor,
        guidance: Tensor | None,
        *,
        padding: tuple[Tensor, Tensor | None, int] | None = None,
        repeat: bool = False,
    ) -> Tensor:
        """Tokens (B, T, n, C), float32, of tokens at n positions; each position attends to itself in all classes.

        Args:
            x: Tokens.
            guidance: (B, T, 1, G).
            padding: A token (C,), its guidance (G,) and how many times they stand beside the classes at every position.
                All are alike, so they add one outer product, times their number, to the sum over classes.
            repeat: Concatenate the guidance as the public code does.
        """
        q = self._split(guided_linear(x, guidance, self.q.weight, self.q.bias, repeat=repeat)).float()
        k = self._split(guided_linear(x, guidance, self.k.weight, self.k.bias, repeat=repeat)).float()
        v = self._split(self.v(x)).float()  # (B, T, n, heads, d)
        with torch.autocast(x.device.type, enabled=False):  # sums over hundreds of classes
            q, k = feature_map(q), feature_map(k)
            mixed, total = torch.einsum("btnhd,btnhe->bnhde", k, v), k.sum(dim=1)
        if padding is not None:
            token, beside, count = padding
            added = self._split(guided_linear(token, beside, self.k.weight, self.k.bias)).float()  # (heads, d)
            value = self._split(self.v(token)).float()
            with torch.autocast(x.device.type, enabled=False):
                added = count * feature_map(added)
                mixed, total = mixed + added[..., None] * value[..., None, :], total + added
        with torch.autocast(x.device.type, enabled=False):
            share = torch.einsum("btnhd,bnhd->btnh", q, total) + EPSILON
            return (torch.einsum("btnhd,bnhde->btnhe", q, mixed) / share[..., None]).flatten(-2)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads


class ClassTransformer(nn.Module):
    """Linear attention and MLP across classes on a pooled grid, added to the input; short lists are padded.

    Fewer classes than ``pad_len`` are filled up by copies of a learned token, which all positions and images share.

    Args:
        dim: Width C.
        guidance_dim: Width G of the guidance; 0: none.
        heads: Attention heads.
        pad_len: Classes that a shorter list is filled up to; 0: never.
        pooling: Side of the squares of positions that are averaged before, with bilinear upsampling behind.
        mlp_ratio: Hidden width of the MLP over C.
    """

    def __init__(
        self, dim: int, guidance_dim: int, heads: int, pad_len: int, pooling: int = 1, mlp_ratio: int = 4
    ) -> None:
        super().__init__()
        self.pad_len, self.pooling = pad_len, pooling
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = LinearAttention(dim, guidance_dim, heads)
        self.MLP = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.ReLU(), nn.Linear(mlp_ratio * dim, dim))
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.padding_guidance = nn.Parameter(torch.zeros(1, 1, guidance_dim)) if guidance_dim else None
        self.repeat = False

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Tokens (B, T, h, w, C) of tokens; guidance (B, T, G)."""
        grid = x.shape[2:4]
        # The public code adds its input before and behind the upsampling, so it counts twice.
        tokens = self._pool(x)  # (B, T, n, C)
        small = (grid[0] // self.pooling, grid[1] // self.pooling)
        guided = None if guidance is None else guidance[:, :, None]
        missing = max(0, self.pad_len - x.shape[1])
        if missing and self.repeat:
            tokens, guided = self._filled(tokens, guided, missing)
        padding = None
        if missing and not self.repeat:
            beside = None if self.padding_guidance is None else self.padding_guidance[0, 0]
            padding = (self.norm1(self.padding_tokens[0, 0]), beside, missing)

        def attended(part: Tensor) -> Tensor:
            part = part + self.attention(self.norm1(part), guided, padding=padding, repeat=self.repeat)
            out: Tensor = part + self.MLP(self.norm2(part))
            return out

        tokens = over_positions(attended, tokens)
        return x + self._unpool(tokens, small, (grid[0], grid[1]))[:, : x.shape[1]]

    def _filled(self, tokens: Tensor, guided: Tensor | None, missing: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and guidance with the padding as further classes."""
        batch, _, positions, _ = tokens.shape
        tokens = torch.cat([tokens, self.padding_tokens[:, None].expand(batch, missing, positions, -1)], dim=1)
        if guided is not None and self.padding_guidance is not None:
            guided = torch.cat([guided, self.padding_guidance[:, None].expand(batch, missing, 1, -1)], dim=1)
        return tokens, guided

    def _pool(self, x: Tensor) -> Tensor:
        if self.pooling == 1:
            return x.flatten(2, 3)
        maps = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), self.pooling)
        pooled: Tensor = maps.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        return pooled

    def _unpool(self, tokens: Tensor, small: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Tokens (B, T, h, w, C) of tokens (B, T, n, C) on a smaller grid."""
        out: Tensor
        if small == grid:
            out = tokens.unflatten(2, grid)
            return out
        maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, small)
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=True)
        out = maps.permute(0, 2, 3, 1).unflatten(0, tokens.shape[:2])
        return out
