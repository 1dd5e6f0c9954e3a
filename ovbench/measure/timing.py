"""Times named stages of a computation and reads peak memory, with the device synchronised around every reading."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ovbench.measure.samples import summary as summary

MIB = float(2**20)


class Stopwatch:
    """Collects wall times of named stages in milliseconds.

    Stages may nest and repeat: every pass through a stage is one sample. An exception inside a stage leaves no sample.

    Args:
        device: Where the stages run; CUDA work is waited for at both ends of a stage.

    Attributes:
        samples: Stage -> times in order.
        enabled: False lets stages pass without waiting and without samples.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.samples: dict[str, list[float]] = {}
        self.enabled = True

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent in the ``with`` block to the samples of ``name``; nothing while not ``enabled``."""
        if not self.enabled:
            yield
            return
        self._synchronize()
        start = time.perf_counter_ns()
        yield
        self._synchronize()
        self.samples.setdefault(name, []).append((time.perf_counter_ns() - start) / 1e6)

    def discard(self) -> None:
        """Forgets all samples, so that warm-up passes do not count."""
        self.samples.clear()

    def summaries(self) -> dict[str, dict[str, Any]]:
        """:func:`summary` of every stage, in order of first appearance."""
        return {name: summary(samples) for name, samples in self.samples.items()}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(device: torch.device | str = "cpu") -> tuple[float, str] | None:
    """Peak memory in MiB since :func:`reset_peak_memory` and its kind, or None where the system does not tell.

    The kind is ``cuda-allocated`` (tensors on the GPU) or ``process-rss`` (resident set of this process, libraries
    included).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB, "cuda-allocated"
    peak_kib = _high_water_kib()
    return None if peak_kib is None else (peak_kib / 1024.0, "process-rss")


def reset_peak_memory(device: torch.device | str = "cpu") -> bool:
    """Starts the peak anew at what is in use now; False where the system cannot.

    The peak then stays the one since the process started.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def _high_water_kib() -> float | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    except OSError:
        pass  # no Linux: ask the C library below
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 1024.0 if sys.platform == "darwin" else peak  # macOS counts bytes, others KiB
