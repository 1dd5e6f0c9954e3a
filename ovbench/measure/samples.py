"""What repeated timings say: median, spread, and whether the spread allows a figure at all; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOISE_WARNING = 0.10  # IQR / median above this: said beside the figure
NOISE_UNSTABLE = 0.25  # above this: the figure is marked
SPREAD_UNSTABLE = 0.05  # medians of repeated profiles further apart than this: marked


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """``median``, ``iqr``, ``p95``, ``n`` and ``samples`` of timings in milliseconds.

    Samples are kept to 0.1 microsecond, below what the clock resolves, and the statistics are computed from the kept
    values. Quantiles interpolate linearly between samples (position q (n - 1) in sorted order).

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("No samples to summarise")
    kept = [round(float(sample), 4) for sample in samples]
    ordered = sorted(kept)
    return {
        "median": quantile(ordered, 0.5),
        "iqr": quantile(ordered, 0.75) - quantile(ordered, 0.25),
        "p95": quantile(ordered, 0.95),
        "n": len(kept),
        "samples": kept,
    }


def quantile(ordered: Sequence[float], q: float) -> float:
    """The value at position q (n - 1) of sorted values, interpolated linearly."""
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def noise(samples: Sequence[float]) -> float:
    """IQR / median; 0 where the median is 0 (below what the clock resolves)."""
    found = summary(samples)
    return float(found["iqr"] / found["median"]) if found["median"] else 0.0


def spread(medians: Sequence[float]) -> float:
    """How far repeated medians lie apart: largest / smallest - 1; 0 for fewer than two."""
    return max(medians) / min(medians) - 1.0 if len(medians) > 1 and min(medians) > 0 else 0.0
