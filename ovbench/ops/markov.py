"""Attention as a Markov chain over the patches: a doubly stochastic matrix, hops along it, and how fast mass arrives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
CHECK_EVERY = 8  # on a GPU, steps between looks at which maps are done: each look waits for the device
RELAXATION = 1.3  # of the fitting's inner rounds; see doubly_stochastic


def doubly_stochastic(attention: Tensor, rounds: int = 15) -> Tensor:
    """T (N, N), float32, rows and columns summing to 1: iterative proportional fitting of columns, then rows.

    Only the two vectors of factors are iterated. The rounds between the first and the last are over-relaxed (the factor's
    change to the power 1.3; Thibault et al., arXiv 1711.01851), with the same limit: on DINOv2-S/14 attention of 72 images
    the plain rounds leave columns up to 1.2e-3 from 1 after 15, these 3e-6. Rows are exact to rounding, columns as far as
    the rounds bring them. A patch whose row or column is zero gets a 1 on the diagonal: it keeps its mass to itself.

    Args:
        attention: Not negative (N, N).
        rounds: Rounds of column and row normalisation.
    """
    t = attention.to(torch.float32, copy=True)
    lonely = (t.sum(0) == 0) | (t.sum(1) == 0)
    t.diagonal().add_(lonely)
    rows = columns = torch.ones(len(t), device=t.device)
    for number in range(rounds):
        relaxed = 0 < number < rounds - 1
        fitted = 1 / (rows @ t).clamp_min(TINY)
        columns = columns * (fitted / columns) ** RELAXATION if relaxed else fitted
        fitted = 1 / (t @ columns).clamp_min(TINY)
        rows = rows * (fitted / rows) ** RELAXATION if relaxed else fitted
    t *= columns
    t *= rows[:, None]
    return t


def hop(maps: Tensor, transition: Tensor, hops: int = 1) -> Tensor:
    """Maps (M, N), float32, after some steps of the chain: f T^hops.

    Args:
        maps: Float32 (M, N).
        transition: T (N, N); in bfloat16 the maps are rounded to it for the product.
        hops: Number of steps.
    """
    for _ in range(hops):
        maps = (maps.to(transition.dtype) @ transition).float()
    return maps


def arrival_steps(maps: Tensor, transition: Tensor, *, tau: float = 0.3, max_steps: int = 1000) -> Tensor:
    """First interpolated step (M, N), float32, > 0, at which f^(l) / max f^(l) exceeds ``tau``; f^(l) = f^(l-1) T.

    ``maps`` is the state of step 1 and nothing is there at step 0, so that a patch which ``maps`` alone brings over the
    threshold has a step in [tau, 1) that still tells how far. In between, values are interpolated linearly. A patch that
    has not crossed after ``max_steps`` gets max_steps tau / value: continuous at the threshold, infinite where nothing
    ever arrives. Maps whose patches have all crossed leave the products.

    Args:
        maps: Not negative (M, N), each with something in it.
        transition: T (N, N); in bfloat16 the maps are rounded to it for the products.
        tau: In (0, 1).
        max_steps: Bound on the steps.
    """
    walk = _Walk(maps, transition, max_steps, rescale=True)
    before = torch.zeros_like(walk.values)
    for step in walk:
        value, at = walk.values, walk.steps
        found = at.isinf() & (value > tau)
        walk.steps = torch.where(found, step - 1 + (tau - before) / (value - before), at)
        (before,) = walk.next(value)
    late = max_steps * tau / walk.last
    return torch.where(walk.all_steps.isinf(), late, walk.all_steps)


def settling_steps(maps: Tensor, transition: Tensor, *, tau: float = 0.3, max_steps: int = 1000) -> Tensor:
    """First interpolated step (M, N), float32, >= 0, at which |f^(l) - f^(l-1)| of a patch is ``tau`` or less.

    The scale is that of the map's maximum at the start, f^(0). A patch whose first change is small at once has the step
    change / tau in [0, 1]; one that never settles gets ``max_steps``.

    Args:
        maps: f^(0), not negative (M, N), each with something in it.
        transition: T (N, N); in bfloat16 the maps are rounded to it for the products.
        tau: On the scale of the map's maximum.
        max_steps: Bound on the steps.
    """
    start = maps / maps.amax(1, keepdim=True)
    walk = _Walk(hop(start, transition), transition, max_steps, rescale=False)
    before, earlier = start, torch.zeros_like(start)
    for step in walk:
        change, at = (walk.values - before).abs(), walk.steps
        found = at.isinf() & (change <= tau)
        part = change / tau if step == 1 else step - 1 + (earlier - tau) / (earlier - change)
        walk.steps = torch.where(found, part, at)
        before, earlier = walk.next(walk.values, change)
    return walk.all_steps.clamp_max(max_steps)


class _Walk:
    """Steps 1, 2, ... of a chain; ``values`` (m, N) are the maps of those that are not finished.

    Args:
        first: State of step 1 (M, N).
        transition: T (N, N).
        max_steps: Bound on the steps.
        rescale: Divide the maps by their maximum at each step.
    """

    def __init__(self, first: Tensor, transition: Tensor, max_steps: int, *, rescale: bool) -> None:
        self.transition, self.max_steps, self.rescale = transition, max_steps, rescale
        self.values = first / first.amax(1, keepdim=True) if rescale else first
        self.steps = torch.full_like(first, torch.inf)  # found so far, of the maps that are not finished
        self.all_steps = self.steps.clone()
        self.last = self.values.clone()  # of all maps: the values when they finished
        self.index = torch.arange(len(first), device=first.device)
        self.number = 0
        self.every = CHECK_EVERY if first.is_cuda else 1

    def __iter__(self) -> Iterator[int]:
        while len(self.index) and self.number < self.max_steps:
            self.number += 1
            yield self.number

    def next(self, *kept: Tensor) -> tuple[Tensor, ...]:
        """Goes one step on, and gives back what the caller keeps (m, N), without the maps that have finished."""
        last = self.number == self.max_steps
        if last or self.number % self.every == 0:
            self.all_steps[self.index], self.last[self.index] = self.steps, self.values
            open_ = self.steps.isinf().any(1).nonzero()[:, 0]  # waits for the device
            if len(open_) < len(self.index):
                self.index, self.steps, self.values = self.index[open_], self.steps[open_], self.values[open_]
                kept = tuple(part[open_] for part in kept)
        if len(self.index) and not last:
            moved = hop(self.values, self.transition)
            self.values = moved / moved.amax(1, keepdim=True) if self.rescale else moved
        return kept
