"""Takes timings that can be trusted: warm-up until the times settle, the device synchronised, every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ovbench.measure.timing import MIB, Stopwatch, peak_memory, reset_peak_memory

Step = Callable[[], object]

SETTLED = 0.05  # warm-up ends when the last passes lie within this share of their largest
SETTLED_PASSES = 3
WARM_UP_PASSES = 30  # ... or after this many
WARM_UP_SECONDS = 60.0  # ... or after this long
RATE_SECONDS = 1.0  # least time that a throughput is taken over
RATE_PASSES = 3
GAIN = 1.02  # a larger batch must be faster by this factor to count as better
MAX_BATCH = 1024
MEMORY_SHARE = 0.8  # of what is free; a CPU process that takes more is killed instead of told


@dataclass(frozen=True)
class Series:
    """Timings of one step.

    Attributes:
        samples: Milliseconds, in order of measurement.
        warm_up: Passes before them that do not count.
        settled: Whether the times had settled when the warm-up ended.
        stages: Milliseconds per stage and pass, summed over a stage that occurs several times in a pass.
    """

    samples: list[float]
    warm_up: int
    settled: bool
    stages: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchSearch:
    """Throughput over batch sizes.

    Attributes:
        batch: Batch with the highest rate.
        images_per_s: Its rate.
        tried: Every batch that was tried and its rate.
        stopped: Why no larger one was tried.
    """

    batch: int
    images_per_s: float
    tried: dict[int, float]
    stopped: str


def elapsed_ms(step: Step, device: torch.device) -> float:
    """Milliseconds that one pass takes, by CUDA events on a GPU, else by the clock."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        step()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    begin = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - begin) / 1e6


def warm_up(step: Step, device: torch.device) -> tuple[int, bool]:
    """Passes until the last three agree within 5 %, and whether they came to agree."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < WARM_UP_PASSES:
        times.append(elapsed_ms(step, device))
        last = times[-SETTLED_PASSES:]
        if len(last) == SETTLED_PASSES:
            if max(last) - min(last) <= SETTLED * max(last):
                return len(times), True
            if time.perf_counter() - begin > WARM_UP_SECONDS:
                break
    return len(times), False


def sample(step: Step, device: torch.device, count: int, stopwatch: Stopwatch | None = None) -> Series:
    """Timings of ``count`` passes after a warm-up.

    Args:
        step: One pass.
        device: Where it runs.
        count: Number of samples.
        stopwatch: Collects the stages that the step names. On a GPU its waiting at every stage would slow the passes
            down, so stages are then timed in a series of their own, and the caller must see to it that the step uses
            the stopwatch only while :attr:`Stopwatch.enabled`.
    """
    if stopwatch is not None:
        stopwatch.enabled = device.type != "cuda"
    passes, settled = warm_up(step, device)
    stages: dict[str, list[float]] = {}
    samples = []
    for _ in range(count):
        if stopwatch is not None:
            stopwatch.discard()
        samples.append(elapsed_ms(step, device))
        if stopwatch is not None and stopwatch.enabled:
            _collect(stopwatch, stages)
    if stopwatch is not None and not stopwatch.enabled:
        stopwatch.enabled = True
        step()  # the first pass with waiting
        for _ in range(count):
            stopwatch.discard()
            step()
            _collect(stopwatch, stages)
    return Series(samples, passes, settled, stages)


def _collect(stopwatch: Stopwatch, stages: dict[str, list[float]]) -> None:
    for name, times in stopwatch.samples.items():
        stages.setdefault(name, []).append(sum(times))


def search_batch(step_for: Callable[[int], Step], device: torch.device) -> BatchSearch:
    """Throughput at batches 1, 2, 4, ... until it stops improving or memory ends.

    Args:
        step_for: Batch -> a step that works through that many images.
        device: Where it runs.
    """
    tried: dict[int, float] = {}
    best, batch, misses, stopped = 1, 1, 0, f"batch {MAX_BATCH} reached"
    # kernels on a GPU work in waves: one batch that does not fill the last wave is no end yet
    patience = 2 if device.type == "cuda" else 1
    before = _in_use(device)
    while batch <= MAX_BATCH:
        try:
            tried[batch] = _rate(step_for(batch), batch, device)
        except torch.OutOfMemoryError:
            if not tried:
                raise
            torch.cuda.empty_cache()
            stopped = f"memory: batch {batch} does not fit"
            break
        if batch == 1 or tried[batch] > GAIN * tried[best]:
            best, misses = batch, 0
        else:
            misses += 1
            if misses >= patience:
                stopped = "no faster"
                break
        if not _room_for(2 * batch, batch, before, device):
            stopped = f"memory: batch {2 * batch} would not fit"
            break
        batch *= 2
    return BatchSearch(best, tried[best], tried, stopped)


def _rate(step: Step, batch: int, device: torch.device) -> float:
    step()
    times: list[float] = []
    while len(times) < RATE_PASSES or sum(times) < 1000 * RATE_SECONDS:
        times.append(elapsed_ms(step, device))
    return 1000.0 * batch * len(times) / sum(times)


def _in_use(device: torch.device) -> float:
    """MiB in use now; the peak starts anew from here."""
    reset_peak_memory(device)
    found = peak_memory(device)
    return found[0] if found else 0.0


def _room_for(batch: int, measured: int, before: float, device: torch.device) -> bool:
    """Whether a batch should fit, by what ``measured`` images took. A GPU says when it is full; a CPU process dies."""
    if device.type == "cuda":
        return True
    found, free = peak_memory(device), free_memory_mib()
    if found is None or free is None:
        return True
    taken = max(0.0, found[0] - before)
    return taken * batch / measured - taken < MEMORY_SHARE * free


def free_memory_mib() -> float | None:
    """Main memory in MiB that a process may still take, also under a container's limit; None where nobody tells."""
    free = None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = float(line.split()[1]) / 1024.0
    except OSError:
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return free
    if limit.isdigit() and used.isdigit():
        room = (int(limit) - int(used)) / MIB
        free = room if free is None else min(free, room)
    return free
