"""Galleries as data addresses, made small enough for a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from ovbench.errors import DataError

_QUALITIES = (85, 75, 62)
_SMALLEST = 320  # pixels of width, below which nothing can be seen


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        address: ``data:`` address.
        width: Pixels.
        height: Pixels.
    """

    address: str
    width: int
    height: int


def embedded(path: Path, limit: int) -> Picture:
    """A picture as a JPEG of at most ``limit`` bytes: first at lower quality, then smaller.

    A picture that cannot be made so small is embedded at 320 pixels of width.

    Raises:
        DataError: The file is no picture that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they happen to meet
        raise DataError(f"Cannot read the gallery '{path}': {error}.") from error
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=quality, optimize=True)
            if buffer.tell() <= limit or (image.width <= _SMALLEST and quality == _QUALITIES[-1]):
                text = base64.b64encode(buffer.getvalue()).decode("ascii")
                return Picture(f"data:image/jpeg;base64,{text}", image.width, image.height)
        width = max(_SMALLEST, image.width * 4 // 5) if image.width > _SMALLEST else image.width
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
