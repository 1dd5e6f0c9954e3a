"""The evaluation proper: mmengine's Runner over the images that are not done yet, timings, pictures, efficiency."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import DataError, RunError
from ovbench.evaluate.gallery import Pictures
from ovbench.evaluate.ranks import Share
from ovbench.evaluate.shards import SUFFIX, Shard, find_unfinished, others_of, rank_path, read_header
from ovbench.evaluate.state import State, default_batch, default_workers, metrics_of
from ovbench.measure import flops
from ovbench.measure.timing import Stopwatch, peak_memory, reset_peak_memory, summary
from ovbench.mm.compat import quiet_mmengine
from ovbench.models.base import Model
from ovbench.results import store
from ovbench.results.record import SEVERAL_SIZES, Efficiency, Latency


def evaluate_images(state: State, benchmark: Benchmark, root: Path, model: Model, *, synthetic: bool) -> None:
    """Evaluates all images that are not done yet and fills in metrics and efficiency of ``state``.

    Of several processes each evaluates its share of the batches, and the first one takes in what the others have found.
    """
    from mmengine.evaluator import Evaluator

    from ovbench.evaluate.loop import AreaMetric, EvaluationLoop, EvaluationRunner, Images, Monitor, batches, readers
    from ovbench.mm.segmentor import OpenVocabSegmentor

    spec, options, team = state.spec, state.options, state.team
    short_side = 0 if model.resizes_images else spec.protocol.short_side
    images = Images(build_dataset(benchmark, root, short_side, spec.protocol.long_side))
    count = len(images) if spec.limit is None else min(spec.limit, len(images))
    state.add_partial_reason(_partial(count, len(images), None if synthetic else benchmark.expected_images))
    done = _open_shard(state, benchmark)
    own = batches(count, options.batch or default_batch(spec.device), done)[team.rank :: team.world]

    stopwatch = Stopwatch(model.device)
    model.stage = stopwatch.stage
    if model.gives_segments and benchmark.panoptic is not None:
        model.set_things(benchmark.panoptic.things)
    pictures = Pictures(state, benchmark)
    monitor = Monitor(
        state.opened,
        count,
        stopwatch,
        options.on_images,
        pictures.keep if pictures.wanted else None,
        (lambda path, why: options.on_message(f"Skipped: {why}")) if options.on_error == "skip" else None,
        team,
    )
    workers = default_workers(spec.device) if options.workers is None else options.workers
    sample = images.first()
    segmentor = OpenVocabSegmentor(model=model)
    _warm_up(segmentor, sample)
    stopwatch.discard()
    resettable = reset_peak_memory(model.device)
    with quiet_work_folder() as work_dir:
        runner = EvaluationRunner(
            model=segmentor,
            work_dir=work_dir,
            test_dataloader=readers(images, own, workers),
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
        if own:
            runner.test()
    memory = peak_memory(model.device)
    state.opened.sync()
    if not team.lead:
        state.opened.close()
    shares = team.shares(Share(len(monitor.results), monitor.loop_seconds, memory[0] if memory else None))
    if not team.lead:
        return
    _gather(state, count)
    state.metrics = metrics_of(state)
    kind = None if memory is None else memory[1] if resettable else f"{memory[1]} since process start"
    state.efficiency = efficiency(state, model, sample, shares, kind)
    pictures.finish()


def _gather(state: State, count: int) -> None:
    """Takes in the shards of the other processes, and sees that no image is missing.

    Raises:
        RunError: One is, or all have failed.
    """
    shard = state.opened
    for path in others_of(shard.path):
        shard.absorb(path, wait=10.0)
    missing = [index for index in range(count) if index not in shard.done and index not in shard.failed]
    if missing:
        raise RunError(
            f"{len(missing)} images that another process has evaluated are not in '{shard.path.parent}': --results must be "
            "a folder that all nodes share. Continue with --resume."
        )
    if shard.failed:
        names = [name for _, (name, _) in sorted(shard.failed.items())]
        if not shard.done:
            raise DataError(f"None of {count} images could be read; the first: {shard.failed[min(shard.failed)][1]}")
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text = f"{len(names)} of {count} images failed and were skipped ({', '.join(names[:3])}{more})"
        state.add_partial_reason(text)


def build_dataset(benchmark: Benchmark, root: Path, short_side: int, long_side: int) -> Any:
    """The mmseg dataset of a benchmark with loading that refuses images which are cut off."""
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    # registers the panoptic dataset, LoadLabel and LoadCompleteImage
    for module in ("ovbench.mm.label_loading", "ovbench.mm.panoptic_dataset", "ovbench.evaluate.loop"):
        importlib.import_module(module)
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


def _open_shard(state: State, benchmark: Benchmark) -> set[int]:
    """Opens a new shard file for the run, or with ``resume`` the unfinished one of the same spec and data.

    Of several processes the first one does, and the others open files of their own beside it.

    Returns:
        The images that are done.

    Raises:
        DataError: Another process sees another spec or other data.
    """
    from datetime import datetime

    spec, options, team = state.spec, state.options, state.team
    folder = options.results / store.path_name(spec.method) / store.path_name(spec.dataset)
    identity = {"spec_hash": spec.spec_hash(), "dataset_fingerprint": state.fingerprint}
    if team.lead:
        _open_own(state, folder, identity, benchmark.num_classes)
    plan = team.told(
        {**identity, "run_id": state.run_id, "started": state.started.isoformat(), "done": _done_of(state.shard)}
    )
    done = set(plan.pop("done"))
    if not team.lead:
        different = [name for name, value in identity.items() if plan[name] != value]
        if different:
            raise DataError(
                f"Process {team.rank} of {team.world} has another {' and '.join(different)} than process 0: give all of "
                "them the same command, code and data."
            )
        state.run_id, state.started = plan["run_id"], datetime.fromisoformat(plan["started"])
        path = rank_path(folder / f"{state.run_id}{SUFFIX}", team.rank)
        state.shard = Shard(path, plan, benchmark.num_classes)
    return done


def _done_of(shard: Shard | None) -> list[int]:
    return [] if shard is None else sorted(shard.done)


def _open_own(state: State, folder: Path, identity: dict[str, Any], num_classes: int) -> None:
    """The shard of the first process, which has taken in what others have left."""
    from datetime import datetime

    options, path = state.options, None
    if options.resume:
        path = find_unfinished(folder, identity["spec_hash"], identity["dataset_fingerprint"])
        if path is None:
            options.on_message("Nothing to resume for this spec and data: a new run starts.")
    header = None if path is None else read_header(path)
    if path is not None and header is not None:
        state.run_id = header["run_id"]
        state.started = datetime.fromisoformat(header["started"])
    else:
        time, _, digits = state.run_id.split("-")
        state.run_id = f"{time}-{identity['spec_hash'][:8]}-{digits}"
        path = folder / f"{state.run_id}{SUFFIX}"
    header = {"run_id": state.run_id, **identity, "started": state.started.isoformat()}
    state.shard = Shard(path, header, num_classes)
    for other in others_of(path):
        state.shard.absorb(other)
    state.shard.failed.clear()  # those are tried again
    if state.shard.damaged:
        options.on_message(f"{state.shard.damaged} lines of '{path}' were damaged: their images are evaluated again.")
    if state.shard.done:
        options.on_message(f"Resuming {state.run_id}: {len(state.shard.done)} images are done.")


def _warm_up(segmentor: Any, sample: Any) -> None:
    """One image through everything, so that allocation and kernel choice are not timed."""
    own = sample["data_samples"].clone()  # the prediction goes into it
    with torch.inference_mode():
        segmentor.test_step({"inputs": [sample["inputs"]], "data_samples": [own]})


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


def efficiency(state: State, model: Model, sample: Any, shares: Sequence[Share], memory_kind: str | None) -> Efficiency:
    """Cost of the run: parameters, operations of one forward, time per image and stage, peak memory.

    Args:
        state: The run, with the times of all images.
        model: What ran.
        sample: An image for counting operations.
        shares: What each process has done.
        memory_kind: What the peaks are; None where the system does not tell.
    """
    times: dict[str, list[float]] = {}
    for result in state.opened.done.values():
        for name, value in result.times_ms.items():
            times.setdefault(name, []).append(value)
    total = times.pop("total", [])
    parameters = {id(p): p for p in model.parameters()}.values()
    step = model.cost(sample["inputs"].flip(0))
    counted = flops.count(step.run)
    fresh, seconds = sum(share.images for share in shares), max(share.seconds for share in shares)
    rate = fresh / seconds if fresh and seconds else None
    peaks = [share.peak_mib for share in shares if share.peak_mib is not None]
    several = f", the highest of {len(shares)} processes" if len(shares) > 1 else ""
    return Efficiency(
        batch=state.options.batch or default_batch(state.spec.device),
        processes=len(shares),
        params_m=sum(p.numel() for p in parameters) / 1e6,
        trainable_params_m=sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
        gmacs=counted.gmacs,
        gflops=counted.gflops,
        forwards=step.forwards,
        image_gmacs=None if step.forwards is None else counted.gmacs * step.forwards,
        image_gmacs_reason=SEVERAL_SIZES if step.forwards is None else None,
        input=step.input,
        tool=counted.tool,
        latency_ms=Latency(**summary(total)) if total else None,
        latency_ms_reason=None if total else "no image was evaluated",
        stages_ms={name: Latency(**summary(samples)) for name, samples in times.items()},
        images_per_s=rate,
        images_per_s_reason=None if rate else "no image was evaluated in this process (all were resumed)",
        peak_memory_mib=max(peaks) if peaks else None,
        peak_memory_mib_reason=None if peaks else "the system does not tell",
        peak_memory_kind=None if not peaks or memory_kind is None else memory_kind + several,
    )
