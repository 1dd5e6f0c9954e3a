"""``ovbench table``: records side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovbench.cli.console import print_json, print_rich, print_text, say
from ovbench.errors import UsageError, unknown_name

_FORMATS = ("rich", "markdown", "csv", "json")


def table(
    results: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("results/runs"),
    methods: Annotated[str | None, typer.Option(help="Rows: method names, separated by commas.")] = None,
    datasets: Annotated[str | None, typer.Option(help="Columns: dataset names, separated by commas.")] = None,
    columns: Annotated[
        str,
        typer.Option(
            help="Figures: miou, macc, aacc, latency, images_per_s, gmacs, gflops, params, memory; separated by commas."
        ),
    ] = "miou",
    format: Annotated[str, typer.Option("--format", "-f", help="rich, markdown, csv or json.")] = "rich",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Shows the newest finished run of every method, setting and dataset.

    Demo runs, partial runs and random weights stand in tables of their own. What still differs within a column
    (machine, dataset version, class wording) is said below it.

    \b
    Examples:
    ovbench table
    ovbench table --methods clip,sc-clip --datasets voc21,ade20k --columns miou,latency
    ovbench table --format markdown > table.md
    """
    from ovbench import benchmarks
    from ovbench.registry import method_info
    from ovbench.results import render, store
    from ovbench.results.table import table as arrange

    if format not in _FORMATS:
        raise unknown_name("format", format, _FORMATS)
    chosen_datasets = _names(datasets, "--datasets")
    records = store.load_all(results, on_problem=say)
    for name in chosen_datasets or []:
        if name not in {record.spec.dataset for record in records}:
            benchmarks.get(name)  # an unknown name is an error, a known one without a run is a note
    chosen_methods = _names(methods, "--methods")
    recorded = {record.spec.method for record in records}
    for name in chosen_methods or []:
        if name not in recorded:
            method_info(name)
    if chosen_datasets is None:
        used = {record.spec.dataset for record in records if record.status == "ok"}
        known = [name for name in benchmarks.names() if name in used]
        chosen_datasets = known + sorted(used.difference(known))
    arranged = arrange(records, chosen_methods, chosen_datasets, _names(columns, "--columns") or ["miou"])
    if json or format == "json":
        print_json(render.to_data(arranged))
    elif format == "csv":
        print_text(render.to_csv(arranged))
    elif format == "markdown":
        print_text(render.to_markdown(arranged))
    else:
        for section in arranged.sections:
            print_rich(render.to_rich(section), *section.notes)
        for note in arranged.left_out:
            say(note)
    if not arranged.sections:
        say(f"No finished run in '{results}'. 'ovbench run' makes one; --results names another folder.")


def _names(text: str | None, option: str) -> list[str] | None:
    """The names in a comma-separated option; None when it was not given."""
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{option} is empty. Give names separated by commas, or leave it out.")
    return names
