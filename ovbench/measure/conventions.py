"""What "FLOPs" means in a paper depends on the tool that its authors used; here each tool's convention, by name.

``torch``: this suite's own, see :mod:`ovbench.measure.flops`. ``fvcore`` and ``modules`` exist to compare a published
figure on its own terms. All count multiply-accumulates; what the latter two print as "FLOPs" is the number of MACs.
Needs no torch; :mod:`ovbench.measure.counters` does the counting.
"""

from __future__ import annotations

from typing import Literal, get_args

Convention = Literal["torch", "fvcore", "modules"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

COUNTED: dict[Convention, str] = {
    "torch": "matrix products (linear layers, einsum, attention) and convolutions; 1 MAC = 2 FLOP",
    "fvcore": "matrix products and convolutions, 1 per MAC; norms 5 (batch norm 2) per value, bilinear resizing 4, "
    "nearest 1, adaptive average pooling 1; papers print this as FLOPs",
    "modules": "modules of type convolution and linear, 1 per MAC, no bias; papers print this as FLOPs",
}
NOT_COUNTED: dict[Convention, str] = {
    "torch": "element-wise work, bias, normalisation, softmax, pooling, resizing, sorting, indexing",
    "fvcore": "scaled-dot-product attention, products fused with an addition (baddbmm), element-wise work, bias, "
    "softmax, other pooling and resizing, sorting, indexing",
    "modules": "everything outside such modules: attention, einsum, matrix products of tensors, functional linear "
    "layers (the q/k/v projection of CLIP's blocks), norms, pooling, resizing",
}
