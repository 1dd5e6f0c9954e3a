"""From patch logits to a label map: softmax over words, the best word's class, thresholds.

The class of a pixel is the class of its most probable word: the same as the maximum over each class's words of the
softmax over all words, and then the argmax over classes. So neither probabilities nor class maps are ever made. On a CPU
only those words are computed in a square of the output that can win there (2 to 8 % of 847 words on photographs);
elsewhere, and where a threshold needs the log-sum-exp of all words, strips of output rows are reduced at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovbench.ops.assemble import Weights, output_size, strips, tiles


def decide(
    values: Tensor,
    weights: Weights | None,
    word_class: Tensor,
    *,
    logit_scale: float = 1.0,
    prob_thd: float = 0.0,
    area_thd: float | None = None,
    area_rule: str = "background",
    background: int = 0,
) -> Tensor:
    """Label map (H, W), int64, of one image.

    Args:
        values: Cosine logits (R, C, Q), float32, of all patches (or pixels), words innermost.
        weights: Weights to the rows (H, R) and columns (W, C) of the label map, see :mod:`ovbench.ops.assemble`; None
            where the logits have its size.
        word_class: Class index of each word (Q,), int64.
        logit_scale: Factor before the softmax.
        prob_thd: Where the winning probability is smaller, the background.
        area_thd: A foreground class whose predicted area is at most this share of all predicted foreground is dropped.
        area_rule: Where pixels of a dropped class go: ``"background"`` or ``"next-best"`` (most probable word of the
            classes that are left, as the public code does; ``prob_thd`` then looks at that probability).
        background: The class that thresholds leave pixels to; nothing else looks at it.
    """
    values = values * logit_scale
    word, top, total = _reduce(values, weights, with_top=prob_thd > 0, with_total=prob_thd > 0)
    labels = word_class[word]
    if area_thd is not None:
        dropped = small_classes(labels, int(word_class.max()) + 1, area_thd, background)
        if bool(dropped.any()):
            keep = (~dropped[word_class]).nonzero()[:, 0]
            if area_rule == "background" or not keep.numel():
                labels = torch.where(dropped[labels], background, labels)
            else:
                word, top, _ = _reduce(values[..., keep], weights, with_top=prob_thd > 0, with_total=False)
                labels = word_class[keep[word]]
    if prob_thd > 0:
        labels = torch.where(torch.exp(top - total) < prob_thd, background, labels)
    return labels


def decide_views(views: Sequence[tuple[Tensor, Weights]]) -> Tensor:
    """Label map (H, W), int64: the class with the largest mean probability over several views of one image.

    Args:
        views: Logits (R, C, K), float32, of each view and the weights to the rows (H, R) and columns (W, C) of the map.
    """
    height, width = output_size(*views[0])
    labels = torch.empty(height, width, dtype=torch.int64, device=views[0][0].device)
    # Rows of the output are the same for every view, so strips of one height go together and no view is held in full.
    for parts in zip(*(strips(values, weights) for values, weights in views), strict=True):
        first, total = parts[0][0], parts[0][1].softmax(dim=-1)
        for _, part in parts[1:]:
            total += part.softmax(dim=-1)
        labels[first : first + total.shape[0]] = total.argmax(dim=-1)
    return labels


def small_classes(labels: Tensor, classes: int, area_thd: float, background: int = 0) -> Tensor:
    """Mask (K,) of the foreground classes that are predicted, but on at most ``area_thd`` of all predicted foreground."""
    area = torch.bincount(labels.flatten(), minlength=classes)
    area[background] = 0
    return (area > 0) & (area <= area_thd * area.sum())


def _reduce(
    values: Tensor, weights: Weights | None, *, with_top: bool, with_total: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Best word (H, W) of scaled logits, its value, and the log-sum-exp over words (the latter two where wanted)."""
    height, width = output_size(values, weights)
    word = torch.empty(height, width, dtype=torch.int64, device=values.device)
    top = values.new_empty(height, width) if with_top else values.new_empty(0)
    total = values.new_empty(height, width) if with_total else values.new_empty(0)
    if weights is not None and not with_total and values.device.type == "cpu":  # a GPU would wait for every count
        for rows, columns, tile in tiles(values, weights):
            words = tile.candidates()
            if len(words) == 1 and not with_top:
                word[rows, columns] = words
                continue
            value, best = tile.output(words).max(dim=-1)
            word[rows, columns] = words[best]
            if with_top:
                top[rows, columns] = value
        return word, top, total
    for first, part in strips(values, weights):
        here = slice(first, first + part.shape[0])
        value, word[here] = part.max(dim=-1)
        if with_top:
            top[here] = value
        if with_total:
            total[here] = torch.logsumexp(part, dim=-1)
    return word, top, total
