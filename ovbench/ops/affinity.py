"""Class-aware affinity in plain tensors: class centres, the map M = sigmoid(q k^T) taken in rows, its ground truth, its loss.

A map has (h w)^2 entries per image: 64 MiB in fp32 on a 64 x 64 grid, 1 GiB on 128 x 128. Nothing here keeps one: rows of M
are made, used and dropped, and where gradients are wanted they are made again in the backward pass. N = h w positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ovbench.ops.full_precision import full_precision

# Entries of the affinity that exist at a time: one map of a 64 x 64 grid.
MAP_ENTRIES = 64**4
# Least share of a row's mass that is divided by: below it, rounding of the difference sum(F') - M F' would be blown up.
MASS_FLOOR = 1e-4
EPS = 1e-6


def class_centers(coarse: Tensor, features: Tensor, softmax: str = "positions") -> Tensor:
    """Class centres (B, K, D'), each a weighted mean of features.

    Args:
        coarse: Logits (B, K, N).
        features: F' as rows, (B, N, D').
        softmax: ``"positions"`` or ``"classes"``.
    """
    if softmax == "positions":
        return coarse.softmax(dim=2) @ features  # (B, K, D')
    weights = coarse.softmax(dim=1)
    return weights @ features / weights.sum(dim=2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def aggregate(affinity: Tensor, features: Tensor, row_normalise: bool = True) -> tuple[Tensor, Tensor]:
    """F_intra = M F' and F_inter = (1 - M) F', both (B, R, D'), from one product.

    Args:
        affinity: Rows of M in [0, 1], (B, R, N).
        features: F' as rows, (B, N, D').
        row_normalise: Divide by the sums of the rows of M and of 1 - M (of at least ``MASS_FLOOR`` of N).
    """
    intra = affinity @ features  # (B, R, D')
    inter = features.sum(dim=1, keepdim=True) - intra
    if not row_normalise:
        return intra, inter
    positions = features.shape[1]
    mass = affinity.sum(dim=2, keepdim=True)  # (B, R, 1)
    floor = MASS_FLOOR * positions
    return intra / mass.clamp_min(floor), inter / (positions - mass).clamp_min(floor)


def intra_and_inter(
    query: Tensor, key: Tensor, features: Tensor, row_normalise: bool = True, entries: int = MAP_ENTRIES
) -> tuple[Tensor, Tensor]:
    """F_intra and F_inter (B, N, D') of M = sigmoid(q k), of which at most ``entries`` entries exist at a time.

    Args:
        query: q, (B, N, C).
        key: k, (B, C, N).
        features: F' as rows, (B, N, D').
        row_normalise: See :func:`aggregate`.
        entries: Entries of M in the whole batch, at least a row.
    """

    def part(rows: Tensor, key: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        # In place, so that only one map exists; autograd keeps the output of sigmoid_ and no input.
        return aggregate((rows @ key).sigmoid_(), features, row_normalise)

    chunks = row_chunks(query.shape[0], key.shape[2], _share(entries))
    pairs = [_dropped(part, query[:, rows], key, features) for rows in chunks]
    return torch.cat([pair[0] for pair in pairs], dim=1), torch.cat([pair[1] for pair in pairs], dim=1)


def class_mass(coarse: Tensor) -> Tensor:
    """Share of the positions that each class has, (B, K), sums to one; ``coarse`` are logits (B, K, N)."""
    return coarse.softmax(dim=1).mean(dim=2)


def associate(
    features: Tensor,
    centers: Tensor,
    scale: bool = False,
    *,
    keys: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """Every position as a mixture of class centres, (B, N, D').

    Args:
        features: (B, N, C).
        centers: What is mixed, (B, K, D').
        scale: Divide the logits by sqrt(C).
        keys: What positions are compared with, (B, K, C); None compares them with the centres.
        mass: Shares of the classes (B, K): a class's part of the mixture is multiplied by its share before the mixture is
            made to sum to one, so that centres of classes that are nowhere stay out.
    """
    logits = features @ (centers if keys is None else keys).transpose(1, 2)  # (B, N, K)
    if scale:
        logits = logits / features.shape[2] ** 0.5
    if mass is not None:
        logits = logits + mass.clamp_min(torch.finfo(mass.dtype).tiny).log()[:, None]
    return logits.softmax(dim=2) @ centers


def labels_on_grid(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (B, h * w) on a coarser grid (h, w), by nearest neighbour, from (B, H, W) of integers."""
    # Class numbers up to 2^24 are exact in fp32, which interpolate wants.
    return F.interpolate(labels[:, None].float(), size=grid, mode="nearest")[:, 0].flatten(1).long()


def affinity_target(labels: Tensor, ignore_index: int = 255, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Ground truth G G^T of the affinity and which pairs count, both boolean (B, R, N).

    A pair of labels (B, N) is true where both have one class; it counts where neither is ``ignore_index``.
    """
    valid = labels != ignore_index
    counted = valid[:, rows, None] & valid[:, None, :]
    return (labels[:, rows, None] == labels[:, None, :]) & counted, counted


def affinity_loss(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    ignore_index: int = 255,
    entries: int = MAP_ENTRIES,
    rows_too: bool = False,
) -> Tensor:
    """Binary cross-entropy of the affinity sigmoid(q k), the mean over the batch's counted pairs; 0 where there is none.

    Args:
        query: q, (B, N, C).
        key: k, (B, C, N).
        labels: (B, N).
        ignore_index: Label whose positions count on neither axis.
        entries: Pairs for which logits and a ground truth exist at a time.
        rows_too: Add the terms of a row as a whole, see :func:`row_terms`; their mean over the counted rows.
    """

    def part(query: Tensor, key: Tensor, rows: slice) -> Tensor:
        target, counted = affinity_target(labels, ignore_index, rows)
        logits = (query[:, rows] @ key).float()
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        # torch.where and not a product: a logit of infinity at an ignored pair must not become NaN.
        single = torch.where(counted, loss, 0.0).sum()
        return torch.stack([single, row_terms(logits.sigmoid(), target, counted) if rows_too else single.new_zeros(())])

    total = query.new_zeros(2, dtype=torch.float32)
    with full_precision(query.device.type):
        for rows in row_chunks(query.shape[0], key.shape[2], _share(entries)):
            total = total + _dropped(part, query, key, rows)
    positions = (labels != ignore_index).sum(dim=1)
    return total[0] / positions.square().sum().clamp_min(1) + total[1] / positions.sum().clamp_min(1)


def row_terms(affinity: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Minus the logarithms of precision, recall and specificity of rows of the affinity, summed (CPNet, Eq. 3 to 6).

    Args:
        affinity: Rows of M in [0, 1], (B, R, N).
        target: Pairs of one class, boolean.
        counted: Pairs that count, boolean; a row without one gives nothing.
    """
    inside = torch.where(counted, affinity, 0.0)
    hits, truth = (inside * target).sum(dim=2), target.sum(dim=2)
    others = counted.sum(dim=2) - truth
    rejected = (torch.where(counted, 1 - affinity, 0.0) * ~target).sum(dim=2)
    shares = ((hits, inside.sum(dim=2)), (hits, truth), (rejected, others))
    # A denominator of 0 is a row without such pairs: nothing to find, nothing to reject.
    logs = [torch.where(whole > 0, -(share / whole.clamp_min(EPS)).clamp(EPS, 1).log(), 0.0) for share, whole in shares]
    return torch.stack(logs).sum()


def row_chunks(batch: int, positions: int, entries: int) -> list[slice]:
    """Slices of the map's rows of which no one has more than ``entries`` entries in the batch, but at least a row."""
    step = max(1, entries // max(1, batch * positions))
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


def _share(entries: int) -> int:
    """A quarter of the entries where gradients are wanted: the rows, their gradient and what the loss makes of them."""
    return max(1, entries // 4) if torch.is_grad_enabled() else entries


def _dropped(part: Callable[..., Any], *arguments: Any) -> Any:
    """The result of ``part``, of which autograd keeps the arguments alone and repeats the rest in the backward pass."""
    if not torch.is_grad_enabled():
        return part(*arguments)
    return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
