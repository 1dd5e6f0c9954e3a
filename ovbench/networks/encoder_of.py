"""Which encoder a state dict is of, by its keys and shapes.

Strides and dilations leave no mark in weights: encoders that differ in these alone are all named, in the order of the list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ovbench.networks.encoders import encoder, encoder_names


def encoders_of(state: Mapping[str, Tensor]) -> list[str]:
    """Ids of the encoders whose network has these weights; empty where it is none of ours.

    Args:
        state: Of an mmseg backbone, without prefix.
    """
    found = _sizes(state)
    return [] if found is None else [name for name in encoder_names() if _config_sizes(encoder(name).backbone) == found]


def _blocks(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Blocks of each stage, by a pattern for keys with groups for the stage and the block."""
    stages: dict[int, int] = {}
    for key in state:
        found = re.match(pattern, key)
        if found is not None:
            stages[int(found[1])] = max(stages.get(int(found[1]), 0), int(found[2]) + 1)
    return [stages[stage] for stage in sorted(stages)]


# Blocks of layers 1 .. 4 to depth; mmseg's ResNet knows no others that are ours.
_DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101}


def _sizes(state: Mapping[str, Tensor]) -> tuple[Any, ...] | None:
    """Kind and sizes of a backbone as its weights show them."""
    if "stem.0.weight" in state:
        depth = _DEPTHS.get(tuple(_blocks(state, r"layer(\d)\.(\d+)\.")))
        return "ResNetV1c", depth, 2 * len(state["stem.0.weight"])
    if "patch_embed.projection.weight" in state and (table := state.get(_TABLE)) is not None:
        window = (round(len(table) ** 0.5) + 1) // 2  # (2 w - 1)^2 relative positions
        depths = _blocks(state, r"stages\.(\d)\.blocks\.(\d+)\.")
        return "SwinTransformer", len(state["patch_embed.projection.weight"]), tuple(depths), window
    if "patch_embed1.proj.0.weight" in state:
        widths = [len(state[f"norm{stage}.weight"]) for stage in (1, 2, 3, 4) if f"norm{stage}.weight" in state]
        return "MSCAN", tuple(widths), tuple(_blocks(state, r"block(\d)\.(\d+)\."))
    return None


_TABLE = "stages.0.blocks.0.attn.w_msa.relative_position_bias_table"


def _config_sizes(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The same, of a config."""
    if config["type"] == "ResNetV1c":
        return "ResNetV1c", config["depth"], config["stem_channels"]
    if config["type"] == "SwinTransformer":
        return "SwinTransformer", config["embed_dims"], tuple(config["depths"]), config["window_size"]
    if config["type"] == "MSCAN":
        return "MSCAN", tuple(config["embed_dims"]), tuple(config["depths"])
    return None


def difference(name: str, given: Mapping[str, Any]) -> str | None:
    """The first setting of a foreign backbone's config that leaves no mark in the weights and is not the encoder's; or None.

    Args:
        name: Encoder id.
        given: Config for mmseg's ``MODELS``.
    """
    own = {**_PLAIN, **encoder(name).backbone}
    for key in _UNSEEN:
        if key in own and key in given and listed(given[key]) != listed(own[key]):
            return f"{key}={given[key]}"
    return None


_PLAIN: dict[str, Any] = {"multi_grid": None, "dcn": None, "plugins": None}
_UNSEEN: Sequence[str] = (*_PLAIN, "strides", "dilations", "contract_dilation", "patch_size", "num_heads", "style")


def listed(value: Any) -> Any:
    """A setting of a config, in which lists and tuples are the same."""
    return list(value) if isinstance(value, tuple) else value
