"""The attention sources by name, and what each published vision transformer among them is; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovbench.networks.dense_clip import PosInterp


@dataclass(frozen=True)
class ViTRecipe:
    """What is needed to build one published vision transformer.

    Attributes:
        arch: timm architecture.
        hub: Repository of its weights on the Hugging Face hub, in timm's layout.
        patch: Patch side in pixels.
        size: Side in pixels of the images that the position embeddings were trained on.
        pos_interp: How its own code resizes position embeddings.
        antialias: Whether it does so with antialiasing.
    """

    arch: str
    hub: str
    patch: int
    size: int
    pos_interp: PosInterp = "offset"
    antialias: bool = False


VITS = {
    "dino-b8": ViTRecipe("vit_base_patch8_224", "timm/vit_base_patch8_224.dino", 8, 224),
    "dinov2-s14": ViTRecipe("vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m", 14, 518),
    "dinov2-b14": ViTRecipe("vit_base_patch14_dinov2", "timm/vit_base_patch14_dinov2.lvd142m", 14, 518),
    "dinov2-b14-reg": ViTRecipe(
        "vit_base_patch14_reg4_dinov2", "timm/vit_base_patch14_reg4_dinov2.lvd142m", 14, 518, "size", antialias=True
    ),
}


def source_names() -> list[str]:
    """Ids of all sources."""
    return [*VITS, "sd2", "clip"]
