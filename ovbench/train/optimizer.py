"""A recipe's optimiser and its schedule, as mmengine wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ovbench.mm.compat import prepare

prepare()

from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR, OptimWrapper, PolyLR  # noqa: E402

from ovbench.errors import RunError  # noqa: E402
from ovbench.models.trainable import ParameterGroup  # noqa: E402
from ovbench.train.recipe import Recipe  # noqa: E402


class CPUAmpWrapper(OptimWrapper):  # type: ignore[misc]
    """bfloat16 autocast on a CPU, where mmengine's own refuses; needs no loss scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


def optimizer_wrapper(groups: list[ParameterGroup], recipe: Recipe, device: str) -> OptimWrapper:
    """The recipe's optimiser over groups of parameters, with clipping and autocast.

    Raises:
        RunError: float16 on a CPU.
    """
    params = []
    for group in groups:
        still = {id(parameter) for parameter in group.undecayed}
        decaying = [parameter for parameter in group.parameters if id(parameter) not in still]
        for own, factor in ((decaying, group.decay_mult), (list(group.undecayed), 0.0)):
            if own:
                lr, decay = recipe.lr * group.lr_mult, recipe.weight_decay * factor
                params.append({"params": own, "lr": lr, "weight_decay": decay})
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(params, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(params, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    clip = None if recipe.grad_clip is None else {"max_norm": recipe.grad_clip}
    if recipe.amp == "off":
        return OptimWrapper(optimizer=optimizer, clip_grad=clip)
    if device != "cpu":
        return AmpOptimWrapper(optimizer=optimizer, clip_grad=clip, dtype=recipe.amp)
    if recipe.amp == "float16":
        raise RunError("float16 training needs a GPU: use --set amp=bfloat16 or amp=off on a CPU.")
    return CPUAmpWrapper(optimizer=optimizer, clip_grad=clip)


def schedulers(optimizer: torch.optim.Optimizer, recipe: Recipe, planned: int) -> list[Any]:
    """The recipe's learning rate over ``planned`` iterations."""
    found: list[Any] = []
    warm = min(recipe.warmup_iters, planned)
    if warm:
        found.append(LinearLR(optimizer, start_factor=recipe.warmup_factor, begin=0, end=warm, by_epoch=False))
    if recipe.schedule == "constant" or warm == planned:
        return found
    span = {"begin": warm, "end": planned, "by_epoch": False, "eta_min": recipe.min_lr}
    if recipe.schedule == "poly":
        return [*found, PolyLR(optimizer, power=recipe.power, **span)]
    return [*found, CosineAnnealingLR(optimizer, T_max=planned - warm, **span)]
