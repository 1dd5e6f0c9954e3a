"""How sure a difference of two mIoUs is: images are drawn again, and both mIoUs taken from the sums of their areas.

The dataset-level mIoU is no mean over images, so it is computed anew from the summed areas of every resample. Both runs
see the same images in a resample (paired), which removes what the choice of images does to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovbench.errors import UsageError
from ovbench.results.image_areas import ImageAreas

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 95.0
_CHUNK_BYTES = 64 * 2**20
_EXACT = 2**53  # float64 holds every integer up to here


@dataclass(frozen=True)
class Interval:
    """A paired bootstrap of a difference of mIoU, in percentage points.

    Attributes:
        difference: mIoU of the second run minus that of the first, all images once.
        low: Lower end of the percentile interval.
        high: Upper end.
        confidence: Percent of the resamples between the two.
        above_zero: Share of the resamples in which the second run is better; ties count half.
        resamples: Number of resamples.
        seed: Seed of the resampling.
        images: Number of images drawn from.
    """

    difference: float
    low: float
    high: float
    confidence: float
    above_zero: float
    resamples: int
    seed: int
    images: int


def miou(intersect: NDArray[np.int64], union: NDArray[np.int64]) -> NDArray[np.float64]:
    """MIoU (...) in percent from summed areas (..., K): the mean over the classes whose union is not 0; NaN without any."""
    import numpy as np

    present = union > 0
    iou = np.divide(intersect, union, out=np.zeros(union.shape, dtype=np.float64), where=present)
    count = present.sum(axis=-1)
    means = np.full(count.shape, np.nan)
    np.divide(100.0 * iou.sum(axis=-1), count, out=means, where=count > 0)
    return means


def paired_differences(
    first: ImageAreas, second: ImageAreas, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """MIoU of ``second`` minus that of ``first`` in every resample (R,), in percentage points.

    Args:
        first: Areas of N images.
        second: Areas of the same images.
        resamples: R, at least 1.
        seed: Of numpy's PCG64.

    Raises:
        UsageError: No images, or fewer than one resample.
        ValueError: The runs do not have the same images and classes.
    """
    import numpy as np

    if first.names != second.names or first.label.shape != second.label.shape:
        raise ValueError("a paired bootstrap needs the same images and classes in both runs")
    images, classes = first.label.shape
    if images == 0:
        raise UsageError("There are no images to draw from.")
    if resamples < 1:
        raise UsageError(f"At least 1 resample is needed, not {resamples}.")
    parts = [areas for run in (first, second) for areas in (run.intersect, run.union)]
    stacked = np.concatenate(parts, axis=1)  # (N, 4K)
    # N images are drawn: below 2^53 a float64 product is exact in any order, and many times faster.
    exact = images * int(stacked.max(initial=0)) < _EXACT
    matrix = stacked.astype(np.float64) if exact else stacked
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _CHUNK_BYTES // (8 * (3 * images + 8 * classes)))
    found = np.empty(resamples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(images, size=(count, images))
        drawn += images * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
        sums = (weights.astype(matrix.dtype) @ matrix).astype(np.int64)  # (count, 4K)
        inter_1, union_1, inter_2, union_2 = np.split(sums, 4, axis=1)
        # 0 where no resampled image has a labelled or predicted pixel: nothing differs there
        found[start : start + count] = np.nan_to_num(miou(inter_2, union_2)) - np.nan_to_num(miou(inter_1, union_1))
    return found


def interval(
    first: ImageAreas,
    second: ImageAreas,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The percentile interval of the mIoU of ``second`` minus that of ``first``.

    Raises:
        UsageError: No images, fewer than one resample, or a confidence that is no percentage between 0 and 100.
    """
    import numpy as np

    if not 0 < confidence < 100:
        raise UsageError(f"The confidence is a percentage between 0 and 100, not {confidence}.")
    drawn = paired_differences(first, second, resamples, seed)
    tail = (1 - confidence / 100) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    whole = [miou(run.intersect.sum(axis=0), run.union.sum(axis=0)) for run in (first, second)]
    above = (np.count_nonzero(drawn > 0) + np.count_nonzero(drawn == 0) / 2) / len(drawn)
    return Interval(
        difference=float(whole[1] - whole[0]),
        low=float(low),
        high=float(high),
        confidence=confidence,
        above_zero=float(above),
        resamples=resamples,
        seed=seed,
        images=len(first.names),
    )
