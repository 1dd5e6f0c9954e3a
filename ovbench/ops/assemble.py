"""From patch logits of overlapping windows to any output size, as two small matrix products.

Upsampling a window bilinearly, averaging overlapping windows and resizing the average are linear, and each acts on rows
and columns alone, because windows lie on a grid. So the logits of a word at the output are ``A P B^T``: P holds the patch
values of all windows in a block matrix, A and B the interpolation and averaging weights of the rows and the columns.
Nothing is ever held at image size for all words: the product is taken in strips of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, Tensor]  # of the rows (H, R) and of the columns (W, C)

# A strip should stay in a CPU's cache; a GPU wants few, large kernels.
STRIP_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
WIDE_BYTES = 256 << 20  # of values that are resized along the columns for all rows at once
TILE = 48  # side of a square in pixels: smaller ones see fewer patches, larger ones cost fewer calls


class Tile(NamedTuple):
    """What one square (s, t) of the output is made of: ``rows @ near @ columns.T`` for every word.

    Attributes:
        rows: Weights (s, r), not negative, rows summing to 1.
        columns: Weights (t, c), likewise.
        near: The patch values (r, c, Q) under the square.
    """

    rows: Tensor
    columns: Tensor
    near: Tensor

    def candidates(self) -> Tensor:
        """Ascending indices of the words that can be the best somewhere in the square.

        Every output is a weighted mean of the patch values under the square, so a word whose largest value is below
        another's smallest is nowhere the best.
        """
        high, low = self.near.amax(dim=(0, 1)), self.near.amin(dim=(0, 1))
        return (high >= low.max()).nonzero()[:, 0]

    def output(self, words: Tensor) -> Tensor:
        """Values (s, t, q) of some words."""
        across = self.columns @ self.near[:, :, words]  # (r, t, q)
        return (self.rows @ across.flatten(1)).view(self.rows.shape[0], self.columns.shape[0], -1)


@lru_cache(maxsize=256)
def linear_weights(length: int, out: int) -> Tensor:
    """Bilinear weights along one side (out, length), float32: ``F.interpolate(..., align_corners=False)`` as a matrix."""
    identity = torch.eye(length, dtype=torch.float64)[None]  # (1, channels, length)
    return F.interpolate(identity, size=out, mode="linear", align_corners=False)[0].T.float().contiguous()


@lru_cache(maxsize=256)
def axis_weights(
    length: int, starts: tuple[int, ...], window: int, patches: int, pad: tuple[int, int], out: int
) -> Tensor:
    """Weights (out, windows * patches), float32, from the patch values of all windows along one side to the output.

    Args:
        length: Side of the network input in pixels.
        starts: First pixel of each window.
        window: Side of a window in pixels.
        patches: Values per window along this side.
        pad: Pixels that were added before and behind every window.
        out: Side of the output in pixels.
    """
    up = linear_weights(patches, window + sum(pad)).double()[pad[0] : pad[0] + window]  # (window, patches)
    blocks = torch.zeros(length, len(starts), patches, dtype=torch.float64)
    for index, start in enumerate(starts):
        blocks[start : start + window, index] = up
    covered = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        covered[start : start + window] += 1
    weights = blocks.flatten(1) / covered[:, None]
    if out != length:
        weights = linear_weights(length, out).double() @ weights
    return weights.float().contiguous()


def block_matrix(logits: Tensor, rows: int, columns: int) -> Tensor:
    """Patch values (rows * h, columns * w, Q) of one image from its window logits (rows * columns, Q, h, w).

    Windows are in reading order.
    """
    _, q, h, w = logits.shape
    return logits.view(rows, columns, q, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, q)


def output_size(values: Tensor, weights: Weights | None) -> tuple[int, int]:
    """Size (H, W) that the weights lead to; that of the values where there are none."""
    return (weights[0].shape[0], weights[1].shape[0]) if weights else (values.shape[0], values.shape[1])


def strips(values: Tensor, weights: Weights | None) -> Iterator[tuple[int, Tensor]]:
    """Output values strip by strip: first row, and (s, W, Q) float32 with the words innermost.

    Args:
        values: (R, C, Q), float32.
        weights: Weights of the rows (H, R) and of the columns (W, C) on the CPU, rows non-zero only around the diagonal
            blocks; None where the values have the output's size.
    """
    (height, width), q = output_size(values, weights), values.shape[2]
    step = max(1, STRIP_BYTES.get(values.device.type, 64 << 20) // (4 * width * q))
    if weights is None:
        for first in range(0, height, step):
            yield first, values[first : first + step]
        return
    rows, columns = weights[0], weights[1].to(values.device)
    wide = columns @ values if 4 * values.shape[0] * width * q <= WIDE_BYTES else None  # (R, W, Q)
    for first in range(0, height, step):
        part = rows[first : first + step]
        used = (part != 0).any(dim=0).nonzero()[:, 0]  # a strip sees few rows of patches
        near, index = part[:, used].to(values.device), used.to(values.device)
        source = wide[index] if wide is not None else columns @ values[index]
        yield first, (near @ source.flatten(1)).view(-1, width, q)


def tiles(values: Tensor, weights: Weights) -> Iterator[tuple[slice, slice, Tile]]:
    """Squares of the output: their rows, their columns, and what they are made of.

    Args:
        values: As in :func:`strips`.
        weights: As in :func:`strips`.
    """
    across = list(_spans(weights[1], TILE, values.device))
    for rows, near_rows, used_rows in _spans(weights[0], TILE, values.device):
        strip = values[used_rows]
        for columns, near_columns, used_columns in across:
            yield rows, columns, Tile(near_rows, near_columns, strip[:, used_columns])


def _spans(weights: Tensor, step: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for first in range(0, weights.shape[0], step):
        part = weights[first : first + step]
        used = (part != 0).any(dim=0).nonzero()[:, 0]
        yield slice(first, first + part.shape[0]), part[:, used].to(device), used.to(device)


def assemble(values: Tensor, weights: Weights) -> Tensor:
    """Output values (Q, H, W), float32, contiguous; arguments as in :func:`strips`."""
    out = values.new_empty(values.shape[2], *output_size(values, weights))
    for first, part in strips(values, weights):
        out[:, first : first + part.shape[0]] = part.permute(2, 0, 1)
    return out
