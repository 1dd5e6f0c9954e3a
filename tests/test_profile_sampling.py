"""Warm-up, samples, stages and the search for the best batch, on a clock that is set by hand."""

from __future__ import annotations

import pytest
import torch

from ovbench.measure import samples as statistics
from ovbench.measure import sampling
from ovbench.measure.timing import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Nanoseconds of all clocks."""
    now = [0]
    monkeypatch.setattr(sampling.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: now[0] / 1e9)
    return now


def _step(clock, milliseconds):
    """A step that takes the given times, the last one for ever."""
    times = list(milliseconds)

    def step() -> None:
        clock[0] += int((times.pop(0) if len(times) > 1 else times[0]) * 1e6)

    return step


def test_warm_up_ends_when_three_passes_agree(clock):
    assert sampling.warm_up(_step(clock, [90, 40, 12, 10, 10.2, 10.1]), CPU) == (6, True)
    assert sampling.warm_up(_step(clock, [10]), CPU) == (3, True)


def test_warm_up_gives_up_on_times_that_do_not_settle(clock):
    assert sampling.warm_up(_step(clock, [10, 20] * 100), CPU) == (sampling.WARM_UP_PASSES, False)
    assert sampling.warm_up(_step(clock, [10_000, 30_000] * 100), CPU) == (4, False)  # a minute is over


def test_samples_come_after_the_warm_up(clock):
    series = sampling.sample(_step(clock, [50, 7, 7, 7, 8, 9, 10]), CPU, 3)
    assert (series.samples, series.warm_up, series.settled) == ([8.0, 9.0, 10.0], 4, True)


def test_stages_are_summed_within_a_pass(clock):
    watch = Stopwatch()

    def step() -> None:
        for milliseconds in (2, 3):
            with watch.stage("backbone"):
                clock[0] += milliseconds * 1_000_000
        with watch.stage("decide"):
            clock[0] += 1_000_000

    series = sampling.sample(step, CPU, 2, watch)
    assert series.samples == [6.0, 6.0]
    assert series.stages == {"backbone": [5.0, 5.0], "decide": [1.0, 1.0]}


class FakeEvent:
    """A CUDA event on the clock."""

    def __init__(self, clock) -> None:
        self.clock, self.at = clock, 0

    def record(self, stream) -> None:
        self.at = self.clock[0]

    def elapsed_time(self, other) -> float:
        return (other.at - self.at) / 1e6


@pytest.fixture
def gpu(monkeypatch, clock):
    """The parts of torch.cuda that timing uses; collects how often was waited."""
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(clock))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(clock[0]))
    return waits


def test_on_a_gpu_events_time_and_stages_have_a_series_of_their_own(gpu, clock):
    watch = Stopwatch("cuda")
    waited_in_samples = []

    def step() -> None:
        before = len(gpu)
        with watch.stage("backbone"):
            clock[0] += 4_000_000
        if not watch.enabled:
            waited_in_samples.append(len(gpu) - before)

    series = sampling.sample(step, torch.device("cuda"), 5, watch)
    assert series.samples == [4.0] * 5
    assert series.stages == {"backbone": [4.0] * 5}
    assert waited_in_samples == [0] * (3 + 5)  # stages do not slow down what the latency is taken from


def _search(monkeypatch, rates, device=CPU):
    """The search over batches whose rates are known; an exception in place of a rate is raised."""

    def rate(step, batch, device):
        found = rates[batch]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(sampling, "_rate", rate)
    return sampling.search_batch(lambda batch: lambda: None, device)


def test_the_search_ends_when_a_batch_is_no_faster(monkeypatch):
    found = _search(monkeypatch, {1: 10.0, 2: 15.0, 4: 15.1, 8: 99.0})
    assert (found.batch, found.images_per_s, found.stopped) == (2, 15.0, "no faster")
    assert found.tried == {1: 10.0, 2: 15.0, 4: 15.1}


@pytest.fixture
def quiet_gpu(monkeypatch):
    monkeypatch.setattr(sampling, "_in_use", lambda device: 0.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_on_a_gpu_one_slow_batch_is_no_end(monkeypatch, quiet_gpu):
    rates = {1: 10.0, 2: 20.0, 4: 19.0, 8: 40.0, 16: 40.1, 32: 39.0, 64: 99.0}
    found = _search(monkeypatch, rates, torch.device("cuda"))
    assert (found.batch, max(found.tried)) == (8, 32)


def test_the_search_ends_when_memory_ends(monkeypatch, quiet_gpu):
    rates = {1: 10.0, 2: 20.0, 4: torch.OutOfMemoryError("CUDA out of memory")}
    found = _search(monkeypatch, rates, torch.device("cuda"))
    assert (found.batch, found.stopped) == (2, "memory: batch 4 does not fit")
    with pytest.raises(torch.OutOfMemoryError):
        _search(monkeypatch, {1: torch.OutOfMemoryError("CUDA out of memory")}, torch.device("cuda"))


def test_a_cpu_process_stops_before_it_is_killed(monkeypatch):
    peaks = iter([100.0, 300.0, 500.0])
    monkeypatch.setattr(sampling, "reset_peak_memory", lambda device: True)
    monkeypatch.setattr(sampling, "peak_memory", lambda device: (next(peaks), "process-rss"))
    monkeypatch.setattr(sampling, "free_memory_mib", lambda: 450.0)
    found = _search(monkeypatch, {1: 10.0, 2: 20.0, 4: 40.0})
    # one image took 200, two took 400; four would take 400 more than now, of 450 that are free
    assert (found.batch, found.stopped) == (2, "memory: batch 4 would not fit")


def test_free_memory_is_below_all_memory():
    free = sampling.free_memory_mib()
    if free is None:
        pytest.skip("this system does not tell")
    from ovbench.measure.environment import environment

    assert 0 < free < environment()["ram_gib"] * 1024


def test_noise_and_spread():
    assert statistics.noise([10.0, 10.0, 10.0]) == 0
    assert statistics.noise([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(0.2)
    assert statistics.noise([0.0, 0.0]) == 0
    assert statistics.spread([10.0, 10.4, 10.2]) == pytest.approx(0.04)
    assert statistics.spread([10.0]) == 0
