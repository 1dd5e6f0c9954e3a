"""Numbers as the report writes them; rounding happens here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ovbench.results.quantities import FIGURES
from ovbench.tables.report.entries import Entry

NONE = "–"


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers.

    Attributes:
        label: Heading.
        unit: Unit; empty for none.
        digits: Digits after the point.
        value: Reads it from a run.
        why: Why a run lacks it; empty where nothing is said.
        title: What the heading means in full.
    """

    label: str
    unit: str
    digits: int
    value: Callable[[Entry], float | None]
    why: Callable[[Entry], str]
    title: str


def _figure(name: str) -> Callable[[Entry], float | None]:
    return lambda entry: FIGURES[name].value(entry.record)


def _reason(field: str) -> Callable[[Entry], str]:
    def read(entry: Entry) -> str:
        cost = entry.record.efficiency
        return "the run ended before it was measured" if cost is None else getattr(cost, field) or ""

    return read


def _no_image(entry: Entry) -> str:
    return "no image was finished" if entry.record.metrics is None else ""


def _no_segments(entry: Entry) -> str:
    metrics = entry.record.metrics
    return _no_image(entry) if metrics is None else metrics.panoptic_reason or "the benchmark has no segments"


def _images(entry: Entry) -> float | None:
    return None if entry.record.metrics is None else float(entry.record.metrics.images)


NUMBERS = (
    NumberColumn("mIoU", "%", 2, _figure("miou"), _no_image, "mean IoU over the classes that occur"),
    NumberColumn("mAcc", "%", 2, _figure("macc"), _no_image, "mean accuracy over the classes that occur"),
    NumberColumn("aAcc", "%", 2, _figure("aacc"), _no_image, "share of labelled pixels that are right"),
    NumberColumn("PQ", "%", 2, _figure("pq"), _no_segments, "panoptic quality over the classes that have a segment"),
    NumberColumn("images", "", 0, _images, _no_image, "evaluated images"),
    NumberColumn(
        "latency", "ms", 1, _figure("latency"), _reason("latency_ms_reason"),
        "median time of one image, synchronised, in this run; depends on the machine",
    ),
    NumberColumn(
        "throughput", "images/s", 2, _figure("images_per_s"), _reason("images_per_s_reason"),
        "images per second of the whole evaluation loop; depends on the machine",
    ),
    NumberColumn(
        "MACs per image", "G", 2, _figure("gmacs"), _reason("image_gmacs_reason"),
        "10^9 multiply-accumulates of all forwards that the first image takes (1 MAC = 2 FLOP)",
    ),
    NumberColumn(
        "MACs per forward", "G", 2, _figure("forward_gmacs"), _reason("gmacs_reason"), "the same of one network forward",
    ),
    NumberColumn("parameters", "M", 2, _figure("params"), _reason("params_m_reason"), "all networks that the method runs"),
    NumberColumn(
        "peak memory", "MiB", 0, _figure("memory"), _reason("peak_memory_mib_reason"),
        "see the run's details for what was measured",
    ),
)  # fmt: skip


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number with a true minus sign, or a dash."""
    return NONE if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def size(bytes_: int) -> str:
    """A file size in words."""
    return f"{bytes_ / 2**20:.1f} MiB" if bytes_ >= 2**20 else f"{bytes_ / 2**10:.0f} KiB"
