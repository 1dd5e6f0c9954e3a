"""A GPU on a machine that has none: tensors that say ``cuda:0``, are computed on the CPU, and refuse what a GPU refuses.

Inside :func:`emulated_cuda`, ``device="cuda"`` and ``.to("cuda")`` give :class:`OnGPU` tensors. An operation that mixes them
with tensors of the CPU raises, as on a GPU, and so does numpy. What can be found with it: models, batches, buffers and
constants on the wrong device, in forward, loss and optimiser. What cannot: kernels that a GPU lacks, its rounding, autocast,
speed, memory, pinning. Torch's own code in C++ sees tensors of the CPU, so the backward pass needs no driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
# What takes tensors of both devices on a GPU as well: copies, and indices of the CPU into a tensor of the GPU.
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}


class OnGPU(Tensor):
    """A tensor that says it is on ``cuda:0``; its numbers are in ``values``, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> OnGPU:
        with torch.inference_mode(False):  # views of other tensors want a version, which inference mode does not give
            made: OnGPU = Tensor._make_wrapper_subclass(
                cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
                dtype=values.dtype, device=CPU, requires_grad=requires_grad,
            )  # fmt: skip
        made.values = values
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = OnGPU(self.values.detach().clone(), self.requires_grad)
        copied = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OnGPU, (self.values.detach(), self.requires_grad)

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refused, as by a GPU's tensors."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def tolist(self) -> Any:
        """The numbers, which a GPU's tensors give as well."""
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _require_one_device(str(func._schema.name.split("::")[-1]), args, kwargs)

        def plain(leaf: Any) -> Any:
            return leaf.values if isinstance(leaf, OnGPU) else leaf

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], OnGPU):
            return args[0]
        wrapped = tree_map(lambda leaf: OnGPU(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _require_one_device(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises where a GPU would: for a tensor of the CPU among others, unless it is a single number."""
    if name == "copy_" or torch._C._current_autograd_node() is not None:  # derivatives make zeros on what they see
        return
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    strange = [tuple(one.shape) for one in tensors if not isinstance(one, OnGPU) and one.dim() > 0]
    if name in _INDEXED:
        strange = [] if isinstance(args[0], OnGPU) else [tuple(args[0].shape)]
    if strange:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu: {strange} (emulated)"
        )


class _ToGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return OnGPU(values.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.values if isinstance(gradient, OnGPU) else gradient


class _ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: OnGPU) -> Tensor:
        return tensor.values.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return OnGPU(gradient)


def _moved(found: Any, gpu: bool) -> Any:
    """Tensors on the wanted device."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, OnGPU) == gpu:
            return leaf
        return (_ToGPU if gpu else _ToCPU).apply(leaf)

    return tree_map(one, found)


class _Devices(TorchFunctionMode):
    """Calls that name a device, made on the CPU and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("cuda", "cpu") and args and isinstance(args[0], Tensor):
            return _moved(args[0], name == "cuda")
        if name == "pin_memory":
            return args[0]
        wanted = given.get("device")
        if name == "to" and isinstance(args[0], Tensor):
            args, wanted = _of_to(args, given.pop("dtype", args[0].dtype), given.pop("device", None))
        elif wanted is not None:
            given["device"] = CPU
        found = func(*args, **given)
        return found if wanted is None else _moved(found, torch.device(wanted).type == "cuda")


def _of_to(args: Any, dtype: torch.dtype, wanted: Any) -> tuple[Any, Any]:
    """The arguments of ``Tensor.to`` without a device, and the device."""
    for one in args[1:3]:
        if isinstance(one, Tensor):
            wanted, dtype = one.device, one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, str | torch.device):
            wanted = one
    return (args[0], dtype), wanted


@contextmanager
def emulated_cuda(count: int = 1) -> Iterator[None]:
    """Torch sees ``count`` GPUs, of which tensors can be on the first.

    Args:
        count: What ``torch.cuda.device_count`` answers.
    """
    props = SimpleNamespace(name="emulated", total_memory=80 << 30, major=9, minor=0, multi_processor_count=1)
    answers: dict[str, Any] = {
        "is_available": True, "device_count": count, "current_device": 0, "is_initialized": True,
        "get_device_name": "emulated", "get_device_properties": props, "get_device_capability": (9, 0),
        "max_memory_allocated": 0, "max_memory_reserved": 0, "memory_allocated": 0, "is_bf16_supported": True,
        "set_device": None, "empty_cache": None, "synchronize": None, "reset_peak_memory_stats": None,
        "_lazy_init": None, "manual_seed": None, "manual_seed_all": None,
    }  # fmt: skip
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, _is=value, **__: _is))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become an OnGPU in place
        stack.enter_context(_Devices())
        yield
