"""Pretrained weights of encoders from a file that the user has, put in strictly.

Read are the keys of mmsegmentation and mmpretrain, and of timm where its network is the same: ``resnet*c`` for ResNetV1c,
Swin (also as its authors name the keys) and ViT. Classifiers are left out, and what is new for segmentation (norms of the
maps) begins at its initial value; anything else that is missing, unknown or of another shape is an error. Position
embeddings and tables of relative positions of another grid are resized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import WeightsError
from ovbench.mm.compat import import_mmseg
from ovbench.networks.encoders import encoder
from ovbench.networks.state_dict import read_state_dict, require_finite
from ovbench.paths import user_path

State = dict[str, Tensor]

# Of classification checkpoints, by key; no map of the encoder needs them.
_CLASSIFIER = re.compile(r"(head|fc|classifier|pre_logits|head_dist)\.|(ln1|norm|fc_norm|ln_post)\.(weight|bias)$")
# Buffers that a network makes itself.
_MADE = re.compile(r"(relative_position_index|attn_mask|num_batches_tracked)$")
# Norms of the maps C1 .. C4, which a classifier has for the last one at most.
_NEW = re.compile(r"norm[0-3]\.(weight|bias)$")


def load_encoder(backbone: nn.Module, path: str | Path) -> None:
    """Fills a backbone of mmseg with a file's weights.

    Args:
        backbone: ``ResNetV1c``, ``SwinTransformer``, ``VisionTransformer`` or ``MSCAN``.
        path: Safetensors, or a torch file that holds tensors only.

    Raises:
        WeightsError: The file cannot be read or does not fit; lists the keys.
    """
    file = user_path(path)
    if not file.is_file():
        raise WeightsError(f"No file '{path}' with the encoder's pretrained weights.")
    kind = type(backbone).__name__
    state = _backbone_keys(read_state_dict(file))
    state = _LAYOUTS.get(kind, dict)(state)
    own = backbone.state_dict()
    # by its own keys first: MSCAN has norms of stages that look like a classifier's elsewhere
    state = {key: value for key, value in state.items() if key in own or not (_CLASSIFIER.match(key))}
    state = {
        key: _resized(key, value, own.get(key), file.name) for key, value in state.items() if not _MADE.search(key)
    }
    allowed = _NEW if kind == "SwinTransformer" else re.compile(r"$^")
    faults = {
        "missing": [key for key in own if key not in state and not _MADE.search(key) and not allowed.match(key)],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key in state if key in own and state[key].shape != own[key].shape],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {_few(keys)}" for what, keys in faults.items() if keys)
        raise WeightsError(f"'{file.name}' does not fit {kind}: {listed}.")
    require_finite(state.items(), file.name)
    backbone.load_state_dict(state, strict=False)  # what is not in it was allowed above


@lru_cache(maxsize=1)
def register() -> None:
    """Registers ``PretrainedEncoder`` in mmseg's ``MODELS``; the first call imports mmseg.

    ``dict(type="PretrainedEncoder", encoder="swin-b", weights="FILE")`` is the plain backbone, with a file's weights in it
    that ``init_weights`` leaves alone: the names of its parameters are those of a backbone that began at random.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    models = import_mmseg().registry.MODELS

    def pretrained_encoder(encoder: str, weights: str) -> nn.Module:
        return build_encoder(encoder, weights)

    models.register_module(name="PretrainedEncoder", module=pretrained_encoder)


def build_encoder(name: str, weights: str | Path | None = None) -> nn.Module:
    """An encoder's backbone (without neck), with a file's weights or mmseg's random ones.

    Raises:
        UsageError: Unknown name.
        WeightsError: The file cannot be read or does not fit.
        RunError: mmsegmentation is not installed or broken.
    """
    backbone: nn.Module = import_mmseg().registry.MODELS.build(encoder(name).backbone)
    if weights is not None:
        load_encoder(backbone, weights)
        backbone._is_init = True  # type: ignore[assignment]  # mmengine's mark: init_weights of the network skips it
    return backbone


def mmseg_keys(state: Mapping[str, Tensor]) -> State:
    """A backbone's tensors, from within a whole network, under mmseg's keys: those of Swin's authors are renamed."""
    return _swin_layout(dict(state))


def _backbone_keys(state: Mapping[str, Any]) -> State:
    """Tensors of the backbone, without the prefixes of the network around it."""
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    inside = {key.removeprefix("backbone."): value for key, value in found.items() if key.startswith("backbone.")}
    return inside or found


def _resnet_layout(state: State) -> State:
    """Keys of ``ResNetV1c``: timm names the stem's parts ``conv1.0 .. conv1.6`` and ``bn1``."""
    if "conv1.weight" in state and "stem.0.weight" not in state:
        raise WeightsError(
            "The file has a ResNet with one 7x7 convolution at the start (as torchvision's), but ResNetV1c begins with "
            "three of 3x3. Give weights of a V1c: mmseg's 'resnet50_v1c' or timm's 'resnet50c'."
        )
    if "conv1.0.weight" not in state:
        return state
    return {re.sub(r"^conv1\.", "stem.", re.sub(r"^bn1\.", "stem.7.", key)): value for key, value in state.items()}


def _swin_layout(state: State) -> State:
    """Keys of mmseg's Swin, from timm's or the authors' names; order of merged patches as ``nn.Unfold`` has it."""
    if "patch_embed.proj.weight" not in state:
        return state
    at_start = 0 if "layers.0.downsample.reduction.weight" in state else 1  # timm merges at the start of a stage
    found: State = {}
    for key, value in state.items():
        merging = re.match(r"layers\.(\d+)\.downsample\.(.*)", key)
        if merging is not None:
            name = f"stages.{int(merging[1]) - at_start}.downsample.{merging[2]}"
            found[name] = _unfold_order(value)
            continue
        key = key.replace("patch_embed.proj.", "patch_embed.projection.")
        key = re.sub(r"^layers\.", "stages.", key)
        key = re.sub(r"\.attn\.", ".attn.w_msa.", key)
        key = key.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        found[re.sub(r"^norm\.", "norm3.", key)] = value
    return found


def _unfold_order(value: Tensor) -> Tensor:
    """The last axis of 4 C merged channels, from patches (0,0), (1,0), (0,1), (1,1) one after another to Unfold's order.

    ``nn.Unfold`` has channels outside and patches (0,0), (0,1), (1,0), (1,1) inside.
    """
    patches: Tensor = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return patches.transpose(-1, -2).flatten(-2)


def _vit_layout(state: State) -> State:
    """Keys of mmseg's ViT, from timm's and mmpretrain's names."""
    found: State = {}
    for key, value in state.items():
        key = key.replace("patch_embed.proj.", "patch_embed.projection.")
        key = re.sub(r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.ln\2.", key)
        key = re.sub(r"^blocks\.", "layers.", key)
        key = key.replace(".attn.qkv.", ".attn.attn.in_proj_").replace(".attn.proj.", ".attn.attn.out_proj.")
        found[key.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")] = value
    return found


_LAYOUTS: dict[str, Callable[[State], State]] = {
    "ResNetV1c": _resnet_layout,
    "SwinTransformer": _swin_layout,
    "VisionTransformer": _vit_layout,
}


def _resized(key: str, value: Tensor, own: Tensor | None, name: str) -> Tensor:
    """A position embedding (1, 1 + N, D) or table of relative positions (M, heads) on the network's grid, bicubically."""
    if own is None or own.shape == value.shape or own.ndim != value.ndim or own.shape[-1] != value.shape[-1]:
        return value
    if key.endswith("pos_embed"):
        grid = _square(value[:, 1:].permute(0, 2, 1), own.shape[1] - 1, name)
        return torch.cat([value[:, :1], grid.permute(0, 2, 1)], dim=1)
    if key.endswith("relative_position_bias_table"):
        return _square(value.T[None], own.shape[0], name)[0].T.contiguous()
    return value


def _square(values: Tensor, positions: int, name: str) -> Tensor:
    """Values (1, C, N) of a square grid on one of ``positions`` positions."""
    old, new = round(values.shape[2] ** 0.5), round(positions**0.5)
    if old * old != values.shape[2] or new * new != positions:
        raise WeightsError(f"'{name}': positions of a grid that is not square cannot be resized.")
    grid = values.float().unflatten(2, (old, old))
    return F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).flatten(2).to(values.dtype)


def _few(keys: Iterable[str]) -> str:
    names = list(keys)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
