"""mmengine parts of an evaluation: strict image loading, the area metric, the loop, a Runner that keeps the device.

An image that cannot be read, or whose label does not fit, is a :class:`Failed` in its place: the others of its batch are
evaluated, and then it ends the run or is skipped.

Importing this module imports mmseg (seconds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.labels import LabelFault
from ovbench.errors import DataError, OvbenchError, RunError
from ovbench.evaluate.faults import clear_error
from ovbench.evaluate.ranks import Team
from ovbench.evaluate.readers import Readers
from ovbench.evaluate.shard_lines import ImageResult
from ovbench.evaluate.shards import Shard
from ovbench.evaluate.signals import held_back
from ovbench.measure.timing import Stopwatch
from ovbench.mm.compat import import_mmseg
from ovbench.ops.areas import areas
from ovbench.ops.panoptic import Quality, quality
from ovbench.pictures import require_complete

import_mmseg()

from mmcv.transforms import LoadImageFromFile  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
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


@dataclass(frozen=True)
class Failed:
    """An image that could not be evaluated: its place in the dataset, the file at fault, and why."""

    index: int
    path: str
    error: OvbenchError

    @classmethod
    def of(cls, index: int, image: str, error: OvbenchError) -> Failed:
        """The label's file where the label is at fault, else the image's."""
        return cls(index, str(error.path) if isinstance(error, LabelFault) else image, error)

    @property
    def name(self) -> str:
        """The file's name; of a label with its folder, because its image may be called the same."""
        path = Path(self.path)
        return "/".join(path.parts[-2:]) if isinstance(self.error, LabelFault) else path.name


class Images(Dataset[Any]):
    """The samples of an mmseg dataset, each knowing its ``index``; :class:`Failed` in place of one that cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.metainfo = dataset, dataset.metainfo

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self.dataset[index]
        except MemoryError:  # no fault of the image
            raise
        except Exception as error:  # decoders raise whatever they like
            path = str(self.dataset.get_data_info(index).get("img_path", index))
            found = clear_error(error)
            if not isinstance(found, DataError):
                found = DataError(f"'{path}' or its label cannot be read: {found}")
            return Failed.of(index, path, found)
        sample["data_samples"].set_metainfo({"index": index})
        return sample

    def first(self) -> Any:
        """The first sample that can be read.

        Raises:
            DataError: There is none.
        """
        failed = None
        for index in range(len(self)):
            sample = self[index]
            if not isinstance(sample, Failed):
                return sample
            failed = failed or sample
        reason = "there is none" if failed is None else failed.error
        raise DataError(f"None of {len(self)} images can be read; the first: {reason}")


def batches(count: int, size: int, done: Collection[int]) -> list[list[int]]:
    """The batches of images 0..count-1 in which one is not done yet.

    Which images go through the network together depends on the index alone, not on where a run was interrupted or how many
    processes share it; so the areas do not either, where kernels round differently for other shapes.
    """
    found = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    return [batch for batch in found if any(index not in done for index in batch)]


def readers(images: Images, batches: list[list[int]], workers: int) -> Readers:
    """Batches, read by ``workers`` processes, as a dict of ``inputs``, ``data_samples`` and a list ``failed``."""
    return Readers(images, batch_sampler=batches, num_workers=min(workers, len(batches)), collate_fn=_collate)


def _collate(samples: Sequence[Any]) -> dict[str, Any]:
    read = [sample for sample in samples if not isinstance(sample, Failed)]
    failed = [sample for sample in samples if isinstance(sample, Failed)]
    return {**(pseudo_collate(read) if read else {}), "failed": failed}


@dataclass
class Monitor:
    """What the loop reports to while it runs.

    Attributes:
        shard: Where finished images go.
        total: Images of the whole run.
        stopwatch: Collects stages of the current batch.
        on_images: Called with (finished so far, total) after every batch.
        keep: Called with (index, data sample, uint8 BGR network input) of every image, for pictures.
        skip: Called with (file, reason) of an image that is passed over; None lets it end the run.
        team: The processes of the run.
    """

    shard: Shard
    total: int
    stopwatch: Stopwatch
    on_images: Callable[[int, int], None] = lambda done, total: None
    keep: Callable[[int, Any], None] | None = None
    skip: Callable[[str, str], None] | None = None
    team: Team = field(default_factory=Team)
    loop_seconds: float = 0.0
    results: list[ImageResult] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

    def tell(self) -> None:
        """Progress of all processes."""
        self.team.finished = len(self.results)
        done = len(self.shard.done) + len(self.shard.failed) + self.team.finished_by_others
        self.on_images(min(done, self.total), self.total)

    def settle(self) -> None:
        """Skips the images that failed in the last batch, or raises the error of the first."""
        failed, self.failed = self.failed, []
        for image in failed:
            if self.skip is None:
                raise image.error
            self.shard.append_failure(image.index, image.name, str(image.error))
            self.skip(image.path, str(image.error))

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
        finished: list[ImageResult] = []
        try:
            for sample in data_samples:
                index = int(sample["index"])
                if index in m.shard.done:  # before an interruption, when another of its batch was not
                    continue
                pred = sample["pred_sem_seg"]["data"][0]
                label = sample["gt_sem_seg"]["data"][0].to(pred.device)
                name, source = str(sample.get("img_path", index)), str(sample.get("seg_map_path", index))
                try:
                    found = areas(pred, label, self.benchmark.num_classes, self.benchmark.ignore_index)
                except ValueError as error:
                    m.failed.append(Failed.of(index, name, self._fault(label, source, name, error)))
                    continue
                areas_cpu = type(found)(*(part.cpu() for part in found))
                scored = self._quality(sample, name)
                if m.keep is not None:
                    m.keep(index, sample)
                finished.append(ImageResult(index, Path(name).name, areas_cpu, per_image, scored))
        finally:
            m.shard.append(finished)
            m.results.extend(finished)
        self.results.extend(result.index for result in finished)

    def _fault(self, label: torch.Tensor, source: str, name: str, error: ValueError) -> DataError:
        """What is wrong with a label that could not be counted."""
        try:
            self.benchmark.require_in_range(label.cpu().numpy(), source)
        except DataError as found:
            return found
        return DataError(f"The label '{source}' does not fit the image '{name}': {error}.")

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
        dataloader: :class:`Readers` of images that are not done yet.
        evaluator: Holds :class:`AreaMetric`.
        monitor: See :class:`Monitor`.
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, monitor: Monitor) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.monitor = monitor

    def run(self) -> dict[str, float]:
        """Evaluates all images of the loader and returns mmengine's metrics dict."""
        self.monitor.results.clear()
        self.monitor.tell()
        start = time.perf_counter()
        try:
            with self.dataloader:
                metrics: dict[str, float] = super().run()
        finally:
            self.monitor.loop_seconds = time.perf_counter() - start
        return metrics

    @torch.inference_mode()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One batch: forward, areas, progress. A signal that comes meanwhile ends the run after it."""
        with held_back(patient=False):
            self._one(data_batch)
        self.monitor.team.check()

    def _one(self, data_batch: Any) -> None:
        monitor = self.monitor
        monitor.failed.extend(data_batch.pop("failed"))
        if data_batch:
            with monitor.stopwatch.stage("total"):
                outputs = self.runner.model.test_step(data_batch)
            self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        monitor.settle()
        monitor.tell()


class EvaluationRunner(Runner):  # type: ignore[misc]
    """A Runner that leaves the model on the device it was built on (mmengine moves it to any GPU it finds)."""

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        """The model as it is."""
        return model
