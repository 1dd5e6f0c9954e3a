"""mmengine parts of an evaluation: strict image loading, the area metric, the loop, a Runner that keeps the device.

Importing this module imports mmseg (seconds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.compat import import_mmseg
from ovbench.errors import DataError, RunError
from ovbench.evaluate.shards import ImageResult, Shard
from ovbench.ops.areas import areas
from ovbench.ops.panoptic import Quality, quality
from ovbench.pictures import require_complete
from ovbench.profile.timing import Stopwatch

import_mmseg()

from mmcv.transforms import LoadImageFromFile  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402
from mmengine.registry import LOOPS, METRICS, TRANSFORMS  # noqa: E402
from mmengine.runner import Runner, TestLoop  # noqa: E402


@TRANSFORMS.register_module()
class LoadCompleteImage(LoadImageFromFile):  # type: ignore[misc]
    """mmcv's image loading that refuses a file which is cut off, instead of decoding grey."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """The results with ``img`` loaded; raises ``DataError`` naming the file."""
        path = Path(results["img_path"])
        try:
            require_complete(path, path.read_bytes())
        except OSError as error:
            raise DataError(f"Cannot read the image '{path}': {error.strerror}.") from None
        loaded: dict[str, Any] | None = super().transform(results)
        if loaded is None or loaded.get("img") is None:
            raise DataError(f"'{path}' is not an image that can be read.")
        return loaded


@dataclass
class Monitor:
    """What the loop reports to while it runs.

    Attributes:
        shard: Where finished images go.
        indices: Dataset index of each image that the loader yields, in order.
        stopwatch: Collects stages of the current batch.
        on_images: Called with (finished so far, total) after every batch.
        keep: Called with (index, data sample, uint8 BGR network input) of every image, for pictures.
    """

    shard: Shard
    indices: Sequence[int]
    stopwatch: Stopwatch
    on_images: Callable[[int, int], None] = lambda done, total: None
    keep: Callable[[int, Any], None] | None = None
    position: int = 0
    loop_seconds: float = 0.0
    results: list[ImageResult] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """Itself: mmengine copies the config that hands the monitor to the loop, but there is one run."""
        return self


@METRICS.register_module()
class AreaMetric(BaseMetric):  # type: ignore[misc]
    """Areas and panoptic quality of every image straight into the shard; the sums are taken from there.

    Args:
        benchmark: Checks that label ids are in range.
        monitor: Shard, timings and pictures.
    """

    default_prefix = "area"

    def __init__(self, benchmark: Benchmark, monitor: Monitor) -> None:
        super().__init__(collect_device="cpu")
        self.benchmark = benchmark
        self.monitor = monitor

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Adds the images of one batch."""
        m = self.monitor
        per_image = {name: sum(samples) / len(data_samples) for name, samples in m.stopwatch.samples.items()}
        m.stopwatch.discard()
        finished = []
        for sample in data_samples:
            index = m.indices[m.position]
            m.position += 1
            pred = sample["pred_sem_seg"]["data"][0]
            label = sample["gt_sem_seg"]["data"][0].to(pred.device)
            name, source = str(sample.get("img_path", index)), str(sample.get("seg_map_path", index))
            try:
                found = areas(pred, label, self.benchmark.num_classes, self.benchmark.ignore_index)
            except ValueError as error:
                self.benchmark.require_in_range(label.cpu().numpy(), source)
                raise DataError(f"The label '{source}' does not fit the image '{name}': {error}.") from error
            areas_cpu = type(found)(*(part.cpu() for part in found))
            finished.append(ImageResult(index, Path(name).name, areas_cpu, per_image, self._quality(sample, name)))
            if m.keep is not None:
                m.keep(index, sample)
        m.shard.append(finished)
        m.results.extend(finished)
        self.results.extend(result.index for result in finished)

    def _quality(self, sample: dict[str, Any], name: str) -> Quality | None:
        """Parts of panoptic quality of one image; None where truth or prediction has no segments."""
        pred, truth = sample.get("pred_panoptic"), sample.get("gt_panoptic")
        if pred is None or truth is None:
            return None
        try:
            areas = sample.get("gt_panoptic_areas")
            return quality(pred.to(truth.ids.device), truth, self.benchmark.num_classes, areas)
        except ValueError as error:
            raise RunError(f"The predicted segments of '{name}' cannot be scored: {error}.") from error

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Only the count: scores are computed from the shard, which a resumed run shares."""
        return {"images": float(len(results))}


@LOOPS.register_module()
class EvaluationLoop(TestLoop):  # type: ignore[misc]
    """mmengine's test loop with inference mode, timing per batch and progress.

    Args:
        runner: The Runner.
        dataloader: Images that are not done yet.
        evaluator: Holds :class:`AreaMetric`.
        monitor: See :class:`Monitor`.
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, monitor: Monitor) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.monitor = monitor

    def run(self) -> dict[str, float]:
        """Evaluates all images of the loader and returns mmengine's metrics dict."""
        self.monitor.results.clear()
        before = len(self.monitor.shard.done)
        total = before + len(self.monitor.indices)
        self.monitor.on_images(before, total)
        start = time.perf_counter()
        try:
            metrics: dict[str, float] = super().run()
        finally:
            self.monitor.loop_seconds = time.perf_counter() - start
        return metrics

    @torch.inference_mode()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One batch: forward, areas, progress."""
        with self.monitor.stopwatch.stage("total"):
            outputs = self.runner.model.test_step(data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        shard, indices = self.monitor.shard, self.monitor.indices
        self.monitor.on_images(len(shard.done), len(shard.done) + len(indices) - self.monitor.position)


class EvaluationRunner(Runner):  # type: ignore[misc]
    """A Runner that leaves the model on the device it was built on (mmengine moves it to any GPU it finds)."""

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        """The model as it is."""
        return model
