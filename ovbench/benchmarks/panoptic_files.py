"""Panoptic labels as COCO stores them: PNGs of segment ids, and one json file that says what each segment is.

An id is R + 256 G + 65536 B of an RGB PNG; 0 is no segment. The json's ``annotations`` have a ``file_name`` and
``segments_info`` with ``id``, ``category_id``, ``iscrowd`` and ``area``. Needs neither torch nor mmseg.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.labels import IGNORE_INDEX, Ids, LabelFault, decode_label, id_ranges
from ovbench.errors import DataError

Numbers = npt.NDArray[np.int64]
NO_SEGMENT = -1


@dataclass(frozen=True)
class Panoptic:
    """What a benchmark with segments has beside its classes.

    Attributes:
        category_ids: The id of each class in the json file, K.
        things: Indices of the classes that are things, sorted; the others are stuff.
        exact_areas: ``area`` in the official json file is what the PNG has.
    """

    category_ids: tuple[int, ...]
    things: tuple[int, ...]
    exact_areas: bool = True


class Described(NamedTuple):
    """What the json says of one image's segments.

    Attributes:
        ids: (S,) int64, ids in the PNG.
        categories: (S,) int64, category ids as stored.
        crowd: (S,) bool.
        areas: (S,) int64, pixels as stored; -1 where nothing is.
    """

    ids: Numbers
    categories: Numbers
    crowd: npt.NDArray[np.bool_]
    areas: Numbers


class SegmentMap(NamedTuple):
    """The segments of one label.

    Attributes:
        ids: (H, W) int16, -1 where there is no segment, else an index into the next two.
        classes: (S,) int64, class of each segment.
        crowd: (S,) bool.
    """

    ids: npt.NDArray[np.int16]
    classes: Numbers
    crowd: npt.NDArray[np.bool_]

    def labels(self) -> Ids:
        """The class of each pixel (H, W), uint8, 255 where there is no segment."""
        table = np.append(self.classes, IGNORE_INDEX).astype(np.uint8)
        return table[self.ids]  # -1 is the last entry


class PanopticFile(NamedTuple):
    """A json file: images by the stem of their PNG, in order, and which stems it has more than once."""

    images: dict[str, Described]
    repeated: tuple[str, ...]
    categories: dict[int, dict[str, Any]]


def read_panoptic(path: Path) -> PanopticFile:
    """The content of a json file, read once for as long as the file stays the same.

    Raises:
        DataError: It is missing, damaged, or not a panoptic annotation file.
    """
    try:
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise DataError(f"The panoptic annotations '{path}' cannot be read: {error.strerror or error}.") from error


@lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int) -> PanopticFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = {int(entry["id"]): entry for entry in content["categories"]}
        images: dict[str, Described] = {}
        repeated = []
        for entry in content["annotations"]:
            stem = str(entry["file_name"]).rpartition(".")[0]
            if stem in images:
                repeated.append(stem)
            segments = entry["segments_info"]
            images[stem] = Described(
                np.array([int(one["id"]) for one in segments], np.int64),
                np.array([int(one["category_id"]) for one in segments], np.int64),
                np.array([bool(one.get("iscrowd", 0)) for one in segments], bool),
                np.array([int(one.get("area", -1)) for one in segments], np.int64),
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"'{path}' is not a panoptic annotation file ({type(error).__name__}: {error}): it needs 'annotations' with "
            "'file_name' and 'segments_info', and 'categories'. Fetch or make it again."
        ) from error
    return PanopticFile(images, tuple(repeated), categories)


def segment_ids(pixels: npt.NDArray[np.generic], source: Path | str) -> Numbers:
    """The ids of a decoded label PNG (H, W).

    Raises:
        DataError: It is no RGB image of 8 bits.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or pixels.dtype != np.uint8:
        raise LabelFault.of("not_rgb", source, f"shape {tuple(pixels.shape)}")
    channels = pixels.astype(np.int64)
    ids: Numbers = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    return ids


def segment_map(
    pixels: npt.NDArray[np.generic], told: Described, facts: Panoptic, source: Path | str = "label"
) -> SegmentMap:
    """The segments of a decoded label, all those of the json in its order, with pixels or without.

    Args:
        pixels: Decoded PNG (H, W, 3).
        told: What the json says.
        facts: The benchmark's categories.
        source: The file, for messages.

    Raises:
        DataError: No RGB image, ids that the json does not have, or an unknown category.
    """
    ids = segment_ids(pixels, source)
    order = np.argsort(told.ids, kind="stable")
    known = told.ids[order]
    place = np.searchsorted(known, ids.ravel()).clip(0, max(len(known) - 1, 0))
    flat = ids.ravel()
    found = (known[place] == flat) & (flat != 0) if len(known) else np.zeros(ids.size, bool)
    if not (found | (flat == 0)).all():
        wrong = np.unique(flat[~found & (flat != 0)])
        raise LabelFault.of("segment_ids", source, id_ranges(wrong))
    index = np.full(ids.size, NO_SEGMENT, np.int16)
    if len(known):
        index[found] = order[place[found]]
    class_of = {category: number for number, category in enumerate(facts.category_ids)}
    strange = [int(one) for one in told.categories if int(one) not in class_of]
    if strange:
        raise DataError(
            f"The json of '{source}' has the categories {id_ranges(strange)}, which the benchmark does not."
        )
    classes = np.array([class_of[int(one)] for one in told.categories], np.int64)
    return SegmentMap(index.reshape(ids.shape), classes, told.crowd)


def load_segments(path: Path, told: Described | None, facts: Panoptic) -> SegmentMap:
    """The segments of a label file.

    Raises:
        DataError: The file is missing or damaged, the json has no entry for it, or the two contradict.
    """
    if told is None:
        raise DataError(f"The json has no annotation for '{path}'. Fetch PNGs and json of one release.")
    return segment_map(decode_label(path, colours=True), told, facts, path)
