"""DINO and DINOv2 as attention sources: timm's vision transformers on images of any size, and their weights.

DINO: Caron et al., arXiv 2104.14294. DINOv2: Oquab et al., arXiv 2304.07193; with registers: Darcet et al., arXiv
2309.16588. Position embeddings are resized as each model's own code does it: bicubic by scale with an offset of 0.1 for
DINO and plain DINOv2, to the exact size with antialiasing for the register models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovbench.errors import WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.networks.attention_base import TransformerSource, to_whole_patches
from ovbench.networks.attention_names import VITS, ViTRecipe
from ovbench.networks.dense_clip import Grid, resize_position_embedding
from ovbench.networks.published import fetched, random_digest
from ovbench.networks.state_dict import read_state_dict, require_finite
from ovbench.paths import user_path

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)


class ViTSource(TransformerSource):
    """A vision transformer of timm on images of any size.

    Args:
        name: Id of the source.
        model: timm ``VisionTransformer`` without a head.
        recipe: How its images are embedded.
        weights: For records.
        weights_sha256: Content hash of the weights.
        blocks: Blocks whose attention is averaged, see :meth:`TransformerSource.average`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        recipe: ViTRecipe,
        weights: str,
        weights_sha256: str,
        blocks: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.patch, self.weights, self.weights_sha256 = name, recipe.patch, weights, weights_sha256
        self.model = model
        self.recipe = recipe
        self.depth, self.prefix = len(model.blocks), int(model.num_prefix_tokens)
        self.average(blocks)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self._positions: dict[tuple[Grid, torch.device], Tensor] = {}
        self.requires_grad_(False).eval()

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens with positions, [CLS, registers, patches]; float32 under autocast too, where it costs nothing."""
        with torch.autocast(images.device.type, enabled=False):
            images = (to_whole_patches(images.float(), self.patch) - self.mean) / self.std  # type: ignore[operator]
            patches = self.model.patch_embed.proj(images)  # (B, C, h, w)
        grid = (patches.shape[-2], patches.shape[-1])
        x = patches.flatten(2).transpose(1, 2)
        position = self._position(grid, x.device)
        prefix = self.model.cls_token + position[:, :1]
        if self.model.reg_token is not None:
            prefix = torch.cat([prefix, self.model.reg_token], dim=1)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x + position[:, 1:]], dim=1), grid

    def _position(self, grid: Grid, device: torch.device) -> Tensor:
        """Position embedding (1, 1 + N, C); its first row, of CLS, is zero where the model has none."""
        key = (grid, device)
        if key not in self._positions:
            embedding = self.model.pos_embed[0]
            if self.model.no_embed_class:
                embedding = torch.cat([torch.zeros_like(embedding[:1]), embedding])
            r, trained = self.recipe, self.model.patch_embed.grid_size
            if len(self._positions) >= 64:  # whole-image runs meet many sizes
                self._positions.clear()
            self._positions[key] = resize_position_embedding(embedding, trained, grid, r.pos_interp, r.antialias)[None]
        return self._positions[key]

    def block(self, index: int, x: Tensor) -> Tensor:
        """Output (B, T, C) of one block, float32."""
        out: Tensor = self.model.blocks[index](x)
        return out

    def query_key(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key (B, heads, T, d) of one block."""
        block = self.model.blocks[index]
        qkv = block.attn.qkv(block.norm1(x))
        q, k, _ = qkv.view(*x.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        return block.attn.q_norm(q), block.attn.k_norm(k)

    def norm(self, x: Tensor) -> Tensor:
        """Final layer norm."""
        out: Tensor = self.model.norm(x)
        return out


def load_vit(name: str, weights: str | Path | None = None, *, seed: int = 0, blocks: str | None = None) -> ViTSource:
    """A source of :data:`VITS` in float32 and evaluation mode on the CPU.

    Args:
        name: Key of :data:`VITS`.
        weights: None fetches the published weights from the hub (or its cache); ``"random"`` gives the architecture
            alone; else the path of a state dict in timm's or the authors' layout.
        seed: Seed of random weights.
        blocks: Blocks whose attention is averaged, see :meth:`TransformerSource.average`.

    Raises:
        UsageError: More blocks are asked for than there are.
        WeightsError: The download failed, or the file is missing, unreadable or does not fit.
    """
    recipe = VITS[name]
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(recipe, recipe.size)
        return ViTSource(name, model, recipe, "random", random_digest(recipe.arch, seed), blocks)
    path = (
        fetched(
            recipe.hub,
            f"of the attention source '{name}'",
            "Without a network give a file with -o attention_weights=FILE, '-o attention_weights=random' (for timing), or "
            "use the run's own CLIP with '-o attention=clip'.",
        )
        if weights is None
        else user_path(weights)
    )
    shown = recipe.hub if weights is None else path.name
    return ViTSource(name, _from_file(name, recipe, path), recipe, shown, sha256_of_file(path), blocks)


def _create(recipe: ViTRecipe, size: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(recipe.arch, pretrained=False, num_classes=0, img_size=size)
    return model


def _from_file(name: str, recipe: ViTRecipe, path: Path) -> nn.Module:
    """The model with a file's weights, all keys and shapes checked."""
    if not path.is_file():
        raise WeightsError(
            f"No weights file '{path}' for the attention source '{name}'. Give an existing state dict, 'random', or "
            f"leave attention_weights away to fetch {recipe.hub}."
        )
    state = _timm_layout({key: value for key, value in read_state_dict(path).items() if isinstance(value, Tensor)})
    model = _create(recipe, _trained_size(state, recipe))
    expected = model.state_dict()
    problems = {
        "shapes differ": [
            f"{key} is {tuple(value.shape)}, needs {tuple(expected[key].shape)}"
            for key, value in state.items()
            if key in expected and value.shape != expected[key].shape
        ],
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
    }
    parts = [
        f"{label}: {'; '.join(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}"
        for label, items in problems.items()
        if items
    ]
    if parts:
        raise WeightsError(f"'{path}' does not fit the attention source '{name}' ({recipe.arch}): {'. '.join(parts)}.")
    require_finite(state.items(), path)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model


def _timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in timm's layout, from timm's own or the one that DINO and DINOv2 publish."""
    state = {key: value for key, value in state.items() if key != "mask_token"}  # of the training objective only
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():  # timm folds CLS's position into CLS
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def _trained_size(state: dict[str, Tensor], recipe: ViTRecipe) -> int:
    """Side in pixels of the images that a file's position embeddings are for; the recipe's where that is unclear."""
    position = state.get("pos_embed")
    if position is None or position.ndim != 3:
        return recipe.size
    rows = position.shape[1] - (0 if "reg_token" in state else 1)
    side = round(rows**0.5)
    return side * recipe.patch if side * side == rows else recipe.size
