"""ovbench: a benchmarking suite for open-vocabulary semantic segmentation.

The two entry points of the Python interface are imported when first used, so that ``import ovbench`` stays quick.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovbench.evaluate.run import run as run
    from ovbench.mm.segmentor import build_segmentor

__all__ = ["__version__", "build_segmentor", "run"]
__version__ = "0.2.0"

# What users' method files, packages and mmseg configs imported in 0.1; the message goes with the next release.
_MOVED = {
    "backbones": "networks",
    "benchmarks.panoptic_dataset": "mm.panoptic_dataset",
    "builtin": "networks.builtin",
    "closed_set": "models.closed_set",
    "compat": "mm.compat",
    "mask_method": "models.mask_method",
    "method": "models.method",
    "mmseg_models": "mm.heads",
    "model": "models.patch_model",
    "segmentor": "mm.segmentor",
    "text": "words.embeddings",
}


class _Moved:
    """Asked last by Python's import: says where a module of the version before is now."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        place = _MOVED.get(name.removeprefix("ovbench.")) if name.startswith("ovbench.") else None
        if place is not None:
            raise ImportError(f"'{name}' is 'ovbench.{place}' since ovbench 0.2: change the import.", name=name)


sys.meta_path.append(_Moved)


def __getattr__(name: str) -> Any:
    if name == "build_segmentor":
        from ovbench.mm.segmentor import build_segmentor

        return build_segmentor
    if name == "run":
        from ovbench.evaluate import run

        return run
    raise AttributeError(f"module 'ovbench' has no attribute {name!r}")
