"""ovbench: a benchmarking suite for open-vocabulary semantic segmentation.

The two entry points of the Python interface are imported when first used, so that ``import ovbench`` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ovbench._version import __version__

if TYPE_CHECKING:
    from ovbench.evaluate.run import run as run
    from ovbench.segmentor import build_segmentor

__all__ = ["__version__", "build_segmentor", "run"]


def __getattr__(name: str) -> Any:
    if name == "build_segmentor":
        from ovbench.segmentor import build_segmentor

        return build_segmentor
    if name == "run":
        from ovbench.evaluate import run

        return run
    raise AttributeError(f"module 'ovbench' has no attribute {name!r}")
