"""Decode heads of closed-set networks that add-ons are put into, and that stand beside them in efficiency tables.

Plain dicts for mmseg's ``MODELS``; torch and mmseg are imported only when a head is built. Values are those of mmsegmentation
1.2.2 (``configs/_base_/models``: ``fcn_r50-d8``, ``pspnet_r50-d8``, ``ccnet_r50-d8``, ``deeplabv3_r50-d8``,
``deeplabv3plus_r50-d8``, ``upernet_r50``), which give the parameters of thesis Tables 3.5 and 4.6 to 0.2 %. Differences:

* FCN has two convolutions and no concatenation of its input (thesis ch. 4: 11.87 M).
* Batch norm is plain instead of synchronised: the same parameters and operations, and it runs on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ovbench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from torch import nn

# Widths of ResNet-50's and ResNet-101's stages C1 .. C4. With stride 8 (dilated C3, C4), C2 .. C4 share one grid and C1
# has twice its side.
RESNET_CHANNELS = (256, 512, 1024, 2048)
NUM_CLASSES = 150  # ADE20K, the thesis' efficiency tables

_C4: dict[str, Any] = {"in_channels": RESNET_CHANNELS[3], "in_index": 3, "channels": 512}
_PYRAMID = (1, 2, 3, 6)
_DILATIONS = (1, 12, 24, 36)

HOSTS: dict[str, dict[str, Any]] = {
    "fcn": {"type": "FCNHead", **_C4, "num_convs": 2, "concat_input": False},
    "psp": {"type": "PSPHead", **_C4, "pool_scales": _PYRAMID},
    "ccnet": {"type": "CCHead", **_C4, "recurrence": 2},
    "deeplabv3": {"type": "ASPPHead", **_C4, "dilations": _DILATIONS},
    "deeplabv3plus": {
        "type": "DepthwiseSeparableASPPHead",
        **_C4,
        "dilations": _DILATIONS,
        "c1_in_channels": RESNET_CHANNELS[0],
        "c1_channels": 48,
    },
    "uper": {
        "type": "UPerHead",
        "in_channels": list(RESNET_CHANNELS),
        "in_index": [0, 1, 2, 3],
        "channels": 512,
        "pool_scales": _PYRAMID,
    },
}


ADDONS = ("caa", "ecac")  # modules beside this one whose ``build_head`` wraps a host; ids are ``<add-on>-<host>``


def addon_and_host(name: str) -> tuple[str | None, str]:
    """The two parts of a head's id: ``caa-psp`` is ("caa", "psp"), ``psp`` is (None, "psp")."""
    addon, dash, host = name.partition("-")
    return (addon, host) if dash and addon in ADDONS else (None, name)


def host_names() -> list[str]:
    """Ids of all hosts."""
    return list(HOSTS)


def head_config(name: str, num_classes: int = NUM_CLASSES) -> dict[str, Any]:
    """A host's decode head as a config of its own for mmseg's ``MODELS``.

    Args:
        name: See :func:`host_names`.
        num_classes: K.

    Raises:
        UsageError: Unknown name.
    """
    if name not in HOSTS:
        raise unknown_name("decode head", name, HOSTS)
    lists = {key: list(value) for key, value in HOSTS[name].items() if isinstance(value, list)}
    return {
        **HOSTS[name],
        **lists,
        "num_classes": num_classes,
        "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "align_corners": False,
    }


def build_head(name: str, num_classes: int = NUM_CLASSES) -> nn.Module:
    """A host's decode head with random weights, in evaluation mode; takes the list C1 .. C4 of feature maps.

    Raises:
        UsageError: Unknown name.
        RunError: mmsegmentation is not installed or broken.
    """
    config = head_config(name, num_classes)
    from ovbench.compat import import_mmseg

    head: nn.Module = import_mmseg().registry.MODELS.build(config)
    return head.eval()


def feature_grids(features: str) -> tuple[tuple[int, int], ...]:
    """Grids (h, w) of C1 .. C4 from text.

    Args:
        features: The grid of the stride-8 stages C2 .. C4, e.g. ``"64x64"`` (C1, at stride 4, is twice as fine), or all
            four: ``"128x128,64x64,32x32,16x16"``.

    Raises:
        UsageError: Neither of the two.
    """
    grids = [_grid(part, features) for part in features.split(",")]
    if len(grids) == 1:
        height, width = grids[0]
        return ((2 * height, 2 * width), *grids * 3)
    if len(grids) != len(RESNET_CHANNELS):
        raise UsageError(f"--features {features!r}: give one grid, e.g. 64x64, or the four of C1 to C4.")
    return tuple(grids)


def _grid(text: str, given: str) -> tuple[int, int]:
    height, x, width = text.strip().lower().partition("x")
    if not x or not height.isdigit() or not width.isdigit() or int(height) < 1 or int(width) < 1:
        raise UsageError(f"--features {given!r}: {text.strip()!r} is no grid HEIGHTxWIDTH, e.g. 64x64.")
    return int(height), int(width)


def feature_shapes(grids: Sequence[tuple[int, int]], batch: int = 1) -> list[tuple[int, int, int, int]]:
    """Shapes (B, C, h, w) of C1 .. C4."""
    return [(batch, channels, *grid) for channels, grid in zip(RESNET_CHANNELS, grids, strict=True)]
