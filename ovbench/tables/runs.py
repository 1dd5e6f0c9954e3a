"""Arranges records as tables that compare only what is comparable, and say what differs where it does.

A row is one setting (method, options, protocol, weights, precision, device); a column is one figure of one benchmark; a
cell comes from the newest finished run of its setting. Demo runs, partial runs, random and built-in weights each get a
section of their own, so that they can never stand beside results. Results under a method's own settings have the printed
mIoU or PQ beside them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ovbench.errors import unknown_name
from ovbench.results.comparable import KINDS, MACHINE, kind_of, unequal_content
from ovbench.results.measured import of_record
from ovbench.results.quantities import FIGURES
from ovbench.results.record import RunRecord
from ovbench.tables import published
from ovbench.tables.layout import Cell, Column, Refused, Row, Section, Table
from ovbench.tables.match import judge, protocol_for
from ovbench.tables.published import Printed

__all__ = ["FIGURES", "MEAN", "Cell", "Column", "Row", "Section", "Table", "table"]

MEAN = "mean"

# Figures that papers print, by their names in published.csv.
_PRINTED = {"miou": "mIoU", "pq": "PQ"}

# Shown in every section; other settings are shown only where they tell rows apart.
_ALWAYS_SHOWN = ("method", "protocol", "weights")

# Settings that unlike rows never share: they tell rows apart only where the setting named here is equal.
_WITHIN = {"options": "method", "weights_sha256": "weights", "activation": "arch"}


def table(
    records: Iterable[RunRecord],
    methods: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """The newest finished run of each setting and benchmark, arranged.

    Args:
        records: Any records, in any order.
        methods: Rows, in this order; None is every method that has a run, by name.
        datasets: Columns, in this order; None is every benchmark that has a run, by name.
        columns: Names of :data:`FIGURES`; None is mIoU, and PQ of the benchmarks that have some.

    Raises:
        UsageError: A column that is no figure.
    """
    for column in columns or ():
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
        by_kind.setdefault(kind_of(record), []).append(record)
    refused: dict[tuple[str, str], list[Refused]] = {}
    for record in sorted(chosen, key=lambda item: (item.provenance.finished, item.run_id), reverse=True):
        if record.status != "ok":
            entry = Refused(record.run_id, f"{record.status}: {record.reason}")
            refused.setdefault((record.spec.method, record.spec.dataset), []).append(entry)
    sections = tuple(
        _section(kind, by_kind[kind], methods, datasets, columns, refused) for kind in sorted(by_kind, key=_kind_order)
    )
    return Table(sections, tuple(left_out))


def _section(
    kind: tuple[str, ...],
    records: Sequence[RunRecord],
    methods: Sequence[str] | None,
    datasets: Sequence[str] | None,
    chosen: Sequence[str] | None,
    refused: Mapping[tuple[str, str], Sequence[Refused]],
) -> Section:
    present = {record.spec.dataset for record in records}
    shown_datasets = sorted(present) if datasets is None else [name for name in datasets if name in present]
    history: dict[_Setting, dict[str, list[RunRecord]]] = {}
    for record in sorted(records, key=lambda item: (item.provenance.finished, item.run_id), reverse=True):
        setting = tuple(_settings(record).items())
        history.setdefault(setting, {}).setdefault(record.spec.dataset, []).append(record)

    def order(setting: _Setting) -> tuple[int, _Setting]:
        return (0 if methods is None else list(methods).index(dict(setting)["method"]), setting)

    ordered = sorted(history, key=order)
    settings = [dict(setting) for setting in ordered]
    shown = tuple(name for name in settings[0] if name in _ALWAYS_SHOWN or _tells_apart(name, settings))
    figures = ("miou", "pq") if chosen is None else tuple(chosen)
    with_pq = {record.spec.dataset for record in records if FIGURES["pq"].value(record) is not None}
    columns = tuple(
        Column(dataset, figure)
        for dataset in shown_datasets
        for figure in figures
        if chosen is not None or figure != "pq" or dataset in with_pq
    )
    if "miou" in figures and len(shown_datasets) > 1:
        columns += (Column(MEAN, "miou"),)
    rows = tuple(
        Row(
            tuple(_brief_options(setting, settings) if name == "options" else setting[name] for name in shown),
            tuple(
                _cell(history[key], column, shown_datasets, kind, refused.get((setting["method"], column.dataset), ()))
                for column in columns
            ),
        )
        for key, setting in zip(ordered, settings, strict=True)
    )
    newest = [{dataset: runs[0] for dataset, runs in history[key].items()} for key in ordered]
    notes = [note for dataset in shown_datasets for note in _differences(dataset, newest, figures)]
    printers = {
        entry.source: None
        for found in newest
        for record in found.values()
        for name in figures
        if name in _PRINTED and not kind and (entry := _printed(record, _PRINTED[name])) is not None
    }
    if printers:
        notes.append(
            f"published: as printed by {', '.join(sorted(printers))} for the method under its own settings; 'ovbench table "
            "--paper METHOD' has what everyone prints for a method"
        )
    return Section("+".join(kind) or "results", _title(kind), shown, columns, rows, tuple(notes))


_Setting = tuple[tuple[str, str], ...]


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
        "compile_mode": spec.compile_mode,
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


def _cell(
    runs: Mapping[str, Sequence[RunRecord]],
    column: Column,
    datasets: Sequence[str],
    kind: tuple[str, ...],
    refused: Sequence[Refused],
) -> Cell:
    """The newest run's figure; ``runs`` are those of one setting per benchmark, newest first."""
    figure = FIGURES[column.figure]
    if column.dataset == MEAN:
        values = [figure.value(runs[name][0]) if name in runs else None for name in datasets]
        known = [value for value in values if value is not None]
        # A mean over fewer benchmarks than the other rows' would not be the same figure.
        if len(known) < len(datasets):
            return Cell(None, None)
        return Cell(sum(known) / len(known), None, members=tuple(runs[name][0].run_id for name in datasets))
    if column.dataset not in runs:
        return Cell(None, None, refused=tuple(refused))
    newest, *older = runs[column.dataset]
    printed = _printed(newest, _PRINTED[column.figure]) if column.figure in _PRINTED and not kind else None
    return Cell(
        figure.value(newest),
        newest.run_id,
        published=None if printed is None else printed.value,
        others=tuple(run.run_id for run in older),
        refused=tuple(refused),
    )


def _printed(record: RunRecord, metric: str) -> Printed | None:
    """The printed mIoU or PQ that a run may stand beside; None where there is none, or papers print different ones."""
    spec = record.spec
    entries = published.accuracy_of(spec.method, spec.arch or "", spec.dataset, metric)
    if len(entries) != 1:
        return None
    want = published.wanted(entries[0])
    verdict = judge(of_record(record), want, entries[0].unit, protocol_for(spec.method, None))
    return entries[0] if verdict.fits else None


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
            for name in MACHINE
            if name != "device"  # a setting of its own, which tells rows apart
        ]
        compared.append((labels, "precision", lambda record: record.environment.precision.model_dump_json()))
    notes = []
    for what, name, read in compared:
        values = sorted({str(read(record)) for record in records})
        if len(values) > 1:
            subject = dataset if what == "all" else f"{dataset} {what}"
            notes.append(f"{subject}: rows differ in {name}: {', '.join(values)}")
    notes += [f"{dataset}: {text}" for text in unequal_content(records)]
    return notes


def _of_environment(name: str) -> Callable[[RunRecord], Any]:
    return lambda record: getattr(record.environment, name)


def _kind_order(kind: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(name in kind) for name in KINDS)


def _title(kind: tuple[str, ...]) -> str:
    return "; ".join(KINDS[name] for name in kind) if kind else "Results"
