"""What stays float32 where networks run in half precision: the products that logits are made of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device_type: str) -> AbstractContextManager[None]:
    """Autocast off, on devices that have it (the meta device has none)."""
    has = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has else nullcontext()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, float32, of tensors of any floating type, also under autocast.

    Cosines of a query of 512 numbers lose 8 bits in bfloat16 here alone, and words of one class differ by less.
    """
    with full_precision(a.device.type):
        return a.float() @ b.float()
