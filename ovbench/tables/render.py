"""Writes a table as Markdown, CSV, data for JSON, LaTeX, HTML, or rich tables for a terminal; equal tables give equal bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ovbench.tables.layout import Cell, Column, Section, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"
MINUS = "−"


@dataclass(frozen=True)
class Leaf:
    """One printed column: the heading of its group, its own heading, and its texts from the top row down."""

    group: str
    heading: str
    texts: tuple[str, ...]
    column: int


def shown(cell: Cell, column: Column) -> str:
    """Ours rounded for reading, or a dash."""
    return MISSING if cell.value is None else f"{cell.value:.{column.shown_digits}f}"


def shown_difference(cell: Cell, column: Column) -> str:
    """Ours minus published, signed: in the unit of the column, or in percent of the published number; or a dash."""
    difference = cell.difference
    if difference is None or cell.published is None:
        return MISSING
    if not column.relative:
        text = f"{difference:+.{column.shown_digits}f}"
    elif float(cell.published) == 0:
        return MISSING
    else:
        text = f"{100 * difference / float(cell.published):+.2f}%"
    return text.replace("-", MINUS)


def leaves(section: Section) -> list[Leaf]:
    """The printed columns of a section: ours alone, or ours, published and difference where anything is published."""
    found = []
    for index, column in enumerate(section.columns):
        cells = [row.cells[index] for row in section.rows]
        ours = tuple(shown(cell, column) for cell in cells)
        if all(cell.published is None for cell in cells):
            found.append(Leaf(column.heading, "", ours, index))
            continue
        found.append(Leaf(column.heading, "ours", ours, index))
        found.append(Leaf(column.heading, "published", tuple(cell.published or MISSING for cell in cells), index))
        differences = tuple(shown_difference(cell, column) for cell in cells)
        found.append(Leaf(column.heading, "difference", differences, index))
    return found


def to_markdown(table: Table) -> str:
    """One pipe table per section under its title, with the notes below it; ends with a line break."""
    blocks = []
    for section in table.sections:
        columns = leaves(section)
        header = [*section.settings, *(_flat_heading(leaf) for leaf in columns)]
        rule = ["---"] * len(section.settings) + ["---:"] * len(columns)
        body = [[*row.settings, *(leaf.texts[index] for leaf in columns)] for index, row in enumerate(section.rows)]
        lines = ["| " + " | ".join(map(_markdown_text, line)) + " |" for line in (header, rule, *body)]
        blocks.append("\n".join([f"**{section.title}**", "", *lines]))
        blocks += [f"- {_markdown_text(note)}" for note in section.notes]
    blocks += [f"- {_markdown_text(note)}" for note in table.left_out]
    return "\n\n".join(blocks) + "\n"


def to_csv(table: Table, *, explained: bool = False) -> str:
    """One line (RFC 4180) per cell that holds anything.

    Section, settings, benchmark, figure, unit, unrounded value, run ids, published number as printed, unrounded
    difference; with ``explained`` also remarks, the ids of older fitting runs, and refused runs with reasons.
    """
    settings = list(dict.fromkeys(name for section in table.sections for name in section.settings))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    figures = ["dataset", "figure", "unit", "value", "run_id", "published", "difference"]
    writer.writerow(["section", *settings, *figures, *(("remarks", "older", "refused") if explained else ())])
    for section in table.sections:
        for row in section.rows:
            named = dict(zip(section.settings, row.settings, strict=True))
            for cell, column in zip(row.cells, section.columns, strict=True):
                details = _csv_details(cell) if explained else ()
                if not (cell.value is not None or cell.run_id or cell.published or any(details)):
                    continue
                writer.writerow(
                    [
                        section.kind,
                        *(named.get(name, "") for name in settings),
                        column.dataset,
                        column.figure,
                        column.shown_unit,
                        "" if cell.value is None else repr(cell.value),
                        " ".join(cell.sources),
                        cell.published or "",
                        "" if cell.difference is None else repr(cell.difference),
                        *details,
                    ]
                )
    return buffer.getvalue()


def _csv_details(cell: Cell) -> tuple[str, ...]:
    refused = "; ".join(f"{item.run_id}: {item.reason}" for item in cell.refused)
    return "; ".join(cell.remarks), " ".join(cell.others), refused


def to_data(table: Table) -> dict[str, Any]:
    """The table as plain dicts and lists for JSON, values unrounded."""
    return {
        "sections": [
            {
                "kind": section.kind,
                "title": section.title,
                "rows": [
                    {
                        "settings": dict(zip(section.settings, row.settings, strict=True)),
                        "cells": [
                            _cell_data(cell, column) for cell, column in zip(row.cells, section.columns, strict=True)
                        ],
                    }
                    for row in section.rows
                ],
                "notes": list(section.notes),
            }
            for section in table.sections
        ],
        "left_out": list(table.left_out),
    }


def _cell_data(cell: Cell, column: Column) -> dict[str, Any]:
    return {
        "dataset": column.dataset,
        "figure": column.figure,
        "unit": column.shown_unit,
        "value": cell.value,
        "run_id": cell.run_id,
        "published": None if cell.published is None else float(cell.published),
        "difference": cell.difference,
        "members": list(cell.members),
        "others": list(cell.others),
        "refused": [{"run_id": item.run_id, "reason": item.reason} for item in cell.refused],
        "remarks": list(cell.remarks),
    }


def explain(table: Table) -> list[str]:
    """For each cell that a run was looked at for: the run it shows, others that fit, and those refused, with reasons."""
    lines = []
    for section in table.sections:
        for row in section.rows:
            name = ", ".join(filter(None, row.settings))
            for cell, column in zip(row.cells, section.columns, strict=True):
                details = list(_details(cell))
                if details:
                    lines.append(f"{name} | {column.heading}")
                    lines += [f"    {detail}" for detail in details]
    return lines


def _details(cell: Cell) -> Iterable[str]:
    if cell.run_id is not None:
        yield f"shown    {cell.run_id}"
    if cell.members:
        yield f"mean of  {', '.join(cell.members)}"
    for run_id in cell.others:
        yield f"older    {run_id}"
    for item in cell.refused:
        yield f"refused  {item.run_id}: {item.reason}"
    for remark in cell.remarks:
        yield f"note     {remark}"


def to_rich(section: Section, width: int | None = None) -> list[RichTable]:
    """A section for a terminal, without its notes; as many tables below each other as ``width`` asks for.

    Args:
        section: What to show.
        width: Columns of the terminal; None puts everything into one table.
    """
    columns = leaves(section)
    sides = [max(len(row.settings[index]) for row in section.rows) for index in range(len(section.settings))]
    fixed = sum(min(side, 30) + 3 for side in sides) + 1
    blocks: list[list[Leaf]] = [[]]
    used = fixed
    for index in range(len(section.columns)):
        group = [leaf for leaf in columns if leaf.column == index]
        need = sum(max(map(len, [*leaf.texts, *_rich_heading(leaf).split("\n")])) + 3 for leaf in group)
        if width is not None and blocks[-1] and used + need > width:
            blocks.append([])
            used = fixed
        blocks[-1] += group
        used += need
    return [_rich_block(section, block, first=index == 0) for index, block in enumerate(blocks)]


def _rich_block(section: Section, block: list[Leaf], *, first: bool) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    style = "bold" if section.kind in ("results", "paper") else "bold yellow"
    grid = RichTable(title=Text(section.title if first else f"{section.title} (continued)", style=style))
    for name in section.settings:
        grid.add_column(name, overflow="fold")
    for leaf in block:
        grid.add_column(_rich_heading(leaf), justify="right", no_wrap=True)
    for index, row in enumerate(section.rows):
        cells = [leaf.texts[index] for leaf in block]
        grid.add_row(*(Text(text) for text in (*row.settings, *cells)))  # Text: brackets in names are no markup
    return grid


def _rich_heading(leaf: Leaf) -> str:
    """Benchmark, figure and unit below each other; the group's words stand over its first column alone."""
    if leaf.heading in ("published", "difference"):
        return "\n\n" + {"published": "publ.", "difference": "diff."}[leaf.heading]
    dataset, _, figure = leaf.group.partition(" ")
    return f"{dataset}\n{figure}" + (f"\n{leaf.heading}" if leaf.heading else "")


def _flat_heading(leaf: Leaf) -> str:
    if leaf.heading in ("", "ours"):
        return leaf.group
    return leaf.heading


def _markdown_text(text: str) -> str:
    return text.replace("|", "\\|")
