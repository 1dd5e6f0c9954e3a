"""Label PNGs to training ids, as mmseg's ``LoadAnnotations`` gives them, with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ovbench.errors import DataError

IGNORE_INDEX = 255

UInt8 = npt.NDArray[np.uint8]


def train_id_table(reduce_zero_label: bool) -> UInt8:
    """The training id of each of the 256 raw values, uint8 (256,).

    With ``reduce_zero_label`` 0 becomes 255, 1..254 move down by one, and 255 stays (mmseg's ``LoadAnnotations``).
    """
    table = np.arange(256, dtype=np.uint8)
    if reduce_zero_label:
        table[1:] -= 1
        table[[0, IGNORE_INDEX]] = IGNORE_INDEX
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
    # Pillow raises SyntaxError and ValueError for damaged PNG chunks, OSError for everything else.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"The label file '{path}' is damaged or no image: {error}. Fetch or make it again.") from error


def index_label(label: npt.NDArray[np.generic], source: Path | str = "label") -> UInt8:
    """A label map as uint8 (H, W), values unchanged.

    Args:
        label: Decoded label image, (H, W) or (H, W, 1).
        source: The file, for the message.

    Raises:
        DataError: The image has colour channels instead of one id per pixel, or ids above 255.
    """
    values = np.asarray(label)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise DataError(
            f"The label '{source}' has shape {tuple(np.shape(label))}: a coloured mask, not one class id per pixel. "
            "Convert the colours to ids and save a grey ('L') or palette ('P') PNG."
        )
    if values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > IGNORE_INDEX):
        raise DataError(
            f"The label '{source}' has values {values.min()}..{values.max()}, but ids are 0..255. It may hold "
            "instance ids (class * 1000 + n): use the file of class ids."
        )
    return values.astype(np.uint8)


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
