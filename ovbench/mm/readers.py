"""mmseg datasets over a benchmark's files. Importing this module imports mmseg (seconds).

Every semantic benchmark is read by a class that mmseg itself registers: its own where it has one, else ``BaseSegDataset``
with the class names in the config. Labels are loaded by ``label_loading``, and panoptic ones need ``panoptic_dataset``:
a dumped config therefore imports them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.mm.compat import prepare

prepare()
# registers datasets and transforms
for _module in ("mmseg.datasets", "mmseg.structures", "ovbench.mm.label_loading", "ovbench.mm.panoptic_dataset"):
    importlib.import_module(_module)


def build(benchmark: Benchmark, root: Path | str, *, short_side: int = 0, long_side: int = 2048) -> Any:
    """The mmseg dataset of a benchmark: ``dataset[i]`` is the packed input of the i-th of ``benchmark.pairs(root)``.

    Args:
        benchmark: What to read.
        root: Data root or a folder above it.
        short_side: Short side of the network input in pixels; 0 leaves images as they are.
        long_side: Upper limit of the long side in pixels.

    Raises:
        DataError: The data is missing or incomplete (mmseg itself would assert or fail at the first such file).
    """
    benchmark.pairs(root)
    cfg = benchmark.dataset_cfg(root, short_side=short_side, long_side=long_side)
    registry = importlib.import_module("mmseg.registry")
    scope = importlib.import_module("mmengine.registry").DefaultScope
    with scope.overwrite_default_scope("mmseg"):
        return registry.DATASETS.build(cfg)
