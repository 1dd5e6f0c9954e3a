"""``ovbench data``: generated copies of the benchmarks, and checks of what lies on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ovbench.cli.console import console, print_json, print_text
from ovbench.errors import DataError, UsageError

app = typer.Typer(name="data", help="Make small generated data, or check your own.", no_args_is_help=True)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback that draws a bar on stderr where that is a terminal, else nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    target = console(sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=target, transient=True, disable=not target.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@app.command()
def synth(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Benchmarks ('ovbench list datasets'), or all.")
    ],
    out: Annotated[Path, typer.Option(help="Folder; each benchmark goes into OUT/NAME.")] = Path("data/synth"),
    images: Annotated[int, typer.Option(help="Images per benchmark.")] = 16,
    seed: Annotated[
        int, typer.Option(help="Which copy; every seed is held out from the built-in CLIP's training.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a small generated copy of benchmarks in their true layout, file names and label encoding.

    The pictures are drawn, not photographs: they are for trying the tool and say nothing about a method.

    \b
    Examples:
    ovbench data synth voc21
    ovbench data synth all --images 24 --out scenes
    ovbench run --method sc-clip --weights builtin --dataset voc21 --data-root scenes
    """
    from ovbench.benchmarks import get
    from ovbench.benchmarks import names as known
    from ovbench.benchmarks.synth import synth as write

    chosen = known() if "all" in names else list(dict.fromkeys(names))
    for name in chosen:
        get(name)  # an unknown name must not leave half of the copies behind
    written = []
    for name in chosen:
        with _bar(name) as progress:
            root = write(name, out / get(name).name, images=images, seed=seed, progress=progress)
        written.append({"benchmark": name, "root": str(root), "images": images, "seed": seed})
        if not as_json:
            print_text(f"{name}: {images} images in {root}")
    if as_json:
        print_json(written)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="Benchmark ('ovbench list datasets'), or the path of your own.")],
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the dataset, or one above it; not needed for a folder of your own.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Open only the first N pairs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Look for missing, damaged, mismatched or wrongly numbered files, each with examples and the fix.

    Exit code 3 where something would spoil a score; warnings alone exit 0.

    \b
    Examples:
    ovbench data check voc21 --data-root ~/data
    ovbench data check cityscapes --data-root /data/cityscapes --json
    ovbench data check ./mydata
    """
    from ovbench.benchmarks import get, own_root
    from ovbench.benchmarks.check import check as examine
    from ovbench.benchmarks.report import describe

    root = data_root or own_root(get(name))
    if root is None:
        raise UsageError(f"Where is the {name} data? Give its folder with --data-root DIR.")
    with _bar(f"check {name}") as progress:
        report = examine(name, root, workers=workers, limit=limit, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        for problem in report.problems:
            print_text(describe(problem))
        found = f"{report.checked} of {report.listed} pairs opened, {report.classes_present} classes"
        ignored = "" if report.ignore_share is None else f", {100 * report.ignore_share:.1f} % of pixels ignored"
        state = "ok" if report.ok else "not usable"
        made = " (generated)" if report.synthetic else ""
        print_text(f"{report.benchmark}: {state}: {report.root}{made}: {found}{ignored}")
    if not report.ok:
        raise typer.Exit(DataError.exit_code)
