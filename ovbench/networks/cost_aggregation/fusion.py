"""Visual fusion of LSMSeg: features of a second encoder beside CLIP's, as one guidance of the same width.

Three levels of CLIP guide the aggregation: two blocks the decoder, the dense output the aggregation in space. Each takes one
of the three maps of the second encoder, earlier with earlier (inferred).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Looked at for what is inferred: thesis ch. 5 (Eq. 5.1, Table 5.7 and its text); LMSeg, arXiv 2412.00364; the public
# CAT-Seg, whose three maps these are.
KINDS = ("add", "concat", "attention")
HEADS = 4  # of the attention: inferred, as in the aggregation
WEIGHT = 0.5  # initial w of E = w F_clip + (1 - w) F_visual


class Fusion(nn.Module):
    """CLIP's maps enriched by those of a second encoder.

    The other maps are brought linearly to CLIP's width and bilinearly to its grid, F. Then ``add``: w F_clip + (1 - w) F with
    one learned w for all levels; ``concat``: a linear map of both side by side; ``attention``: each position of CLIP asks all
    positions of F, and what it finds is added to it. What the last two do precisely, and that w is shared, is inferred.

    Args:
        kind: One of :data:`KINDS`.
        visual_width: Channels of the second encoder's maps.
        widths: Channels of CLIP's maps, level by level.
    """

    def __init__(self, kind: str, visual_width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.ModuleList(nn.Linear(visual_width, width) for width in widths)
        if kind == "add":
            self.weight = nn.Parameter(torch.tensor(WEIGHT))
        elif kind == "concat":
            self.mix = nn.ModuleList(nn.Linear(2 * width, width) for width in widths)
        else:
            self.attend = nn.ModuleList(CrossAttention(width) for width in widths)

    def forward(self, clip: Sequence[Tensor], visual: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, C_l, h_l, w_l) for each level of CLIP's, of its maps and the second encoder's (B, C, h, w)."""
        return tuple(
            self._level(level, mine, other) for level, (mine, other) in enumerate(zip(clip, visual, strict=True))
        )

    def _level(self, level: int, mine: Tensor, other: Tensor) -> Tensor:
        other = self.project[level](other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if other.shape[-2:] != mine.shape[-2:]:
            other = F.interpolate(other.float(), size=mine.shape[-2:], mode="bilinear", align_corners=False)
        if self.kind == "add":
            return self.weight * mine + (1 - self.weight) * other
        grid = (mine.shape[-2], mine.shape[-1])
        x, y = (part.flatten(2).transpose(1, 2) for part in (mine, other))  # (B, N, C_l)
        found = (
            self.mix[level](torch.cat([x, y.to(x.dtype)], dim=-1))
            if self.kind == "concat"
            else x + self.attend[level](x, y)
        )
        out: Tensor = found.transpose(1, 2).unflatten(2, grid)
        return out


class CrossAttention(nn.Module):
    """Softmax attention of one set of tokens to another, both normed.

    Args:
        dim: Width of both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_q, self.norm_kv = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tokens (B, N, C), of tokens x (B, N, C) that ask and y (B, M, C) that are asked."""
        y = self.norm_kv(y)
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q(self.norm_q(x)), self.k(y), self.v(y))
        )
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out
