"""Pixel-adaptive mask refinement (PAMR): every logit becomes a mean over neighbours of similar colour, repeatedly.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. The neighbours n of a pixel p are
the 8 positions around it at each dilation (16 for the dilations 8 and 16), and c runs over the image's channels::

    a_pn = softmax over n of -mean_c( |I_cp - I_cn| / (1e-8 + 0.1 s_cp) )
    m_p <- sum_n a_pn m_n,   repeated

The details follow the authors' code (visinf/1-stage-wseg, ``models/mods/pamr.py``; sinahmr/NACLIP carries the same
arithmetic in ``pamr.py``):

- s_cp is the sample standard deviation (divisor n - 1) of channel c over the 3 x 3 positions of all dilations together,
  so p itself counts once per dilation; all neighbours of p share it.
- One softmax runs over the neighbours of all dilations; p is not among its own neighbours.
- Behind the border lies the nearest border pixel.

NACLIP refines the window-averaged cosine logits, before scale and softmax, after resizing them to the original image's
size. The image is its normalised network input, resized bilinearly to the same size; 10 iterations, dilations 8 and 16.
It goes on unrefined when that runs out of memory; here memory is bounded instead.

A linear change of a channel cancels in the ratio, so values 0..255, 0..1 and normalised values give the same result up to
rounding. The exception, in the authors' code as well, is a region whose colours differ by rounding alone (saturated sky
after a resize): the ratio enlarges that noise to ordinary weights. Of six VOC photos one had such a region; there normalised
values and 0..255 agree on 99.6 % of the labels of random logits, on the others on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD_FACTOR = 0.1
EPSILON = 1e-8

# What is worked on at once should stay in a CPU's cache; a GPU wants few, large kernels.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # of padded logits: how many classes are refined together
STRIP_BYTES = {"cpu": 1 << 20, "cuda": 128 << 20}  # of neighbour weights: how many rows are taken together


@torch.no_grad()
def pamr(logits: Tensor, image: Tensor, *, iterations: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Refined logits (Q, H, W), float32: ``iterations`` weighted means over the neighbours of every pixel.

    Extra memory beside the result, for P = 8 * len(dilations) and R = max(dilations): the weights, 4 P H W bytes (as much
    as P classes); plus ``CHUNK_BYTES``, or one padded class, 4 (H + 2 R) (W + 2 R) bytes, where that is more, or the padded
    image, where that is more; plus 4 ``STRIP_BYTES``. Q does not enter. How classes and rows are divided does not change
    the result.

    Args:
        logits: Finite values (Q, H, W) at the image's size; any linear scale.
        image: Image (C, H, W) on the same device, usually RGB and normalised; any linear scale per channel.
        iterations: Number of means; 0 returns a copy.
        dilations: Distances of the neighbours in pixels.

    Raises:
        ValueError: Shapes that do not fit, no dilation or one below 1, a negative number of iterations.
    """
    if logits.ndim != 3 or image.ndim != 3 or logits.shape[1:] != image.shape[1:] or not image.numel():
        raise ValueError(
            f"PAMR needs logits (Q, H, W) and an image (C, H, W) of one size, H and W at least 1; got logits "
            f"{tuple(logits.shape)} and an image {tuple(image.shape)}"
        )
    if not dilations or min(dilations) < 1:
        raise ValueError(f"PAMR needs one dilation or more, each at least 1; got {tuple(dilations)}")
    if iterations < 0:
        raise ValueError(f"PAMR needs 0 iterations or more; got {iterations}")
    if iterations == 0:
        return logits.float().clone()

    offsets, reach = _offsets(dilations), max(dilations)
    weights = neighbour_weights(image, dilations)
    refined = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    height, width = logits.shape[1] + 2 * reach, logits.shape[2] + 2 * reach
    step = max(1, CHUNK_BYTES.get(logits.device.type, 64 << 20) // (4 * height * width))
    for first in range(0, logits.shape[0], step):
        classes = refined[first : first + step]
        classes.copy_(logits[first : first + step])
        for _ in range(iterations):
            _average(classes, weights, offsets, reach)
    return refined


@torch.no_grad()
def neighbour_weights(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights (P, H, W), float32, of the P = 8 * len(dilations) neighbours of every pixel; they sum to 1 over P.

    Args:
        image: Image (C, H, W), at least one pixel.
        dilations: Distances of the neighbours in pixels, in the order of the result; within one, in reading order.
    """
    offsets, reach = _offsets(dilations), max(dilations)
    channels, height, width = image.shape
    padded = F.pad(image.float(), [reach] * 4, mode="replicate")
    weights = torch.empty(len(offsets), height, width, dtype=torch.float32, device=image.device)
    for top, bottom in _strips(weights):
        score = torch.zeros_like(weights[:, top:bottom])
        for channel in padded:  # (H + 2R, W + 2R)
            near = torch.stack([_shifted(channel, top, bottom, width, reach, *offset) for offset in offsets])
            here = _shifted(channel, top, bottom, width, reach, 0, 0)
            spread = torch.cat([near, here.expand(len(dilations), -1, -1)]).std(dim=0)
            score -= near.sub_(here).abs_().div_(EPSILON + SPREAD_FACTOR * spread)
        # A softmax by hand: torch's own sums in an order that depends on where a strip ends.
        score /= channels
        score.sub_(score.amax(dim=0)).exp_()
        total = score[0].clone()
        for weight in score[1:]:
            total += weight
        torch.div(score, total, out=weights[:, top:bottom])
    return weights


def _average(classes: Tensor, weights: Tensor, offsets: Sequence[tuple[int, int]], reach: int) -> None:
    """Replace ``classes`` (c, H, W) by the weighted means over their neighbours."""
    width = classes.shape[2]
    padded = F.pad(classes, [reach] * 4, mode="replicate")
    for top, bottom in _strips(weights):
        mean = classes[:, top:bottom]
        for index, offset in enumerate(offsets):
            near, weight = _shifted(padded, top, bottom, width, reach, *offset), weights[index, top:bottom]
            if index == 0:
                torch.mul(near, weight, out=mean)
            else:
                mean.addcmul_(near, weight)


def _strips(weights: Tensor) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of strips in which all neighbour weights (P, H, W) are small."""
    count, height, width = weights.shape
    step = max(1, STRIP_BYTES.get(weights.device.type, 64 << 20) // (4 * count * width))
    for top in range(0, height, step):
        yield top, min(top + step, height)


def _offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Row and column offsets of the 8 neighbours at each dilation, in reading order."""
    return [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]


def _shifted(padded: Tensor, top: int, bottom: int, width: int, reach: int, down: int, right: int) -> Tensor:
    """View (..., bottom - top, width) of the neighbours at one offset of the rows ``top`` to ``bottom``."""
    return padded[..., top + reach + down : bottom + reach + down, reach + right : reach + right + width]
