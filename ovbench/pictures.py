"""Pictures in and out: strict reading, the protocol's resizing, label PNGs, overlays with a legend, contact sheets.

Reading and resizing are OpenCV's, as in mmseg's pipeline, so that ``predict`` and ``run`` see the same pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ovbench.errors import DataError

UInt8 = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
INK, SOFT, PAPER = (32, 32, 32), (110, 110, 110), (255, 255, 255)
NARROWEST, TALLEST = 200, 2400  # pixels; overlays below are enlarged up to there


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


def require_size(path: Path, content: bytes) -> None:
    """Nothing, if an image file's header does not ask for more memory than a picture takes.

    Raises:
        DataError: It has more pixels than Pillow allows (some 180 million).
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError as error:
        raise DataError(f"'{path}': {error}") from None
    except Exception:  # not a format of Pillow's, or damaged: the decoder decides
        return
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    if most and pixels > most:
        raise DataError(f"'{path}' has {pixels} pixels, more than {most}: it is damaged, or no picture to be read.")


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
    require_size(path, content)
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


def blend(
    image: UInt8,
    labels: npt.NDArray[Any],
    colours: Sequence[Colour],
    opacity: float = 0.55,
    *,
    fade: float = 0.0,
    outline: int = 1,
) -> UInt8:
    """Image (H, W, 3) with classes laid over it as colours and thin light outlines between them.

    Labels outside the palette (ignored pixels) show the image dimmed.

    Args:
        image: RGB (H, W, 3).
        labels: Classes (H, W).
        colours: K colours.
        opacity: Share of the class colour, 0..1.
        fade: Share of the picture's own colour that is taken out first, 0..1, so that class colours stay true.
        outline: Thickness of the lines in pixels.
    """
    light = np.array([0.299, 0.587, 0.114], dtype=np.float32) * fade * (1 - opacity)  # Rec. 601 luma
    kept = np.eye(3, dtype=np.float32) * (1 - fade) * (1 - opacity) + light[:, None]
    table = np.array([*colours, (0, 0, 0)], dtype=np.float32) * opacity + 0.5  # for rounding
    index = np.where((labels >= 0) & (labels < len(colours)), labels, len(colours))
    edge = edges(labels, outline)
    out = np.empty_like(image)
    for top in range(0, len(image), 64):  # strips stay in the processor's cache
        rows = slice(top, top + 64)
        mixed = image[rows].astype(np.float32) @ kept + table[index[rows]]
        mixed[edge[rows]] = mixed[edge[rows]] * 0.3 + 255 * 0.7
        out[rows] = mixed  # 0..255 by construction
    return out


def edges(labels: npt.NDArray[Any], thickness: int = 1) -> npt.NDArray[np.bool_]:
    """Mask (H, W) of the borders between classes, about ``thickness`` pixels wide."""
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge = np.zeros(labels.shape, dtype=bool)
    height, width = labels.shape
    for shift in range(-(thickness // 2), thickness - thickness // 2):  # the border moved up and down, left and right
        low, high = max(0, 1 + shift), min(height, height + shift)
        if low < high:
            edge[low:high] |= down[low - 1 - shift : high - 1 - shift]
        low, high = max(0, 1 + shift), min(width, width + shift)
        if low < high:
            edge[:, low:high] |= right[:, low - 1 - shift : high - 1 - shift]
    return edge


def overlay(
    image: UInt8,
    labels: npt.NDArray[Any],
    colours: Sequence[Colour],
    names: Sequence[str],
    *,
    most: int = 16,
) -> Image.Image:
    """The blended picture, large regions named in place, over a legend: colour, name and share, largest class first.

    A picture narrower than 200 pixels is enlarged by a whole number; type and lines grow with the picture.

    Args:
        image: RGB (H, W, 3).
        labels: Classes (H, W).
        colours: K colours.
        names: K class names.
        most: Longest legend; the rest is summed up.
    """
    height, width = labels.shape
    factor = max(1, min(-(-NARROWEST // width), TALLEST // max(1, height)))
    if factor > 1:
        size = (width * factor, height * factor)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        labels = labels.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = labels.shape
    outline = max(1, round(min(height, width) / 500))
    picture = Image.fromarray(blend(image, labels, colours, fade=0.6, outline=outline))
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))].ravel(), minlength=len(names))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    size_px = type_size(width, height)
    name_regions(picture, labels, [(i, names[i]) for i in order if counts[i] >= 0.01 * labels.size], size_px)
    most = len(order) if len(order) == most + 1 else most  # "1 more" would take the line of that one
    entries = [(colours[i], names[i], _percent(counts[i] / labels.size)) for i in order[:most]]
    if len(order) > most:
        rest = sum(int(counts[i]) for i in order[most:]) / labels.size
        entries.append((PAPER, f"{len(order) - most} more classes", _percent(rest)))
    return stack([picture, legend(entries, max(width, NARROWEST), size_px)])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def type_size(width: int, height: int) -> int:
    """Font size in pixels that can be read when a picture of that size fills a screen; at least 12."""
    return max(12, min(round(math.sqrt(width * height) / 34), width // 12))


def name_regions(picture: Image.Image, labels: npt.NDArray[Any], named: Sequence[tuple[int, str]], size: int) -> None:
    """Writes class names into the widest places of their regions, where they fit and meet no other name.

    Args:
        picture: Drawn on.
        labels: Classes (H, W) at the picture's size.
        named: Class numbers and names, the most important first.
        size: Font size in pixels.
    """
    import cv2

    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(picture)
    step = max(1, min(labels.shape) // 400)  # places need no more precision than that
    small = labels[::step, ::step]
    free = np.ones(small.shape, dtype=np.uint8)
    for index, name in named:
        text = shortened(name, font, 12 * size) or name
        high, wide = round(1.2 * size / step), round((font.getlength(text) + 0.4 * size) / step)
        if high >= small.shape[0] or wide >= small.shape[1]:
            continue
        # a picture's edge ends a region; a few stray pixels under a name do no harm
        inside = np.pad((small == index) * free, 1).astype(np.uint8)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
        share = cv2.blur(inside.astype(np.float32), (wide, high), borderType=cv2.BORDER_CONSTANT)
        depth[share < 0.93] = 0
        y, x = (int(value) - 1 for value in np.unravel_index(int(depth.argmax()), depth.shape))
        if depth.max() <= 0:
            continue
        free[max(0, y - high) : y + high + 1, max(0, x - wide) : x + wide + 1] = 0
        centre = ((x + 0.5) * step, (y + 0.5) * step)
        draw.text(centre, text, fill=PAPER, font=font, anchor="mm", stroke_width=max(1, size // 9), stroke_fill=INK)


def shortened(text: str, font: Any, width: float) -> str | None:
    """A text that takes at most ``width`` pixels: itself, or its beginning with "..."; None below four letters."""
    if font.getlength(text) <= width:
        return text
    length = len(text) - 1
    while length >= 4 and font.getlength(text[:length].rstrip() + "...") > width:
        length -= 1
    return text[:length].rstrip() + "..." if length >= 4 else None


def legend(entries: Sequence[tuple[Colour, str, str]], width: int, size: int | None = None) -> Image.Image:
    """Colour swatches with name and figure in as many columns as fit into ``width`` pixels.

    Names that would not fit, or that are longer than about 40 letters, are cut; the figure stays.

    Args:
        entries: Colour, name and figure ("" for none).
        width: Width of the legend in pixels.
        size: Font size in pixels.
    """
    size = size or max(12, min(22, width // 40))
    font = ImageFont.load_default(size)
    line, edge = int(size * 1.7), size // 2
    beside = {figure: (font.getlength(figure) + 0.7 * size if figure else 0.0) for _, _, figure in entries}
    shown = []
    for colour, name, figure in entries:
        room = min(20 * size, width - 2 * edge - 1.6 * size - beside[figure])
        shown.append((colour, shortened(name, font, room) or name[:1], figure))
    widest = max((font.getlength(name) + beside[figure] for _, name, figure in shown), default=0.0)
    cell = int(widest + 1.6 * size + 1.4 * size)  # swatch, text, and air before the next column
    columns = max(1, min(len(shown) or 1, (width - 2 * edge + int(1.4 * size)) // max(cell, 1)))
    rows = -(-len(shown) // columns)
    image = Image.new("RGB", (width, rows * line + size), PAPER)
    draw = ImageDraw.Draw(image)
    for index, (colour, name, figure) in enumerate(shown):
        x = edge + (index // rows) * cell
        y = edge + (index % rows) * line
        draw.rounded_rectangle((x, y, x + size, y + size), radius=size // 5, fill=colour, outline=INK)
        middle = y + size / 2
        draw.text((x + 1.6 * size, middle), name, fill=INK, font=font, anchor="lm")
        if figure:
            after = round(x + 1.6 * size + font.getlength(name) + 0.7 * size)
            draw.text((after, middle), figure, fill=SOFT, font=font, anchor="lm")
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
        [caption(title, strip.width), heads, strip, legend([(colours[i], names[i], "") for i in order], strip.width)]
    )
