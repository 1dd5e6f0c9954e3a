"""Stable Diffusion 2 as an attention source: the UNet's self-attention, taken in one denoising call on a clean image.

Rombach et al., arXiv 2112.10752; as a source of the discrepancy solvers, arXiv 2604.07723. The image becomes latents by
the VAE's mode times its scaling factor, no noise is added, and the UNet runs once with the empty prompt's embedding.
Attention is that of the two up blocks of highest resolution, "up_0 + up_1" in the paper's naming: here ``up_0`` is
diffusers' ``up_blocks[-1]`` (latents' resolution, N patches) and ``up_1`` is ``up_blocks[-2]`` (half of it, N/4). Heads
and layers of a block are averaged; the coarser block is brought to N x N bilinearly over both patch axes, its rows are
rescaled to sum 1, and the two count half each.

A processor of diffusers, set on the self-attention of these two blocks only, does the ordinary attention and adds up the
maps; nothing is patched or hooked. What follows the last self-attention (one cross-attention, one MLP, the output
convolution) runs to no purpose: under 2 % of the work.

Inferred, the paper being silent: the timestep (it says small; 1, because the input carries no noise); images keep their
aspect ratio and get the area of ``size`` x ``size`` pixels, so N and the memory hardly depend on the shape; sides are
rounded to what all levels of the UNet divide (64 pixels); upsampling the coarser block rather than pooling the finer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.networks.attention_base import CPU_SCORES, GPU_SCORES, AttentionSource, add_attention
from ovbench.networks.dense_clip import Grid

# Looked at for what is inferred: arXiv 2604.07723, the public M2N2 (its UNet layers and sizes), diffusers. The paper
# names time step 0 as one that works.
SIZE = 512  # side in pixels that the weights were trained at: 64 x 64 latents, N = 4096
TIMESTEP = 1  # of 0..999; inferred


class Recorder:
    """Attention processor of diffusers: ordinary self-attention that also adds up its maps, over heads and layers.

    Attributes:
        total: Sum of the maps (B, N, N), float32; None before the first.
        maps: How many were added.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.maps = 0

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output (B, N, C) of a layer from its input (B, N, C)."""
        q, k, v = (
            project(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self.total is None:
            self.total = torch.zeros(q.shape[0], q.shape[2], q.shape[2], device=q.device)
        add_attention(self.total, q, k)
        self.maps += attn.heads
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](heads)
        return out

    def take(self) -> tuple[Tensor, int]:
        """The sum and the number of maps; starts anew."""
        if self.total is None:
            raise RuntimeError("no self-attention was run since the last call")
        taken = self.total, self.maps
        self.clear()
        return taken

    def clear(self) -> None:
        """Starts anew."""
        self.total, self.maps = None, 0


class SD2Source(AttentionSource):
    """Self-attention of a latent diffusion UNet of diffusers; it has no features.

    Args:
        unet: ``UNet2DConditionModel`` whose last two up blocks have self-attention.
        vae: ``AutoencoderKL``; its decoder is dropped.
        prompt: Embedding (1, tokens, D) of the empty prompt.
        size: Images get the area of a square of this side in pixels.
        timestep: Step of the denoising call.
        weights: For records.
        weights_sha256: Content hash of the weights.

    Raises:
        UsageError: A size or timestep out of range.
        WeightsError: The parts do not fit each other.
    """

    name = "sd2"

    def __init__(
        self,
        unet: Any,
        vae: Any,
        prompt: Tensor,
        *,
        size: int = SIZE,
        timestep: int = TIMESTEP,
        weights: str,
        weights_sha256: str,
    ) -> None:
        super().__init__()
        _require_fitting(unet, vae, prompt)
        self.patch = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.patch * 2**unet.num_upsamplers
        if size < self.multiple:
            raise UsageError(f"attention_size={size}: sd2 needs {self.multiple} pixels or more.")
        if not 0 <= timestep < 1000:
            raise UsageError(f"attention_timestep={timestep}: sd2 has steps 0 .. 999.")
        self.size, self.timestep, self.weights, self.weights_sha256 = size, timestep, weights, weights_sha256
        vae.decoder = vae.post_quant_conv = None
        vae.enable_slicing()  # one image at a time: at the image's resolution activations are large
        self.unet, self.vae = unet, vae
        self.register_buffer("prompt", prompt, persistent=False)
        self.recorders = (Recorder(), Recorder())  # up_0, up_1
        for recorder, block in zip(self.recorders, (unet.up_blocks[-1], unet.up_blocks[-2]), strict=True):
            for layer in _self_attentions(block):
                layer.set_processor(recorder)
        self.requires_grad_(False).eval()

    def use_precision(self, dtype: torch.dtype) -> None:
        """Run all of it in ``dtype``; the attention maps stay float32."""
        self.to(dtype)

    def record(self) -> dict[str, Any]:
        """What a record should say of the source."""
        return {**super().record(), "attention_size": self.size, "attention_timestep": self.timestep}

    def features(self, images: Tensor) -> Tensor:
        """Raises: sd2 has attention only."""
        raise UsageError(
            "The attention source 'sd2' has no patch features. Use dino-b8, dinov2-s14, dinov2-b14, dinov2-b14-reg or "
            "clip where features are needed."
        )

    def attention(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Self-attention (B, N, N) of the two finest up blocks, float32, rows summing to 1, and the grid (h, w)."""
        try:
            with torch.autocast(images.device.type, enabled=False):
                latents = self.latents(images)
                prompt = self.prompt.to(latents.dtype).expand(latents.shape[0], -1, -1)  # type: ignore[operator]
                self.unet(latents, self.timestep, prompt, return_dict=False)
            (fine, fine_maps), (coarse, coarse_maps) = (recorder.take() for recorder in self.recorders)
        finally:
            for recorder in self.recorders:
                recorder.clear()
        grid = (latents.shape[-2], latents.shape[-1])
        fine.mul_(0.5 / fine_maps)
        add_upsampled(fine, coarse.mul_(1 / coarse_maps), grid, (grid[0] // 2, grid[1] // 2), 0.5)
        return fine, grid

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) of RGB images (B, 3, H, W) with values 0..255, in the network's dtype."""
        size = fitted(images.shape[-2], images.shape[-1], self.size, self.multiple)
        images = images.float()
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        images = (images / 127.5 - 1).to(next(self.vae.parameters()).dtype)
        latents: Tensor = self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor
        return latents


def fitted(height: int, width: int, size: int, multiple: int) -> Grid:
    """Sides (h, w) with the area of ``size`` x ``size`` and about the given aspect ratio, multiples of ``multiple``."""
    stretch = math.sqrt(height / width)
    h, w = (max(1, round(side / multiple)) * multiple for side in (size * stretch, size / stretch))
    return h, w


def add_upsampled(total: Tensor, coarse: Tensor, grid: Grid, coarse_grid: Grid, weight: float) -> None:
    """Adds ``weight`` times ``coarse``, brought to the finer grid, to ``total``.

    Both patch axes are interpolated bilinearly; then rows are rescaled to sum 1 (interpolating the attended axis spreads
    a patch's share over several, and at borders over fewer). A few rows are in memory at a time.

    Args:
        total: (B, N, N), N = h * w; changed in place.
        coarse: (B, n, n), n = h' * w'.
        grid: (h, w).
        coarse_grid: (h', w').
        weight: Factor on the interpolated attention, whose rows sum to 1.
    """
    batch, patches = total.shape[:2]
    queries = _interpolated(coarse.transpose(1, 2), coarse_grid, grid).transpose(1, 2)  # (B, N, n)
    step = max(1, (GPU_SCORES if total.is_cuda else CPU_SCORES) // (batch * patches))
    for start in range(0, patches, step):
        rows = _interpolated(queries[:, start : start + step], coarse_grid, grid)  # (B, step, N)
        total[:, start : start + step] += rows.mul_(weight / rows.sum(dim=-1, keepdim=True))


def _interpolated(maps: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Maps (B, M, h*w) on ``grid`` at ``size``: (B, M, H*W)."""
    return F.interpolate(maps.unflatten(2, grid), size=size, mode="bilinear", align_corners=False).flatten(2)


def _self_attentions(block: Any) -> list[Any]:
    """The self-attention layers of an up block."""
    transformers = [layer for module in getattr(block, "attentions", []) for layer in module.transformer_blocks]
    return [layer.attn1 for layer in transformers]


def _require_fitting(unet: Any, vae: Any, prompt: Tensor) -> None:
    problem = None
    if len(unet.up_blocks) < 2 or not all(_self_attentions(block) for block in unet.up_blocks[-2:]):
        problem = "the last two up blocks of its UNet have no self-attention"
    elif unet.config.in_channels != vae.config.latent_channels:
        problem = f"its UNet takes {unet.config.in_channels} channels, its VAE gives {vae.config.latent_channels}"
    elif unet.config.cross_attention_dim != prompt.shape[-1]:
        problem = f"its UNet takes a prompt of width {unet.config.cross_attention_dim}, given is {prompt.shape[-1]}"
    elif unet.config.addition_embed_type is not None:
        problem = "its UNet needs more than a prompt"
    if problem:
        raise WeightsError(
            f"These weights are no Stable Diffusion 2: {problem}. Give those of SD 2 in diffusers' layout."
        )
