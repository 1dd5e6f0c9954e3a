"""From averaged cosine logits to a label map: resize, softmax over words, best word's class, thresholds.

The logits at the label's size are never held for all words: words are resized in chunks and reduced on the way to the
running best word and the running log-sum-exp, so that 171 words at 2048 x 1024 cost megabytes instead of gigabytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 128 << 20  # of resized logits at a time


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (Q, h, w) resized bilinearly (``align_corners=False``) to (Q, H, W)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def decide(
    logits: Tensor,
    size: tuple[int, int],
    word_class: Tensor,
    *,
    logit_scale: float = 1.0,
    prob_thd: float = 0.0,
    area_thd: float | None = None,
    area_rule: str = "background",
) -> Tensor:
    """Label map (H, W), int64, of one image.

    The class of a pixel is the class of its most probable word, which is the same as the maximum over each class's
    words of the softmax over all words, and then the argmax over classes.

    Args:
        logits: Cosine logits (Q, h, w), float32, one map per word.
        size: Size (H, W) of the label map.
        word_class: Class index of each word (Q,), int64.
        logit_scale: Factor before the softmax.
        prob_thd: Where the winning probability is smaller, class 0.
        area_thd: A class > 0 whose predicted area is at most this share of all predicted area > 0 is dropped.
        area_rule: Where pixels of a dropped class go: ``"background"`` (class 0) or ``"next-best"`` (most probable
            word of the classes that are left, as the public code does; ``prob_thd`` then looks at that probability).
    """
    word, top, total = _reduce(logits, size, logit_scale, with_total=prob_thd > 0)
    labels = word_class[word]
    if area_thd is not None:
        classes = int(word_class.max()) + 1
        area = torch.bincount(labels.flatten(), minlength=classes)
        area[0] = 0
        dropped = area <= area_thd * area.sum()
        dropped[0] = False
        if bool((dropped & (area > 0)).any()):
            if area_rule == "background":
                labels = torch.where(dropped[labels], 0, labels)
            else:
                keep = (~dropped[word_class]).nonzero()[:, 0]
                if keep.numel():
                    word, top, _ = _reduce(logits[keep], size, logit_scale, with_total=False)
                    labels = word_class[keep[word]]
                else:  # a benchmark without words for class 0, and all else dropped
                    labels = torch.zeros_like(labels)
    if prob_thd > 0:
        assert total is not None
        labels = torch.where(torch.exp(top - total) < prob_thd, 0, labels)
    return labels


def _reduce(
    logits: Tensor, size: tuple[int, int], scale: float, *, with_total: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Best word (H, W), its scaled logit, and the log-sum-exp over words, all at the wanted size."""
    chunk = max(1, CHUNK_BYTES // (4 * size[0] * size[1]))
    word: Tensor | None = None
    top = total = torch.empty(0)
    for first in range(0, logits.shape[0], chunk):
        part = resize(logits[first : first + chunk], size) * scale
        value, index = part.max(dim=0)
        if with_total:
            sums = torch.logsumexp(part, dim=0)
            total = sums if word is None else torch.logaddexp(total, sums)
        if word is None:
            word, top = index, value
        else:
            better = value > top  # strictly: the first of equal words wins, as argmax has it
            word = torch.where(better, index + first, word)
            top = torch.where(better, value, top)
    assert word is not None
    return word, top, (total if with_total else None)
