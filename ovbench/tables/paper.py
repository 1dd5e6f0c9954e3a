"""Arranges a paper's table: every printed number, ours beside it where a run fits, and what a reader must know of both.

Where several runs fit one cell the newest counts. A cell that no run fits keeps the printed number alone. A mean of ours is
taken from unrounded values, and only where every benchmark of the column has one and all come from one setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ovbench.registry import method_names
from ovbench.results.comparable import data_of, differing, unequal_content
from ovbench.results.measured import CLASS, Measured, metric
from ovbench.tables import published
from ovbench.tables.layout import Cell, Column, Refused, Row, Section, Table
from ovbench.tables.match import judge, protocol_for, same_machine, settings_brief
from ovbench.tables.published import Printed

RULE = "Where several runs fit a cell, the newest counts; --explain lists the others and what was refused."

_SHOWN_UNIT = {"percent": "%"}


@dataclass(frozen=True)
class _Found:
    """A cell and the measurement behind it."""

    cell: Cell
    source: Measured | None
    entry: Printed | None


def arrange(paper: str, table: str, measured: Iterable[Measured], protocol: str | None = None) -> Table:
    """One table of a paper.

    Args:
        paper: Paper id.
        table: Table id as in ``published.csv``.
        measured: Runs and profiles in any order.
        protocol: Preset that runs must have been made under; None is each method's own.

    Raises:
        UsageError: No such paper or table.
    """
    reason = None if paper not in published.papers() else published.no_tables(paper)
    if reason is not None:
        return Table((), (f"{published.title(paper)}: {reason}",))
    entries = published.table_numbers(paper, table)
    pool: dict[str, list[Measured]] = {}
    for item in sorted(measured, key=lambda item: (item.finished, item.id), reverse=True):
        pool.setdefault(item.method, []).append(item)
    title = published.title(paper)
    if table != published.BY_METHOD:
        title += f", Table {table if table[0].isdigit() else repr(table)}"
    return Table(tuple(_section(f"{title}{part}", some, pool, protocol) for part, some in _parts(entries).items()))


def _parts(entries: Sequence[Printed]) -> dict[str, list[Printed]]:
    """A table of classes by its groups of classes, which share no column; any other whole."""
    parts: dict[str, list[Printed]] = {}
    by_class = any(entry.metric.startswith(CLASS) for entry in entries)
    for entry in entries:
        parts.setdefault(f", {entry.variant}" if by_class else "", []).append(entry)
    return parts


def _section(
    title: str, entries: Sequence[Printed], pool: Mapping[str, Sequence[Measured]], protocol: str | None
) -> Section:
    rows = printed_rows(entries)
    columns = _columns(rows)
    built = set(method_names(None))
    shown_rows, found_rows = [], []
    for key, printed in rows.items():
        found = [_cell(printed.get(column), pool, protocol) for column in columns]
        found = [_mean(index, found, list(columns)) for index in range(len(found))]
        methods = {published.wanted(entry).method for entry in printed.values()}
        shown_rows.append((*key, _method_text(methods), _state(printed, found, built, pool)))
        found_rows.append(found)
    names = (*RowKey._fields, "method", "state")
    kept = [index for index, name in enumerate(names) if name == "row" or any(row[index] for row in shown_rows)]
    section = Section(
        kind="paper",
        title=title,
        settings=tuple(names[index].replace("_", " ") for index in kept),
        columns=tuple(_column(column, entries) for column in columns),
        rows=tuple(
            Row(tuple(row[index] for index in kept), tuple(item.cell for item in found))
            for row, found in zip(shown_rows, found_rows, strict=True)
        ),
        notes=(),
    )
    labels = _labels(list(rows))
    notes = [*_origins(entries), *_notes(section, labels, found_rows, protocol)]
    return replace(section, notes=tuple(notes))


_Key = tuple[str, str]  # dataset, metric


class RowKey(NamedTuple):
    """What tells the rows of a paper's table apart; who printed it and the setting only where the rest does not."""

    row: str
    variant: str
    backbone: str
    trained_on: str
    printed_by: str = ""
    setting: str = ""


def printed_rows(entries: Sequence[Printed]) -> dict[RowKey, dict[_Key, Printed]]:
    """The numbers of a table by rows, and within a row by column; numbers of different printers share no row."""
    several = len({(entry.source, entry.table) for entry in entries}) > 1
    rows: dict[RowKey, dict[_Key, Printed]] = {}
    for entry in entries:
        printer = f"{entry.source}, {entry.table}" if several else ""
        key = RowKey(entry.row, entry.variant, entry.backbone, entry.train_data, printer)
        if entry.key in rows.get(key, {}):
            key = key._replace(setting=entry.setting)
        rows.setdefault(key, {})[entry.key] = entry
    return rows


def _origins(entries: Sequence[Printed]) -> Iterable[str]:
    """Who printed the numbers, where that is not the paper that the table is of."""
    places: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry.origin:
            places.setdefault(entry.source, {})[entry.origin] = None
    for source, found in places.items():
        yield f"{published.title(source)}: read from {', '.join(found)}."
    settings: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry.setting and entry.origin:
            settings.setdefault(entry.setting, {})[entry.row] = None
    for setting, rows in settings.items():
        yield f"Printed with: {setting} ({', '.join(rows)})."


def _columns(rows: Mapping[RowKey, Mapping[_Key, Printed]]) -> dict[_Key, None]:
    """Columns in the order of the fullest row, then whatever other rows have besides; means last."""
    order: dict[_Key, None] = {}
    for printed in sorted(rows.values(), key=len, reverse=True):
        order |= dict.fromkeys(printed)
    return dict.fromkeys(sorted(order, key=lambda column: published.is_mean(column[0])))


def _column(column: _Key, entries: Sequence[Printed]) -> Column:
    dataset, name = column
    printed = [entry for entry in entries if entry.key == column]
    units = {entry.unit for entry in printed}
    if len(units) != 1:
        raise ValueError(f"{dataset} {name} is printed in {sorted(units)}")
    reader = metric(name)
    unit = units.pop()
    decimals = max(len(entry.value.partition(".")[2]) for entry in printed)
    return Column(
        dataset=dataset,
        figure=name,
        label=reader.label,
        unit=_SHOWN_UNIT.get(unit, unit),
        digits=max(reader.digits, decimals),
        relative=not published.of_accuracy(name),
    )


def _cell(entry: Printed | None, pool: Mapping[str, Sequence[Measured]], protocol: str | None) -> _Found:
    """The newest fitting measurement beside a printed number; means are filled in afterwards."""
    if entry is None:
        return _Found(Cell(None, None), None, None)
    want = published.wanted(entry)
    candidates = [
        item
        for item in pool.get(want.method, ())
        if item.dataset in (None, *want.datasets) and (item.origin == "run" or not want.accuracy)
    ]
    verdicts = [(item, judge(item, want, entry.unit, protocol_for(want.method, protocol))) for item in candidates]
    fitting = [(item, verdict) for item, verdict in verdicts if verdict.fits]
    refused = tuple(Refused(item.id, "; ".join(verdict.reasons)) for item, verdict in verdicts if not verdict.fits)
    if not fitting:
        return _Found(Cell(None, None, entry.value, refused=refused), None, entry)
    chosen, verdict = fitting[0]
    remarks = list(verdict.remarks)
    spread = differing(_telling(item) for item, _ in fitting)
    remarks += [f"fitting runs differ in {name}: {', '.join(values)}" for name, values in spread.items()]
    reader = metric(entry.metric)
    cell = Cell(
        value=verdict.value,
        run_id=chosen.id,
        published=entry.value,
        comparable=not reader.machine_bound or same_machine(want.machine, chosen),
        others=tuple(item.id for item, _ in fitting[1:]),
        refused=refused,
        remarks=tuple(remarks),
    )
    return _Found(cell, chosen, entry)


def _telling(item: Measured) -> dict[str, str]:
    """What may differ between two runs that fit the same cell."""
    fields = {key: value for key, value in settings_brief(item).items() if key != "weights sha256"}
    return {**fields, "device": item.environment.gpu or item.environment.cpu, "counting": item.convention}


def _mean(index: int, row: Sequence[_Found], columns: Sequence[_Key]) -> _Found:
    """The cell at ``index``, a mean column's filled from the row's other cells."""
    dataset, name = columns[index]
    here = [column for found, column in zip(row, columns, strict=True) if found.entry is not None]
    members = published.mean_members(name, dataset, here, columns)
    if members is None or row[index].entry is None:
        return row[index]
    if not members:
        untold = "no mean: which benchmarks the printed one is over is not told"
        return replace(row[index], cell=replace(row[index].cell, refused=(), remarks=(untold,)))
    parts = [found for found, column in zip(row, columns, strict=True) if column[0] in members and column[1] == name]
    values = [found.cell.value for found in parts if found.cell.value is not None]
    sources = [found.source for found in parts if found.source is not None]
    cell = row[index].cell
    if len(values) < len(members):
        missing = len(members) - len(values)
        remarks = (f"no mean: {missing} of {len(members)} benchmarks have no run",) if values else ()
        return replace(row[index], cell=replace(cell, refused=(), remarks=remarks))
    unequal = differing(settings_brief(source) for source in sources)
    if unequal:
        text = "; ".join(f"{field}: {', '.join(kinds)}" for field, kinds in unequal.items())
        return replace(row[index], cell=replace(cell, refused=(), remarks=(f"no mean: runs differ in {text}",)))
    ids = tuple(source.id for source in sources)
    return replace(row[index], cell=replace(cell, value=sum(values) / len(values), members=ids, refused=()))


def _labels(keys: Sequence[RowKey]) -> list[str]:
    """Names of the rows in notes: as printed, with backbone and the like where two rows are called the same."""
    names = [key.row for key in keys]
    more = [", ".join(filter(None, key[2:])) for key in keys]
    return [
        f"{name} ({detail})" if names.count(name) > 1 and detail else name
        for name, detail in zip(names, more, strict=True)
    ]


def _method_text(methods: set[str]) -> str:
    return ", ".join(sorted(filter(None, methods)))


def _state(
    printed: Mapping[_Key, Printed], found: Sequence[_Found], built: set[str], pool: Mapping[str, Sequence[Measured]]
) -> str:
    """Why a row has no number of ours, in two words; empty where it has one."""
    if any(item.cell.value is not None for item in found):
        return ""
    wants = [published.wanted(entry) for entry in printed.values()]
    methods = {want.method for want in wants} - {""}
    told = {want.state for want in wants}
    if len(told) == 1 and "" not in told:
        return told.pop()
    if not methods:
        return "published only"
    if not any(method in built or method in pool for method in methods):
        return "not built"
    if all(want.unknown for want in wants):
        return "settings not stated"
    return "no run"


def _notes(
    section: Section, labels: Sequence[str], found_rows: Sequence[Sequence[_Found]], protocol: str | None
) -> Iterable[str]:
    """What a reader must know of the runs beside the numbers."""
    chosen = [(label, found) for label, row in zip(labels, found_rows, strict=True) for found in row if found.source]
    accurate = {
        found.source.method: str(found.source.fields.get("protocol.name"))
        for _, found in chosen
        if found.source and found.entry and published.of_accuracy(found.entry.metric)
    }
    if accurate:
        under = ", ".join(f"{method}: {name}" for method, name in sorted(accurate.items()))
        whose = "its method's own protocol" if protocol in (None, "paper") else "one protocol that the user chose"
        yield f"Each run of ours is under {whose} ({under})."
    yield from _data_notes(chosen)
    unknown: dict[str, list[str]] = {}
    for label, row in zip(labels, found_rows, strict=True):
        for found in row:
            if found.entry is not None and (want := published.wanted(found.entry)).state:
                unknown.setdefault(want.unknown, []).append(label)
    for why, places in unknown.items():
        yield f"No run of ours stands beside {', '.join(dict.fromkeys(places))}: {why}."
    for index, column in enumerate(section.columns):
        yield from _column_notes(column, [(label, row[index]) for label, row in zip(labels, found_rows, strict=True)])
    remarks: dict[str, list[str]] = {}
    for label, found in chosen:
        for remark in found.cell.remarks:
            remarks.setdefault(remark, []).append(f"{label}: {found.cell.run_id}")
    for label, row in zip(labels, found_rows, strict=True):
        for found in row:
            if found.source is None:
                for remark in found.cell.remarks:
                    remarks.setdefault(remark, []).append(label)
    for remark, places in sorted(remarks.items()):
        yield f"{remark[0].upper()}{remark[1:]} ({'; '.join(dict.fromkeys(places))})."
    if any(found.cell.others for _, found in chosen):
        yield RULE
    refused = {item.run_id for row in found_rows for found in row for item in found.cell.refused}
    refused -= {run_id for row in found_rows for found in row for run_id in (*found.cell.sources, *found.cell.others)}
    if refused:
        runs = "1 run or profile of these methods fits" if len(refused) == 1 else f"{len(refused)} runs or profiles fit"
        yield f"{runs} no cell: --explain says why."


def _data_notes(chosen: Sequence[tuple[str, _Found]]) -> Iterable[str]:
    by_dataset: dict[str, dict[str, Measured]] = {}
    for _, found in chosen:
        if found.source is not None and found.source.record is not None and found.entry is not None:
            by_dataset.setdefault(found.entry.dataset, {})[found.source.id] = found.source
    for dataset, sources in sorted(by_dataset.items()):
        records = [source.record for source in sources.values() if source.record is not None]
        for name, values in differing(data_of(record) for record in records).items():
            yield f"{dataset}: rows differ in {name}: {', '.join(values)}."
        for text in unequal_content(records):
            yield f"{dataset}: {text}."


def _column_notes(column: Column, cells: Sequence[tuple[str, _Found]]) -> Iterable[str]:
    """Machines and counting conventions of one column."""
    present = [(label, found, found.source) for label, found in cells if found.source is not None]
    if not present or published.of_accuracy(column.figure):
        return
    reader = metric(column.figure)
    if reader.machine_bound:
        for name, values in differing(source.machine for _, _, source in present).items():
            yield f"{column.heading}: ours differ in {name}: {', '.join(values)}."
        how = sorted(
            {f"{source.environment.gpu or source.environment.cpu}, {_how(source)}" for _, _, source in present}
        )
        theirs = sorted({published.wanted(found.entry).machine for _, found, _ in present if found.entry} - {""})
        text = f"{column.heading}: ours on {' and '.join(how)}"
        text += f"; published on {', '.join(theirs)}" if theirs else "; the paper does not say on what"
        other = not all(found.cell.comparable for _, found, _ in present)
        yield text + (": no difference is taken across machines." if other else ".")
    if reader.counted:
        conventions: dict[str, list[str]] = {}
        for label, _, source in present:
            conventions.setdefault(source.convention or "not recorded", []).append(label)
        for convention, rows in conventions.items():
            yield f"{column.heading}: ours counted by {convention} ({', '.join(dict.fromkeys(rows))})."
        yield f"{column.heading}: printed as FLOPs."


def _how(source: Measured) -> str:
    return f"{source.fields.get('dtype')}, {source.environment.threads} threads"
