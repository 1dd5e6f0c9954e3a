"""Pareto plots as SVG: a point per run, the frontier of each group, axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ovbench.tables.pareto import COSTS, Point, frontier
from ovbench.tables.report.entries import Entry, scope
from ovbench.tables.report.figures import number
from ovbench.tables.report.markup import Markup, element, join

# Scaled to the column; about the width of a phone, so that type stays legible there.
WIDTH, HEIGHT = 380.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 44.0
GROUPS = 6  # colours in style.css
_LETTER = 6.6  # mean width of a letter at the labels' size
_LINE = 13.0
_MOST = 22  # letters of a label


@dataclass(frozen=True)
class Axis:
    """One axis, linear or logarithmic.

    Attributes:
        low: Value at the start.
        high: Value at the end.
        start: Place of ``low`` in the drawing.
        end: Place of ``high``.
        ticks: Values that are written.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands, in units of the drawing, to a hundredth."""
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(value)) if self.log else (self.low, self.high, value)
        )
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 2)


def axis(values: Sequence[float], start: float, end: float, *, cost: bool = False) -> Axis:
    """An axis that holds all values with some room; of costs that span more than a factor of ten, a logarithmic one."""
    low, high = min(values), max(values)
    if cost and low > 0 and high / low > 10:
        low, high = low / 1.25, high * 1.25
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = (1.0, 2.0, 5.0) if last - first <= 3 else (1.0,)
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return Axis(low, high, start, end, tuple(tick for tick in ticks if low <= tick <= high), log=True)
    room = (high - low) * 0.12 or max(abs(high) * 0.05, 0.5)
    low, high = low - room, high + room
    if cost:
        low = max(0.0, low)
    step = _step((high - low) / 5)
    first = math.ceil(low / step)
    ticks = [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]
    return Axis(low, high, start, end, tuple(ticks))


def _step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def pareto(points: Sequence[Point], runs: Mapping[str, Entry], cost: str, name: str) -> Markup:
    """The plot of points of one benchmark.

    Args:
        points: From :func:`ovbench.tables.pareto.points`.
        runs: The run of each id.
        cost: A key of :data:`ovbench.tables.pareto.COSTS`.
        name: What the drawing is called for those who do not see it.
    """
    x = axis([point.cost for point in points], LEFT, WIDTH - RIGHT, cost=True)
    y = axis([point.miou for point in points], HEIGHT - BOTTOM, TOP)
    groups = list(dict.fromkeys(point.group for point in points))
    lines: list[Markup] = []
    best: set[str] = set()
    for index, group in enumerate(groups):
        chosen = frontier([point for point in points if point.group == group])
        best.update(point.run_id for point in chosen)
        lines.append(_frontier(chosen, x, y, index))
    labels = _labels(points, best, x, y)
    marks = [_mark(point, runs[point.run_id], x, y, groups.index(point.group), cost) for point in points]
    children = [_grid(x, y, COSTS[cost]), *lines, *labels, *marks]
    return element(
        "svg", *children, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="group", aria_label=name, class_="pareto"
    )  # fmt: skip


def plain(point: Point) -> Point:
    """A point in fewer words: no run id, which a click shows, and nothing that its machine does not have."""
    label = point.label.removesuffix(f" {point.run_id[:16]}")
    group = ", ".join(part for part in point.group.split(", ") if not part.endswith(" None"))
    return replace(point, label=label, group=group)


def legend(points: Sequence[Point]) -> Markup | None:
    """What tells the groups of a plot apart; None where there is one group."""
    groups = list(dict.fromkeys(point.group for point in points))
    if len(groups) < 2:
        return None
    items = [element("li", _sample(index), f" {group or 'other'}") for index, group in enumerate(groups)]
    return element("ul", *items, class_="legend")


def _sample(index: int) -> Markup:
    shape = _shape(7.0, 7.0, index)
    return element(
        "svg", shape, viewBox="0 0 14 14", width=14, height=14, aria_hidden="true", class_=f"g{index % GROUPS}"
    )


def _grid(x: Axis, y: Axis, label: str) -> Markup:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        at = y.place(tick)
        parts.append(element("line", x1=LEFT, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(element("text", _tick(tick), x=LEFT - 6, y=at + 4, text_anchor="end"))
    for tick in x.ticks:
        at = x.place(tick)
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=bottom, class_="grid"))
        parts.append(element("text", _tick(tick), x=at, y=bottom + 15, text_anchor="middle"))
    parts.append(element("text", label, x=(LEFT + right) / 2, y=HEIGHT - 8, text_anchor="middle", class_="axis"))
    middle = (TOP + bottom) / 2
    parts.append(
        element("text", "mIoU (%)", x=11, y=middle, text_anchor="middle", transform=f"rotate(-90 11 {middle:g})", class_="axis")
    )  # fmt: skip
    return element("g", *parts, aria_hidden="true")


def _tick(value: float) -> str:
    return f"{value:,.10g}".replace(",", " ").replace("-", "−")


def _frontier(chosen: Sequence[Point], x: Axis, y: Axis, index: int) -> Markup:
    """From one point of the frontier to the next, the cheaper one is the best to be had."""
    path = ""
    for point in chosen:
        across, up = x.place(point.cost), y.place(point.miou)
        path += f"M{across:g} {up:g}" if not path else f"H{across:g}V{up:g}"
    path += f"H{WIDTH - RIGHT:g}"
    return element("path", d=path, class_=f"frontier g{index % GROUPS}", aria_hidden="true")


def _mark(point: Point, entry: Entry, x: Axis, y: Axis, index: int, cost: str) -> Markup:
    unit = "ms" if cost == "latency" else "G MACs"
    text = f"{point.label}: {number(point.miou, 2)} % mIoU, {number(point.cost, 2)} {unit}"
    if point.group:
        text += f" ({point.group})"
    across, up = x.place(point.cost), y.place(point.miou)
    # the wide circle is for fingers
    return element(
        "a",
        element("title", text),
        element("circle", cx=across, cy=up, r=13, class_="touch"),
        _shape(across, up, index),
        href=f"#{entry.anchor}", class_=f"mark g{index % GROUPS}", data_tip=text, aria_label=text, **scope(entry),
    )  # fmt: skip


def _shape(x: float, y: float, index: int) -> Markup:
    """A mark whose form tells its group where colour does not."""
    r = 5.0
    if index % 3 == 0:
        return element("circle", cx=x, cy=y, r=r, class_="dot")
    corners = (
        [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
        if index % 3 == 1
        else [(x, y - 1.3 * r), (x + 1.2 * r, y + r), (x - 1.2 * r, y + r)]
    )
    return element("polygon", points=" ".join(f"{a:g},{b:g}" for a, b in corners), class_="dot")


Box = tuple[float, float, float, float]


def _labels(points: Sequence[Point], best: set[str], x: Axis, y: Axis) -> list[Markup]:
    """Short names beside the points, where they meet no other; those of the frontier first, the rest as room is left."""
    places = {point.run_id: (x.place(point.cost), y.place(point.miou)) for point in points}
    taken: list[Box] = [(a - 7, b - 7, a + 7, b + 7) for a, b in places.values()]
    found = []
    for point in sorted(points, key=lambda item: (item.run_id not in best, -item.miou, item.run_id)):
        a, b = places[point.run_id]
        text = point.label if len(point.label) <= _MOST else point.label[: _MOST - 1] + "…"
        width = len(text) * _LETTER
        for left, top, anchor in (
            (a + 9, b - _LINE / 2, "start"), (a - 9 - width, b - _LINE / 2, "end"),
            (a - width / 2, b - 9 - _LINE, "middle"), (a - width / 2, b + 9, "middle"),
            (a + 6, b - 8 - _LINE, "start"), (a + 6, b + 8, "start"),
        ):  # fmt: skip
            box = (left, top, left + width, top + _LINE)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                at = {"start": left, "end": left + width, "middle": left + width / 2}[anchor]
                found.append(
                    element("text", text, x=round(at, 2), y=round(top + 10, 2), text_anchor=anchor, class_="label", aria_hidden="true")
                )  # fmt: skip
                break
    return found


def _meet(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def bar(value: float | None, most: float) -> Markup:
    """A bar of ``value`` where ``most`` is the full length; empty for None."""
    share = 0.0 if value is None or most <= 0 else max(0.0, min(100.0, 100 * value / most))
    return element("span", element("span", style=f"width:{share:.4g}%"), class_="bar", aria_hidden="true")


def stacked(parts: Sequence[tuple[str, float]]) -> Markup:
    """One bar whose parts are shares of a whole."""
    whole = sum(value for _, value in parts) or 1.0
    pieces = [
        element("span", style=f"width:{100 * value / whole:.4g}%", class_=f"s{index % GROUPS}", title=f"{name}: {value:.2f} ms")
        for index, (name, value) in enumerate(parts)
    ]  # fmt: skip
    return element("div", join(pieces), class_="stacked", aria_hidden="true")
