"""Mask files of other tools, read strictly: npz arrays, PNGs, and COCO's JSON with run-length encodings.

Every reader gives masks as logits (M, h, w), float32, and scores (M,) where the file has them; whatever does not fit is a
``DataError`` that names the file. docs/masks.md describes the layouts.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ovbench.errors import DataError
from ovbench.networks.mask_generators.oracle import LOGIT
from ovbench.pictures import require_complete, require_size

Array = NDArray[Any]
MOST_MASKS = 10_000  # of one image
MOST_CELLS = 2**30  # of all masks of one image: 4 GiB as float32


@dataclass(frozen=True)
class MaskArrays:
    """Masks of one image: logits (M, h, w) and scores (M,) in 0..1 or None, float32."""

    masks: Array
    scores: Array | None = None


def require_bounds(shape: Sequence[int], where: str) -> None:
    """Nothing, if masks (M, h, w) of this shape can be held.

    Raises:
        DataError: Another number of dimensions, empty sides, or too many masks or cells.
    """
    if len(shape) != 3 or min(shape[1:]) < 1:
        raise DataError(f"{where}: masks must be an array (M, h, w) with sides of at least 1; it is {tuple(shape)}.")
    count, height, width = shape
    if count > MOST_MASKS or count * height * width > MOST_CELLS:
        raise DataError(
            f"{where}: {count} masks of {height} x {width} are more than can be held ({MOST_MASKS} masks, {MOST_CELLS} "
            "values). Save them smaller: any size that spans the image will do."
        )


def as_logits(masks: Array, where: str) -> Array:
    """Logits (M, h, w), float32, of masks as bool, as integers 0 and 1 (or 0 and 255), or as float logits.

    Raises:
        DataError: Other integers, NaN or infinity, or numbers that look like probabilities.
    """
    kind = masks.dtype.kind
    if kind in "iu" and masks.size:
        values = np.unique(masks).tolist()
        if not set(values) <= {0, 1} and not set(values) <= {0, 255}:
            raise DataError(
                f"{where}: masks of type {masks.dtype} hold 0 and 1, or 0 and 255; these hold {values[:5]}. Ids of several "
                "masks in one map go into a PNG; soft masks are float logits."
            )
    if kind in "biu":
        return np.where(masks != 0, np.float32(LOGIT), np.float32(-LOGIT))
    with np.errstate(over="ignore"):
        logits = masks.astype(np.float32)
    if not np.isfinite(logits).all():
        raise DataError(f"{where}: the masks hold NaN or infinity.")
    if logits.size and logits.min() >= 0 and logits.max() <= 1:
        raise DataError(
            f"{where}: all values of the float masks lie in 0..1, like probabilities, while logits are needed (inside where "
            "at least 0). Save log(p / (1 - p)), or 'p >= 0.5' as bool."
        )
    return logits


def read_npz(path: Path) -> MaskArrays:
    """``masks`` and, where it is there, ``objectness`` of an npz; other arrays are left alone.

    Raises:
        DataError: Missing, damaged, or not in the layout.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "masks.npy" not in names:
                held = ", ".join(name.removesuffix(".npy") for name in names[:8]) or "nothing"
                raise DataError(f"'{path}' holds no array 'masks' (M, h, w); it holds {held}.")
            masks = _array(archive, "masks.npy", f"'{path}'")
            scores = _array(archive, "objectness.npy", f"'{path}'") if "objectness.npy" in names else None
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"Cannot read masks from '{path}': {_reason(error)}.") from error
    return MaskArrays(as_logits(masks, f"'{path}'"), _scores(scores, len(masks), f"'{path}'"))


def _array(archive: zipfile.ZipFile, name: str, where: str) -> Array:
    """An array of an archive, whose header is looked at before its values are."""
    with archive.open(name) as file:
        shape, dtype = _header(file)
    if dtype.kind not in "biuf":  # of Python objects least of all
        raise DataError(f"{where}: '{name}' is no array of numbers but of {dtype}. Save bool, integers or floats.")
    if name == "masks.npy":
        require_bounds(shape, where)
    elif len(shape) != 1 or shape[0] > MOST_MASKS:
        raise DataError(f"{where}: objectness must be (M,); it is {shape}.")
    with archive.open(name) as file:
        found: Array = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _scores(values: Any, count: int, where: str) -> Array | None:
    """Scores (count,), float32, checked."""
    if values is None:
        return None
    try:
        scores = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(f"{where}: scores of the masks must be numbers.") from None
    if scores.shape != (count,) or not ((scores >= 0) & (scores <= 1)).all():  # NaN is in no range
        raise DataError(f"{where}: scores must be one number in 0..1 for each of {count} masks.")
    return scores


def read_ids(path: Path) -> MaskArrays:
    """One mask for each positive value of a PNG, in ascending order; 0 is no mask.

    Raises:
        DataError: Missing, damaged, not a PNG, or too many masks.
    """
    ids = _png(path)
    values = np.unique(ids)
    values = values[values > 0]
    require_bounds((len(values), *ids.shape), f"'{path}'")
    return MaskArrays(as_logits(ids[None] == values[:, None, None], f"'{path}'"))


def read_folder(folder: Path) -> MaskArrays:
    """One mask for each PNG of a folder, in natural order of their names (2.png before 10.png); an empty folder is no mask.

    Raises:
        DataError: A file that is damaged or no mask, sizes that differ, or files but no PNG.
    """
    files = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)
    pictures = [path for path in files if path.suffix.lower() == ".png"]
    if files and not pictures:
        raise DataError(f"'{folder}' holds no PNG, one per mask: it holds '{files[0].name}'.")
    found: list[Array] = []
    for path in pictures:
        values = _png(path)
        if len(np.unique(values[values > 0])) > 1:
            raise DataError(f"'{path}' is no mask: it has more than one value besides 0 (one PNG per mask here).")
        if found and values.shape != found[0].shape:
            raise DataError(f"'{path}' is {values.shape}, while the masks before it are {found[0].shape} (h, w).")
        require_bounds((len(pictures), *values.shape), f"'{folder}'")
        found.append(values > 0)
    if not found:
        return MaskArrays(np.zeros((0, 1, 1), np.float32))
    return MaskArrays(as_logits(np.stack(found), f"'{folder}'"))


def _png(path: Path) -> Array:
    """Values (h, w), int64, of a PNG: grey levels, palette indices, or R + 256 G + 65536 B as in COCO's panoptic PNGs."""
    import io

    from PIL import Image

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the mask '{path}': {error.strerror}.") from None
    require_complete(path, content)
    require_size(path, content)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # whatever Pillow meets first in a damaged file
        raise DataError(f"'{path}' is not a PNG that can be read: {_reason(error)}.") from error
    if mode == "RGB":
        red, green, blue = (values[..., channel].astype(np.int64) for channel in range(3))
        grey = bool((red == green).all() and (red == blue).all())
        return red if grey else red + 256 * green + 65536 * blue
    if values.ndim != 2:
        raise DataError(f"'{path}' is of mode {mode}: masks are PNGs in grey, with a palette, or RGB.")
    return values.astype(np.int64)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


@dataclass(frozen=True)
class Annotated:
    """Annotations of a JSON file by image: file stems, or ids where no table says which files they are.

    Attributes:
        path: The file.
        by_image: Annotations of each image; under None those that name no image.
    """

    path: Path
    by_image: dict[str | None, list[tuple[int, dict[str, Any]]]]

    def of(self, stem: str) -> list[tuple[int, dict[str, Any]]] | None:
        """Annotations of an image by its file's stem, with their places in the file; None where it is not mentioned."""
        found = self.by_image.get(stem)
        return self.by_image.get(str(int(stem))) if found is None and stem.isdecimal() else found

    def masks(self, annotations: Sequence[tuple[int, dict[str, Any]]]) -> MaskArrays:
        """The masks of some annotations.

        Raises:
            DataError: One is a polygon, damaged, or of another size than the first.
        """
        found: list[Array] = []
        for place, annotation in annotations:
            where = f"'{self.path}', annotation {place}"
            height, width, runs = _run_lengths(annotation.get("segmentation"), where)
            require_bounds((len(annotations), height, width), where)
            if found and found[0].shape != (height, width):
                raise DataError(f"{where}: its mask is {height} x {width}, the first of its image {found[0].shape}.")
            found.append(decoded(runs, (height, width), where))
        scores = [annotation.get("score") for _, annotation in annotations]
        if not found:
            return MaskArrays(np.zeros((0, 1, 1), np.float32))
        known = None if all(score is None for score in scores) else scores
        logits = as_logits(np.stack(found), f"'{self.path}'")
        return MaskArrays(logits, _scores(known, len(found), f"'{self.path}'"))


def read_json(path: Path) -> Annotated:
    """The annotations of a JSON file: COCO's ``{"images": [...], "annotations": [...]}`` or a list of annotations.

    Raises:
        DataError: Missing, no JSON, or not in the layout.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"Cannot read masks from '{path}': {_reason(error)}.") from error
    whole = content if isinstance(content, dict) else {"annotations": content}
    annotations, images = whole.get("annotations"), whole.get("images", [])
    if not isinstance(annotations, list) or not isinstance(images, list):
        raise DataError(f"'{path}' holds no list 'annotations'.")
    found: dict[str | None, list[tuple[int, dict[str, Any]]]] = {}
    stems: dict[str, str] = {}
    for place, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not _is_id(image.get("id")):
            raise DataError(f"'{path}', image {place}: it needs 'id' and 'file_name'.")
        stem = Path(image["file_name"]).stem
        if stem in found or str(image["id"]) in stems:
            raise DataError(f"'{path}', image {place}: '{image['file_name']}' or its id is there twice.")
        stems[str(image["id"])], found[stem] = stem, []
    for place, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or "segmentation" not in annotation:
            raise DataError(f"'{path}', annotation {place}: it needs a 'segmentation'.")
        name, number = annotation.get("file_name"), annotation.get("image_id")
        key: str | None = None
        if isinstance(name, str):
            key = Path(name).stem
        elif _is_id(number):
            key = stems.get(str(number)) if stems else str(number)
            if key is None:
                raise DataError(f"'{path}', annotation {place}: no image has the id {number}.")
        elif name is not None or number is not None:
            raise DataError(f"'{path}', annotation {place}: 'image_id' is a number or text, 'file_name' is text.")
        found.setdefault(key, []).append((place, annotation))
    return Annotated(path, found)


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _run_lengths(segmentation: Any, where: str) -> tuple[int, int, list[int]]:
    """Height, width and run lengths of COCO's encoding, compressed or not."""
    if isinstance(segmentation, list):
        raise DataError(
            f"{where}: its segmentation is a polygon. Masks are read as run lengths, {{'size': [h, w], 'counts': ...}}: "
            "convert it with pycocotools.mask (frPyObjects, then merge)."
        )
    if not isinstance(segmentation, dict):
        raise DataError(f"{where}: its segmentation is neither run lengths nor a polygon.")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"{where}: 'size' must be [h, w] in pixels; it is {str(size)[:60]}.")
    if isinstance(counts, str):
        counts = uncompressed(counts, where)
    if not isinstance(counts, list) or not all(type(run) is int for run in counts):
        raise DataError(f"{where}: 'counts' must be run lengths, as a list of integers or as COCO's text.")
    return size[0], size[1], counts


def uncompressed(text: str, where: str = "run lengths") -> list[int]:
    """Run lengths of COCO's compressed text: base 32 with a sign, from the third on as differences to the last but one.

    Raises:
        DataError: A character that is none of it, or an end within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise DataError(f"{where}: '{character}' is no part of compressed run lengths, or a number is too large.")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise DataError(f"{where}: the compressed run lengths end within a number: they are cut off.")
    return runs


def decoded(runs: Sequence[int], size: tuple[int, int], where: str = "run lengths") -> NDArray[np.bool_]:
    """The mask (h, w) of run lengths: outside, inside, outside ..., column by column.

    Raises:
        DataError: A negative run, or they do not fill the mask.
    """
    total = size[0] * size[1]
    if any(run < 0 or run > total for run in runs) or sum(runs) != total:
        raise DataError(f"{where}: the run lengths make {sum(runs)} pixels, the mask has {size[0]} x {size[1]}.")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(size, order="F")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
