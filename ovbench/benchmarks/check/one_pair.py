"""What is in one image and its label, looked at without trusting either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.labels import LabelFault, Size
from ovbench.benchmarks.layout import Pair

Counts = npt.NDArray[np.int64]
_NONE: Counts = np.zeros(0, np.int64)


class Seen(NamedTuple):
    """What was found in one pair of files.

    Attributes:
        pair: The files.
        image_error: What is wrong with the image.
        image_size: Its width and height.
        label_fault: Why the label cannot be read.
        label_size: Its width and height.
        values: Raw ids of the label that occur, sorted.
        counts: Pixels of each of them.
    """

    pair: Pair
    image_error: str | None
    image_size: Size | None
    label_fault: LabelFault | None
    label_size: Size | None
    values: Counts
    counts: Counts


def read_image(path: Path) -> tuple[Size | None, str | None]:
    """Size (width, height) as a reader that follows EXIF rotation sees it, and what is wrong with the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            # A JPEG is decoded at an eighth: all its data is read, so that a truncated file shows, in less time.
            image.draft("L", (1, 1))
            image.load()
            return ((height, width) if turned else (width, height)), None
    except Exception as error:  # Pillow's decoders raise what they happen to meet
        return None, str(error) or type(error).__name__


def look(pair: Pair, read: Callable[[Path], npt.NDArray[np.integer[Any]]]) -> Seen:
    """Opens one pair; never raises for what is in the files. ``read`` gives the raw ids (H, W) of a label."""
    image_size, image_error = read_image(pair.image)
    try:
        label = read(pair.label)
    except LabelFault as fault:
        return Seen(pair, image_error, image_size, fault, fault.size, _NONE, _NONE)
    present, counts = counted(label)
    return Seen(pair, image_error, image_size, None, (label.shape[1], label.shape[0]), present, counts)


def counted(values: npt.NDArray[np.integer[Any]]) -> tuple[Counts, Counts]:
    """The values that occur, sorted, and how often each does."""
    if values.dtype.itemsize <= 2 and values.dtype.kind in "bu":
        counts = np.bincount(values.ravel())
        present = np.nonzero(counts)[0]
        return present, counts[present]
    present, counts = np.unique(values, return_counts=True)
    return present.astype(np.int64), counts
