"""Regions of one colour pattern, without a network: cells of the image merged into a tree, of which the lasting nodes are kept.

Pixels become indices of a palette of the image's own colours (k-means from fixed starts), so a texture is a histogram. Cells
are merged pair by pair, neighbours only, always the pair whose joint histogram costs least to tell apart from the two: the
log-likelihood ratio n H(p) - n_a H(p_a) - n_b H(p_b), with entropies H. The nodes that were dearest to merge are the regions,
from parts of objects to groups of them. Their boundaries are then drawn anew pixel by pixel, by the colours inside and
around. Nothing is random.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

COLOURS = 24  # of the palette
CELL = 3  # pixels a side
SMALLEST = 0.002  # of the image: share of a region
REACH = 5  # pixels by which a boundary may move when it is drawn anew
WINDOW = 3  # pixels a side over which the evidence is averaged there
MOST = 10.0  # logit
SETTINGS = (COLOURS, CELL, SMALLEST, REACH, WINDOW, MOST)  # what can move a mask


def palette_indices(image: Tensor, colours: int = COLOURS, steps: int = 8) -> Tensor:
    """Each pixel's nearest of the image's ``colours`` commonest colours: (h, w), int64, of an image (3, h, w), float.

    k-means whose starts are the mean and then always the colour farthest from all before.
    """
    pixels = image.flatten(1).T
    centres = pixels.mean(dim=0, keepdim=True)
    far = (pixels - centres).square().sum(dim=1)
    for _ in range(colours - 1):
        chosen = pixels[far.argmax()][None]
        centres = torch.cat([centres, chosen])
        far = torch.minimum(far, (pixels - chosen).square().sum(dim=1))
    for _ in range(steps):
        index = torch.cdist(pixels, centres).argmin(dim=1)
        member = F.one_hot(index, colours).to(pixels.dtype)
        counts = member.sum(dim=0)
        centres = torch.where(counts[:, None] > 0, member.T @ pixels / counts.clamp(min=1)[:, None], centres)
    return torch.cdist(pixels, centres).argmin(dim=1).view(image.shape[1:])


@dataclass(frozen=True)
class Node:
    """A region of the tree.

    Attributes:
        cells: Indices of its cells, row-major.
        cost: Of merging it further, in nats.
    """

    cells: NDArray[np.int64]
    cost: float


def merge_tree(counts: Floats, grid: tuple[int, int]) -> list[Node]:
    """All nodes of more than one cell but the whole, from histograms (N, K) of a grid's cells, row-major."""
    rows, columns = grid
    index = np.arange(rows * columns).reshape(grid)
    neighbours: list[set[int]] = [set() for _ in range(rows * columns)]
    for first, second in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
            neighbours[a].add(b)
            neighbours[b].add(a)
    histograms = list(counts)
    surprise = [float(value) for value in _surprise(counts)]
    members: list[list[int]] = [[cell] for cell in range(len(counts))]
    found: list[Node] = []
    heap: list[tuple[float, int, int]] = []

    def offer(node: int, others: list[int]) -> None:
        joint = _surprise(histograms[node] + np.stack([histograms[other] for other in others]))
        for other, value in zip(others, joint, strict=True):
            heapq.heappush(heap, (float(value) - surprise[node] - surprise[other], node, other))

    for cell in range(len(counts)):
        later = [other for other in neighbours[cell] if other < cell]
        if later:
            offer(cell, sorted(later))
    alive = [True] * len(counts)
    while heap:
        cost, a, b = heapq.heappop(heap)
        if not (alive[a] and alive[b]):
            continue
        for part in (a, b):
            alive[part] = False
            if len(members[part]) > 1:
                found.append(Node(np.array(members[part]), cost))
        around = sorted(other for other in neighbours[a] | neighbours[b] if alive[other])
        node = len(histograms)
        histograms.append(histograms[a] + histograms[b])
        surprise.append(float(_surprise(histograms[node][None])[0]))
        members.append(members[a] + members[b])
        alive.append(True)
        neighbours.append(set(around))
        for other in around:
            neighbours[other].add(node)
        if around:
            offer(node, around)
    return found


def _surprise(counts: Floats) -> Floats:
    """Entropy times total, n H(p), in nats, of histograms (N, K)."""
    total = counts.sum(axis=1)
    plain: Floats = total * np.log(np.maximum(total, 1)) - (counts * np.log(np.maximum(counts, 1))).sum(axis=1)
    return plain


def colour_regions(image: Tensor, count: int) -> Tensor:
    """Logits (M, h, w), float32, M <= ``count``, of the regions of an image (3, h, w), 0..255; the clearest first.

    Made on the CPU, so that they are the same wherever the network runs.
    """
    height, width = image.shape[1:]
    indices = palette_indices(image.cpu().float())
    member = F.one_hot(indices, COLOURS).permute(2, 0, 1).float()  # (K, h, w)
    cells = F.avg_pool2d(member[None], CELL, ceil_mode=True)[0] * CELL**2
    grid = (cells.shape[1], cells.shape[2])
    nodes = merge_tree(cells.flatten(1).T.double().numpy(), grid)
    least = max(2, round(SMALLEST * grid[0] * grid[1]))
    nodes = [node for node in nodes if len(node.cells) >= least]
    nodes.sort(key=lambda node: -node.cost)
    if not nodes:
        return torch.zeros(0, height, width)
    coarse = torch.zeros(min(count, len(nodes)), grid[0] * grid[1])
    for row, node in enumerate(nodes[:count]):
        coarse[row, torch.from_numpy(node.cells)] = 1
    inside = coarse.view(-1, *grid).repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)[:, :height, :width]
    return redrawn(inside, indices)


def redrawn(inside: Tensor, indices: Tensor) -> Tensor:
    """Logits (M, h, w) of masks (M, h, w), 0 or 1, whose boundaries follow the colours ``indices`` (h, w).

    A pixel farther than :data:`REACH` from the boundary stays as it is. Nearer, the logit is the mean log ratio, over
    a small window, of its colour's frequency inside to that in a band around the mask.
    """
    member = F.one_hot(indices, COLOURS).flatten(0, 1).float()  # (h w, K)
    wide, core = _grown(inside), 1 - _grown(1 - inside)
    around = _grown(wide) - inside
    own, other = ((part.flatten(1) @ member + 0.5) for part in (inside, around))
    ratio = (own / own.sum(1, keepdim=True)).log() - (other / other.sum(1, keepdim=True)).log()  # (M, K)
    logits = F.avg_pool2d(ratio[:, indices][:, None], WINDOW, 1, WINDOW // 2, count_include_pad=False)[:, 0]
    logits = torch.where(core > 0, MOST, torch.where(wide > 0, logits, -MOST))
    return logits.clamp(-MOST, MOST)


def _grown(masks: Tensor) -> Tensor:
    """Masks (M, h, w), 0 or 1, grown by :data:`REACH`."""
    masks = F.max_pool2d(masks[:, None], (2 * REACH + 1, 1), 1, (REACH, 0))
    return F.max_pool2d(masks, (1, 2 * REACH + 1), 1, (0, REACH))[:, 0]
