"""Losses and validation scores over the iterations as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ovbench.train.record import ValidationPoint, read_losses


def smoothed(values: Sequence[float], span: int) -> np.ndarray:
    """Running mean over the last ``span`` values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - span, 0)
    smooth: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smooth


def plot_losses(logs: Mapping[str, Path], out: Path, title: str) -> Path | None:
    """One panel per loss, one line per log (by label), as a PNG; None where no log has a line yet.

    Args:
        logs: ``losses.jsonl`` files by label.
        out: PNG to write.
        title: Above the panels.
    """
    found = {label: list(read_losses(path)) for label, path in logs.items()}
    names = sorted({name for lines in found.values() for line in lines for name in line if "loss" in name})
    if not names:
        return None
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, lines in found.items():
            points = [(line["iteration"], line[name]) for line in lines if name in line]
            if points:
                steps, values = zip(*points, strict=True)
                (line,) = axes.plot(steps, smoothed(values, max(1, len(values) // 40)), label=label, linewidth=1.4)
                axes.plot(steps, values, color=line.get_color(), alpha=0.15, linewidth=0.6)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if index == 0 and len(found) > 1:
            axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out


def plot_validation(points: Sequence[ValidationPoint], out: Path, title: str) -> Path | None:
    """MIoU of the weights and of each branch over the iterations, the best marked, as a PNG; None without any score."""
    if not points:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [point.iteration for point in points]
    best = max(points, key=lambda point: point.miou)
    (line,) = axes.plot(
        steps, [point.miou for point in points], marker="o", markersize=3, label="network", linewidth=1.8
    )
    axes.plot([best.iteration], [best.miou], marker="*", markersize=11, color=line.get_color(), linestyle="none")
    for name in sorted({name for point in points for name in point.branches}):
        axes.plot(
            steps,
            [point.branches.get(name, float("nan")) for point in points],
            label=name,
            linewidth=1.2,
            linestyle="--",
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel("mIoU (%) on the validation split")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out
