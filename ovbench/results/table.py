"""Arranges records as tables that compare only what is comparable, and say what differs where it does.

A row is one setting (method, options, protocol, weights, precision, device); a column is one figure of one benchmark; a
cell comes from the newest finished run of its setting. Demo runs, partial runs, random and built-in weights each get a
section of their own, so that they can never stand beside results.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ovbench.errors import unknown_name
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


def _of_efficiency(name: str) -> Callable[[RunRecord], float | None]:
    return lambda record: None if record.efficiency is None else getattr(record.efficiency, name)


def _of_environment(name: str) -> Callable[[RunRecord], Any]:
    return lambda record: getattr(record.environment, name)


def _latency(record: RunRecord) -> float | None:
    latency = None if record.efficiency is None else record.efficiency.latency_ms
    return None if latency is None else latency.median


FIGURES: dict[str, Figure] = {
    "miou": Figure("mIoU", "%", 2, _of_metrics("miou")),
    "macc": Figure("mAcc", "%", 2, _of_metrics("macc")),
    "aacc": Figure("aAcc", "%", 2, _of_metrics("aacc")),
    "latency": Figure("latency", "ms", 1, _latency, machine_bound=True),
    "images_per_s": Figure("images/s", "1/s", 2, _of_efficiency("images_per_s"), machine_bound=True),
    "gmacs": Figure("MACs", "G", 2, _of_efficiency("gmacs")),
    "gflops": Figure("FLOPs", "G", 2, _of_efficiency("gflops")),
    "params": Figure("parameters", "M", 2, _of_efficiency("params_m")),
    "memory": Figure("peak memory", "MiB", 0, _of_efficiency("peak_memory_mib"), machine_bound=True),
}

MEAN = "mean"

# Shown in every section; other settings are shown only where they tell rows apart.
_ALWAYS_SHOWN = ("method", "protocol", "weights")

# What sets runs apart from results, with the words that say so.
_KINDS = {
    "demo": "DEMO, built-in CLIP on generated scenes: a check of the pipeline, no evidence about real images",
    "builtin-weights": "BUILT-IN WEIGHTS, trained on generated scenes only: the accuracy means nothing",
    "random-weights": "RANDOM WEIGHTS: a check of the path, the accuracy means nothing",
    "partial": "PARTIAL, not all images of the benchmark",
}

# Settings that unlike rows never share: they tell rows apart only where the setting named here is equal.
_WITHIN = {"options": "method", "weights_sha256": "weights", "activation": "arch"}


@dataclass(frozen=True)
class Cell:
    """One figure and the run it comes from; ``value`` is None where there is no run or the run lacks the figure."""

    value: float | None
    run_id: str | None


@dataclass(frozen=True)
class Column:
    """One figure of one benchmark; ``dataset`` is ``"mean"`` for the mean over all benchmark columns."""

    dataset: str
    figure: str

    @property
    def heading(self) -> str:
        """Benchmark and figure with its unit."""
        figure = FIGURES[self.figure]
        return f"{self.dataset} {figure.label} ({figure.unit})"


@dataclass(frozen=True)
class Row:
    """One setting: the shown settings in order of ``Section.settings`` and one cell per column."""

    settings: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Section:
    """Rows that may stand beside each other.

    Attributes:
        kind: ``results``, or what sets these runs apart: ``demo``, ``builtin-weights``, ``random-weights``,
            ``partial``, joined by '+'.
        title: Heading, which says so in words.
        settings: Names of the shown settings.
        columns: Figure columns.
        rows: One per setting.
        notes: What still differs within a column.
    """

    kind: str
    title: str
    settings: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """All sections, and what was left out of them."""

    sections: tuple[Section, ...]
    left_out: tuple[str, ...]


def table(
    records: Iterable[RunRecord],
    methods: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    columns: Sequence[str] = ("miou",),
) -> Table:
    """The newest finished run of each setting and benchmark, arranged.

    Args:
        records: Any records, in any order.
        methods: Rows, in this order; None is every method that has a run, by name.
        datasets: Columns, in this order; None is every benchmark that has a run, by name.
        columns: Names of :data:`FIGURES`.

    Raises:
        UsageError: A column that is no figure.
    """
    for column in columns:
        if column not in FIGURES:
            raise unknown_name("column", column, FIGURES, "ovbench table --help")
    chosen = [
        record
        for record in records
        if (methods is None or record.spec.method in methods) and (datasets is None or record.spec.dataset in datasets)
    ]
    left_out = []
    for status, number in sorted(Counter(record.status for record in chosen if record.status != "ok").items()):
        left_out.append(f"{number} {status} run{'s' if number > 1 else ''} left out")
    finished = [record for record in chosen if record.status == "ok"]
    left_out += [
        f"no finished run of {kind} '{name}'"
        for kind, names, found in (
            ("method", methods or (), {record.spec.method for record in finished}),
            ("dataset", datasets or (), {record.spec.dataset for record in finished}),
        )
        for name in names
        if name not in found
    ]
    by_kind: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in finished:
        by_kind.setdefault(_kind(record), []).append(record)
    sections = tuple(
        _section(kind, by_kind[kind], methods, datasets, columns) for kind in sorted(by_kind, key=_kind_order)
    )
    return Table(sections, tuple(left_out))


def _section(
    kind: tuple[str, ...],
    records: Sequence[RunRecord],
    methods: Sequence[str] | None,
    datasets: Sequence[str] | None,
    figures: Sequence[str],
) -> Section:
    present = {record.spec.dataset for record in records}
    shown_datasets = sorted(present) if datasets is None else [name for name in datasets if name in present]
    newest: dict[tuple[tuple[str, str], ...], dict[str, RunRecord]] = {}
    for record in sorted(records, key=lambda item: (item.provenance.finished, item.run_id)):
        newest.setdefault(tuple(_settings(record).items()), {})[record.spec.dataset] = record

    def order(setting: tuple[tuple[str, str], ...]) -> tuple[int, tuple[tuple[str, str], ...]]:
        return (0 if methods is None else list(methods).index(dict(setting)["method"]), setting)

    settings = [dict(setting) for setting in sorted(newest, key=order)]
    runs = [newest[tuple(setting.items())] for setting in settings]
    shown = tuple(name for name in settings[0] if name in _ALWAYS_SHOWN or _tells_apart(name, settings))
    columns = tuple(Column(dataset, figure) for dataset in shown_datasets for figure in figures)
    if "miou" in figures and len(shown_datasets) > 1:
        columns += (Column(MEAN, "miou"),)
    rows = tuple(
        Row(
            tuple(_brief_options(setting, settings) if name == "options" else setting[name] for name in shown),
            tuple(_cell(found, column, shown_datasets) for column in columns),
        )
        for setting, found in zip(settings, runs, strict=True)
    )
    notes = [note for dataset in shown_datasets for note in _differences(dataset, runs, figures)]
    return Section("+".join(kind) or "results", _title(kind), shown, columns, rows, tuple(notes))


def _settings(record: RunRecord) -> dict[str, str]:
    """Everything that makes two runs of one benchmark different runs, as shown text."""
    spec = record.spec
    protocol = spec.protocol
    overrides = " ".join(f"{name}={getattr(protocol, name)}" for name in protocol.overrides)
    return {
        "method": spec.method,
        "options": json.dumps(spec.method_options, sort_keys=True, ensure_ascii=False) if spec.method_options else "",
        "protocol": f"{protocol.name} {overrides}".strip(),
        "weights": spec.weights,
        "weights_sha256": (record.provenance.weights_sha256 or "")[:8],
        "arch": spec.arch or "",
        "activation": spec.activation,
        "dtype": spec.dtype,
        "device": spec.device,
        "window_batch": "" if spec.window_batch is None else str(spec.window_batch),
        "seed": str(spec.seed),
        "limit": "" if spec.limit is None else str(spec.limit),
    }


def _tells_apart(name: str, settings: Sequence[dict[str, str]]) -> bool:
    """Whether a setting differs between rows that it should tell apart."""
    groups: dict[str, set[str]] = {}
    for setting in settings:
        groups.setdefault(setting[_WITHIN[name]] if name in _WITHIN else "", set()).add(setting[name])
    return any(len(values) > 1 for values in groups.values())


def _brief_options(setting: dict[str, str], settings: Sequence[dict[str, str]]) -> str:
    """The method options of a row that other rows of its method have otherwise."""
    own = json.loads(setting["options"] or "{}")
    others = [json.loads(other["options"] or "{}") for other in settings if other["method"] == setting["method"]]
    return " ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in own.items()
        if any(name not in other or other[name] != value for other in others)
    )


def _cell(runs: dict[str, RunRecord], column: Column, datasets: Sequence[str]) -> Cell:
    figure = FIGURES[column.figure]
    if column.dataset == MEAN:
        values = [figure.value(runs[name]) if name in runs else None for name in datasets]
        known = [value for value in values if value is not None]
        # A mean over fewer benchmarks than the other rows' would not be the same figure.
        return Cell(sum(known) / len(known) if len(known) == len(datasets) else None, None)
    run = runs.get(column.dataset)
    return Cell(None, None) if run is None else Cell(figure.value(run), run.run_id)


def _differences(dataset: str, rows: Iterable[dict[str, RunRecord]], figures: Sequence[str]) -> list[str]:
    """What is unequal among the runs of one benchmark although it should be equal for them to compare."""
    records = [runs[dataset] for runs in rows if dataset in runs]
    compared: list[tuple[str, str, Callable[[RunRecord], Any]]] = [
        ("all", "benchmark version", lambda record: record.spec.dataset_version),
        ("all", "dataset fingerprint", lambda record: (record.provenance.dataset_fingerprint or "unknown")[:8]),
        ("all", "images", lambda record: record.metrics.images if record.metrics else 0),
    ]
    if any(FIGURES[figure].machine_bound for figure in figures):
        labels = ", ".join(FIGURES[figure].label for figure in figures if FIGURES[figure].machine_bound)
        compared += [
            (labels, name, _of_environment(name))
            for name in ("cpu", "cores", "threads", "gpu", "gpu_driver", "cuda", "torch", "os")
        ]
        compared.append((labels, "precision", lambda record: record.environment.precision.model_dump_json()))
    notes = []
    for what, name, read in compared:
        values = sorted({str(read(record)) for record in records})
        if len(values) > 1:
            subject = dataset if what == "all" else f"{dataset} {what}"
            notes.append(f"{subject}: rows differ in {name}: {', '.join(values)}")
    # Presets are shown by name; the same name with other words or prompts inside would otherwise pass unseen.
    for name in ("wording", "templates"):
        hashes: dict[str, set[str]] = {}
        for record in records:
            protocol = record.spec.protocol
            hashes.setdefault(getattr(protocol, name), set()).add(getattr(protocol, f"{name}_sha256") or "unknown")
        for label, found in sorted(hashes.items()):
            if len(found) > 1:
                short = ", ".join(sorted(value[:8] for value in found))
                notes.append(f"{dataset}: rows differ in the content of {name} '{label}': {short}")
    return notes


def _kind(record: RunRecord) -> tuple[str, ...]:
    """What keeps a run out of the results proper; empty for a result."""
    holds = {
        "demo": record.demo,
        "builtin-weights": record.spec.weights == "builtin" and not record.demo,
        "random-weights": record.spec.weights == "random",
        # Generated copies never have a benchmark's number of images: "demo" says enough.
        "partial": record.partial and not record.demo,
    }
    return tuple(name for name in _KINDS if holds[name])


def _kind_order(kind: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(name in kind) for name in _KINDS)


def _title(kind: tuple[str, ...]) -> str:
    return "; ".join(_KINDS[name] for name in kind) if kind else "Results"
