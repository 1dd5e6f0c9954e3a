"""The evaluation proper: mmengine's Runner over the images that are not done yet, timings, pictures, efficiency."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.closed_set import ClosedSetModel, views_inside
from ovbench.compat import quiet_mmengine
from ovbench.evaluate.run import default_batch, default_workers, metrics_of
from ovbench.evaluate.shards import SUFFIX, Shard, find_unfinished, read_header
from ovbench.model import OpenVocabModel
from ovbench.ops.windows import windows
from ovbench.profile import flops
from ovbench.profile.timing import Stopwatch, peak_memory, reset_peak_memory, summary
from ovbench.results import store
from ovbench.results.record import Efficiency, Latency

if TYPE_CHECKING:
    from ovbench.evaluate.run import _State

SegmentationModel = OpenVocabModel | ClosedSetModel


def evaluate_images(
    state: _State, benchmark: Benchmark, root: Path, model: SegmentationModel, *, synthetic: bool
) -> None:
    """Evaluates all images that are not done yet and fills in metrics and efficiency of ``state``."""
    from mmengine.dataset import pseudo_collate
    from mmengine.evaluator import Evaluator

    from ovbench.evaluate.loop import AreaMetric, EvaluationLoop, EvaluationRunner, Monitor
    from ovbench.segmentor import OpenVocabSegmentor

    spec, options = state.spec, state.options
    short_side = 0 if views_inside(spec.protocol) else spec.protocol.short_side
    dataset = build_dataset(benchmark, root, short_side, spec.protocol.long_side)
    count = len(dataset) if spec.limit is None else min(spec.limit, len(dataset))
    reasons = state.partial_reason, _partial(count, len(dataset), None if synthetic else benchmark.expected_images)
    state.partial_reason = "; ".join(filter(None, reasons)) or None
    _open_shard(state, benchmark)
    indices = [index for index in range(count) if index not in state.shard.done]

    stopwatch = Stopwatch(model.device)
    model.stage = stopwatch.stage
    if getattr(model, "gives_segments", False) and benchmark.panoptic is not None:
        model.set_things(benchmark.panoptic.things)  # type: ignore[operator]
    pictures = Pictures(state, benchmark, dataset)
    monitor = Monitor(state.shard, indices, stopwatch, options.on_images, pictures.keep if pictures.wanted else None)
    subset: Any = Subset(dataset, indices)
    subset.metainfo = dataset.metainfo
    workers = default_workers(spec.device) if options.workers is None else options.workers
    loader: DataLoader[Any] = DataLoader(
        subset,
        batch_size=options.batch or default_batch(spec.device),
        num_workers=min(workers, len(indices)),
        collate_fn=pseudo_collate,
    )
    segmentor = OpenVocabSegmentor(model=model)
    _warm_up(segmentor, dataset)
    stopwatch.discard()
    resettable = reset_peak_memory(model.device)
    with quiet_work_folder() as work_dir:
        runner = EvaluationRunner(
            model=segmentor,
            work_dir=work_dir,
            test_dataloader=loader,
            test_evaluator=Evaluator([AreaMetric(benchmark, monitor)]),
            test_cfg={"type": EvaluationLoop, "monitor": monitor},
            default_hooks=dict.fromkeys(
                ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"), None
            ),
            env_cfg={"dist_cfg": {"backend": "nccl" if spec.device == "cuda" else "gloo"}},
            log_level="ERROR",
            default_scope="mmseg",
            experiment_name=state.run_id,
        )
        if indices:
            runner.test()
    memory = peak_memory(model.device)
    state.metrics = metrics_of(state)
    state.efficiency = efficiency(state, model, dataset, monitor, memory, resettable)
    pictures.finish()


def build_dataset(benchmark: Benchmark, root: Path, short_side: int, long_side: int) -> Any:
    """The mmseg dataset of a benchmark with loading that refuses images which are cut off."""
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    import ovbench.benchmarks.panoptic_dataset
    import ovbench.evaluate.loop  # noqa: F401  (registers LoadCompleteImage)

    cfg = benchmark.dataset_cfg(root, short_side=short_side, long_side=long_side)
    cfg["pipeline"] = [
        {**step, "type": "mmengine.LoadCompleteImage"} if step["type"] == "LoadImageFromFile" else step
        for step in cfg["pipeline"]
    ]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return DATASETS.build(cfg)


def _partial(count: int, available: int, expected: int | None) -> str | None:
    """Why a run does not stand for the whole benchmark; generated data (``expected`` None) is whole as it is."""
    reasons = []
    if count < available:
        reasons.append(f"limited to the first {count} of {available} images")
    if expected is not None and available != expected:
        reasons.append(f"the data has {available} images, the benchmark {expected}")
    return "; ".join(reasons) or None


def _open_shard(state: _State, benchmark: Benchmark) -> None:
    """A new shard file for the run, or with ``resume`` the unfinished one of the same spec and data."""
    from datetime import datetime

    spec, options = state.spec, state.options
    folder = options.results / store.path_name(spec.method) / store.path_name(spec.dataset)
    spec_hash = spec.spec_hash()
    path = None
    if options.resume:
        path = find_unfinished(folder, spec_hash, str(state.fingerprint))
        if path is None:
            options.on_message("Nothing to resume for this spec and data: a new run starts.")
    if path is not None:
        header = read_header(path)
        state.run_id = header["run_id"]
        state.started = datetime.fromisoformat(header["started"])
    else:
        state.run_id = state.run_id.split("-")[0] + f"-{spec_hash[:8]}-" + state.run_id.split("-")[-1]
        path = folder / f"{state.run_id}{SUFFIX}"
    header = {
        "run_id": state.run_id,
        "spec_hash": spec_hash,
        "dataset_fingerprint": state.fingerprint,
        "started": state.started.isoformat(),
    }
    state.shard = Shard(path, header, benchmark.num_classes)
    if state.shard.done:
        options.on_message(f"Resuming {state.run_id}: {len(state.shard.done)} images are done.")


def _warm_up(segmentor: Any, dataset: Any) -> None:
    """One image through everything, so that allocation and kernel choice are not timed."""
    sample = dataset[0]
    with torch.inference_mode():
        segmentor.test_step({key: [value] for key, value in sample.items()})


@contextmanager
def quiet_work_folder() -> Iterator[str]:
    """A folder for mmengine's own logs that is thrown away; nothing of it reaches stdout or the user's folder."""
    with (
        tempfile.TemporaryDirectory(prefix="ovbench-mmengine-") as folder,
        warnings.catch_warnings(),
        quiet_mmengine(),
    ):
        try:
            yield folder
        finally:
            for handler in list(logging.getLogger("mmengine").handlers):
                handler.close()


def efficiency(
    state: _State,
    model: SegmentationModel,
    dataset: Any,
    monitor: Any,
    memory: tuple[float, str] | None,
    resettable: bool,
) -> Efficiency:
    """Cost of the run: parameters, operations of one forward, time per image and stage, peak memory."""
    times: dict[str, list[float]] = {}
    for result in state.shard.done.values():
        for name, value in result.times_ms.items():
            times.setdefault(name, []).append(value)
    total = times.pop("total", [])
    parameters = {id(p): p for p in model.parameters()}.values()
    counted, shape = _count(model, dataset)
    fresh = len(monitor.results)
    rate = fresh / monitor.loop_seconds if fresh and monitor.loop_seconds else None
    return Efficiency(
        batch=state.options.batch or default_batch(state.spec.device),
        params_m=sum(p.numel() for p in parameters) / 1e6,
        trainable_params_m=sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
        gmacs=counted.gmacs,
        gflops=counted.gflops,
        input=shape,
        tool=counted.tool,
        latency_ms=Latency(**summary(total)) if total else None,
        latency_ms_reason=None if total else "no image was evaluated",
        stages_ms={name: Latency(**summary(samples)) for name, samples in times.items()},
        images_per_s=rate,
        images_per_s_reason=None if rate else "no image was evaluated in this process (all were resumed)",
        peak_memory_mib=memory[0] if memory else None,
        peak_memory_mib_reason=None if memory else "the system does not tell",
        peak_memory_kind=None if memory is None else memory[1] if resettable else f"{memory[1]} since process start",
    )


def _count(model: SegmentationModel, dataset: Any) -> tuple[flops.Flops, str]:
    """Operations of one network forward at the first image's input, and that input in words."""
    protocol = model.protocol
    image = dataset[0]["inputs"]
    height, width = image.shape[-2:]
    if model.solver:
        counted = flops.count(lambda: model.predict_labels([image.flip(0)], [(height, width)]))
        return counted, f"1x3x{height}x{width}, one whole image: networks, solver and upsampling"
    boxes = 1
    if isinstance(model, ClosedSetModel) and views_inside(protocol):
        height, width = model.resized(image, 1.0).shape[-2:]
    if model.takes_views:
        inputs = model.views((height, width))  # type: ignore[operator]
        boxes, (height, width) = len(inputs), inputs[0]
    elif protocol.mode == "slide":
        found = windows(height, width, protocol.crop, protocol.stride)
        boxes = len(found)
        height, width = found[0][2] - found[0][0], found[0][3] - found[0][1]
    batch = model.network_input(torch.zeros(1, 3, height, width))
    masks = ""
    with model.precision():
        if isinstance(model, ClosedSetModel):
            counted = flops.count(lambda: model.network(batch))
        elif getattr(model, "gives_segments", False):
            counted = flops.count(lambda: model.run_network(batch))
            masks = f" with {model.method.config.masks} masks, the generator left out"
        else:
            counted = flops.count(lambda: model.method.patch_logits(batch, model.text))  # type: ignore[arg-type]
    shape = "x".join(str(side) for side in batch.shape)
    views = f" at scale 1; it has {len(protocol.scales) * (1 + protocol.flip)} views" if views_inside(protocol) else ""
    return counted, f"{shape}, one forward{masks}; the first image takes {boxes}{views}"


class Pictures:
    """Prediction PNGs and the overlay gallery of a run.

    Args:
        state: The run.
        benchmark: Names and palette.
        dataset: Knows the image files.
    """

    def __init__(self, state: _State, benchmark: Benchmark, dataset: Any) -> None:
        self.state, self.benchmark, self.dataset = state, benchmark, dataset
        self.folder = state.shard.path.with_name(state.run_id)
        self.rows: list[Any] = []

    @property
    def wanted(self) -> bool:
        """Whether any picture is to be made."""
        return self.state.options.save_predictions or self.state.options.gallery > 0

    def keep(self, index: int, sample: Any) -> None:
        """Called with every finished image."""
        from ovbench import pictures

        options = self.state.options
        in_gallery = len(self.rows) < options.gallery and index < max(options.gallery, 1)
        if not (options.save_predictions or in_gallery):
            return
        pred = sample["pred_sem_seg"]["data"][0].cpu().numpy()
        path = Path(sample["img_path"])
        if options.save_predictions:
            (self.folder / "predictions").mkdir(parents=True, exist_ok=True)
            pictures.save_label_png(self.folder / "predictions" / f"{path.stem}.png", pred, self.benchmark.palette)
        if in_gallery:
            truth = sample["gt_sem_seg"]["data"][0].cpu().numpy()
            names: Sequence[str] = self.benchmark.class_names
            image = pictures.read_rgb(path)
            if image.shape[:2] == pred.shape:
                self.rows.append(
                    pictures.gallery_row(image, pred, np.asarray(truth), self.benchmark.palette, names, path.name)
                )

    def finish(self) -> None:
        """Writes the gallery as one PNG."""
        from ovbench import pictures

        if self.rows:
            spec = self.state.spec
            title = f"{spec.method} on {spec.dataset}" + (" - demo: no evidence about the method" if spec.demo else "")
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet = pictures.stack([pictures.caption(title, self.rows[0].width), *self.rows], gap=10)
            sheet.save(self.folder / "gallery.png")
