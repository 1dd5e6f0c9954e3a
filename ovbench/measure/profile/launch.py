"""Starts fresh processes with fixed threads, one per profile, and puts repeated ones together. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ovbench import errors
from ovbench.errors import OvbenchError, RunError
from ovbench.measure.profile.record import ProfileEfficiency, ProfileRecord, ProfileSpec
from ovbench.measure.samples import NOISE_UNSTABLE, SPREAD_UNSTABLE, noise, spread, summary
from ovbench.results.record import Latency

Tell = Callable[[str], None]

# What reads its number of threads when it is loaded, before any call could set it.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# The child finds modules exactly where its parent does; Python itself would put the current folder first.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from ovbench.measure.profile.job import main; main()"


def profile(spec: ProfileSpec, *, command: str = "", on_message: Tell = lambda text: None) -> ProfileRecord:
    """The profile of a spec, measured in ``spec.repeat`` fresh processes one after another.

    Args:
        spec: What to profile; ``threads`` None takes ``OMP_NUM_THREADS`` or all cores of this process.
        command: Command line for the record.
        on_message: Receives a line at every step.

    Raises:
        UsageError, WeightsError: The spec names something that does not exist or fit.
        RunError: A process ended without an answer, or memory ran out.
    """
    spec = spec.model_copy(update={"threads": spec.threads or default_threads()})
    records = []
    for number in range(spec.repeat):
        if spec.repeat > 1:
            on_message(f"process {number + 1} of {spec.repeat}")
        records.append(_in_process(spec, command, on_message))
    return merged(records)


def default_threads() -> int:
    """``OMP_NUM_THREADS`` where it is set, else the cores that this process may use."""
    configured = os.environ.get("OMP_NUM_THREADS", "")
    if configured.isdigit() and int(configured) > 0:
        return int(configured)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_process(spec: ProfileSpec, command: str, tell: Tell) -> ProfileRecord:
    request = json.dumps({"spec": spec.model_dump(mode="json"), "command": command})
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(spec.threads))}
    arguments = [sys.executable, "-c", _CHILD, *sys.path]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        last: dict[str, Any] = {}
        try:
            try:
                child.stdin.write(request)
                child.stdin.close()
            except BrokenPipeError:  # it has ended already: its status below says why
                child.stdin = None
            for line in child.stdout:
                last = json.loads(line)
                if "message" in last:
                    tell(last["message"])
        except BaseException:
            child.kill()
            raise
    if "error" in last:
        kind = getattr(errors, last["error"]["kind"], RunError)
        raise kind(last["error"]["message"]) if issubclass(kind, OvbenchError) else RunError(last["error"]["message"])
    if "record" not in last:
        raise RunError(_ended(child.returncode))
    return ProfileRecord.model_validate_json(json.dumps(last["record"]))


def _ended(status: int) -> str:
    if status == -9:
        return (
            "The profiling process was killed, as systems do when memory runs out. Use a smaller --batch or --input, "
            "--dtype bfloat16, or --no-throughput."
        )
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"The profiling process ended {how} without an answer; what it said stands above."


def merged(records: Sequence[ProfileRecord]) -> ProfileRecord:
    """One record of repeated profiles, its unreliable figures marked.

    Samples are put together, peaks are the highest, the throughput is that of the process with the middle rate, and what
    does not vary is the first's. Name, environment and code are the first's; the end is the last's.
    """
    first = records[0]
    all_figures = [record.efficiency for record in records]
    changes: dict[str, Any] = {}
    for name in ("forward_ms", "latency_ms"):
        changes[name] = _joined([getattr(figures, name) for figures in all_figures])
    changes["stages_ms"] = {
        name: _joined([figures.stages_ms.get(name) for figures in all_figures]) for name in first.efficiency.stages_ms
    }
    for name in ("peak_memory_mib", "forward_peak_memory_mib", "peak_reserved_mib"):
        values = [value for figures in all_figures if (value := getattr(figures, name)) is not None]
        changes[name] = max(values, default=None)
    rates = sorted(
        (figures for figures in all_figures if figures.throughput is not None), key=lambda one: one.images_per_s or 0.0
    )
    if rates:
        middle = rates[(len(rates) - 1) // 2]
        changes |= {"throughput": middle.throughput, "images_per_s": middle.images_per_s}
    timed = {name: changes[name] for name in ("forward_ms", "latency_ms") if changes[name] is not None}
    changes["warm_up"] = {
        name: max(figures.warm_up.get(name, 0) for figures in all_figures) for name in first.efficiency.warm_up
    }
    changes["unsettled"] = tuple(name for name in timed if any(name in figures.unsettled for figures in all_figures))
    changes["noise"] = {name: noise(latency.samples) for name, latency in timed.items()}
    changes["repeats"] = {
        name: tuple(getattr(figures, name).median for figures in all_figures) for name in timed if len(records) > 1
    }
    changes["unstable"] = unstable(changes["noise"], changes["repeats"])
    figures = first.efficiency.model_copy(update=changes)
    return first.model_copy(
        update={
            "efficiency": ProfileEfficiency.model_validate(figures.model_dump()),
            "provenance": first.provenance.model_copy(update={"finished": records[-1].provenance.finished}),
        }
    )


def unstable(noises: dict[str, float], repeats: dict[str, tuple[float, ...]]) -> dict[str, str]:
    """Figures that are not to be relied on, each with the reason in words."""
    found: dict[str, list[str]] = {}
    for name, value in noises.items():
        if value > NOISE_UNSTABLE:
            found.setdefault(name, []).append(f"IQR is {value:.0%} of the median")
    for name, medians in repeats.items():
        if spread(medians) > SPREAD_UNSTABLE:
            found.setdefault(name, []).append(f"medians of {len(medians)} processes differ by {spread(medians):.0%}")
    return {name: "; ".join(reasons) for name, reasons in found.items()}


def _joined(parts: Sequence[Latency | None]) -> Latency | None:
    present = [part for part in parts if part is not None]
    return Latency(**summary([value for part in present for value in part.samples])) if present else None
