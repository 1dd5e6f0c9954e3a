"""Pictures in and out: strict reading, the protocol's resizing, label PNGs, overlays with a legend, contact sheets.

Reading and resizing are OpenCV's, as in mmseg's pipeline, so that ``predict`` and ``run`` see the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ovbench.errors import DataError

UInt8 = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
INK, PAPER = (32, 32, 32), (255, 255, 255)


def require_complete(path: Path, content: bytes) -> None:
    """Nothing, if an image file holds all its data.

    Decoders fill the missing part of a cut JPEG with grey and say nothing; PNG decoders differ. The end marker tells.

    Raises:
        DataError: The file is empty or cut off.
    """
    end = content.rstrip(b"\0")  # some writers pad with zeros
    cut = (content[:2] == b"\xff\xd8" and b"\xff\xd9" not in end[-4096:]) or (
        content[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" not in end[-64:]
    )
    if not content or cut:
        raise DataError(
            f"The image '{path}' is {'cut off' if content else 'empty'} ({len(content)} bytes). Fetch or copy it again."
        )


def read_rgb(path: Path) -> UInt8:
    """An image file as uint8 (H, W, 3) RGB, its EXIF rotation applied.

    Raises:
        DataError: Missing, cut off or not an image.
    """
    import cv2

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the image '{path}': {error.strerror}.") from None
    require_complete(path, content)
    bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise DataError(f"'{path}' is not an image that can be read (JPEG, PNG, WebP, TIFF or BMP).")
    return np.ascontiguousarray(bgr[:, :, ::-1]).astype(np.uint8, copy=False)


def resize_short_side(image: UInt8, short_side: int, long_side: int = 2048) -> UInt8:
    """An image (H, W, 3) with its short side at ``short_side`` and its long side at most ``long_side``, ratio kept.

    Rounds as mmcv's ``Resize(scale=(long_side, short_side), keep_ratio=True)``. ``short_side`` 0 changes nothing.
    """
    if short_side == 0:
        return image
    import cv2

    height, width = image.shape[:2]
    long_edge, short_edge = max(long_side, short_side), min(long_side, short_side)
    factor = min(long_edge / max(height, width), short_edge / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    if size == (width, height):
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def palette(count: int) -> list[Colour]:
    """``count`` colours that differ: VOC's bit-reversal colours, whose first is black."""
    colours = []
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((channels[0], channels[1], channels[2]))
    return colours


def save_label_png(path: Path, labels: npt.NDArray[Any], colours: Sequence[Colour]) -> None:
    """Write a label map (H, W) as a PNG: palette indices up to 256 classes, 16-bit grey values above."""
    if len(colours) > 256:
        Image.fromarray(labels.astype(np.uint16)).save(path, format="PNG")
        return
    height, width = labels.shape
    image = Image.frombytes("P", (width, height), labels.astype(np.uint8).tobytes())
    flat = [value for colour in colours for value in colour]
    image.putpalette(flat + [0] * (768 - len(flat)))
    image.save(path, format="PNG")


def blend(image: UInt8, labels: npt.NDArray[Any], colours: Sequence[Colour], opacity: float = 0.55) -> UInt8:
    """Image (H, W, 3) with classes laid over it as colours and thin light outlines between them.

    Labels outside the palette (ignored pixels) show the image dimmed.
    """
    table = np.array([*colours, (0, 0, 0)], dtype=np.float32)
    index = np.where((labels >= 0) & (labels < len(colours)), labels, len(colours))
    mixed = image * (1 - opacity) + table[index] * opacity
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    mixed[edge] = mixed[edge] * 0.3 + 255 * 0.7
    return mixed.round().clip(0, 255).astype(np.uint8)


def overlay(
    image: UInt8,
    labels: npt.NDArray[Any],
    colours: Sequence[Colour],
    names: Sequence[str],
    *,
    most: int = 16,
) -> Image.Image:
    """The blended picture with a legend below: colour, name and share of every class, largest first.

    Args:
        image: RGB (H, W, 3).
        labels: Classes (H, W).
        colours: K colours.
        names: K class names.
        most: Longest legend; the rest is summed up.
    """
    picture = Image.fromarray(blend(image, labels, colours))
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))].ravel(), minlength=len(names))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    entries = [(colours[i], f"{names[i]}  {_percent(counts[i] / labels.size)}") for i in order[:most]]
    if len(order) > most:
        rest = sum(int(counts[i]) for i in order[most:]) / labels.size
        entries.append((PAPER, f"{len(order) - most} more classes  {_percent(rest)}"))
    return stack([picture, legend(entries, picture.width)])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def legend(entries: Sequence[tuple[Colour, str]], width: int) -> Image.Image:
    """Colour swatches with their texts in as many columns as fit into ``width`` pixels."""
    size = max(12, min(22, width // 40))
    font = ImageFont.load_default(size)
    line = int(size * 1.7)
    widest = max((int(font.getlength(text)) for _, text in entries), default=0) + 3 * size
    columns = max(1, min(len(entries) or 1, width // max(widest, 1)))
    rows = -(-len(entries) // columns)
    image = Image.new("RGB", (width, rows * line + size), PAPER)
    draw = ImageDraw.Draw(image)
    for index, (colour, text) in enumerate(entries):
        x = (index // rows) * (width // columns) + size // 2
        y = (index % rows) * line + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline=INK)
        draw.text((x + int(1.6 * size), y - size // 8), text, fill=INK, font=font)
    return image


def caption(text: str, width: int) -> Image.Image:
    """One line of text on white, cut to ``width`` pixels."""
    size = max(12, min(20, width // 28))
    font = ImageFont.load_default(size)
    while len(text) > 4 and font.getlength(text) > width - size:
        text = text[:-4] + "..."
    image = Image.new("RGB", (width, int(size * 1.8)), PAPER)
    ImageDraw.Draw(image).text((size // 2, size // 4), text, fill=INK, font=font)
    return image


def stack(images: Sequence[Image.Image], *, gap: int = 0, across: bool = False) -> Image.Image:
    """Images below each other (or side by side with ``across``) on white."""
    if across:
        width = sum(image.width for image in images) + gap * (len(images) - 1)
        sheet = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    else:
        height = sum(image.height for image in images) + gap * (len(images) - 1)
        sheet = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    position = 0
    for image in images:
        sheet.paste(image, (position, 0) if across else (0, position))
        position += (image.width if across else image.height) + gap
    return sheet


def gallery_row(
    image: UInt8,
    pred: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    colours: Sequence[Colour],
    names: Sequence[str],
    title: str,
) -> Image.Image:
    """Image, prediction and label side by side under a title, with a legend of the classes in either; 900 px wide."""
    side = 296
    height = max(1, round(image.shape[0] * side / image.shape[1]))
    panels = [
        Image.fromarray(image),
        Image.fromarray(blend(image, pred, colours)),
        Image.fromarray(blend(image, truth, colours)),
    ]
    shown = [panel.resize((side, height), Image.Resampling.LANCZOS) for panel in panels]
    strip = stack(shown, gap=6, across=True)
    heads = stack([caption(text, side) for text in ("image", "prediction", "label")], gap=6, across=True)
    present = np.bincount(
        np.concatenate([array[(array >= 0) & (array < len(names))].ravel() for array in (pred, truth)]),
        minlength=len(names),
    )
    order = [int(i) for i in np.argsort(-present, kind="stable") if present[i] > 0.002 * pred.size][:12]
    return stack(
        [caption(title, strip.width), heads, strip, legend([(colours[i], names[i]) for i in order], strip.width)]
    )
