"""Areas of intersection, prediction and label per class, exact in int64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Areas(NamedTuple):
    """Pixel counts per class (K,), int64, over pixels whose label is not ignored."""

    intersect: Tensor
    pred: Tensor
    label: Tensor

    @property
    def union(self) -> Tensor:
        """Pixels in the prediction or the label of a class (K,), int64."""
        return self.pred + self.label - self.intersect


def areas(pred: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255) -> Areas:
    """Areas of one image from one ``bincount`` over (label, prediction) pairs.

    Args:
        pred: Predicted classes (H, W), 0 .. K-1.
        label: True classes (H, W), 0 .. K-1 or ``ignore_index``.
        num_classes: K.
        ignore_index: Label value that counts nowhere.

    Raises:
        ValueError: Sizes differ, or a value is outside 0 .. K-1.
    """
    if pred.shape != label.shape:
        raise ValueError(f"prediction is {tuple(pred.shape)} but label is {tuple(label.shape)}")
    valid = label != ignore_index
    p, t = pred[valid].long(), label[valid].long()
    if t.numel() and (int(t.max()) >= num_classes or int(t.min()) < 0):
        values = sorted(set(t[(t < 0) | (t >= num_classes)].tolist()))[:5]
        raise ValueError(f"label holds {values}, outside 0..{num_classes - 1} and not {ignore_index}")
    if p.numel() and (int(p.max()) >= num_classes or int(p.min()) < 0):
        raise ValueError(f"prediction holds {int(p.max())}, outside 0..{num_classes - 1}")
    matrix = torch.bincount(t * num_classes + p, minlength=num_classes**2).view(num_classes, num_classes)
    return Areas(matrix.diagonal().clone(), matrix.sum(dim=0), matrix.sum(dim=1))
