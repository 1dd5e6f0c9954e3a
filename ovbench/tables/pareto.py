"""The Pareto plot of runs: mIoU over what an image costs, with the frontier of those that no other run beats in both.

Times stand on one frontier only where the machines agree. The plot is drawn without pyplot: no window, no global state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ovbench.errors import RunError, UsageError
from ovbench.results.comparable import KINDS, differing, kind_of, machine_of, settings_of
from ovbench.results.quantities import FIGURES
from ovbench.results.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Cost = Literal["latency", "gmacs"]
COSTS: dict[str, str] = {"latency": "latency per image (ms)", "gmacs": "multiply-accumulates per image (G)"}
SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Point:
    """One run of a plot.

    Attributes:
        run_id: Run id.
        label: Short name, unlike every other point's.
        cost: Milliseconds, or 10^9 multiply-accumulates.
        miou: Percent.
        group: What sets it apart from points of other groups, e.g. its machine; empty where there is one group.
    """

    run_id: str
    label: str
    cost: float
    miou: float
    group: str = ""


def points(records: Sequence[RunRecord], cost: Cost) -> list[Point]:
    """One point per run.

    Raises:
        UsageError: Runs of several benchmarks, or a run without mIoU or cost; names them.
    """
    datasets = sorted({record.spec.dataset for record in records})
    if len(datasets) > 1:
        raise UsageError(
            f"Runs of several benchmarks ({', '.join(datasets)}) do not share an axis: name runs of one, or --dataset."
        )
    found = []
    for record, label, group in zip(records, _labels(records), _groups(records, cost), strict=True):
        value = FIGURES[cost].value(record)
        miou = FIGURES["miou"].value(record)
        if value is None or miou is None:
            missing = cost if value is None else "mIoU"
            raise UsageError(f"The run {record.run_id} has no {missing}: leave it out of the plot.")
        found.append(Point(record.run_id, label, value, miou, group))
    return found


def frontier(chosen: Sequence[Point]) -> list[Point]:
    """The points that no other beats in mIoU at the same or lower cost, from cheap to dear."""
    best: list[Point] = []
    for point in sorted(chosen, key=lambda item: (item.cost, -item.miou, item.label)):
        if not best or point.miou > best[-1].miou:
            best.append(point)
    return best


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """The method, and of the other settings those that tell runs of one method apart."""
    names = []
    for record in records:
        same = [
            settings_of(other) | {"protocol": other.spec.protocol.name} for other in records if _alike(other, record)
        ]
        own = settings_of(record) | {"protocol": record.spec.protocol.name}
        told = [
            own.get(name, "none") if not name.startswith("option ") else f"{name[7:]}={own.get(name)}"
            for name in differing(same)
        ]
        names.append(", ".join([record.spec.method, *told]))
    repeated = {name for name in names if names.count(name) > 1}
    return [
        f"{name} {record.run_id[:16]}" if name in repeated else name
        for name, record in zip(names, records, strict=True)
    ]


def _alike(one: RunRecord, two: RunRecord) -> bool:
    return one.spec.method == two.spec.method


def _groups(records: Sequence[RunRecord], cost: Cost) -> list[str]:
    """What runs may not be joined across, in words: the machine of times, and what is no result."""
    entries = [{"runs": " and ".join(kind_of(record)) or "results"} for record in records]
    if cost == "latency":
        entries = [entry | machine_of(record.environment) for entry, record in zip(entries, records, strict=True)]
    named = differing(entries)
    return [
        ", ".join(entry[name] if name == "runs" else f"{name} {entry[name]}" for name in named) for entry in entries
    ]


def headline(records: Sequence[RunRecord], cost: Cost) -> str:
    """Benchmark and axes in words, and a warning where no run is a result."""
    text = f"{records[0].spec.dataset}: mIoU over {COSTS[cost]}"
    kinds = {kind_of(record) for record in records}
    if len(kinds) == 1:
        text += "".join(f"\n{KINDS[kind]}" for kind in kinds.pop())
    return text


def plot(chosen: Sequence[Point], title: str, cost: Cost, path: Path) -> None:
    """Draws the points, their labels and the frontier of each group into a PNG or SVG file.

    Raises:
        UsageError: Another suffix, or no matplotlib.
        RunError: The file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot '{path}': give a file that ends in {' or '.join(SUFFIXES)}.")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib.") from None
    svg = path.suffix.lower() == ".svg"
    # Without these two an SVG holds the date and random names.
    with matplotlib.rc_context({"svg.hashsalt": "ovbench", "axes.unicode_minus": True}):
        figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, chosen, title, COSTS[cost])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the labels are placed for the axes as they are now
        _place_labels(axes, chosen)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None} if svg else {"Software": None})
        except OSError as error:
            raise RunError(f"Cannot write the plot to '{path}': {error.strerror or error}.") from error


# Distinguishable in grey and for the colour-blind (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"


def _draw(axes: Axes, chosen: Sequence[Point], title: str, x_label: str) -> None:
    groups = list(dict.fromkeys(point.group for point in chosen))
    for index, group in enumerate(groups):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        members = [point for point in chosen if point.group == group]
        axes.scatter(
            [point.cost for point in members],
            [point.miou for point in members],
            s=42, color=colour, marker=marker, zorder=3, label=group or None,
        )  # fmt: skip
        best = frontier(members)
        # From one point of the frontier to the next, the cheaper one is the best to be had.
        axes.step([point.cost for point in best], [point.miou for point in best], where="post", color=colour, zorder=2)
    costs = [point.cost for point in chosen]
    if min(costs) > 0 and max(costs) / min(costs) > 10:
        from matplotlib.ticker import LogFormatter, LogLocator

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(float("inf"), 0.4)))
        axes.xaxis.minorticks_off()
    axes.margins(0.1)
    axes.set_xlabel(x_label)
    axes.set_ylabel("mIoU (%)")
    axes.set_title(title, fontsize=10, loc="left", wrap=True)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(groups) > 1:
        figure: Any = axes.figure
        figure.legend(fontsize=7, loc="outside lower left", frameon=False)  # over no point


# Where a label may go: distance from the point in typographic points, direction, and the text's own anchor.
_RADII = (8.0, 16.0, 28.0, 44.0, 64.0, 88.0, 116.0)
_DIRECTIONS: tuple[tuple[float, float, str, str], ...] = (
    (1, 0, "left", "center"),
    (0.7, 0.7, "left", "bottom"),
    (0.7, -0.7, "left", "top"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (-0.7, 0.7, "right", "bottom"),
    (-0.7, -0.7, "right", "top"),
    (-1, 0, "right", "center"),
)


def _place_labels(axes: Axes, chosen: Sequence[Point]) -> None:
    """Each label at the nearest free place: off other labels, points and lines, inside the axes."""
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    renderer = figure.canvas.get_renderer()
    marks = [axes.transData.transform((point.cost, point.miou)) for point in chosen]
    size = 5 * figure.dpi / 72
    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in marks]
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    inside = axes.get_window_extent(renderer)
    for point, own in sorted(zip(chosen, taken, strict=False), key=lambda pair: -pair[0].miou):
        best: tuple[float, Any, Bbox] | None = None
        for radius, (dx, dy, ha, va) in itertools.product(_RADII, _DIRECTIONS):
            text = axes.annotate(
                point.label, (point.cost, point.miou), xytext=(radius * dx, radius * dy), textcoords="offset points",
                ha=ha, va=va, fontsize=8, zorder=4,
                arrowprops=None if radius < 10 else {"arrowstyle": "-", "lw": 0.6, "color": "#888888", "shrinkB": 4},
            )  # fmt: skip
            box = _text_box(text, renderer)  # an annotation's own extent includes its line
            over = sum(_overlap(box, other) for other in taken if other is not own)
            over += box.width * box.height - _overlap(box, inside)
            crossed = sum(line.intersects_bbox(box, filled=False) for line in lines)
            price = over * 10 + crossed * 40 + radius
            if best is None or price < best[0]:
                if best is not None:
                    best[1].remove()
                best = (price, text, box)
            else:
                text.remove()
        assert best is not None  # there is at least one place
        taken.append(best[2])


def _text_box(text: Any, renderer: Any) -> Bbox:
    """Pixels of an annotation's words without its line."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    box: Bbox = Text.get_window_extent(text, renderer)
    return box


def _overlap(one: Bbox, two: Bbox) -> float:
    """Common area of two boxes in pixels."""
    width = min(one.x1, two.x1) - max(one.x0, two.x0)
    height = min(one.y1, two.y1) - max(one.y0, two.y0)
    return float(max(width, 0) * max(height, 0))
