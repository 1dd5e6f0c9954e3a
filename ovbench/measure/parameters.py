"""Parameters of a network, whole and by part; a parameter that several parts share counts once, in the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Parameters:
    """Number of parameters.

    Attributes:
        total: All of them.
        trainable: Those with ``requires_grad``.
    """

    total: int
    trainable: int


def count_parameters(network: nn.Module) -> Parameters:
    """Parameters of a network, shared ones once; buffers (running means, memory banks) are none."""
    return _count(network.parameters(), set())


def by_part(network: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, Parameters]:
    """Parameters of each part and, as ``other``, of what lies in none; parts without parameters are left out."""
    seen: set[int] = set()
    found = {name: _count(part.parameters(), seen) for name, part in parts.items()}
    found["other"] = _count(network.parameters(), seen)
    return {name: counted for name, counted in found.items() if counted.total}


def _count(parameters: Iterable[nn.Parameter], seen: set[int]) -> Parameters:
    total = trainable = 0
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
    return Parameters(total, trainable)
