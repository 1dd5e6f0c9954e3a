"""Batches that are larger than memory: gradients of their parts added up, activations computed again, both exact."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ovbench.errors import UsageError
from ovbench.models.trainable import Trainable
from ovbench.train.recipe import Recipe


def prepare(network: Trainable, recipe: Recipe, world: int = 1) -> None:
    """Makes the network keep what the recipe says, after refusing what would not be exact.

    Args:
        network: What is trained, in training mode.
        recipe: How.
        world: Number of processes, each of which takes its share of a batch in parts.

    Raises:
        UsageError: More parts than images; batch statistics, which a part or a second forward would change; nothing to
            compute again.
    """
    if recipe.accumulate > recipe.batch // world:
        raise UsageError(
            f"{recipe.batch // world} images per process cannot be taken in {recipe.accumulate} parts: --set accumulate=..."
        )
    statistics = any(isinstance(module, _BatchNorm) and module.training for module in network.modules())
    for name, wanted, remedy in (
        ("accumulate", recipe.accumulate > 1 and not recipe.norm_of_parts, "--set norm_of_parts=true to have it so, "),
        ("checkpoint_activations", recipe.checkpoint_activations, ""),
    ):
        if wanted and statistics:
            raise UsageError(
                f"{name} would change what batch norm sees, so the weights would not be those of the recipe: {remedy}"
                "a smaller batch or crop, --set amp=bfloat16, or several processes."
            )
    if recipe.checkpoint_activations:
        network.recompute_activations()


def slices(images: int, parts: int) -> list[slice]:
    """A batch of so many images in parts that differ by one image at most."""
    ends = [images * number // parts for number in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def step(model: Any, plain: Any, batch: dict[str, Any], wrapper: Any, parts: int) -> dict[str, Tensor]:
    """One step of the optimiser by the gradient of a batch, of which only a part goes through the network at a time.

    Args:
        model: As mmengine wraps it, for one process or several.
        plain: The same without the wrapper of several processes.
        batch: ``image`` (B, 3, S, S), ``label`` (B, S, S), and perhaps lists with an entry per image.
        wrapper: mmengine's optimiser wrapper.
        parts: Number of parts.

    Returns:
        The losses of the whole batch by name.
    """
    whole = plain.data_preprocessor(batch, True)
    told: dict[str, Tensor] = {}
    chosen = slices(len(whole["label"]), parts)
    for number, part in enumerate(chosen):
        share = plain.network.loss_share(whole["label"], part) if parts > 1 else 1.0
        later = number < len(chosen) - 1 and hasattr(model, "no_sync")  # gradients are exchanged once
        with model.no_sync() if later else nullcontext():
            with wrapper.optim_context(model):
                losses = model(**{name: values[part] for name, values in whole.items()}, mode="loss")
            total, each = plain.parse_losses(losses)
            wrapper.backward(total * share)
        for name, value in each.items():
            told[name] = told.get(name, 0) + value.detach() * share
    wrapper.step()
    wrapper.zero_grad()
    return told
