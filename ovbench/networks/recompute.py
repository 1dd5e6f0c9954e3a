"""Activation checkpointing: what a step computes is not kept for the backward pass but computed again in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(on: bool, step: Callable[..., T], *inputs: object) -> T:
    """``step(*inputs)``; while gradients are recorded and ``on`` is set, only the inputs are kept.

    Values and gradients are those of the plain step, at the cost of a second forward of it. What is drawn in it (dropout) is
    drawn again alike.
    """
    if not (on and torch.is_grad_enabled()):
        return step(*inputs)
    result: T = checkpoint(step, *inputs, use_reentrant=False)
    return result
