"""Label files to training ids, as mmseg's ``LoadAnnotations`` gives them, with errors that name the file.

A benchmark's label files have 8 bits, with 255 for pixels that no metric counts, or 16 bits, with 65535. Training ids are
of the same width.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ovbench.errors import DataError

IGNORE_INDEX = 255
WIDE_IGNORE_INDEX = 65535

Ids = npt.NDArray[np.unsignedinteger[Any]]


@lru_cache(maxsize=32)
def train_id_table(reduce_zero_label: bool, ignore_index: int = IGNORE_INDEX, raw_ids: tuple[int, ...] = ()) -> Ids:
    """The training id of each raw value 0..``ignore_index``: uint8 (256,) or uint16 (65536,), read-only.

    Args:
        reduce_zero_label: 0 becomes 255, 1..254 move down by one, and 255 stays (mmseg's ``LoadAnnotations``).
        ignore_index: 255 or 65535, which stays what it is.
        raw_ids: The raw value of each class, an order of 0..K-1; other values stay (mmseg's ``label_map``).
    """
    table = np.arange(ignore_index + 1, dtype=np.min_scalar_type(ignore_index))
    if reduce_zero_label:
        table[1:] -= 1
        table[[0, ignore_index]] = ignore_index
    if raw_ids:
        table[list(raw_ids)] = np.arange(len(raw_ids))
    table.setflags(write=False)
    return table


def decode_label(path: Path) -> npt.NDArray[np.generic]:
    """The stored values of a label image, before any rule: palette indices, grey values, or colours as they are.

    Raises:
        DataError: The file is missing, truncated or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image)
    except FileNotFoundError:
        raise DataError(f"The label file '{path}' does not exist.") from None
    except Exception as error:  # Pillow's decoders raise what they happen to meet
        raise DataError(f"The label file '{path}' is damaged or no image: {error}. Fetch or make it again.") from error


def index_label(label: npt.NDArray[np.generic], source: Path | str = "label", ignore_index: int = IGNORE_INDEX) -> Ids:
    """A label map (H, W) as uint8, or uint16 where ``ignore_index`` is 65535, values unchanged.

    Args:
        label: Decoded label image, (H, W) or (H, W, 1).
        source: The file, for the message.
        ignore_index: The largest value that there is.

    Raises:
        DataError: The image has colour channels instead of one id per pixel, or ids above ``ignore_index``.
    """
    values = np.asarray(label)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise DataError(
            f"The label '{source}' has shape {tuple(np.shape(label))}: a coloured mask, not one class id per pixel. "
            "Convert the colours to ids and save a grey ('L') or palette ('P') PNG."
        )
    if values.dtype != np.bool_ and not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"The label '{source}' has values of type {values.dtype}, not whole numbers. Make it again as PNG."
        )
    if values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > ignore_index):
        raise DataError(
            f"The label '{source}' has values {values.min()}..{values.max()}, but ids are 0..{ignore_index}. It may hold "
            "instance ids (class * 1000 + n): use the file of class ids."
        )
    return values.astype(np.min_scalar_type(ignore_index))


def id_ranges(ids: npt.ArrayLike, most: int = 8) -> str:
    """Ids as short text, e.g. ``"19-21, 33"``."""
    values = sorted({int(value) for value in np.asarray(ids).ravel()})
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    parts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(parts[:most]) + (", ..." if len(parts) > most else "")
