"""mmseg's part of label files: a transform that loads them with the one strict reader.

Importing this module imports mmseg (seconds) and registers ``LoadLabel`` among its transforms, which a dumped config
therefore imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovbench.benchmarks.labels import LabelRule, require_same_size
from ovbench.mm.compat import import_mmseg

import_mmseg()

from mmcv.transforms import BaseTransform  # noqa: E402
from mmseg.registry import TRANSFORMS  # noqa: E402


@TRANSFORMS.register_module()
class LoadLabel(BaseTransform):  # type: ignore[misc]
    """Loads ``gt_seg_map`` (H, W), uint8 or uint16: what mmseg's ``LoadAnnotations`` gives for labels that are in order.

    The rule comes from here and not from the dataset's ``reduce_zero_label`` and ``label_map``, which say the same.

    Args:
        **rule: Fields of :class:`~ovbench.benchmarks.labels.LabelRule`.
    """

    def __init__(self, **rule: Any) -> None:
        self.rule = LabelRule(**{**rule, "raw_ids": tuple(rule.get("raw_ids", ()))})

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """The results with the label; raises ``LabelFault`` naming the file."""
        path = Path(results["seg_map_path"])
        results["gt_seg_map"] = self.rule.load(path)
        require_fitting(results)
        results["seg_fields"].append("gt_seg_map")
        return results


def require_fitting(results: dict[str, Any]) -> None:
    """Raises ``LabelFault`` where the loaded label has not the size that its image had before any resizing."""
    if "ori_shape" in results:
        height, width = results["gt_seg_map"].shape
        image_height, image_width = results["ori_shape"][:2]
        require_same_size(results["seg_map_path"], (width, height), results["img_path"], (image_width, image_height))
