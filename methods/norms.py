"""Norms of decode heads written here, as mmseg's configs name them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ovbench.errors import unknown_name


def norm_layer(config: dict[str, Any] | None) -> Callable[[int], nn.Module]:
    """Channels to a norm, of an mmseg ``norm_cfg``; None means plain batch norm.

    Raises:
        UsageError: A norm that is none of BN, SyncBN and GN.
    """
    name = (config or {"type": "BN"})["type"]
    groups = (config or {}).get("num_groups", 32)
    norms: dict[str, Callable[[int], nn.Module]] = {
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "GN": lambda channels: nn.GroupNorm(math.gcd(groups, channels), channels),
    }
    if name not in norms:
        raise unknown_name("norm of a decode head", name, norms)
    return norms[name]
