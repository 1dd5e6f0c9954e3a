"""The quantities that tables and comparisons show: how each is read from a record, its unit and its rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ovbench.results.record import RunRecord


@dataclass(frozen=True)
class Figure:
    """One quantity that a column can hold.

    Attributes:
        label: Heading.
        unit: Unit of the value; empty for none.
        digits: Digits after the point where it is shown rounded.
        value: Reads it from a record; None when the record does not have it.
        machine_bound: Whether the value depends on the machine and its load.
    """

    label: str
    unit: str
    digits: int
    value: Callable[[RunRecord], float | None]
    machine_bound: bool = False


def _of_metrics(name: str) -> Callable[[RunRecord], float | None]:
    return lambda record: None if record.metrics is None else getattr(record.metrics, name)


def _of_panoptic(name: str) -> Callable[[RunRecord], float | None]:
    def read(record: RunRecord) -> float | None:
        found = None if record.metrics is None else record.metrics.panoptic
        return None if found is None else getattr(found, name)

    return read


def _of_efficiency(name: str) -> Callable[[RunRecord], float | None]:
    return lambda record: None if record.efficiency is None else getattr(record.efficiency, name)


def _image_gflops(record: RunRecord) -> float | None:
    found = None if record.efficiency is None else record.efficiency.image_gmacs
    return None if found is None else 2 * found


def _latency(record: RunRecord) -> float | None:
    latency = None if record.efficiency is None else record.efficiency.latency_ms
    return None if latency is None else latency.median


FIGURES: dict[str, Figure] = {
    "miou": Figure("mIoU", "%", 2, _of_metrics("miou")),
    "macc": Figure("mAcc", "%", 2, _of_metrics("macc")),
    "aacc": Figure("aAcc", "%", 2, _of_metrics("aacc")),
    "pq": Figure("PQ", "%", 2, _of_panoptic("pq")),
    "sq": Figure("SQ", "%", 2, _of_panoptic("sq")),
    "rq": Figure("RQ", "%", 2, _of_panoptic("rq")),
    "latency": Figure("latency", "ms", 1, _latency, machine_bound=True),
    "images_per_s": Figure("images/s", "1/s", 2, _of_efficiency("images_per_s"), machine_bound=True),
    "gmacs": Figure("MACs per image", "G", 2, _of_efficiency("image_gmacs")),
    "gflops": Figure("FLOPs per image", "G", 2, _image_gflops),
    "forward_gmacs": Figure("MACs per forward", "G", 2, _of_efficiency("gmacs")),
    "params": Figure("parameters", "M", 2, _of_efficiency("params_m")),
    "memory": Figure("peak memory", "MiB", 0, _of_efficiency("peak_memory_mib"), machine_bound=True),
}
