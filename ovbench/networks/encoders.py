"""Image encoders of closed-set networks: configs for mmseg's ``MODELS`` with four feature maps C1 .. C4 each.

Values are those of mmsegmentation 1.2.2 (``configs/_base_/models`` and the folders ``swin``, ``vit``, ``segnext``), which
also initialises them. ``vit-l`` has the neck of mmseg's UperNet with ViT, so that it gives four maps as the others do, and the
patch embedding's bias, which pretrained files have and mmseg's configs silently drop.
InternImage is not here: it is in none of timm, transformers and mmsegmentation, and its operator needs a CUDA extension
that no maintained package builds.

Plain data: nothing heavy is imported. Pretrained weights are read by :mod:`ovbench.networks.encoder_weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ovbench.errors import unknown_name

# ImageNet's statistics in RGB on a scale of 0 .. 255, as all of these encoders were pretrained with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Encoder:
    """An encoder and what the rest of a network must know of it.

    Attributes:
        name: Encoder id.
        backbone: Config for mmseg's ``MODELS``.
        channels: Channels of C1 .. C4, after the neck.
        strides: Pixels per position of C1 .. C4.
        neck: Config of what turns the backbone's maps into C1 .. C4; None where they are that.
        crop: Side in pixels of training crops that mmseg's configs use.
        mean: Subtracted from RGB images of 0 .. 255.
        std: Divided by, likewise.
    """

    name: str
    backbone: dict[str, Any]
    channels: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    neck: dict[str, Any] | None = None
    crop: int = 512
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD


def _resnet(name: str, depth: int, base: int = 64, stride: int = 8) -> Encoder:
    """ResNet with the stem of three 3x3 convolutions (V1c): dilated last stages for an output stride of 8, none for 32."""
    dilated = stride == 8
    backbone = {
        "type": "ResNetV1c",
        "depth": depth,
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "stem_channels": base,
        "base_channels": base,
        "strides": (1, 2, 1, 1) if dilated else (1, 2, 2, 2),
        "dilations": (1, 1, 2, 4) if dilated else (1, 1, 1, 1),
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": False,
        "style": "pytorch",
        "contract_dilation": True,
    }
    wide = base * (1 if depth < 50 else 4)
    return Encoder(name, backbone, (wide, 2 * wide, 4 * wide, 8 * wide), (4, 8, 8, 8) if dilated else (4, 8, 16, 32))


def _swin(name: str, width: int, depths: Sequence[int], heads: int, window: int, image: int) -> Encoder:
    backbone = {
        "type": "SwinTransformer",
        "pretrain_img_size": image,
        "embed_dims": width,
        "patch_size": 4,
        "window_size": window,
        "mlp_ratio": 4,
        "depths": list(depths),
        "num_heads": [heads, 2 * heads, 4 * heads, 8 * heads],
        "strides": (4, 2, 2, 2),
        "out_indices": (0, 1, 2, 3),
        "qkv_bias": True,
        "patch_norm": True,
        "drop_path_rate": 0.3,
        "use_abs_pos_embed": False,
        "act_cfg": {"type": "GELU"},
        "norm_cfg": {"type": "LN", "requires_grad": True},
    }
    return Encoder(name, backbone, (width, 2 * width, 4 * width, 8 * width), (4, 8, 16, 32))


def _vit(name: str, width: int, layers: int, heads: int, crop: int = 512) -> Encoder:
    backbone = {
        "type": "VisionTransformer",
        "img_size": (crop, crop),
        "patch_size": 16,
        "embed_dims": width,
        "num_layers": layers,
        "num_heads": heads,
        "mlp_ratio": 4,
        "out_indices": tuple(layers * part // 4 - 1 for part in (1, 2, 3, 4)),
        "qkv_bias": True,
        "patch_bias": True,
        "with_cls_token": True,
        "norm_cfg": {"type": "LN", "eps": 1e-6},
        "act_cfg": {"type": "GELU"},
        "interpolate_mode": "bicubic",
    }
    neck = {"type": "MultiLevelNeck", "in_channels": [width] * 4, "out_channels": width, "scales": [4, 2, 1, 0.5]}
    return Encoder(name, backbone, (width, width, width, width), (4, 8, 16, 32), neck, crop)


def _mscan(name: str, widths: tuple[int, int, int, int], depths: Sequence[int], drop_path: float) -> Encoder:
    backbone = {
        "type": "MSCAN",
        "embed_dims": list(widths),
        "mlp_ratios": [8, 8, 4, 4],
        "drop_rate": 0.0,
        "drop_path_rate": drop_path,
        "depths": list(depths),
        "attention_kernel_sizes": [5, [1, 7], [1, 11], [1, 21]],
        "attention_kernel_paddings": [2, [0, 3], [0, 5], [0, 10]],
        "act_cfg": {"type": "GELU"},
        "norm_cfg": {"type": "BN", "requires_grad": True},
    }
    return Encoder(name, backbone, widths, (4, 8, 16, 32))


_ENCODERS = {
    found.name: found
    for found in (
        _resnet("tiny", 18, base=16),  # for trials on a CPU, from random weights
        _resnet("resnet18-v1c", 18),
        _resnet("resnet50-v1c", 50),
        _resnet("resnet101-v1c", 101),
        _resnet("resnet18-v1c-d32", 18, stride=32),  # the strides of mmseg's UperNet
        _resnet("resnet50-v1c-d32", 50, stride=32),
        _resnet("resnet101-v1c-d32", 101, stride=32),
        _swin("swin-t", 96, (2, 2, 6, 2), 3, 7, 224),
        _swin("swin-s", 96, (2, 2, 18, 2), 3, 7, 224),
        _swin("swin-b", 128, (2, 2, 18, 2), 4, 12, 384),
        _swin("swin-b-w7", 128, (2, 2, 18, 2), 4, 7, 224),
        _swin("swin-l", 192, (2, 2, 18, 2), 6, 12, 384),
        _swin("swin-l-w7", 192, (2, 2, 18, 2), 6, 7, 224),
        _vit("vit-l", 1024, 24, 16),
        _mscan("mscan-t", (32, 64, 160, 256), (3, 3, 5, 2), 0.1),
        _mscan("mscan-s", (64, 128, 320, 512), (2, 2, 4, 2), 0.1),
        _mscan("mscan-b", (64, 128, 320, 512), (3, 3, 12, 3), 0.1),
        _mscan("mscan-l", (64, 128, 320, 512), (3, 5, 27, 3), 0.3),
    )
}


def encoder_names() -> list[str]:
    """Ids of all encoders."""
    return list(_ENCODERS)


def encoder(name: str) -> Encoder:
    """An encoder by its id, with configs of its own.

    Raises:
        UsageError: Unknown name.
    """
    if name not in _ENCODERS:
        raise unknown_name("encoder", name, _ENCODERS)
    return copy.deepcopy(_ENCODERS[name])


def encoder_config(name: str, weights: str | None = None) -> dict[str, Any]:
    """Parts of a network's config: ``backbone`` and, where the encoder has one, ``neck``.

    Args:
        name: Encoder id.
        weights: File with pretrained weights, which the backbone then begins with; see
            :func:`ovbench.networks.encoder_weights.load_encoder`. None leaves mmseg's random initialisation.

    Raises:
        UsageError: Unknown name.
    """
    found = encoder(name)
    backbone = found.backbone
    if weights is not None:
        backbone = {"type": "PretrainedEncoder", "encoder": name, "weights": weights}
    return {"backbone": backbone, **({} if found.neck is None else {"neck": found.neck})}
