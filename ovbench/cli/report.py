"""``ovbench report``: all records as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_text, say
from ovbench.errors import DataError, RunError


def report(
    results: o.Results = o.RUNS,
    out: o.DefaultOut = Path("report.html"),
    profiles: o.Profiles = None,
    gallery_kb: Annotated[
        int, typer.Option("--gallery-kb", min=0, help="Size limit of each embedded gallery in kB; 0 leaves them out.")
    ] = 300,
) -> None:
    """Writes all runs as one HTML page that opens without a network.

    Tables that sort and filter, mIoU over latency and MACs, bars of classes and stages, galleries, provenance. Demo,
    partial, random-weight, failed and older runs carry a badge and are hidden until asked for. The same records give the
    same bytes.

    \b
    Examples:
    ovbench report
    ovbench report --results results/runs --out report.html
    ovbench report --profiles results/profiles --gallery-kb 0
    """
    from ovbench.results import store
    from ovbench.results.profiles import load_all
    from ovbench.tables.report import page
    from ovbench.tables.report.figures import size

    if profiles is not None and not profiles.is_dir():
        raise DataError(f"There is no folder '{profiles}'. Name another with --profiles.")
    records = store.load_all(results, on_problem=say)
    costs = load_all(results.parent / "profiles" if profiles is None else profiles, on_problem=say)
    if not records and not costs:
        raise DataError(f"No record in '{results}'. 'ovbench run' makes one; --results names another folder.")
    text = page(records, costs, results=results, gallery_bytes=1000 * gallery_kb, on_problem=say)
    content = text.encode("utf-8")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise RunError(f"Cannot write '{out}': {error.strerror or error}. Choose another place with --out.") from error
    counts = ((len(records), "run"), (len(costs), "profile"))
    what = ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts if number)
    say(f"{what}; {size(len(content))}")
    print_text(str(out))
