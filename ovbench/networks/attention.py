"""Second backbones that say which patches belong together: features and self-attention behind one interface.

A source takes RGB images 0..255 of any size, normalises them itself, and answers on a patch grid of its own that spans
the whole image: sides that are no multiple of its patch are first resized bilinearly to the nearest multiple.
:mod:`ovbench.networks.attention_base` is the interface; a further source is a class of it, known to :func:`load_source`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ovbench.errors import UsageError, unknown_name
from ovbench.networks.attention_base import AttentionSource, TransformerSource, to_whole_patches
from ovbench.networks.attention_names import source_names
from ovbench.networks.attention_sd2 import SIZE, TIMESTEP
from ovbench.networks.attention_sd2_weights import load_sd2
from ovbench.networks.attention_vit import load_vit
from ovbench.networks.dense_clip import DenseCLIP, Grid

# Looked at for what is inferred: arXiv 2604.07723 (its table of sources says neither blocks nor features of CLIP),
# ProxyCLIP's public code for DINO's tokens, and the measurement said beside it.
__all__ = ["AttentionSource", "ClipSource", "TransformerSource", "load_source", "source_names"]


class ClipSource(TransformerSource):
    """The run's own CLIP vision tower; shares its parameters.

    Features are the last block's ordinary output behind ``ln_post``, before the projection: inferred, as the analogue of
    DINO's normed tokens.

    Args:
        clip: The loaded CLIP.
        blocks: Blocks whose attention is averaged, see :meth:`TransformerSource.average`.
    """

    name = "clip"
    prefix = 1

    def __init__(self, clip: DenseCLIP, blocks: str | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.patch, self.depth = clip.patch, clip.depth
        self.average(blocks)
        self.weights = Path(clip.weights).name if Path(clip.weights).is_file() else clip.weights
        self.weights_sha256 = clip.weights_sha256
        self.eval()

    def default_blocks(self) -> range:
        """The middle third of the tower: inferred.

        The last blocks of a CLIP look at the same few patches from everywhere. Measured on the built-in CLIP: of a
        patch's attention, .77 to .80 falls on its own class in blocks 4 to 6 of 12, .69 in block 7, .50 in block 8 and
        .22 to .57 in the last three, where chance is .38 to .47.
        """
        return range(self.depth // 3, max(self.depth // 3 + 1, 2 * self.depth // 3))

    @property
    def params(self) -> int:
        """Parameters of the vision tower."""
        return sum(parameter.numel() for parameter in self.clip.visual.parameters())

    def use_precision(self, dtype: torch.dtype) -> None:
        """The tower's own rule."""
        self.clip.use_precision(dtype)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens of RGB images 0..255."""
        return self.clip.embed(self.clip.normalise(to_whole_patches(images.float(), self.patch)))

    def block(self, index: int, x: Tensor) -> Tensor:
        """Output (B, T, C) of one ordinary block."""
        return self.clip.block(index, x)

    def query_key(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key (B, heads, T, d) of one block."""
        q, k, _ = self.clip.qkv(x, index)
        return q, k

    def norm(self, x: Tensor) -> Tensor:
        """The tower's ``ln_post``."""
        out: Tensor = self.clip.visual.ln_post(x)
        return out


def load_source(
    name: str,
    weights: str | Path | None = None,
    *,
    clip: DenseCLIP | None = None,
    seed: int = 0,
    blocks: str | None = None,
    size: int | None = None,
    timestep: int | None = None,
) -> AttentionSource:
    """A frozen source in float32 and evaluation mode, on the device of ``clip`` (else on the CPU).

    Args:
        name: See :func:`source_names`.
        weights: None fetches the published weights from the hub (or its cache); ``"random"`` gives the architecture
            alone; else the path of a state dict in timm's or the authors' layout, for ``"sd2"`` of a folder in
            diffusers' layout or the name of another repository of the hub.
        clip: The run's CLIP; needed for ``"clip"``.
        seed: Seed of random weights.
        blocks: Of transformers: blocks whose attention is averaged, ``N`` or ``A-B``; None is the source's own choice.
        size: Of ``"sd2"``: its images have the area of a square of this side in pixels; None is 512.
        timestep: Of ``"sd2"``: step of the one denoising call; None is 1.

    Raises:
        UsageError: Unknown name, weights for ``"clip"``, an option that the source does not have or cannot take, or
            diffusers is missing for ``"sd2"``.
        WeightsError: The download failed, or the file is missing, unreadable or does not fit.
    """
    if name not in source_names():
        raise unknown_name("attention source", name, source_names())
    _only_its_options(name, blocks=blocks, size=size, timestep=timestep)
    if name == "clip":
        if weights is not None:
            raise UsageError("The attention source 'clip' is the run's own CLIP: leave attention_weights away.")
        if clip is None:
            raise ValueError("the attention source 'clip' needs the loaded CLIP")
        return ClipSource(clip, blocks)
    source: AttentionSource
    if name == "sd2":
        source = load_sd2(
            weights,
            seed=seed,
            size=SIZE if size is None else size,
            timestep=TIMESTEP if timestep is None else timestep,
        )
    else:
        source = load_vit(name, weights, seed=seed, blocks=blocks)
    return source if clip is None else source.to(next(clip.parameters()).device)


def _only_its_options(name: str, **options: int | str | None) -> None:
    """Refuses options that would be ignored; names them as methods do."""
    known = ("attention_size", "attention_timestep") if name == "sd2" else ("attention_blocks",)
    shown = {"blocks": "attention_blocks", "size": "attention_size", "timestep": "attention_timestep"}
    given = [shown[option] for option, value in options.items() if value is not None]
    ignored = [option for option in given if option not in known]
    if ignored:
        raise UsageError(
            f"The attention source '{name}' has no option {' or '.join(ignored)}. It has: {', '.join(known)}."
        )
