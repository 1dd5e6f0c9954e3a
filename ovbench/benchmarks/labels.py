"""The one reader of label files, and the rule that makes training ids of the values that they store.

Runs, ``data check``, the look at the first files, training and panoptic data all come here, so that what one of them
refuses no other reads. mmseg's ``LoadAnnotations`` gives the same for every label that is read here; beyond that it casts
to uint8, which makes 0 of 256, 255 of -1 and 1 of 1.9 without a word.

A benchmark's label files have 8 bits, with 255 for pixels that no metric counts, or 16 bits, with 65535. Training ids are
of the same width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.errors import DataError

IGNORE_INDEX = 255
WIDE_IGNORE_INDEX = 65535

Ids = npt.NDArray[np.unsignedinteger[Any]]
Size = tuple[int, int]

_ORIENTATION, _SUBFILE, _SAMPLE_FORMAT = 274, 254, 339  # tags of TIFF; the first one is EXIF's as well
_UNSIGNED, _SIGNED = 1, 2  # values of _SAMPLE_FORMAT
# What Pillow may take a label for. It knows more formats, and for one of them (EPS) it starts another program.
_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM", "TGA", "WEBP", "JPEG2000", "JPEG", "MPO")

_MODES = {"P": "palette", "L": "grey", "LA": "grey with transparency", "PA": "palette with transparency"}


class Kind(NamedTuple):
    """A kind of fault: what ``data check`` says of several files, what is said of one, and what helps."""

    many: str
    one: str
    fix: str


KINDS = {
    "unreadable_label": Kind("label files are damaged or no image", "is damaged or no image", "Fetch or make again."),
    "missing_labels": Kind("labels are missing", "does not exist", ""),
    "lossy_label": Kind(
        "labels are JPEG data, which changes ids near borders",
        "is JPEG data, which changes ids near borders",
        "Make again as PNG.",
    ),
    "several_pictures": Kind(
        "labels hold several pictures",
        "holds several pictures (frames or pages), and nothing says which is the label",
        "Save the label alone, as PNG.",
    ),
    "turned_label": Kind(
        "labels carry an EXIF rotation, which readers of labels do not follow",
        "carries an EXIF rotation, which readers of labels do not follow",
        "Save again without the tag, as seen over the picture.",
    ),
    "scaled_label": Kind(
        "labels are stored so that readers stretch or invert their values",
        "is stored so that readers stretch or invert its values",
        "Save again as 8-bit grey ('L') or palette ('P') PNG.",
    ),
    "colour_label": Kind(
        "labels are coloured pictures, not one class id per pixel",
        "is a coloured picture, not one class id per pixel",
        "Use the index PNGs, or turn colours into ids and save grey ('L') or palette ('P') PNGs.",
    ),
    "not_rgb": Kind(
        "labels are no RGB PNGs, whose colours are segment ids",
        "is no RGB PNG, whose colours are segment ids",
        "These look like semantic labels, or were saved anew with a palette: use the PNGs of the panoptic annotations.",
    ),
    "fractions": Kind(
        "labels hold numbers with fractions (floats), not ids",
        "holds numbers with fractions (floats), not ids",
        "Make again as PNG, with whole numbers.",
    ),
    "narrow_ids": Kind(
        "labels have 8 bits, which cannot tell all classes apart",
        "has 8 bits, which cannot tell all classes apart",
        "Ids above 255 are lost: make again with 16 bits.",
    ),
    "wide_ids": Kind("labels have values that are no ids", "has values that are no ids", ""),
    "out_of_range": Kind("labels have ids of no class", "has ids of no class", ""),
    "size_mismatch": Kind(
        "labels have another size than their image",
        "has another size than its image",
        "Use images and labels of the same release, none of them resized or rotated.",
    ),
    "segment_ids": Kind(
        "labels have segment ids that the json does not have",
        "has segment ids that the json does not have",
        "PNGs and json are of different releases: fetch them again.",
    ),
}
"""Faults that a single label file can have."""


class LabelFault(DataError):
    """A label file that cannot be used.

    Attributes:
        kind: A key of :data:`KINDS`.
        detail: What is wrong with this file, in a few words.
        path: The file.
        size: Its width and height where they are known.
    """

    kind: str = "unreadable_label"
    detail: str = ""
    path: Path = Path()
    size: Size | None = None

    @classmethod
    def of(cls, kind: str, path: Path | str, detail: str, *, fix: str = "", size: Size | None = None) -> LabelFault:
        """The fault of a kind; ``fix`` comes after what always helps."""
        known = KINDS[kind]
        text = f"The label '{path}' {known.one}{f': {detail}' if detail else ''}."
        fault = cls(" ".join(part for part in (text, known.fix, fix) if part))
        fault.kind, fault.detail, fault.path, fault.size = kind, detail, Path(path), size
        return fault


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


@dataclass(frozen=True)
class LabelRule:
    """What the label files of a benchmark hold: enough to read them, and to say what is wrong with one.

    All fields are plain data, so that a config for plain mmseg can hold them.

    Attributes:
        name: The benchmark as commands name it.
        num_classes: K.
        reduce_zero_label: The files' 0 is ignored and 1..K become 0..K-1.
        ignore_index: 255, or 65535 where the files have 16 bits.
        raw_ids: The stored value of each class, where it is another order of 0..K-1; else empty.
        labels_from: Where the files come from and what they hold.
        split: The split that they belong to.
    """

    name: str
    num_classes: int
    reduce_zero_label: bool = False
    ignore_index: int = IGNORE_INDEX
    raw_ids: tuple[int, ...] = ()
    labels_from: str = ""
    split: str = "val"

    @property
    def wide(self) -> bool:
        """Label files have 16 bits."""
        return self.ignore_index > IGNORE_INDEX

    @property
    def table(self) -> Ids:
        """The training id of each stored value 0..``ignore_index``."""
        return train_id_table(self.reduce_zero_label, self.ignore_index, tuple(self.raw_ids))

    @property
    def allowed(self) -> str:
        """The values that files may have, in words."""
        first = int(self.reduce_zero_label)
        zero = "0 and " if self.reduce_zero_label else ""
        verb = "are" if zero else "is"
        return f"classes are {first}..{self.num_classes - 1 + first}; {zero}{self.ignore_index} {verb} not counted"

    def load(self, path: Path) -> Ids:
        """Training ids (H, W), uint8 or uint16, of a label file, every one a class or the ignore index.

        Raises:
            LabelFault: The file is missing, damaged, no map of ids, or holds ids that the benchmark does not have.
        """
        train_ids = self.train_ids(self.stored(path), path)
        self.require_classes(train_ids, path)
        return train_ids

    def stored(self, path: Path) -> npt.NDArray[np.integer[Any]]:
        """The stored values (H, W) of a label file, all within 0..``ignore_index``.

        Raises:
            LabelFault: As :meth:`load`, but for ids of no class.
        """
        values = decode_label(path)
        if self.wide and values.dtype == np.uint8:
            raise LabelFault.of(
                "narrow_ids", path, f"{self.name} has {self.num_classes}", fix=self._made, size=_size(values)
            )
        self._require_ids(values, path)
        return values

    def train_ids(self, values: npt.NDArray[np.generic], source: Path | str = "label") -> Ids:
        """Training ids of stored values (H, W) or (H, W, 1); the same as mmseg's ``LoadAnnotations`` makes of them.

        Raises:
            LabelFault: A coloured label, fractions, or values outside 0..``ignore_index``.
        """
        values = np.asarray(values)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.ndim != 2:
            raise LabelFault.of("colour_label", source, f"shape {tuple(values.shape)}")
        if values.dtype != np.bool_ and not np.issubdtype(values.dtype, np.integer):
            raise LabelFault.of("fractions", source, f"type {values.dtype}")
        self._require_ids(values, source)
        ids: Ids = values.astype(np.min_scalar_type(self.ignore_index))
        return self.table[ids] if self.reduce_zero_label or self.raw_ids else ids  # a look-up costs 40 copies

    def require_classes(self, train_ids: npt.NDArray[np.integer[Any]], source: Path | str) -> None:
        """Raises :class:`LabelFault` naming file and ids where a training id is no class and not ignored."""
        if train_ids.dtype == self.table.dtype and (train_ids + train_ids.dtype.type(1)).max() <= self.num_classes:
            return  # the ignored value, the largest there is, has become 0: half the time of what follows
        fine = (train_ids < self.num_classes) | (train_ids == self.ignore_index)
        if fine.all():
            return
        raw = np.unique(train_ids[~fine]) + np.int64(self.reduce_zero_label)
        where = "" if self.split == "val" else f" --split {self.split}"
        look = f"'ovbench data check {self.name} --data-root ...{where}' looks at all files."
        raise LabelFault.of(
            "out_of_range",
            source,
            f"{id_ranges(raw)}, which {self.name} does not have ({self.allowed})",
            fix=f"The file looks unconverted or of another dataset. {self._made} {look}",
            size=_size(train_ids),
        )

    def _require_ids(self, values: npt.NDArray[Any], source: Path | str) -> None:
        """Raises :class:`LabelFault` where a value is outside 0..``ignore_index``."""
        if (
            not values.size
            or values.dtype == np.bool_
            or (values.dtype.kind == "u" and np.iinfo(values.dtype).max <= self.ignore_index)
        ):
            return
        low, high = int(values.min()), int(values.max())
        if low >= 0 and high <= self.ignore_index:
            return
        strange = np.unique(values[(values < 0) | (values > self.ignore_index)])
        if low < 0 or strange.tolist() == [WIDE_IGNORE_INDEX]:
            hint = f"If these pixels are not to be counted, write {self.ignore_index} there."
        else:
            hint = "These look like instance ids (class * 1000 + n), not class ids: use the file of class ids."
        detail = f"{id_ranges(strange)} ({self.allowed})"
        raise LabelFault.of("wide_ids", source, detail, fix=f"{hint} {self._made}", size=_size(values))

    @property
    def _made(self) -> str:
        return f"{self.labels_from}." if self.labels_from else ""


def decode_label(path: Path, *, colours: bool = False) -> npt.NDArray[np.integer[Any]]:
    """The values that a label file stores, before any rule, read-only: palette indices, grey values, or colours.

    Args:
        path: The file.
        colours: Colours are wanted (panoptic labels): (H, W, 3) or (H, W, 4), uint8; else one value per pixel (H, W).

    Raises:
        LabelFault: The file is missing, cut or no image, or its values cannot be had without guessing: JPEG, several
            pictures, a rotation, grey that readers stretch, fractions, colours where there should be none.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            found = _doubt(image, colours)
            if found is not None:
                raise LabelFault.of(found[0], path, found[1], size=image.size)
            values = _typed(image)
            if values.size == 0:
                raise LabelFault.of("unreadable_label", path, "it has no pixels")
            if values.dtype == np.float32:
                detail = f"{values.min():g}..{values.max():g}"
                raise LabelFault.of("fractions", path, detail, size=image.size)
            return values
    except (MemoryError, LabelFault):
        raise
    except FileNotFoundError:
        raise LabelFault.of("missing_labels", path, "") from None
    except Exception as error:  # Pillow's decoders raise what they happen to meet
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise LabelFault.of("unreadable_label", path, str(detail)) from error


def _doubt(image: Any, colours: bool) -> tuple[str, str] | None:
    """Why the values of an opened image cannot be had without guessing: kind of fault and detail; None if they can."""
    compression = str(image.info.get("compression", ""))
    if image.format in ("JPEG", "MPO") or (image.format == "TIFF" and compression == "jpeg"):
        return "lossy_label", "" if image.format == "JPEG" else f"{image.format}, JPEG inside"
    stored = image.tile[0].args if image.tile else ""
    stored = str(stored[0] if isinstance(stored, tuple) and stored else stored)  # Pillow's name for what is in the file
    pictures = _pictures(image)
    if pictures > 1:
        return "several_pictures", f"there are {pictures}"
    turned = _orientation(image)
    if turned != 1:
        return "turned_label", f"orientation {turned}"
    kind = _MODES.get(image.mode, image.mode)
    if colours:
        if image.mode in ("RGB", "RGBA") and ";16" not in stored:
            return None
        return "not_rgb", "16 bits per channel" if image.mode in ("RGB", "RGBA") else kind
    if image.mode == "F" or image.mode in ("1", "P") or image.mode.startswith("I"):
        return ("scaled_label", "white is 0") if stored.endswith(";I") else None
    if image.mode != "L":
        return "colour_label", kind
    if stored in ("L;2", "L;4"):
        return "scaled_label", f"grey of {stored[2:]} bits"
    return ("scaled_label", "white is 0") if ";I" in stored else None


def _pictures(image: Any) -> int:
    """Pictures in a file; smaller copies of the first one, which maps have for zooming, do not count."""
    frames = int(getattr(image, "n_frames", 1))
    if frames == 1 or image.format != "TIFF":
        return frames
    count = 1
    for frame in range(1, frames):
        image.seek(frame)
        count += not int(image.tag_v2.get(_SUBFILE, 0)) & 1  # bit 0: a reduced copy
    image.seek(0)
    return count


def _orientation(image: Any) -> int:
    """EXIF's orientation tag of an opened image; 1 where there is none."""
    if image.format == "TIFF":
        return int(image.tag_v2.get(_ORIENTATION, 1))
    if any("exif" in str(key).lower() or "xmp" in str(key).lower() for key in image.info):
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _typed(image: Any) -> npt.NDArray[Any]:
    """The values of an opened image; Pillow forgets the sign of some kinds of TIFF."""
    sign = image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] if image.format == "TIFF" else None
    values = np.asarray(image)
    if sign == _SIGNED and values.dtype == np.uint8:
        return values.view(np.int8)
    if sign == _UNSIGNED and values.dtype == np.int32:
        return values.view(np.uint32)
    return values


def _size(values: npt.NDArray[Any]) -> Size:
    return values.shape[1], values.shape[0]


def require_same_size(label: Path | str, size: Size, image: Path | str, image_size: Size) -> None:
    """Raises :class:`LabelFault` where label and image differ in width or height."""
    if tuple(size) == tuple(image_size):
        return
    detail = f"{size[0]} x {size[1]} pixels, '{image}' {image_size[0]} x {image_size[1]}"
    turned = "One of the two is turned, perhaps by an EXIF tag of the picture." if size == image_size[::-1] else ""
    raise LabelFault.of("size_mismatch", label, detail, fix=turned, size=size)


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
