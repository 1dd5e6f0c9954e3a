"""The raw label formats: content of a downloaded file in, content of the file that a benchmark reads out.

Every rule refuses ids that its format cannot have and names the file. Sources are named at each table.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.labels import IGNORE_INDEX, WIDE_IGNORE_INDEX, id_ranges
from ovbench.benchmarks.prepare.ade847 import NUM_OBJECTS, OBJECT_IDS
from ovbench.errors import DataError

Table = npt.NDArray[np.int32]
Ids = npt.NDArray[np.integer[Any]]

# Raised whenever a rule gives other files, so that those of an earlier version are made again.
VERSION = 1
# The value in a table for ids that the raw format cannot have.
_IMPOSSIBLE = -1
# labelIds of the 19 classes in training order (cityscapesScripts, helpers/labels.py).
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Unused ids of COCO's numbering, counted from 0 (mmsegmentation, dataset_converters/coco_stuff164k.py).
_COCO_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO_IDS = tuple(value for value in range(182) if value not in _COCO_GAPS)
_COCO_THINGS = 80
# Categories of PASCAL Context that the 59 classes are, in their order (dataset_converters/pascal_context.py).
_CONTEXT = """
2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207 220 232 258 259 260
284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454 458
"""
CONTEXT_IDS = tuple(map(int, _CONTEXT.split()))
# Short side above which the published preparation of ADE20K's 847 classes makes images smaller.
_ADE_SHORT = 512


class Drawing(NamedTuple):
    """The regions of one image of PASCAL Context, later ones over earlier ones.

    Attributes:
        regions: Category 1..459 and run lengths, as text (COCO's compression) or as numbers.
    """

    height: int
    width: int
    regions: tuple[tuple[int, str | tuple[int, ...]], ...]


def _table(ids: Iterable[int], first: int = 0, others: dict[int, int] | None = None) -> Table:
    """A table (65536,) in which ``ids`` become ``first``, ``first + 1`` ..., others as given, the rest impossible."""
    table = np.full(WIDE_IGNORE_INDEX + 1, _IMPOSSIBLE, np.int32)
    table[list(others or {})] = list((others or {}).values())
    chosen = list(ids)
    table[chosen] = np.arange(first, first + len(chosen))
    return table


TABLES = {
    "cityscapes": _table(_CITYSCAPES, others=dict.fromkeys(range(34), IGNORE_INDEX)),
    "coco_stuff": _table(_COCO_IDS, others={255: IGNORE_INDEX}),
    "coco_object": _table(_COCO_IDS[:_COCO_THINGS], first=1, others=dict.fromkeys((*_COCO_IDS[_COCO_THINGS:], 255), 0)),
    # Ids are one higher than those of COCO-Stuff 164k, 0 is unlabelled.
    "coco_stuff10k": _table((0, *(value + 1 for value in _COCO_IDS))),
    "context459": _table(range(1, 460), others={0: WIDE_IGNORE_INDEX}),
    "context60": _table((0, *CONTEXT_IDS)),
    "ade847": _table(OBJECT_IDS, others=dict.fromkeys(range(NUM_OBJECTS + 1), WIDE_IGNORE_INDEX)),
}


def mapped(rule: str, raw: Ids, source: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Ids of the benchmark's files (H, W), uint8 or uint16.

    Args:
        rule: A key of ``TABLES``.
        raw: Ids of the source (H, W).
        source: The file, for the message.

    Raises:
        DataError: Ids that the raw format cannot have.
    """
    table = TABLES[rule]
    outside = (raw < 0) | (raw > WIDE_IGNORE_INDEX)
    ids = table[np.where(outside, 0, raw)]
    wrong = outside | (ids == _IMPOSSIBLE)
    if wrong.any():
        known = np.nonzero(table != _IMPOSSIBLE)[0]
        raise DataError(
            f"'{source}' has ids that its format does not have: {id_ranges(raw[wrong])} (known: {id_ranges(known, 20)}). "
            "It is damaged, converted already, or of another dataset."
        )
    return ids.astype(np.uint16 if rule in ("context459", "ade847") else np.uint8)


def run_lengths(text: str) -> list[int]:
    """The run lengths of COCO's compressed text (maskApi.c, ``rleFrString``).

    Each number is in groups of five bits, lowest first, one character from '0' on for each: bit 5 says that more
    follow, bit 4 of the last is the sign. From the fourth number on, the difference to the last but one is written.

    Raises:
        ValueError: The text is no such list.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"character {character!r}")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the last number is cut off")
    return runs


def drawn(drawing: Drawing) -> Ids:
    """The category of each pixel (H, W), int32; 0 where no region is.

    Raises:
        ValueError: Runs that are negative or do not add up to the image.
    """
    flat = np.zeros(drawing.height * drawing.width, np.int32)  # runs go down the columns
    for category, counts in drawing.regions:
        runs = np.array(run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
        if (runs < 0).any() or runs.sum() != flat.size:
            raise ValueError(f"the runs cover {runs.sum()} of {flat.size} pixels")
        flat[np.repeat(np.arange(len(runs)) % 2 == 1, runs)] = category
    return flat.reshape(drawing.width, drawing.height).T


def _picture(content: bytes, source: str) -> tuple[npt.NDArray[np.generic], str]:
    """Stored values of an image file and its format."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image), str(image.format)
    except Exception as error:  # Pillow's decoders raise what they happen to meet
        raise DataError(f"'{source}' is damaged or no image: {error}. Fetch it again.") from error


def _label_picture(content: bytes, source: str) -> Ids:
    """Ids of a grey or palette image (H, W)."""
    values, kind = _picture(content, source)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer) or kind == "JPEG":
        raise DataError(f"'{source}' is a {kind} of shape {values.shape}, not one id per pixel. Fetch the label maps.")
    return values.astype(np.int32)


def _matrix(content: bytes, key: str, source: str) -> Ids:
    """An integer matrix (H, W) of a MATLAB file."""
    loadmat = importlib.import_module("scipy.io").loadmat  # scipy brings no types
    try:
        values = np.asarray(loadmat(io.BytesIO(content), variable_names=[key])[key])
    except KeyError:
        raise DataError(f"'{source}' has no matrix '{key}': it is of another dataset.") from None
    except Exception as error:  # scipy has no common class for what a damaged file makes it raise
        raise DataError(f"'{source}' is damaged or no MATLAB file: {error}. Fetch it again.") from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number) or not (values == np.round(values)).all():
        raise DataError(f"'{source}': '{key}' is no matrix of whole numbers. Fetch it again.")
    return values.astype(np.int64)


def _png(ids: npt.NDArray[np.generic]) -> bytes:
    return _encoded(ids, "PNG")


def _tiff(ids: npt.NDArray[np.generic]) -> bytes:
    return _encoded(ids, "TIFF")


def _encoded(values: npt.NDArray[np.generic], kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(file, format=kind)
    return file.getvalue()


def _context60(content: Drawing, source: str) -> bytes:
    try:
        raw = drawn(content)
    except ValueError as error:
        raise DataError(f"'{source}' has a damaged region: {error}. Fetch it again.") from error
    return _png(mapped("context60", raw, source))


def _coco_stuff10k(content: bytes, source: str) -> bytes:
    raw = _matrix(content, "S", source) if source.endswith(".mat") else _label_picture(content, source)
    return _png(mapped("coco_stuff10k", raw, source))


def _ade847(content: bytes, source: str) -> bytes:
    values, _ = _picture(content, source)
    if values.ndim != 3 or values.dtype != np.uint8:
        raise DataError(f"'{source}' has shape {values.shape}: not a coloured *_seg.png. Fetch the full release.")
    red, green = values[..., 0].astype(np.int32), values[..., 1].astype(np.int32)
    if (red % 10).any():
        raise DataError(f"'{source}' has red values that are no multiples of 10: it was changed. Fetch it again.")
    ids = mapped("ade847", red // 10 * 256 + green, source)
    return _tiff(_smaller(ids, linear=False))


def _ade847_image(content: bytes, source: str) -> bytes:
    return _encoded(_smaller(_picture(content, source)[0], linear=True), "JPEG")


def _smaller(values: npt.NDArray[Any], *, linear: bool) -> npt.NDArray[Any]:
    """An image or label whose short side is at most 512, resized as OpenCV does, without smoothing."""
    import cv2

    height, width = values.shape[:2]
    short = min(height, width)
    if short <= _ADE_SHORT:
        return values
    size = tuple(_ADE_SHORT if side == short else round(side / short * _ADE_SHORT) for side in (width, height))
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_LINEAR if linear else cv2.INTER_NEAREST))


def _map(rule: str) -> Callable[[bytes, str], bytes]:
    return lambda content, source: _png(mapped(rule, _label_picture(content, source), source))


COPY = "copy"
RULES: dict[str, Callable[[Any, str], bytes]] = {
    COPY: lambda content, source: bytes(content),
    "text": lambda content, source: str(content).encode(),
    "cityscapes": _map("cityscapes"),
    "coco_stuff": _map("coco_stuff"),
    "coco_object": _map("coco_object"),
    "coco_stuff10k": _coco_stuff10k,
    "context459": lambda content, source: _tiff(mapped("context459", _matrix(content, "LabelMap", source), source)),
    "context60": _context60,
    "ade847": _ade847,
    "ade847_image": _ade847_image,
}


def same(rule: str, one: bytes, other: bytes) -> bool:
    """Whether two outputs of a rule mean the same: equal bytes, or for labels equal ids."""
    if one == other:
        return True
    if rule in (COPY, "text", "ade847_image"):
        return False
    try:
        values = [_picture(content, "")[0] for content in (one, other)]
    except DataError:
        return False
    return values[0].shape == values[1].shape and bool((values[0] == values[1]).all())
