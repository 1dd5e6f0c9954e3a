"""mmseg's part of panoptic labels: a dataset, and transforms that carry a segment map beside the class map.

Importing this module imports mmseg (seconds) and registers all three in its registries. Both maps are ``seg_fields``, so
mmseg's resizing, cropping and flipping move them together; :class:`PackPanopticInputs` turns what is left into
``gt_panoptic``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovbench.benchmarks.labels import decode_label
from ovbench.benchmarks.panoptic_files import Described, Panoptic, SegmentMap, read_panoptic, segment_map
from ovbench.errors import DataError
from ovbench.mm.compat import import_mmseg
from ovbench.mm.label_loading import require_fitting
from ovbench.ops.panoptic import Segments

import_mmseg()

from mmcv.transforms import BaseTransform  # noqa: E402
from mmseg.datasets import BaseSegDataset, PackSegInputs  # noqa: E402
from mmseg.registry import DATASETS, TRANSFORMS  # noqa: E402

MAP = "gt_segment_map"


@DATASETS.register_module()
class PanopticDataset(BaseSegDataset):  # type: ignore[misc]
    """Images with COCO's panoptic labels; every sample knows what the json says of its segments.

    Args:
        panoptic_file: The json file.
        category_ids: Its id of each class, K.
        **rest: As mmseg's ``BaseSegDataset``.
    """

    def __init__(self, panoptic_file: str, category_ids: list[int], **rest: Any) -> None:
        self.panoptic_file = Path(panoptic_file)
        self.facts = Panoptic(tuple(category_ids), ())
        super().__init__(**rest)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry per image, with ``segments`` beside the paths.

        Raises:
            DataError: The json cannot be used or lacks an image.
        """
        images = read_panoptic(self.panoptic_file).images
        entries: list[dict[str, Any]] = super().load_data_list()
        for entry in entries:
            told = images.get(Path(entry["seg_map_path"]).stem)
            if told is None:
                raise DataError(f"'{self.panoptic_file}' has no annotation for '{entry['seg_map_path']}'.")
            entry["segments"], entry["category_ids"] = tuple(told), self.facts.category_ids
        return entries


@TRANSFORMS.register_module()
class LoadPanopticAnnotations(BaseTransform):  # type: ignore[misc]
    """Loads the class map ``gt_seg_map`` (uint8, 255 for void) and the segment map (int16, -1 for void)."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """The results with both maps; raises ``DataError`` naming the file."""
        path = Path(results["seg_map_path"])
        facts = Panoptic(tuple(results["category_ids"]), ())
        found = segment_map(decode_label(path, colours=True), Described(*results["segments"]), facts, path)
        results["gt_seg_map"], results[MAP] = found.labels(), found.ids
        require_fitting(results)
        results["segment_classes"], results["segment_crowd"] = found.classes, found.crowd
        results["segment_areas"] = Described(*results["segments"]).areas
        results["seg_fields"] += ["gt_seg_map", MAP]
        return results


@TRANSFORMS.register_module()
class PackPanopticInputs(PackSegInputs):  # type: ignore[misc]
    """mmseg's packing, with ``gt_panoptic``: the :class:`~ovbench.ops.panoptic.Segments` that are still in the picture.

    Args:
        stored_areas: All segments of the json instead, and their areas in it as ``gt_panoptic_areas``, for evaluation where
            these are not those of the PNG.
        **rest: As mmseg's ``PackSegInputs``.
    """

    def __init__(self, stored_areas: bool = False, **rest: Any) -> None:
        super().__init__(**rest)
        self.stored_areas = stored_areas

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """The packed sample."""
        packed: dict[str, Any] = super().transform(results)
        found = SegmentMap(results[MAP], results["segment_classes"], results["segment_crowd"])
        if self.stored_areas:
            whole = Segments(
                torch.from_numpy(found.ids.astype(np.int64)),
                torch.from_numpy(found.classes),
                torch.from_numpy(found.crowd),
            )
            counted = np.bincount(found.ids[found.ids >= 0], minlength=len(found.classes))
            areas = torch.from_numpy(np.where(results["segment_areas"] < 0, counted, results["segment_areas"]))
            packed["data_samples"].set_data({"gt_panoptic": whole, "gt_panoptic_areas": areas})
        else:
            packed["data_samples"].set_data({"gt_panoptic": in_the_picture(found)})
        return packed


def in_the_picture(found: SegmentMap) -> Segments:
    """The segments that have a pixel, numbered anew; after cropping or shrinking some may have none."""
    present, ids = np.unique(found.ids, return_inverse=True)
    kept = present[present >= 0]
    first = len(present) - len(kept)  # void comes first where there is any
    return Segments(
        torch.from_numpy(ids.reshape(found.ids.shape).astype(np.int64) - first),
        torch.from_numpy(found.classes[kept].astype(np.int64)),
        torch.from_numpy(found.crowd[kept].astype(bool)),
    )
