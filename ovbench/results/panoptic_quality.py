"""Panoptic quality in a record, from its parts per class as :func:`ovbench.ops.panoptic.quality` counts them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import Field

from ovbench.results.stored import Stored


class PanopticClass(Stored):
    """Matched and unmatched segments of one class over all evaluated images."""

    name: str = Field(description="class name in label order")
    thing: bool = Field(description="true for a thing (countable), false for stuff")
    iou_sum: float = Field(ge=0, description="sum of IoU over true positives, each in 0.5..1, images in dataset order")
    tp: int = Field(ge=0, description="matched pairs of segments")
    fp: int = Field(ge=0, description="predicted segments without a true one")
    fn: int = Field(ge=0, description="true segments without a predicted one")
    pq: float | None = Field(
        description="percent, iou_sum / (tp + fp / 2 + fn / 2), unrounded; null without any segment"
    )


class PanopticMean(Stored):
    """Means over the classes of a kind that have a true or predicted segment."""

    pq: float | None = Field(description="panoptic quality, percent, unrounded; null without any class")
    sq: float | None = Field(
        description="segmentation quality, percent: mean of iou_sum / tp, 0 for a class without tp"
    )
    rq: float | None = Field(description="recognition quality, percent: mean of tp / (tp + fp / 2 + fn / 2)")
    classes: int = Field(ge=0, description="number of classes that the means are over")


class PanopticMetrics(Stored):
    """Panoptic quality by COCO's definition; every figure follows from the counts of ``classes``."""

    pq: float | None = Field(description="panoptic quality, percent, mean over classes, unrounded")
    sq: float | None = Field(description="segmentation quality, percent, mean over classes, unrounded")
    rq: float | None = Field(description="recognition quality, percent, mean over classes, unrounded")
    things: PanopticMean = Field(description="the same over things only")
    stuff: PanopticMean = Field(description="the same over stuff only")
    classes: tuple[PanopticClass, ...] = Field(description="one entry per class in label order")


def panoptic_from_sums(
    names: Sequence[str],
    things: Collection[int],
    iou: Sequence[float],
    tp: Sequence[int],
    fp: Sequence[int],
    fn: Sequence[int],
) -> PanopticMetrics:
    """Panoptic quality from sums over a dataset, unrounded; classes without any segment are left out of the means.

    Args:
        names: K class names in label order.
        things: Indices of the classes that are things.
        iou: K sums of IoU over true positives.
        tp: K numbers of true positives.
        fp: K numbers of false positives.
        fn: K numbers of false negatives.
    """
    classes = []
    for index, (name, total, hits, wrong, missed) in enumerate(zip(names, iou, tp, fp, fn, strict=True)):
        score = _scores(total, hits, wrong, missed)
        classes.append(
            PanopticClass(
                name=name,
                thing=index in things,
                iou_sum=total,
                tp=hits,
                fp=wrong,
                fn=missed,
                pq=None if score is None else score[0],
            )
        )
    everything = _mean(classes)
    return PanopticMetrics(
        **everything.model_dump(exclude={"classes"}),
        things=_mean([entry for entry in classes if entry.thing]),
        stuff=_mean([entry for entry in classes if not entry.thing]),
        classes=tuple(classes),
    )


def _scores(iou: float, tp: int, fp: int, fn: int) -> tuple[float, float, float] | None:
    """PQ, SQ and RQ in percent; None without any segment."""
    weight = tp + fp / 2 + fn / 2
    return (100 * iou / weight, 100 * iou / tp if tp else 0.0, 100 * tp / weight) if weight else None


def _mean(classes: Sequence[PanopticClass]) -> PanopticMean:
    scores = [score for c in classes if (score := _scores(c.iou_sum, c.tp, c.fp, c.fn)) is not None]
    if not scores:
        return PanopticMean(pq=None, sq=None, rq=None, classes=0)
    pq, sq, rq = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    return PanopticMean(pq=pq, sq=sq, rq=rq, classes=len(scores))
