"""Panoptic quality of one image by COCO's definition, from one ``bincount`` over (truth, prediction) pairs.

PQ = sum of IoU over true positives / (TP + FP / 2 + FN / 2), per class over a dataset (Kirillov et al., CVPR 2019); the
treatment of void and crowd is that of panopticapi's ``pq_compute``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_SEGMENT = -1


class Segments(NamedTuple):
    """A panoptic map.

    Attributes:
        ids: (H, W), int64, -1 where there is no segment (void), else an index into the next two.
        classes: (S,), int64, the class of each segment.
        crowd: (S,), bool, whether it stands for a group of things that are not told apart.
    """

    ids: Tensor
    classes: Tensor
    crowd: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Segments:
        """The same on another device; mmengine's data samples call this where they are moved."""
        return Segments(*(part.to(*args, **kwargs) for part in self))

    def labels(self, ignore_index: int = 255) -> Tensor:
        """The class of each pixel (H, W), int64, ``ignore_index`` where there is no segment."""
        table = torch.cat([self.classes, self.classes.new_tensor([ignore_index])])
        return table[self.ids]  # -1 is the last entry


class Quality(NamedTuple):
    """What panoptic quality is made of, per class (K,).

    Attributes:
        iou: float64, sum of IoU over true positives.
        tp: int64, matched pairs of segments.
        fp: int64, predicted segments without a true one.
        fn: int64, true segments without a predicted one.
    """

    iou: Tensor
    tp: Tensor
    fp: Tensor
    fn: Tensor


def segments_of_labels(labels: Tensor, num_classes: int) -> Segments:
    """One segment per class that occurs in a label map (H, W); values outside 0..K-1 belong to none."""
    known = (labels >= 0) & (labels < num_classes)
    classes = torch.unique(labels[known]).long()
    table = torch.full((num_classes + 1,), NO_SEGMENT, dtype=torch.int64, device=labels.device)
    table[classes] = torch.arange(len(classes), device=labels.device)
    ids = table[torch.where(known, labels, num_classes).long()]
    return Segments(ids, classes, torch.zeros(len(classes), dtype=torch.bool, device=labels.device))


def quality(pred: Segments, truth: Segments, num_classes: int, areas: Tensor | None = None) -> Quality:
    """Panoptic quality's parts for one image, on the CPU.

    A predicted and a true segment of one class match where their IoU is above 0.5, void pixels of the prediction left
    out of the union; so no segment can match two. A crowd matches nothing and is never missed. A predicted segment
    without match does not count if more than half of it lies in void or in crowds of its class. Segments without a
    pixel do not exist. (Of several crowds of one class in an image panopticapi looks at the last alone, this at all.)

    Args:
        pred: Predicted segments; ``crowd`` is not looked at.
        truth: True segments.
        num_classes: K.
        areas: Pixels of each true segment (S,), int64, where they are not those of the map: panopticapi takes them from
            the json file, where they may have been counted before one segment was drawn over another. A segment with an
            area exists, with pixels or without.

    Raises:
        ValueError: Sizes differ, or ids or classes are out of range.
    """
    if pred.ids.shape != truth.ids.shape:
        raise ValueError(f"prediction is {tuple(pred.ids.shape)} but truth is {tuple(truth.ids.shape)}")
    for what, given in (("prediction", pred), ("truth", truth)):
        _require_in_range(what, given, num_classes)
    rows, columns = len(truth.classes) + 1, len(pred.classes) + 1
    # row and column 0 are "no segment"
    pairs = (truth.ids + 1).flatten() * columns + (pred.ids + 1).flatten().to(truth.ids.device)
    table = torch.bincount(pairs, minlength=rows * columns).view(rows, columns).cpu()

    pred_classes, classes, crowd = (part.cpu() for part in (pred.classes, truth.classes, truth.crowd))
    pred_area, void = table.sum(dim=0)[1:], table[0, 1:]
    area = table.sum(dim=1)[1:] if areas is None else areas.cpu()
    inter = table[1:, 1:]
    same_class = classes[:, None] == pred_classes[None, :]
    union = area[:, None] + pred_area[None, :] - inter - void[None, :]
    matched = same_class & ~crowd[:, None] & (2 * inter > union)  # IoU > 0.5, in integers
    true, predicted = matched.nonzero(as_tuple=True)
    iou = inter[true, predicted].double() / union[true, predicted].double()

    excused = void + (inter * (same_class & crowd[:, None])).sum(dim=0)
    wrong = (pred_area > 0) & ~matched.any(dim=0) & (2 * excused <= pred_area)
    missed = (area > 0) & ~matched.any(dim=1) & ~crowd

    def count(of: Tensor) -> Tensor:
        return torch.bincount(of, minlength=num_classes)

    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, classes[true], iou)
    return Quality(sums, count(classes[true]), count(pred_classes[wrong]), count(classes[missed]))


def _require_in_range(what: str, given: Segments, num_classes: int) -> None:
    count = len(given.classes)
    if len(given.crowd) != count:
        raise ValueError(f"{what} has {count} classes but {len(given.crowd)} crowd flags")
    if given.ids.numel() and not (int(given.ids.min()) >= NO_SEGMENT and int(given.ids.max()) < count):
        raise ValueError(f"{what} holds ids {int(given.ids.min())}..{int(given.ids.max())}, but has {count} segments")
    if count and not (int(given.classes.min()) >= 0 and int(given.classes.max()) < num_classes):
        low, high = int(given.classes.min()), int(given.classes.max())
        raise ValueError(f"{what} holds classes {low}..{high}, outside 0..{num_classes - 1}")
