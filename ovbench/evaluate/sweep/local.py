"""Jobs on this machine: a queue, and on each device as many processes at a time as are wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ovbench.errors import UsageError
from ovbench.evaluate.sweep.job import POLL_S, Outcome, Process, Work, stop
from ovbench.evaluate.sweep.plan import Job


@dataclass(frozen=True)
class Local:
    """Runs jobs on devices of this machine.

    Attributes:
        devices: ``cpu``, or the GPUs as ``cuda:N``, N as torch counts them here.
        per_device: Processes on each at a time.
    """

    devices: tuple[str, ...] = ("cpu",)
    per_device: int = 1

    @property
    def device(self) -> str:
        """Kind of device that a job gets."""
        return self.devices[0].split(":")[0]

    def run(self, jobs: Sequence[Job], work: Work) -> Iterator[tuple[Job, Outcome]]:
        """Outcomes as they come; closing the iterator ends what runs, in order."""
        waiting = list(reversed(jobs))
        slots = [self._environment(device) for device in self.devices for _ in range(self.per_device)]
        running: dict[int, Process] = {}
        try:
            while waiting or running:
                for slot, environment in enumerate(slots):
                    if slot not in running and waiting:
                        running[slot] = Process(waiting.pop(), work, environment)
                for slot in [slot for slot, process in running.items() if process.ended]:
                    process = running.pop(slot)
                    yield process.job, process.outcome()
                time.sleep(POLL_S)
        finally:
            stop(list(running.values()))

    def _environment(self, device: str) -> dict[str, str]:
        """Variables that give a process its device alone, or its share of the cores."""
        kind, _, index = device.partition(":")
        if kind == "cuda":
            return {"CUDA_VISIBLE_DEVICES": _visible(int(index))}
        if "OMP_NUM_THREADS" in os.environ or self.per_device == 1:
            return {}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {"OMP_NUM_THREADS": str(max(1, cores // self.per_device))}


def _visible(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES must say for the GPU that torch counts as ``index``."""
    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return listed[index] if index < len(listed) else str(index)


def local(devices: str | None, per_device: int = 1) -> Local:
    """The executor for ``--devices``.

    Args:
        devices: ``cpu``, ``cuda`` (all GPUs), or a list such as ``cuda:0,cuda:2``; None: all GPUs, else the CPU.
        per_device: Processes on each at a time.

    Raises:
        UsageError: No such device.
    """
    import torch

    count = torch.cuda.device_count()
    every = tuple(f"cuda:{index}" for index in range(count))
    if devices is None:
        return Local(every or ("cpu",), per_device)
    found = every if devices == "cuda" else tuple(part.strip() for part in devices.split(","))
    if not found or not (found == ("cpu",) or all(name in every for name in found)):
        raise UsageError(
            f"--devices {devices}: give cpu, cuda, or a list of {', '.join(every)}."
            if every
            else f"--devices {devices}: torch finds no CUDA device here. Use --devices cpu."
        )
    return Local(found, per_device)
