"""Writes a table as Markdown, CSV, data for JSON, or rich tables for a terminal; equal tables give equal bytes."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from ovbench.results.table import FIGURES, Cell, Column, Section, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"


def shown(cell: Cell, column: Column) -> str:
    """The cell's value rounded for reading, or a dash."""
    return MISSING if cell.value is None else f"{cell.value:.{FIGURES[column.figure].digits}f}"


def to_markdown(table: Table) -> str:
    """One pipe table per section under its title, with the notes below it; ends with a line break."""
    blocks = []
    for section in table.sections:
        header = [*section.settings, *(column.heading for column in section.columns)]
        rule = ["---"] * len(section.settings) + ["---:"] * len(section.columns)
        body = [
            [*row.settings, *(shown(cell, column) for cell, column in zip(row.cells, section.columns, strict=True))]
            for row in section.rows
        ]
        lines = ["| " + " | ".join(map(_markdown_text, line)) + " |" for line in (header, rule, *body)]
        blocks.append("\n".join([f"**{section.title}**", "", *lines]))
        blocks += [f"- {_markdown_text(note)}" for note in section.notes]
    blocks += [f"- {_markdown_text(note)}" for note in table.left_out]
    return "\n\n".join(blocks) + "\n"


def to_csv(table: Table) -> str:
    """One line (RFC 4180) per cell that has a run: section, settings, benchmark, figure, unrounded value, run id."""
    settings = list(dict.fromkeys(name for section in table.sections for name in section.settings))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(["section", *settings, "dataset", "figure", "unit", "value", "run_id"])
    for section in table.sections:
        for row in section.rows:
            named = dict(zip(section.settings, row.settings, strict=True))
            for cell, column in zip(row.cells, section.columns, strict=True):
                if cell.value is None and cell.run_id is None:
                    continue
                value = "" if cell.value is None else repr(cell.value)
                figure = FIGURES[column.figure]
                writer.writerow(
                    [
                        section.kind,
                        *(named.get(name, "") for name in settings),
                        column.dataset,
                        column.figure,
                        figure.unit,
                        value,
                        cell.run_id or "",
                    ]
                )
    return buffer.getvalue()


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
                            {
                                "dataset": column.dataset,
                                "figure": column.figure,
                                "unit": FIGURES[column.figure].unit,
                                "value": cell.value,
                                "run_id": cell.run_id,
                            }
                            for cell, column in zip(row.cells, section.columns, strict=True)
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


def to_rich(section: Section) -> RichTable:
    """One section for a terminal; its notes are not in it."""
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(section.title, style="bold" if section.kind == "results" else "bold yellow"))
    for name in section.settings:
        grid.add_column(name, overflow="fold")
    for column in section.columns:
        figure = FIGURES[column.figure]
        grid.add_column(f"{column.dataset}\n{figure.label} ({figure.unit})", justify="right", no_wrap=True)
    for row in section.rows:
        cells = [shown(cell, column) for cell, column in zip(row.cells, section.columns, strict=True)]
        grid.add_row(*(Text(text) for text in (*row.settings, *cells)))  # Text: brackets in names are no markup
    return grid


def _markdown_text(text: str) -> str:
    return text.replace("|", "\\|")
