"""Decode heads of closed-set networks that add-ons are put into, and that stand beside them in efficiency tables.

Plain dicts for mmseg's ``MODELS``; torch and mmseg are imported only when a head is built. Values are those of mmsegmentation
1.2.2 (``configs/_base_/models``: ``fcn_r50-d8``, ``pspnet_r50-d8``, ``ccnet_r50-d8``, ``deeplabv3_r50-d8``,
``deeplabv3plus_r50-d8``, ``upernet_r50``, and the folder ``segnext``), which give the parameters of thesis Tables 3.5 and
4.6 to 0.2 %. Differences:

* FCN has two convolutions and no concatenation of its input (thesis ch. 4: 11.87 M) unless told otherwise.
* Batch norm is plain instead of synchronised: the same parameters and operations, and it runs on one device.
* ISNet is written here (:mod:`ovbench.methods.isnet`), and SegNeXt's evaluation repeats itself
  (:mod:`ovbench.methods.segnext`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ovbench.errors import UsageError, unknown_name
from ovbench.networks import encoders

if TYPE_CHECKING:
    from torch import Tensor

NUM_CLASSES = 150  # ADE20K, the thesis' efficiency tables

_C4: dict[str, Any] = {"in_index": 3, "channels": 512}
_PYRAMID = (1, 2, 3, 6)
_DILATIONS = (1, 12, 24, 36)

HOSTS: dict[str, dict[str, Any]] = {
    "fcn": {"type": "FCNHead", **_C4, "num_convs": 2, "concat_input": False},
    "psp": {"type": "PSPHead", **_C4, "pool_scales": _PYRAMID},
    "ccnet": {"type": "CCHead", **_C4, "recurrence": 2},
    "deeplabv3": {"type": "ASPPHead", **_C4, "dilations": _DILATIONS},
    "deeplabv3plus": {"type": "DepthwiseSeparableASPPHead", **_C4, "dilations": _DILATIONS, "c1_channels": 48},
    "uper": {"type": "UPerHead", "in_index": [0, 1, 2, 3], "channels": 512, "pool_scales": _PYRAMID},
    "isnet": {"type": "ISNetHead", **_C4},
    "segnext": {"type": "SegNeXtHead", "in_index": [1, 2, 3], "channels": 512},
}
# Widths of SegNeXt's head by encoder; others get that of mscan-b.
_SEGNEXT = {"mscan-t": 256, "mscan-s": 256, "mscan-b": 512, "mscan-l": 1024}

ADDONS = ("caa", "ecac")  # modules beside this one that put a head around a host's; ids are ``<add-on>-<host>``


def addon_and_host(name: str) -> tuple[str | None, str]:
    """The two parts of a head's id: ``caa-psp`` is ("caa", "psp"), ``psp`` is (None, "psp")."""
    addon, dash, host = name.partition("-")
    return (addon, host) if dash and addon in ADDONS else (None, name)


def host_names() -> list[str]:
    """Ids of all hosts."""
    return list(HOSTS)


def default_encoder(name: str) -> str:
    """Encoder id that a host stands on where none is named, and that its efficiency is told for."""
    return "mscan-b" if name == "segnext" else "resnet50-v1c"


def head_config(
    name: str,
    num_classes: int = NUM_CLASSES,
    *,
    encoder: str | None = None,
    in_channels: Sequence[int] | None = None,
    channels: int = 0,
    concat_input: bool | None = None,
) -> dict[str, Any]:
    """A host's decode head as a config of its own for mmseg's ``MODELS``.

    Args:
        name: See :func:`host_names`.
        num_classes: K.
        encoder: Encoder id; None takes :func:`default_encoder`.
        in_channels: Channels of C1 .. C4 other than the encoder's.
        channels: Width D of the feature before the classifier; 0 takes the published one.
        concat_input: Of FCN, whether its input is concatenated to what comes out of its convolutions; None is as above.

    Raises:
        UsageError: Unknown name.
    """
    if name not in HOSTS:
        raise unknown_name("decode head", name, HOSTS)
    encoder = encoder or default_encoder(name)
    in_channels = in_channels or encoders.encoder(encoder).channels
    config = copy.deepcopy(HOSTS[name])
    index = config["in_index"]
    config["in_channels"] = [in_channels[i] for i in index] if isinstance(index, list) else in_channels[index]
    if name == "deeplabv3plus":
        config["c1_in_channels"] = in_channels[0]
    if concat_input is not None:
        config["concat_input"] = concat_input
    norm: dict[str, Any] = {"type": "BN", "requires_grad": True}
    if name == "segnext":
        config["channels"] = channels or _SEGNEXT.get(encoder, config["channels"])
        config |= {"ham_channels": config["channels"], "ham_kwargs": {"MD_R": 16}}
        norm = {"type": "GN", "num_groups": math.gcd(32, config["channels"]), "requires_grad": True}
    return {
        **config,
        **({"channels": channels} if channels else {}),
        "num_classes": num_classes,
        "dropout_ratio": 0.1,
        "norm_cfg": norm,
        "align_corners": False,
    }


def register() -> None:
    """Registers the hosts that mmsegmentation lacks in its ``MODELS``; the first call imports mmseg.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    from ovbench.methods import isnet, segnext  # type: ignore[import-not-found]

    isnet.register()
    segnext.register()


def features(host: Any, inputs: Any) -> tuple[Tensor, Any]:
    """A host's feature before its classifier, and what its own losses need besides (None for most).

    Args:
        host: A head whose ``cls_seg`` was replaced by :func:`as_is`.
        inputs: C1 .. C4.
    """
    if hasattr(host, "features"):
        found: tuple[Tensor, Any] = host.features(inputs)
        return found
    return host(inputs), None


def feature_losses(host: Any, extra: Any, batch_data_samples: Any) -> dict[str, Tensor]:
    """The losses that a host has on its way to the feature, by name; empty for most."""
    return {} if extra is None else dict(host.feature_losses(extra, batch_data_samples))


def as_is(features: Tensor) -> Tensor:
    """Stands in for a host's classifier, so that the host's forward ends with its feature."""
    return features


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
    if len(grids) != 4:
        raise UsageError(f"--features {features!r}: give one grid, e.g. 64x64, or the four of C1 to C4.")
    return tuple(grids)


def default_grids(encoder: str) -> tuple[tuple[int, int], ...]:
    """Grids (h, w) of an encoder's C1 .. C4 for an input of 512 x 512 pixels."""
    return tuple((512 // stride, 512 // stride) for stride in encoders.encoder(encoder).strides)


def _grid(text: str, given: str) -> tuple[int, int]:
    height, x, width = text.strip().lower().partition("x")
    if not x or not height.isdigit() or not width.isdigit() or int(height) < 1 or int(width) < 1:
        raise UsageError(f"--features {given!r}: {text.strip()!r} is no grid HEIGHTxWIDTH, e.g. 64x64.")
    return int(height), int(width)


def feature_shapes(
    grids: Sequence[tuple[int, int]], batch: int = 1, encoder: str = "resnet50-v1c"
) -> list[tuple[int, int, int, int]]:
    """Shapes (B, C, h, w) of an encoder's C1 .. C4."""
    channels = encoders.encoder(encoder).channels
    return [(batch, width, *grid) for width, grid in zip(channels, grids, strict=True)]
