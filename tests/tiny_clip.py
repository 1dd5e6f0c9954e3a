"""A small random CLIP in OpenAI's format, made in a second, for tests that need any CLIP."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file


def tiny_state(
    seed: int = 0, *, layers: int = 12, width: int = 64, grid: int = 14, patch: int = 16
) -> dict[str, torch.Tensor]:
    """A state dict: ViT of ``layers`` blocks, ``grid`` x ``grid`` positions, embedding 32; 2 text blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(
            32,
            vision_cfg={
                "layers": layers, "width": width, "head_width": 64, "patch_size": patch, "image_size": patch * grid
            },
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
            quick_gelu=True,
        )  # fmt: skip
    # in float16, as OpenAI's releases are: that is what tells its activation
    return {key: value.detach().half().float() for key, value in model.state_dict().items() if key != "attn_mask"}


@lru_cache(maxsize=4)
def _cached(seed: int, layers: int) -> dict[str, torch.Tensor]:
    return tiny_state(seed, layers=layers)


def save_tiny(path: Path, seed: int = 0, *, layers: int = 12) -> Path:
    """Writes the state dict as .safetensors and returns the path."""
    save_file({key: value.contiguous() for key, value in _cached(seed, layers).items()}, path)
    return path


def photo(height: int = 250, width: int = 330, seed: int = 0) -> torch.Tensor:
    """A smooth random RGB image (3, H, W), uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 11, generator=generator) * 255
    fine = torch.rand(1, 3, height, width, generator=generator) * 40 - 20
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic") + fine
    return image[0].clamp(0, 255).to(torch.uint8)
