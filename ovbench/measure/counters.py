"""Counters of operations, one per convention; see :mod:`ovbench.measure.conventions`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ovbench.errors import unknown_name
from ovbench.measure import flops
from ovbench.measure.conventions import CONVENTIONS, Convention
from ovbench.measure.flops import Flops


def count(fn: Callable[[], object], convention: Convention = "torch") -> Flops:
    """The operations of ``fn()`` under a convention; runs it once, without gradients.

    Raises:
        UsageError: Unknown convention.
    """
    if convention == "torch":
        return flops.count(fn)
    if convention == "fvcore":
        return _result(_count_fvcore(fn), "fvcore convention")
    if convention == "modules":
        return _result(_count_modules(fn), "convolution and linear modules")
    raise unknown_name("count convention", convention, CONVENTIONS)


def _result(macs: dict[str, int], tool: str) -> Flops:
    total = sum(macs.values())
    # by_op of Flops is in FLOP
    by_op = {name: 2 * value for name, value in sorted(macs.items(), key=lambda item: (-item[1], item[0]))}
    return Flops(gmacs=total / 1e9, gflops=2 * total / 1e9, tool=f"{tool}, torch {torch.__version__}", by_op=by_op)


def _count_modules(fn: Callable[[], object]) -> dict[str, int]:
    macs: dict[str, int] = {}

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            name, found = "conv", inputs[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.modules.conv._ConvNd):
            name, found = "conv", output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            name, found = "linear", output.numel() * module.in_features
        else:
            return
        macs[name] = macs.get(name, 0) + found

    handle = nn.modules.module.register_module_forward_hook(add)
    try:
        with torch.no_grad(), _plain_layers():
            fn()
    finally:
        handle.remove()
    return macs


def _count_fvcore(fn: Callable[[], object]) -> dict[str, int]:
    # In inference mode a dispatch mode sees operators as they were called (linear, matmul, attention), before they are
    # taken apart: the level at which fvcore looks at a traced graph.
    counter = _FvcoreCounter()
    with torch.inference_mode(), _plain_layers(), counter:
        fn()
    return counter.macs


class _FvcoreCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        rule = _RULES.get(packet)
        if rule is None and packet is not torch.ops.aten.scaled_dot_product_attention:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if rule is not None:
            name = str(packet).removeprefix("aten.")
            self.macs[name] = self.macs.get(name, 0) + rule(args, kwargs, out)
        return out


@contextmanager
def _plain_layers() -> Iterator[None]:
    """Attention layers as written, not as torch's one fused operator, which no tool looks into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# (positional arguments, keyword arguments, output) of an operator -> count
_Rule = Callable[[Sequence[Any], dict[str, Any], Any], int]


def _matmul(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    left, right = args[0], args[1]
    return int(left.numel() * (right.shape[-1] if right.ndim > 1 else 1))


def _addmm(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    return int(args[1].numel() * args[2].shape[-1])


def _linear(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    return int(args[0].numel() * args[1].shape[0])


def _convolution(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    image, weight, transposed = args[0], args[1], bool(args[6])
    places = math.prod((image if transposed else out).shape[2:])
    return int(image.shape[0] * weight.numel() * places)


def _batch_norm(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    affine, training = args[1] is not None, bool(args[5])
    per_value = (5 if affine else 4) if training else (2 if affine else 1)
    return int(args[0].numel() * per_value)


def _norm(weight_at: int) -> _Rule:
    def rule(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
        weight = args[weight_at] if len(args) > weight_at else kwargs.get("weight")
        return int(args[0].numel() * (4 if weight is None else 5))

    return rule


def _elementwise(per_input: int, per_output: int) -> _Rule:
    def rule(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
        return per_input * cast(Tensor, args[0]).numel() + per_output * cast(Tensor, out).numel()

    return rule


# The factors are fvcore 0.1.5's (fvcore/nn/flop_count.py and jit_handles.py); einsum is taken apart into bmm here.
_RULES: dict[Any, _Rule] = {
    torch.ops.aten.mm: _matmul,
    torch.ops.aten.bmm: _matmul,
    torch.ops.aten.matmul: _matmul,
    torch.ops.aten.addmm: _addmm,
    torch.ops.aten.linear: _linear,
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.batch_norm: _batch_norm,
    torch.ops.aten.layer_norm: _norm(2),
    torch.ops.aten.group_norm: _norm(2),
    torch.ops.aten.instance_norm: _norm(1),
    torch.ops.aten.upsample_nearest2d: _elementwise(0, 1),
    torch.ops.aten.upsample_bilinear2d: _elementwise(0, 4),
    torch.ops.aten.adaptive_avg_pool2d: _elementwise(1, 0),
    torch.ops.aten.grid_sampler: _elementwise(0, 4),
}
