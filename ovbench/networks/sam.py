"""SAM's image encoder (Kirillov et al., arXiv 2304.02643) through transformers, on images of any size.

Outputs of the last three blocks that attend globally; all others attend in windows of 14 x 14 patches. Off the size of its
training (1024 x 1024), position embeddings are resized bicubically to the grid (inferred: SAM's own code has one size),
tables of relative positions linearly, as SAM's code and transformers do; windows beyond the edge are padded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.networks.dense_clip import Grid
from ovbench.networks.published import fetched, random_digest
from ovbench.networks.state_dict import read_state_dict, require_finite
from ovbench.networks.visual_base import VisualEncoder
from ovbench.paths import user_path

MEAN = (123.675, 116.28, 103.53)  # of SAM's preprocessing, RGB 0..255
STD = (58.395, 57.12, 57.375)
SHOWN = 3  # global-attention blocks, from the last
INIT_STD = 0.02  # of random weights: transformers' own are 1e-10, with which nothing depends on the image
PREFIXES = {"vision_encoder.": True, "image_encoder.": False}  # transformers' layout, that of SAM's releases


# Looked at for what is inferred: SAM's public code and its issues 84 and 374 (one size only), SAMed (hitachinsk/SAMed,
# issue 28: bilinear), DINOv2's code (bicubic).
@dataclass(frozen=True)
class SamSizes:
    """Sizes of one encoder; those of ViT-B by default."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    globals_at: tuple[int, ...] = (2, 5, 8, 11)
    mlp: int = 3072
    patch: int = 16
    window: int = 14
    grid: int = 64  # patches a side of the images it was trained on: 1024 pixels


@dataclass(frozen=True)
class SamRecipe:
    """A published encoder: its sizes, and the repository of the hub that has it."""

    sizes: SamSizes
    hub: str


SAMS = {
    "sam-b": SamRecipe(SamSizes(), "facebook/sam-vit-base"),
    "sam-l": SamRecipe(
        SamSizes(hidden=1024, layers=24, heads=16, globals_at=(5, 11, 17, 23), mlp=4096), "facebook/sam-vit-large"
    ),
}


class SamEncoder(VisualEncoder):
    """SAM's image encoder without its neck, which no block's output passes.

    Args:
        name: Its id.
        sizes: Its sizes.
        model: transformers' ``SamVisionEncoder``.
        weights: For records.
        weights_sha256: Content hash of the weights.
    """

    def __init__(self, name: str, sizes: SamSizes, model: Any, weights: str, weights_sha256: str) -> None:
        super().__init__()
        self.name, self.weights, self.weights_sha256 = name, weights, weights_sha256
        self.width, self.patch, self.blocks = sizes.hidden, sizes.patch, sizes.globals_at[-SHOWN:]
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs (B, C, h, w), float32, of the last global-attention blocks."""
        with torch.autocast(images.device.type, enabled=False):  # the residual stream stays float32
            images = (images.float() - self.mean) / self.std  # type: ignore[operator]
            x = self.model.patch_embed.projection(images).permute(0, 2, 3, 1)  # (B, h, w, C)
            x = x + resized_positions(self.model.pos_embed, (x.shape[1], x.shape[2]))
        found = []
        for index in range(self.blocks[-1] + 1):
            x = self.model.layers[index](x)
            if index in self.blocks:
                found.append(x.float().permute(0, 3, 1, 2))
        return tuple(found)


def resized_positions(embedding: Tensor, grid: Grid) -> Tensor:
    """Position embedding (1, h, w, C) on ``grid`` of one (1, H, W, C), bicubic."""
    if tuple(embedding.shape[1:3]) == grid:
        return embedding
    maps = F.interpolate(embedding.permute(0, 3, 1, 2).float(), size=grid, mode="bicubic", align_corners=False)
    return maps.permute(0, 2, 3, 1)


def random_sam(name: str, seed: int = 0, sizes: SamSizes | None = None) -> SamEncoder:
    """The architecture with seeded normal weights; biases are 0, norms 1."""
    sizes = SAMS[name].sizes if sizes is None else sizes
    model = _create(sizes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=INIT_STD)
    return SamEncoder(name, sizes, model, "random", random_digest(sizes, seed))


def load_sam(name: str, weights: str | None = None, *, seed: int = 0) -> SamEncoder:
    """An encoder of :data:`SAMS` in float32 and evaluation mode on the CPU.

    Args:
        name: Key of :data:`SAMS`.
        weights: None, or the repository's name, fetches the published weights from the hub (or its cache); ``"random"``
            gives the architecture alone; else a folder in transformers' layout, or a file in that layout or the one of
            SAM's releases.
        seed: Seed of random weights.

    Raises:
        WeightsError: The download failed, or the file is missing, unreadable or does not fit.
    """
    if weights == "random":
        return random_sam(name, seed)
    recipe = SAMS[name]
    published = weights is None or weights == recipe.hub  # as records name it
    path = (
        fetched(
            recipe.hub,
            f"of the visual encoder '{name}'",
            "Without a network give a file or folder with -o visual_weights=PATH, '-o visual_weights=random' (for timing), "
            "or '-o visual=none'.",
        )
        if published
        else user_path(str(weights))
    )
    shown = recipe.hub if published else path.name
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise WeightsError(
            f"No weights '{path}' for the visual encoder '{name}'. Give a .safetensors or .pth file of SAM, a folder with "
            f"model.safetensors, 'random', or leave visual_weights away to fetch {recipe.hub}."
        )
    state = encoder_state(read_state_dict(path), str(path))
    model = _create(recipe.sizes)
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} is {tuple(state[key].shape)}, needs {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    parts = [
        f"{label}: {'; '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for label, keys in problems.items()
        if keys
    ]
    if parts:
        raise WeightsError(f"'{path}' does not fit the visual encoder '{name}' ({'. '.join(parts)}).")
    require_finite(state.items(), path)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return SamEncoder(name, recipe.sizes, model, shown, sha256_of_file(path))


def encoder_state(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The image encoder's part of a state dict of SAM under transformers' names, without the neck.

    Raises:
        WeightsError: There is none.
    """
    for prefix, plain in PREFIXES.items():
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            return {
                key if plain else _renamed(key): value for key, value in found.items() if not key.startswith("neck.")
            }
    raise WeightsError(
        f"'{name}' has no image encoder of SAM: no key begins with {' or '.join(PREFIXES)}. Give the weights of "
        f"{' or '.join(recipe.hub for recipe in SAMS.values())}, or sam_vit_b/l_*.pth."
    )


def _renamed(key: str) -> str:
    """The name in transformers of a tensor of SAM's releases."""
    for old, new in (
        ("patch_embed.proj.", "patch_embed.projection."),
        ("blocks.", "layers."),
        (".norm", ".layer_norm"),
    ):
        key = key.replace(old, new)
    return key


def _create(sizes: SamSizes) -> Any:
    """An encoder of transformers of these sizes without its neck; what its weights are does not matter."""
    transformers: Any = importlib.import_module("transformers")  # takes seconds
    config = transformers.SamVisionConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        global_attn_indexes=list(sizes.globals_at),
        mlp_dim=sizes.mlp,
        patch_size=sizes.patch,
        window_size=sizes.window,
        image_size=sizes.grid * sizes.patch,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = transformers.SamVisionModel(config).vision_encoder
    model.neck = nn.Identity()
    return model.float()
