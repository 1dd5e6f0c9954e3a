"""Segments of generated scenes, in COCO's panoptic format: instances, some of them crowds, ids over all three channels."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.labels import Ids

if TYPE_CHECKING:
    from ovbench.benchmarks.benchmark import Benchmark

CROWD_SHARE = 0.1  # of the instances of things; one of a class in an image at most
SMALLEST = 16  # pixels of an instance; smaller splinters of a thing belong to its largest part


def segments(
    labels: Ids, benchmark: Benchmark, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
    """A label as RGB segment ids (H, W, 3) and its ``segments_info``.

    Every connected region of a thing is an instance; large ones are cut in two that touch, as neighbouring objects do. Stuff
    is one segment per class.

    Args:
        labels: Classes (H, W), 255 for void.
        benchmark: Says which classes are things.
        rng: Decides cuts, crowds and ids.
    """
    facts = benchmark.panoptic
    assert facts is not None  # only called for panoptic benchmarks
    pixels = np.zeros((*labels.shape, 3), np.uint8)
    told: list[dict[str, Any]] = []
    taken: set[int] = {0}
    for cls in np.unique(labels[labels != benchmark.ignore_index]).tolist():
        whole = labels == cls
        thing, crowds = cls in facts.things, 0
        for mask in _instances(whole, rng) if thing else [whole]:
            number = 0
            while number in taken:
                number = int(rng.integers(1, 1 << 24))
            taken.add(number)
            pixels[mask] = (number & 255, number >> 8 & 255, number >> 16)
            rows, columns = np.nonzero(mask)
            box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
            crowd = int(thing and not crowds and rng.random() < CROWD_SHARE)
            crowds += crowd
            told.append(
                {
                    "id": number,
                    "category_id": facts.category_ids[cls],
                    "iscrowd": crowd,
                    "bbox": box,
                    "area": len(rows),
                }
            )
    return pixels, told


def _instances(whole: npt.NDArray[np.bool_], rng: np.random.Generator) -> list[npt.NDArray[np.bool_]]:
    label = importlib.import_module("scipy.ndimage").label  # scipy brings no types
    regions, count = label(whole)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    largest = int(sizes.argmax()) + 1
    regions[np.isin(regions, np.nonzero(sizes < SMALLEST)[0] + 1)] = largest
    found = []
    for number in np.unique(regions[whole]).tolist():
        mask = regions == number
        columns = np.nonzero(mask.any(axis=0))[0]
        middle = int(np.median(columns))
        left = mask & (np.arange(mask.shape[1]) < middle)
        if rng.random() < 0.5 and min(left.sum(), (mask & ~left).sum()) >= SMALLEST:
            found += [left, mask & ~left]
        else:
            found.append(mask)
    return found


def annotation_file(benchmark: Benchmark, entries: Sequence[tuple[str, tuple[int, int], list[dict[str, Any]]]]) -> str:
    """The json file of a split.

    Args:
        benchmark: Names, categories and palette.
        entries: Stem, (height, width) and ``segments_info`` of each image.
    """
    facts, layout = benchmark.panoptic, benchmark.layout
    assert facts is not None  # only called for panoptic benchmarks
    images, annotations = [], []
    for stem, (height, width), told in entries:
        image_id: int | str = int(stem) if stem.isdigit() else stem
        name = PurePosixPath(stem).name
        image = {"id": image_id, "file_name": name + layout.image_suffix, "height": height, "width": width}
        images.append(image)
        annotations.append({"image_id": image_id, "file_name": name + layout.label_suffix, "segments_info": told})
    categories = [
        {"id": category, "name": name, "supercategory": name, "isthing": int(index in facts.things), "color": colour}
        for index, (category, name, colour) in enumerate(
            zip(facts.category_ids, benchmark.class_names, benchmark.palette, strict=True)
        )
    ]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories}) + "\n"
