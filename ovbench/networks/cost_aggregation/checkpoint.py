"""Public CAT-Seg checkpoints: their keys to a CLIP and an aggregator, and back; sizes read from the shapes.

A checkpoint holds ``sem_seg_head.predictor.clip_model.*`` (OpenAI's names, but query, key and value weights of the attention
apart), ``sem_seg_head.predictor.transformer.*`` (the aggregator) and ``upsample1.*``, ``upsample2.*`` (transposed
convolutions of CLIP's features). What ``ovbench train`` leaves has the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.networks.clip_weights import OPENAI_MEAN
from ovbench.networks.cost_aggregation.aggregator import AggregatorConfig
from ovbench.networks.cost_aggregation.swin import shift_mask
from ovbench.networks.dense_clip import DenseCLIP

CLIP = "sem_seg_head.predictor.clip_model."
AGGREGATOR = "sem_seg_head.predictor.transformer."
UPSAMPLE = ("upsample1.", "upsample2.")
MASK = ".attn_mask"  # a buffer of the public code that follows from the window's size
PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # RGB
PIXEL_STD = (68.5005327, 66.6321579, 70.3231630)
PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Checkpoint(NamedTuple):
    """A public checkpoint by its parts.

    Attributes:
        clip: CLIP's state in OpenAI's format.
        head: State of the aggregator (``aggregator.*``) and of the transposed convolutions (``upsample1.*``).
        grid: Side of the feature grid that the checkpoint is for, in patches; None where it does not say.
        window: Side of a Swin window; None where it does not say.
    """

    clip: dict[str, Tensor]
    head: dict[str, Tensor]
    grid: int | None
    window: int | None


def is_checkpoint(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the public code's names."""
    return any(key.startswith((CLIP, AGGREGATOR)) for key in state)


def read(state: Mapping[str, Any], name: str, parts: tuple[str, ...] = UPSAMPLE) -> Checkpoint:
    """The parts of a public checkpoint.

    Args:
        state: Its state dict.
        name: The file, for messages.
        parts: What keys of the head begin with, beside those of the aggregator.

    Raises:
        WeightsError: With the keys that belong to no part, or the parts of an attention that are missing.
    """
    clip: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if key.startswith(AGGREGATOR) and key.endswith(MASK):
            masks[key] = value
        elif key.startswith(AGGREGATOR):
            head[f"aggregator.{key.removeprefix(AGGREGATOR)}"] = value
        elif key.startswith(CLIP):
            clip[key.removeprefix(CLIP)] = value
        elif key.startswith(parts):
            head[key] = value
        else:
            unknown.append(key)
    refuse(name, unknown=unknown, missing=[] if clip else [f"{CLIP}*"])
    grid, window = _grid_of(masks, name)
    return Checkpoint(joined(clip, name), head, grid, window)


def joined(clip: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """CLIP's state with query, key and value weights of each attention in one matrix, as OpenAI's files have it.

    Raises:
        WeightsError: Some of the three are missing.
    """
    found = {key: value for key, value in clip.items() if not key.endswith(PARTS)}
    places = {key.rpartition(".")[0] for key in clip if key.endswith(PARTS)}
    refuse(
        name, missing=[f"{CLIP}{place}.{part}" for place in places for part in PARTS if f"{place}.{part}" not in clip]
    )
    for place in places:
        found[f"{place}.in_proj_weight"] = torch.cat([clip[f"{place}.{part}"] for part in PARTS])
    return found


def public_state(clip: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the public names, which :func:`read` takes back.

    Args:
        clip: State of open_clip's model, query, key and value weights apart or together.
        head: ``aggregator.*``, ``upsample1.*``, ``upsample2.*``.
    """
    found: dict[str, Tensor] = {}
    for key, value in clip.items():
        place, _, name = key.rpartition(".")
        if name == "in_proj_weight":
            found |= {f"{CLIP}{place}.{part}": rows for part, rows in zip(PARTS, value.chunk(3), strict=True)}
        else:
            found[CLIP + key] = value
    return found | {public_name(key): value for key, value in head.items()}


def public_name(key: str) -> str:
    """The public code's name of a tensor that is not CLIP's."""
    return AGGREGATOR + key.removeprefix("aggregator.") if key.startswith("aggregator.") else key


def read_config(head: Mapping[str, Tensor], name: str, *, window: int, heads: int, keep: int) -> AggregatorConfig:
    """The sizes of an aggregator from the shapes of its state.

    Args:
        head: State as in :class:`Checkpoint`.
        name: The file, for messages.
        window: Side of a Swin window, which no shape tells.
        heads: Attention heads, which no shape tells.
        keep: Classes that go on, and that shorter lists are filled up to.

    Raises:
        WeightsError: A tensor that tells a size is missing.
    """
    needed = [
        "aggregator.conv1.weight", "aggregator.guidance_projection.0.weight",
        "aggregator.text_guidance_projection.0.weight", "aggregator.decoder1.conv.double_conv.0.weight",
        "aggregator.decoder2.conv.double_conv.0.weight", "aggregator.decoder_guidance_projection.0.0.weight",
        "aggregator.decoder_guidance_projection.1.0.weight",
    ]  # fmt: skip
    refuse(name, missing=[key.replace("aggregator.", AGGREGATOR) for key in needed if key not in head])
    conv1, image, text, first, second, guide1, guide2 = (head[key].shape for key in needed)
    layers = {key.split(".")[2] for key in head if key.startswith("aggregator.layers.")}
    return AggregatorConfig(
        text_dim=text[1],
        image_dim=image[1],
        text_proj=text[0],
        image_proj=image[0],
        decoder_dims=(first[0], second[0]),
        decoder_guidance=(guide1[1], guide2[1]),
        decoder_proj=(guide1[0], guide2[0]),
        hidden=conv1[0],
        layers=len(layers),
        heads=heads,
        window=window,
        prompts=conv1[1],
        pad_len=keep,
        keep=keep,
    )


def refuse(
    name: str,
    *,
    missing: list[str] | None = None,
    unknown: list[str] | None = None,
    shapes: list[str] | None = None,
) -> None:
    """Nothing, if all lists are empty.

    Raises:
        WeightsError: Names the keys.
    """
    parts = []
    for label, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if keys:
            shown = ", ".join(sorted(keys)[:5])
            parts.append(f"{label}: {shown}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}")
    if parts:
        raise WeightsError(
            f"'{name}' is no complete CAT-Seg checkpoint ({'; '.join(parts)}). Give a public one (model_final.pth or the "
            "same tensors as .safetensors) or the model.safetensors of 'ovbench train'."
        )


def _grid_of(masks: Mapping[str, Tensor], name: str) -> tuple[int | None, int | None]:
    """Side of the grid and of a window that the masks of the shifted windows were made for."""
    if not masks:
        return None, None
    windows, positions, _ = next(iter(masks.values())).shape
    window, across = round(positions**0.5), round(windows**0.5)
    expected = shift_mask(window * across, window * across, window, window // 2)
    wrong = [
        key for key, mask in masks.items() if mask.shape != expected.shape or not torch.equal(mask.float(), expected)
    ]
    refuse(name, shapes=wrong)
    return window * across, window


def with_public_statistics(clip: DenseCLIP) -> DenseCLIP:
    """The CLIP with the pixel statistics and the position embeddings of the public code.

    OpenAI's statistics are not rounded there, as they are in the code of the training-free methods, and position
    embeddings are resized to the size.
    """
    clip.pos_interp = "size"
    if torch.equal(clip.mean.flatten().cpu(), torch.tensor(OPENAI_MEAN)):  # type: ignore[operator]
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            getattr(clip, name).copy_(torch.tensor(values).view(1, 3, 1, 1))
    return clip
