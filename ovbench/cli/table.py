"""``ovbench table``: records side by side, and the papers' tables with ours beside them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_rich, say
from ovbench.cli.inputs import parse_names
from ovbench.errors import RunError, UsageError, unknown_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ovbench.tables.layout import Table

_FORMATS = ("rich", "markdown", "csv", "json", "latex", "html")
# A file has no width: wide enough for any table of a paper, so that its bytes do not depend on a terminal.
_FILE_WIDTH = 240


def table(
    paper: o.Paper = None,
    number: o.PaperTable = None,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="With --paper: the commands that make each row, as a shell script.",
            rich_help_panel=o.WHAT,
        ),
    ] = False,
    protocol: o.Preset = "paper",
    results: o.Results = o.RUNS,
    profiles: o.Profiles = None,
    methods: o.Methods = None,
    datasets: o.Datasets = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Figures: {figures}. Left out: miou, and pq where there is some.",
            rich_help_panel=o.WHAT,
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say for every cell which run it shows, which fit as well, which do not.")
    ] = False,
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"{', '.join(_FORMATS)}; latex is for booktabs.")
    ] = "rich",
    out: o.Out = None,
    json: o.Json = False,
) -> None:
    """Shows the newest finished run of every method, setting and dataset, or a paper's table with ours beside it.

    Demo runs, partial runs and random weights stand in tables of their own, and never in a paper's. What still differs
    within a column (machine, dataset version, class wording) is said below it. In a paper's table a run must be under
    the method's own protocol (or that of --protocol) and options; where several fit a cell, the newest counts.
    Parameters, MACs and times may come from 'ovbench profile --save', on random weights, which is said.

    \b
    Examples:
    ovbench table
    ovbench table --methods clip,sc-clip --datasets voc21,ade20k --columns miou,latency
    ovbench table --paper direct-seg
    ovbench table --paper direct-seg --table 1 --explain
    ovbench table --paper direct-seg --table 1 --commands
    ovbench table --paper sc-clip
    ovbench table --paper thesis-caa --table 3.5 --format latex --out heads.tex
    """
    chosen = "json" if json else format
    if chosen not in _FORMATS:
        raise unknown_name("format", chosen, _FORMATS)
    if paper is None:
        asked = (("--table", number is not None), ("--protocol", protocol != "paper"), ("--commands", commands))
        given = [name for name, value in asked if value]
        if given:
            raise UsageError(f"{given[0]} belongs to --paper: name the paper.")
        arranged = _of_records(results, methods, datasets, columns)
    else:
        given = [
            name
            for name, value in (("--methods", methods), ("--datasets", datasets), ("--columns", columns))
            if value is not None
        ]
        if given:
            raise UsageError(f"{given[0]} does not go with --paper: a paper's table has its own rows and columns.")
        if commands:
            from ovbench.tables import commands as made

            _put(made.script(made.table_commands(paper, number), paper, results.parent / "trainings"), out)
            return
        folder = results.parent / "profiles" if profiles is None else profiles
        found = _of_paper(paper, number, protocol, results, folder)
        if found is None:
            return
        arranged = found
    _write(arranged, chosen, out, explain)
    if not arranged.sections and paper is None:
        say(f"No finished run in '{results}'. 'ovbench run' makes one; --results names another folder.")


def _of_records(results: Path, methods: str | None, datasets: str | None, columns: str | None) -> Table:
    from ovbench import benchmarks
    from ovbench.registry import expand_methods
    from ovbench.results import store
    from ovbench.tables.runs import table as arrange

    records = store.load_all(results, on_problem=say)
    recorded = {record.spec.dataset for record in records}
    chosen_datasets = _chosen(parse_names(datasets, "--datasets"), recorded, benchmarks.expand)
    recorded = {record.spec.method for record in records}
    chosen_methods = _chosen(parse_names(methods, "--methods"), recorded, expand_methods)
    if chosen_datasets is None:
        used = {record.spec.dataset for record in records if record.status == "ok"}
        known = [name for name in benchmarks.names() if name in used]
        chosen_datasets = known + sorted(used.difference(known))
    return arrange(records, chosen_methods, chosen_datasets, parse_names(columns, "--columns"))


def _chosen(
    given: list[str] | None, recorded: set[str], expand: Callable[[Iterable[str]], list[str]]
) -> list[str] | None:
    """Names as they are recorded, groups by what of them is; a known name without a run stays, and becomes a note."""
    if given is None:
        return None
    found: list[str] = []
    for name in given:
        members = [name] if name in recorded else expand([name])
        found += [member for member in members if member in recorded] or members
    return list(dict.fromkeys(found))


def _of_paper(paper: str, number: str | None, protocol: str, results: Path, profiles: Path) -> Table | None:
    """The paper's table; None where there was no more to show than a list of tables."""
    from ovbench.results import store
    from ovbench.results.measured import of_record
    from ovbench.results.profiles import load_all
    from ovbench.tables import published
    from ovbench.tables.paper import arrange

    known = published.tables(paper)  # an unknown paper is an error
    from ovbench.spec import protocol_names

    if protocol not in [*protocol_names(), "paper"]:
        raise unknown_name("protocol", protocol, [*protocol_names(), "paper"], "ovbench list protocols")
    if number is None and len(known) > 1:
        _list_tables(paper, known)
        return None
    measured = [of_record(record) for record in store.load_all(results, on_problem=say)]
    measured += load_all(profiles, on_problem=say)
    return arrange(paper, number or "".join(known), measured, protocol)


def _list_tables(paper: str, known: list[str]) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    from ovbench.tables import published

    grid = RichTable(title=Text(published.title(paper), style="bold"))
    for name in ("--table", "rows", "figures", "datasets"):
        grid.add_column(name, overflow="fold")
    for table_id in known:
        entries = published.table_numbers(paper, table_id)
        rows = {(entry.row, entry.variant, entry.backbone, entry.train_data) for entry in entries}
        figures = dict.fromkeys(entry.metric for entry in entries)
        names = dict.fromkeys(entry.dataset for entry in entries)
        grid.add_row(*map(Text, (table_id, str(len(rows)), ", ".join(figures), ", ".join(names))))
    print_rich(grid)


def _write(arranged: Table, format: str, out: Path | None, explain: bool) -> None:
    """To a file or stdout; everything but a terminal gets UTF-8, whatever the locale."""
    from ovbench.tables import render

    explained = render.explain(arranged) if explain else []
    if format == "rich" and out is None and sys.stdout.isatty():
        width = os.get_terminal_size(sys.stdout.fileno()).columns
        for section in arranged.sections:
            print_rich(*render.to_rich(section, width), *map(_plain, section.notes))
        print_rich(*map(_plain, explained))
        for note in arranged.left_out:
            say(note)
        return
    _put(_text(arranged, format, explained), out)
    if out is None and format in ("rich", "csv"):  # where there is no place for them in the table itself
        for note in arranged.left_out:
            say(note)


def _put(text: str, out: Path | None) -> None:
    """To a file or stdout."""
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(text.encode("utf-8"))
        except OSError as error:
            raise RunError(
                f"Cannot write '{out}': {error.strerror or error}. Choose another place with --out."
            ) from error
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.flush()


def _plain(text: str) -> RenderableType:
    from rich.text import Text

    return Text(text)


def _text(arranged: Table, format: str, explained: list[str]) -> str:
    import json

    from ovbench.tables import render, render_markup

    if format == "json":
        return json.dumps(render.to_data(arranged), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "csv":
        return render.to_csv(arranged, explained=bool(explained))
    if format == "html":
        return render_markup.to_html(arranged, explained)
    if format == "latex":
        return render_markup.to_latex(arranged) + "".join(f"% {line}\n" for line in explained)
    if format == "markdown":
        block = "\n```text\n" + "\n".join(explained) + "\n```\n" if explained else ""
        return render.to_markdown(arranged) + block
    return _rich_text(arranged, explained)


def _rich_text(arranged: Table, explained: list[str]) -> str:
    from rich.console import Console

    from ovbench.tables import render

    buffer = io.StringIO()
    for section in arranged.sections:
        for grid in render.to_rich(section, _FILE_WIDTH):
            # no markup, no colour, no look at the environment: the same bytes everywhere
            console = Console(file=buffer, width=_FILE_WIDTH, color_system=None, legacy_windows=False, _environ={})
            console.print(grid)
        buffer.write("".join(f"{note}\n" for note in section.notes))
    buffer.write("".join(f"{line}\n" for line in explained))
    return buffer.getvalue()
