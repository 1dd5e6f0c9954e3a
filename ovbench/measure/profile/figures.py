"""All figures of a subject, in the order in which one does not disturb the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ovbench.measure.conventions import COUNTED, NOT_COUNTED
from ovbench.measure.counters import count
from ovbench.measure.parameters import by_part, count_parameters
from ovbench.measure.profile.record import PartSize, ProfileEfficiency, Throughput
from ovbench.measure.profile.subject import Subject
from ovbench.measure.samples import noise
from ovbench.measure.sampling import Series, sample, search_batch
from ovbench.measure.timing import MIB, Stopwatch, peak_memory, reset_peak_memory, summary

Tell = Callable[[str], None]


def measure(subject: Subject, tell: Tell = lambda text: None) -> ProfileEfficiency:
    """The figures of a subject.

    Memory comes first, in a process that has computed nothing yet; operations last, because counting them switches
    kernels.

    Args:
        subject: What to measure.
        tell: Receives a line before each part of the work.
    """
    spec = subject.spec
    total = count_parameters(subject.network)
    sizes = by_part(subject.network, subject.parts) if subject.trained is None else subject.trained
    figures: dict[str, Any] = {
        "params_m": total.total / 1e6,
        "trainable_params_m": sum(part.trainable for part in sizes.values()) / 1e6,
        "parts": {
            name: PartSize(params_m=part.total / 1e6, trainable_params_m=part.trainable / 1e6)
            for name, part in sizes.items()
        },
        "convention": spec.count,
        "counted": COUNTED[spec.count],
        "not_counted": NOT_COUNTED[spec.count],
        "forwards": subject.windows,
        "batch": spec.batch,
        "input": _input(subject),
    }
    if not spec.params_only:
        figures |= _memory(subject, tell)
        figures |= _times(subject, tell)
        figures |= _throughput(subject, tell)
        figures |= _operations(subject, tell)
    return complete(figures, "only parameters were asked for" if spec.params_only else None)


def complete(figures: dict[str, Any], why_missing: str | None = None) -> ProfileEfficiency:
    """The figures with a reason beside each that is missing; ``why_missing`` where there is no better one."""
    for name in ProfileEfficiency.model_fields:
        figure = name.removesuffix("_reason")
        if figure != name and figures.get(figure) is None:
            figures.setdefault(name, why_missing or "not measured")
    return ProfileEfficiency(**figures)


def _input(subject: Subject) -> str:
    if subject.windows is None:
        return f"{subject.forward_input}, one forward"
    return f"{subject.forward_input}, one forward; an image of {subject.spec.input} takes {subject.windows}"


def _memory(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Peak memory over the first forward and the first whole image of this process."""
    tell("memory")
    device, batch = subject.device, subject.spec.batch
    resettable = reset_peak_memory(device)
    subject.forward(batch)()
    forward = peak_memory(device)
    if subject.image is not None:
        reset_peak_memory(device)
        subject.image(batch)()
    whole = peak_memory(device)
    if whole is None or forward is None:
        silent = "the system does not tell"
        return {
            "peak_memory_mib_reason": silent,
            "forward_peak_memory_mib_reason": silent,
            "peak_reserved_mib_reason": silent,
        }
    found: dict[str, Any] = {
        "peak_memory_mib": whole[0],
        "peak_memory_kind": whole[1] if resettable else f"{whole[1]} since process start",
        "forward_peak_memory_mib": forward[0],
        "peak_reserved_mib_reason": "only a GPU has it",
    }
    if subject.image is None:
        found |= {"forward_peak_memory_mib": None, "forward_peak_memory_mib_reason": "see peak_memory_mib"}
    if device.type == "cuda":
        found |= {"peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB, "peak_reserved_mib_reason": None}
    return found


def _times(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Latency of one forward and of a whole image, and of the stages within one."""
    spec, device = subject.spec, subject.device
    tell(f"{spec.samples} forwards")
    series = {"forward_ms": sample(subject.forward(spec.batch), device, spec.samples)}
    if subject.image is None:
        series = {"latency_ms": series["forward_ms"]}
    else:
        tell(f"{spec.samples} whole images")
        stopwatch = Stopwatch(device)
        subject.watch(stopwatch)
        series["latency_ms"] = sample(subject.image(spec.batch), device, spec.samples, stopwatch)
        stopwatch.enabled = False
    found: dict[str, Any] = {name: _latency(one.samples, spec.batch) for name, one in series.items()}
    found["stages_ms"] = {name: _latency(times, spec.batch) for name, times in series["latency_ms"].stages.items()}
    if subject.image is None:
        found["forward_ms_reason"] = "the forward is the whole: see latency_ms"
    return found | _trust(series)


def _latency(samples: list[float], batch: int) -> dict[str, Any]:
    return summary([value / batch for value in samples])


def _trust(series: dict[str, Series]) -> dict[str, Any]:
    return {
        "warm_up": {name: one.warm_up for name, one in series.items()},
        "unsettled": tuple(name for name, one in series.items() if not one.settled),
        "noise": {name: noise(one.samples) for name, one in series.items()},
    }


def _throughput(subject: Subject, tell: Tell) -> dict[str, Any]:
    if not subject.spec.throughput:
        reason = "left out (--no-throughput)"
        return {"images_per_s_reason": reason, "throughput_reason": reason}
    tell("throughput")
    search = search_batch(subject.image or subject.forward, subject.device)
    return {
        "images_per_s": search.images_per_s,
        "throughput": Throughput(
            batch=search.batch, images_per_s=search.images_per_s, tried=search.tried, stopped=search.stopped
        ),
    }


def _operations(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Operations of one forward on one input, and of a whole image."""
    tell("operations")
    convention = subject.spec.count
    with subject.countable():
        forward = count(subject.forward(1), convention)
        whole = None if subject.image is None else count(subject.image(1), convention)
    found: dict[str, Any] = {
        "gmacs": forward.gmacs,
        "gflops": forward.gflops,
        "tool": forward.tool,
        "gmacs_by_op": {name: flop / 2e9 for name, flop in forward.by_op.items()},
    }
    if whole is None:
        reason = "the forward is the whole: see gmacs"
        return found | {"image_gmacs_reason": reason, "image_gflops_reason": reason}
    return found | {"image_gmacs": whole.gmacs, "image_gflops": whole.gflops}
