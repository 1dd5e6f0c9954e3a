"""Guidance beside the features of every class: the same linear map of both, without repeating what all classes share.

The public code repeats an image's guidance for every class, concatenates it with the class's features and maps the result.
A linear map of a concatenation is the sum of two maps, and the second one is the same for every class: it is taken once per
image. The result is equal to rounding and the parameters are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Maps (classes x images) that go through the parts that see classes one by one in one call while nothing is learned: what
# lies between them is many times their size.
MAPS = {"cpu": 128, "cuda": 4096}
POSITIONS = 576  # of a map, 24 x 24 in the public configs


def guided_linear(x: Tensor, guidance: Tensor | None, weight: Tensor, bias: Tensor, *, repeat: bool = False) -> Tensor:
    """``weight @ [x, guidance] + bias`` (..., D) of features (..., C) and guidance (..., G) that broadcasts over classes.

    Args:
        x: Features.
        guidance: Guidance with size 1 where x has classes (or positions); None: the weight is of x alone.
        weight: (D, C + G), the features' columns first.
        bias: (D,).
        repeat: Concatenate as the public code does.
    """
    if guidance is None:
        return F.linear(x, weight, bias)
    width = x.shape[-1]
    if repeat:
        return F.linear(torch.cat([x, guidance.expand(*x.shape[:-1], -1)], dim=-1), weight, bias)
    return F.linear(x, weight[:, :width]) + F.linear(guidance, weight[:, width:], bias)


def guided_conv(x: Tensor, guidance: Tensor, weight: Tensor, *, repeat: bool = False) -> Tensor:
    """3x3 convolution (B, T, D, h, w) of features (B, T, C, h, w) beside guidance (B, G, h, w), no bias.

    Args:
        x: Features.
        guidance: Of each image.
        weight: (D, C + G, 3, 3), the features' channels first.
        repeat: Concatenate as the public code does.
    """
    batch, classes, width = x.shape[:3]
    if repeat:
        x = torch.cat([x, guidance[:, None].expand(-1, classes, -1, -1, -1)], dim=2)
        together: Tensor = F.conv2d(x.flatten(0, 1), weight, padding=1).unflatten(0, (batch, classes))
        return together
    of_image = F.conv2d(guidance, weight[:, width:], padding=1)
    of_class: Tensor = F.conv2d(x.flatten(0, 1), weight[:, :width], padding=1).unflatten(0, (batch, classes))
    return of_class + of_image[:, None]


def over_classes(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``step`` of maps (B, T, ...) in portions of T, for a step that sees classes one by one.

    In training all go at once, as every intermediate is kept anyway.
    """
    return _in_portions(step, x, 1, MAPS.get(x.device.type, 128) // x.shape[0])


def over_positions(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``step`` of tokens (B, T, n, C) in portions of n, for a step that sees positions one by one; see above."""
    return _in_portions(step, x, 2, MAPS.get(x.device.type, 128) * POSITIONS // (x.shape[0] * x.shape[1]))


def _in_portions(step: Callable[[Tensor], Tensor], x: Tensor, dim: int, portion: int) -> Tensor:
    if torch.is_grad_enabled() or x.shape[dim] <= portion:
        return step(x)
    return torch.cat([step(part) for part in torch.split(x, max(1, portion), dim=dim)], dim=dim)
