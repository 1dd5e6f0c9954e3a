"""Two runs held against each other: what differs between them, class by class, how sure, and at what cost."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovbench.errors import DataError, UsageError
from ovbench.paths import user_path
from ovbench.results import bootstrap, image_areas, store
from ovbench.results.bootstrap import Interval
from ovbench.results.comparable import KINDS, data_of, kind_of, machine_of, protocol_of, settings_of
from ovbench.results.quantities import FIGURES
from ovbench.results.record import RunRecord

Pairs = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Loaded:
    """A record and the file it was read from."""

    record: RunRecord
    path: Path


@dataclass(frozen=True)
class ClassDifference:
    """One class in two runs, IoU in percent; None where its union is 0."""

    name: str
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        """Percentage points, second minus first."""
        return None if self.first is None or self.second is None else self.second - self.first


@dataclass(frozen=True)
class Ratio:
    """A cost of two runs.

    Attributes:
        figure: Name in :data:`ovbench.results.quantities.FIGURES`.
        first: Of the first run.
        second: Of the second run.
        ratio: Second divided by first; None where that says nothing.
        reason: Why there is no ratio; empty where there is one.
    """

    figure: str
    first: float | None
    second: float | None
    ratio: float | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A run against a base.

    Attributes:
        first: Run id of the base.
        second: Run id of the other.
        miou: Both mIoU in percent, unrounded.
        warnings: What a reader must know before believing any difference.
        data: Fields of the data that differ, base first.
        protocol: The same of the protocol.
        settings: The same of method, weights and precision.
        machine: The same of the machine.
        classes: Every class, the largest gain first, absent ones last.
        interval: Paired bootstrap of the difference of mIoU; None where it cannot be had.
        interval_reason: Why not; empty where there is one.
        ratios: Costs.
    """

    first: str
    second: str
    miou: tuple[float | None, float | None]
    warnings: tuple[str, ...]
    data: Pairs
    protocol: Pairs
    settings: Pairs
    machine: Pairs
    classes: tuple[ClassDifference, ...]
    interval: Interval | None
    interval_reason: str
    ratios: tuple[Ratio, ...]

    @property
    def difference(self) -> float | None:
        """mIoU of the other minus that of the base, percentage points."""  # noqa: D403 (the metric's name)
        first, second = self.miou
        return None if first is None or second is None else second - first

    def to_data(self) -> dict[str, Any]:
        """Plain dicts and lists for JSON, unrounded."""
        pairs = {name: {key: list(pair) for key, pair in getattr(self, name).items()} for name in _GROUPS}
        return {
            "first": self.first,
            "second": self.second,
            "miou": list(self.miou),
            "difference": self.difference,
            "interval": None if self.interval is None else asdict(self.interval),
            "interval_reason": self.interval_reason or None,
            "warnings": list(self.warnings),
            "differs": pairs,
            "classes": [{**asdict(entry), "difference": entry.difference} for entry in self.classes],
            "ratios": [{**asdict(ratio), "unit": FIGURES[ratio.figure].unit} for ratio in self.ratios],
        }


_GROUPS = ("data", "protocol", "settings", "machine")


def find(name: str, root: Path) -> Loaded:
    """A run by the path of its record, its id, or a prefix of its id that no other run has.

    Raises:
        UsageError: No such run, or several; names them.
        DataError: The file is no record.
    """
    path = user_path(name)
    if path.is_file():
        return Loaded(store.read(path), path)
    known = {item.stem: item for item in sorted(root.glob("*/*/*.json")) if not item.name.startswith(".")}
    hits = [run_id for run_id in known if run_id.startswith(name)] if name else []
    if name in known or len(hits) == 1:
        found = known[name if name in known else hits[0]]
        return Loaded(store.read(found), found)
    if hits:
        more = f" and {len(hits) - 4} more" if len(hits) > 4 else ""
        raise UsageError(f"'{name}' begins several run ids: {', '.join(hits[:4])}{more}. Give more of it.")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean: {', '.join(near)}?" if near else ""
    raise UsageError(
        f"No run '{name}' in '{root}'.{hint} Give a run id, the beginning of one, or the path of a record; "
        "--results names another folder."
    )


def compare(
    first: Loaded,
    second: Loaded,
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    confidence: float = bootstrap.CONFIDENCE,
) -> Comparison:
    """One run against another.

    Raises:
        UsageError: The runs have other benchmarks or classes: there is nothing to hold against each other.
    """
    one, two = first.record, second.record
    _require_same_classes(one, two)
    data = _pairs(data_of(one), data_of(two))
    protocol = _pairs(protocol_of(one), protocol_of(two))
    machine = _pairs(machine_of(one.environment), machine_of(two.environment))
    sure, reason = _interval(first, second, resamples, seed, confidence)
    return Comparison(
        first=one.run_id,
        second=two.run_id,
        miou=(_miou(one), _miou(two)),
        warnings=tuple(_warnings(one, two, data, protocol)),
        data=data,
        protocol=protocol,
        settings=_settings(one, two),
        machine=machine,
        classes=_classes(one, two),
        interval=sure,
        interval_reason=reason,
        ratios=tuple(_ratio(name, one, two, machine) for name in _COSTS),
    )


def _require_same_classes(one: RunRecord, two: RunRecord) -> None:
    if one.spec.dataset != two.spec.dataset:
        raise UsageError(
            f"{one.run_id} is on {one.spec.dataset} and {two.run_id} on {two.spec.dataset}: runs of different benchmarks "
            "have nothing to compare class by class. 'ovbench table' shows them side by side."
        )
    for record in (one, two):
        if record.metrics is None:
            raise UsageError(f"The run {record.run_id} has no finished image ({record.reason}).")
    if _class_names(one) != _class_names(two):
        raise UsageError(f"{one.run_id} and {two.run_id} have different classes under the name {one.spec.dataset}.")


def _class_names(record: RunRecord) -> list[str]:
    return [score.name for score in record.metrics.classes] if record.metrics else []


def _miou(record: RunRecord) -> float | None:
    return record.metrics.miou if record.metrics else None


def _pairs(one: Mapping[str, str], two: Mapping[str, str]) -> Pairs:
    names = dict.fromkeys([*one, *two])
    found = {name: (one.get(name, "none"), two.get(name, "none")) for name in names}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _settings(one: RunRecord, two: RunRecord) -> Pairs:
    pairs = _pairs(settings_of(one), settings_of(two))
    if "method" in pairs:  # each has options of its own: that they differ says nothing
        pairs = {name: pair for name, pair in pairs.items() if not name.startswith("option ")}
    return pairs


def _warnings(one: RunRecord, two: RunRecord, data: Pairs, protocol: Pairs) -> list[str]:
    found = []
    for record in (one, two):
        found += [f"{record.run_id}: {KINDS[kind]}" for kind in kind_of(record)]
        if record.status != "ok":
            found.append(f"{record.run_id}: the run {record.status} ({record.reason})")
    if data:
        found.append(f"the runs were evaluated on different data: {_words(data)}")
    if protocol:
        found.append(f"the runs have different protocols: {_words(protocol)}")
    return found


def _words(pairs: Pairs) -> str:
    return ", ".join(f"{name} {one} / {two}" for name, (one, two) in pairs.items())


def _classes(one: RunRecord, two: RunRecord) -> tuple[ClassDifference, ...]:
    assert one.metrics is not None and two.metrics is not None  # held by _require_same_classes
    entries = [
        ClassDifference(a.name, a.iou, b.iou) for a, b in zip(one.metrics.classes, two.metrics.classes, strict=True)
    ]

    def order(entry: ClassDifference) -> tuple[bool, float]:
        return entry.difference is None, -(entry.difference or 0.0)

    return tuple(sorted(entries, key=order))


def _interval(
    first: Loaded, second: Loaded, resamples: int, seed: int, confidence: float
) -> tuple[Interval | None, str]:
    try:
        one, two = (image_areas.read(image_areas.path_beside(run.path), run.record) for run in (first, second))
    except DataError as error:
        return None, str(error)
    if one.names != two.names:
        only = [len(set(a.names) - set(b.names)) for a, b in ((one, two), (two, one))]
        return None, f"the image sets differ: {only[0]} images only in the first run, {only[1]} only in the second"
    if (one.label != two.label).any():
        return None, "the labels of the same images differ"
    return bootstrap.interval(one, two, resamples=resamples, seed=seed, confidence=confidence), ""


_COSTS = ("latency", "images_per_s", "memory", "gmacs", "params")


def _ratio(name: str, one: RunRecord, two: RunRecord, machine: Pairs) -> Ratio:
    figure = FIGURES[name]
    first, second = figure.value(one), figure.value(two)
    reason = ""
    if first is None or second is None:
        reason = "not measured in " + " and ".join(
            record.run_id for record, value in ((one, first), (two, second)) if value is None
        )
    elif first == 0:
        reason = "0 in the first run"
    elif figure.machine_bound and machine:
        reason = f"the machines differ: {_words(machine)}"
    elif name == "memory" and _memory_kind(one) != _memory_kind(two):
        reason = f"measured differently: {_memory_kind(one)} / {_memory_kind(two)}"
    elif name == "gmacs" and _tool(one) != _tool(two):
        reason = f"counted by different tools: {_tool(one)} / {_tool(two)}"
    return Ratio(name, first, second, None if reason or not first or second is None else second / first, reason)


def _memory_kind(record: RunRecord) -> str:
    return str(record.efficiency.peak_memory_kind if record.efficiency else None)


def _tool(record: RunRecord) -> str:
    return str(record.efficiency.tool if record.efficiency else None)
