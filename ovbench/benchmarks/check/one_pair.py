"""What is in one image and its label, looked at without trusting either."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.layout import Pair

Counts = npt.NDArray[np.int64]


class Seen(NamedTuple):
    """What was found in one pair of files.

    Attributes:
        colour: Mode of a label that is no map of ids.
        lossy: The label is JPEG data.
        narrow: It has 8 bits.
        lowest: Its smallest value.
        widest: Its largest value where it has more than 8 bits.
        counts: Pixels per raw id, (256,) or, of 16 bits, (65536,); None where there are none.
    """

    pair: Pair
    image_error: str | None
    label_error: str | None
    image_size: tuple[int, int] | None
    label_size: tuple[int, int] | None
    colour: str | None
    lossy: bool
    narrow: bool
    lowest: int
    widest: int
    counts: Counts | None


def read_image(path: Path) -> tuple[tuple[int, int] | None, str | None]:
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


def look(pair: Pair, largest: int) -> Seen:
    """Opens one pair; never raises for what is in the files. ``largest`` is the largest value that a label may have."""
    from PIL import Image

    image_size, image_error = read_image(pair.image)
    label_size, colour, lossy, narrow, lowest, widest, counts = None, None, False, False, 0, 0, None
    try:
        with Image.open(pair.label) as label:
            label.load()
            label_size, lossy = label.size, label.format == "JPEG"
            if label.mode in ("L", "P"):
                narrow, counts = True, np.zeros(largest + 1, np.int64)
                counts[:256] = label.histogram()
            elif label.mode == "1" or label.mode.startswith("I"):
                values = np.asarray(label).astype(np.int64)
                lowest, widest = int(values.min()), int(values.max())
                counts = np.bincount(values.clip(0, largest).ravel(), minlength=largest + 1).astype(np.int64)
            else:
                bands = [np.asarray(band) for band in label.split()]
                grey = label.mode.startswith("RGB") and all((band == bands[0]).all() for band in bands[1:3])
                colour = f"{label.mode}, all channels equal" if grey else label.mode
        label_error = None
    except Exception as error:  # Pillow's decoders raise what they happen to meet
        label_error = str(error) or type(error).__name__
    return Seen(pair, image_error, label_error, image_size, label_size, colour, lossy, narrow, lowest, widest, counts)
