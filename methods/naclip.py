"""NACLIP: k-k attention that prefers a patch's neighbourhood (Hajimiri et al., arXiv 2404.08181).

Attention is softmax(k k^T / sqrt d + omega) with omega_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)) over patch positions p in
units of patches, and 0 on the rows and columns of CLS. No residual, no MLP; CLS is dropped after. PAMR, which the released
configs turn on and the paper's headline numbers do without, is a switch of the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.models.method import Method
from ovbench.networks.dense_clip import DenseCLIP, Grid, LastBlock

METHODS = {
    "naclip": {
        "cls": "NACLIP",
        "summary": "neighbour-aware k-k attention, no residual, no MLP in the last block",
        "paper": "Hajimiri et al. 2024, arXiv 2404.08181",
        "protocol": "naclip",
    }
}


@dataclass(frozen=True)
class NACLIPConfig:
    """Constants of the public code."""

    sigma: float = 5.0  # standard deviation of the neighbourhood in patches: ``gaussian_std`` of its configs
    residual: bool = False  # its "reduced" architecture, the paper's model; True keeps residual and MLP ("vanilla")


def neighbourhood(grid: Grid, sigma: float, device: torch.device | None = None) -> Tensor:
    """Additive term omega (1 + N, 1 + N), float32: a Gaussian of the distance between patches, 0 for CLS (index 0)."""

    def axis(length: int) -> Tensor:
        position = torch.arange(length, device=device, dtype=torch.float32)
        return torch.exp(-(position[:, None] - position).square() / (2 * sigma**2))

    # the Gaussian of a 2-d distance is the product over both axes
    return F.pad(torch.kron(axis(grid[0]), axis(grid[1])), (1, 0, 1, 0))


class NACLIP(Method):
    """NACLIP on any CLIP ViT."""

    Config = NACLIPConfig
    # Looked at: code, configs, README and issues of sinahmr/NACLIP at 0cac3a6. They name no other backbone.
    BACKBONES: ClassVar[dict[str, dict[str, Any]]] = {
        "ViT-B/16": {"source": "public code, configs/base_config.py and README", "values": {}}
    }

    def __init__(self, clip: DenseCLIP, config: NACLIPConfig | None = None) -> None:
        super().__init__(clip, config)
        if not self.config.sigma > 0:
            raise UsageError(f"Option sigma={self.config.sigma}: a positive number of patches is needed, e.g. 5.")
        self._omega: dict[tuple[Grid, torch.dtype, torch.device], Tensor] = {}

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W)."""
        keep: bool = self.config.residual
        return self.clip.dense(images, LastBlock(self.attend, residual=keep, mlp=keep))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Output (B, heads, 1 + N, d) of the neighbour-aware k-k attention."""
        return F.scaled_dot_product_attention(k, k, v, attn_mask=self.omega(grid, k.dtype, k.device))

    def omega(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The additive term of a grid, made once."""
        if (
            torch.compiler.is_compiling()
        ):  # a table kept from inside a CUDA graph is overwritten by the graph's next run
            return neighbourhood(grid, self.config.sigma, device).to(dtype)
        key = (grid, dtype, device)
        if key not in self._omega:
            if len(self._omega) >= 8:  # whole-image runs meet many sizes, and N x N is large
                self._omega.clear()
            self._omega[key] = neighbourhood(grid, self.config.sigma, device).to(dtype)
        return self._omega[key]
