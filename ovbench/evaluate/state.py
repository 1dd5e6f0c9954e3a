"""A run on its way: what it was asked for, and what is known of it so far."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.evaluate import ranks
from ovbench.results import record as records
from ovbench.results import store
from ovbench.results.panoptic_quality import panoptic_from_sums
from ovbench.spec import RunSpec

if TYPE_CHECKING:
    from ovbench.evaluate.shards import Shard


@dataclass(frozen=True)
class RunOptions:
    """Where things lie and how they are worked through; nothing here can move a score.

    Attributes:
        data_root: Folder of the dataset (found in customary layouts); None only for demo runs.
        results: Root folder of the records.
        batch: Images per step; None takes 1 on a CPU and 8 on a GPU, where small batches leave it idle.
        workers: Processes that read and resize images; None chooses.
        resume: Continue the newest unfinished run of the same spec and data.
        skip_recorded: Return the newest whole record of the same spec and data where there is one.
        on_error: What an image that cannot be read does: ``stop`` the run with its name, or ``skip`` it, which marks the
            run partial.
        launcher: What has started this process and others that share the images: ``none``, ``pytorch`` or ``slurm``.
        save_predictions: Write a palette PNG per image.
        gallery: Images in the overlay gallery, 0 for none.
        check: Look at the first label files before anything else.
        cache_masks: Keep the proposals of a mask generator on disk, in a folder of at most so many GiB; 0 = off.
        command: Command line for the record.
        on_images: Progress callback (finished, total).
        on_message: Receives notices for the user.
    """

    data_root: Path | None = None
    results: Path = store.DEFAULT_ROOT
    batch: int | None = None
    workers: int | None = None
    resume: bool = False
    skip_recorded: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    launcher: str = "none"
    save_predictions: bool = False
    gallery: int = 4
    check: bool = True
    cache_masks: float = 0.0
    command: str | None = None
    on_images: Callable[[int, int], None] = lambda done, total: None
    on_message: Callable[[str], None] = lambda text: None


@dataclass
class State:
    """What is known of a run so far, for the record of a run that ends early."""

    spec: RunSpec
    options: RunOptions
    started: datetime
    run_id: str = ""
    fingerprint: str | None = None
    weights_sha256: str | None = None
    metrics: records.Metrics | None = None
    efficiency: records.Efficiency | None = None
    shard: Shard | None = None
    partial_reason: str | None = None
    constants: str | None = None
    benchmark: Benchmark | None = None
    recorded: records.RunRecord | None = None
    team: ranks.Team = field(default_factory=ranks.Team)

    @property
    def opened(self) -> Shard:
        """The shard, once it is open."""
        assert self.shard is not None
        return self.shard

    def add_partial_reason(self, *reasons: str | None) -> None:
        """One more reason why the run is no result of its whole benchmark."""
        self.partial_reason = "; ".join(filter(None, (self.partial_reason, *reasons))) or None


def metrics_of(state: State) -> records.Metrics:
    """Scores from what the run's shard file holds per image."""
    benchmark, shard = state.benchmark, state.opened
    assert benchmark is not None
    total = shard.total()
    panoptic, reason = None, None
    if benchmark.panoptic is not None:
        sums = shard.total_quality()
        if sums is None:
            reason = f"{state.spec.method} gives labels per pixel, no segments"
        else:
            parts = (part.tolist() for part in sums)
            panoptic = panoptic_from_sums(benchmark.class_names, benchmark.panoptic.things, *parts)
    return records.metrics_from_areas(
        benchmark.class_names,
        total.intersect.tolist(),
        total.union.tolist(),
        total.pred.tolist(),
        total.label.tolist(),
        images=len(shard.done),
        panoptic=panoptic,
        panoptic_reason=reason,
    )


def default_batch(device: str) -> int:
    """Images per step: a GPU needs several to be busy."""
    return 1 if device == "cpu" else 8


def default_workers(device: str) -> int:
    """Reader processes: one beside a CPU that computes, up to 8 beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cpu" and cores > 1 else min(8, cores - 1) if device != "cpu" else 0
