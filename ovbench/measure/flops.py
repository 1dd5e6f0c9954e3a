"""Counts the operations of a computation with torch's own counter, the same on every device.

One multiply-accumulate (MAC) is two floating-point operations (FLOP). Counted are matrix products (linear layers,
einsum, attention) and convolutions. Not counted are element-wise work, normalisation, softmax, pooling, resizing,
sorting and indexing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


@dataclass(frozen=True)
class Flops:
    """Operations of one call.

    Attributes:
        gmacs: 10^9 multiply-accumulates.
        gflops: 10^9 floating-point operations, exactly 2 x ``gmacs``.
        tool: What counted, with version.
        by_op: FLOP (not 10^9) of each torch operator, largest first.
    """

    gmacs: float
    gflops: float
    tool: str
    by_op: dict[str, int]


def count(fn: Callable[[], object]) -> Flops:
    """The operations that ``fn()`` performs; runs it once, without gradients.

    Attention is counted in full (2 x N x M x d MAC per head for N queries and M keys), also where a mask or causality
    would let a kernel skip a part.
    """
    with (
        torch.no_grad(),
        _countable_attention(),
        FlopCounterMode(display=False, custom_mapping=_VECTOR_PRODUCTS) as mode,
    ):
        fn()
    by_op = {str(op).removeprefix("aten."): int(flop) for op, flop in mode.get_flop_counts().get("Global", {}).items()}
    flop = sum(by_op.values())
    ordered = dict(sorted(by_op.items(), key=lambda item: (-item[1], item[0])))
    return Flops(gmacs=flop / 2e9, gflops=flop / 1e9, tool=tool(), by_op=ordered)


def tool() -> str:
    """Name and version of the counter, as it stands in records."""
    return f"torch.utils.flop_counter {torch.__version__} (matrix products and convolutions; 1 MAC = 2 FLOP)"


@contextmanager
def _countable_attention() -> Iterator[None]:
    # Fused kernels hide their products: torch < 2.15 has no formula for attention on a CPU, and the fast path of
    # nn.MultiheadAttention and nn.TransformerEncoderLayer is one operator that no version counts. Written out as matrix
    # products, every version and every device gives the same number.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _mv(matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _addmv(bias: Shape, matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _dot(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left)


def _addbmm(bias: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[-1]


# Products with a vector, which torch's counter leaves out.
_VECTOR_PRODUCTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _mv,
    torch.ops.aten.addmv: _addmv,
    torch.ops.aten.dot: _dot,
    torch.ops.aten.vdot: _dot,
    torch.ops.aten.addbmm: _addbmm,
}
