"""Second image encoders that show what some of their blocks say of an image: SAM and DINOv2, frozen, or none.

LSMSeg fuses such maps with CLIP's. An encoder takes RGB images 0..255, normalises them itself and answers on its own grid.
"""

from __future__ import annotations

from torch import Tensor

from ovbench.errors import unknown_name
from ovbench.networks.attention_names import VITS
from ovbench.networks.attention_vit import ViTSource, load_vit
from ovbench.networks.sam import SAMS, load_sam
from ovbench.networks.visual_base import VisualEncoder

# Looked at for what is inferred: thesis ch. 5 (Table 5.6 names DINOv2-B alone), DINOv2's public code, which gives any
# blocks.
NONE = "none"
# Name here: name of the attention source with the same network. The small one is in no table; it runs on a CPU.
DINO = {"dinov2-b": "dinov2-b14", "dinov2-s": "dinov2-s14"}


class DinoEncoder(VisualEncoder):
    """DINOv2, all of whose blocks attend globally: those at the depths of the last three global ones of SAM-B (inferred).

    Args:
        name: Its id.
        source: The network.
    """

    def __init__(self, name: str, source: ViTSource) -> None:
        super().__init__()
        self.name, self.source = name, source
        self.weights, self.weights_sha256 = source.weights, source.weights_sha256
        self.width, self.patch = int(source.model.embed_dim), source.patch
        self.blocks = tuple(source.depth * quarter // 4 - 1 for quarter in (2, 3, 4))  # 5, 8, 11 of 12
        self.requires_grad_(False).eval()

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs (B, C, h, w), float32, of the blocks, before the final norm."""
        x, grid = self.source.embed(images)
        found = []
        for index in range(self.blocks[-1] + 1):
            x = self.source.block(index, x)
            if index in self.blocks:
                found.append(x[:, self.source.prefix :].float().transpose(1, 2).unflatten(2, grid))
        return tuple(found)


def visual_names() -> list[str]:
    """Ids of all encoders, and ``none``."""
    return [NONE, *SAMS, *DINO]


def load_visual(name: str, weights: str | None = None, *, seed: int = 0) -> VisualEncoder | None:
    """A frozen encoder in float32 and evaluation mode on the CPU; None for ``none``.

    Args:
        name: See :func:`visual_names`.
        weights: None, or the repository's name, fetches the published weights from the hub (or its cache); ``"random"``
            gives the architecture alone; else a file, or for SAM a folder in transformers' layout.
        seed: Seed of random weights.

    Raises:
        UsageError: Unknown name.
        WeightsError: The download failed, or the file is missing, unreadable or does not fit.
    """
    if name not in visual_names():
        raise unknown_name("visual encoder", name, visual_names())
    if name == NONE:
        return None
    if name in DINO:
        weights = None if weights == VITS[DINO[name]].hub else weights  # as records name it
        return DinoEncoder(name, load_vit(DINO[name], weights, seed=seed))
    return load_sam(name, weights, seed=seed)
