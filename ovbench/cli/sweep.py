"""``ovbench sweep``: many runs, on this machine or over a cluster."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import console, print_json, print_rich, print_text, say
from ovbench.cli.inputs import parse_names, parse_options, require_own_scenes
from ovbench.cli.run import spec_of, terminable
from ovbench.errors import Interrupted, RunError, UsageError

if TYPE_CHECKING:
    from ovbench.evaluate.sweep.job import Outcome
    from ovbench.evaluate.sweep.plan import Grid, Job

WHERE = "Where to run it"
EXECUTORS = ("local", "ray", "slurm")
Outcomes = dict[int, "Outcome"]


def sweep(
    file: Annotated[Path | None, typer.Argument(help="YAML file with methods, datasets, data_root, demo, set and vary; a list of such mappings is several sweeps in one.")] = None,
    *,
    methods: o.Methods = None,
    datasets: o.Datasets = None,
    data_root: o.DataRoot = None,
    demo: o.Demo = False,
    settings: o.Settings = None,
    vary: Annotated[list[str] | None, typer.Option("--vary", metavar="KEY=VALUE", help="The same with several values: give it once for each, e.g. --vary stride=112 --vary stride=56. All combinations are run.", rich_help_panel=o.WHAT)] = None,
    paper: o.Paper = None,
    number: o.PaperTable = None,
    again: Annotated[bool, typer.Option("--again", help="Also run what is recorded already.", rich_help_panel=o.WHAT)] = False,
    executor: Annotated[str, typer.Option(help=f"Where: {', '.join(EXECUTORS)}; local is this machine.", rich_help_panel=WHERE)] = "local",
    devices: Annotated[str | None, typer.Option(help="local: cpu, cuda (all GPUs) or a list such as cuda:0,cuda:2. Default: all GPUs, else the CPU.", rich_help_panel=WHERE)] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time: on each device (local), or of a Ray cluster on this machine without GPUs.", rich_help_panel=WHERE)] = 1,
    ray_address: Annotated[str | None, typer.Option(metavar="HOST:PORT|auto", help="ray: a cluster that runs already; without it one is started on this machine.", rich_help_panel=WHERE)] = None,
    retries: Annotated[int, typer.Option(min=0, help="ray: times that a run is started again when its worker dies.", rich_help_panel=WHERE)] = 2,
    slurm: Annotated[list[str] | None, typer.Option("--slurm", metavar="KEY=VALUE", help="slurm: option of the jobs, e.g. partition=gpu, gpus_per_node=1, timeout_min=240; may be repeated. cluster=local tries it without Slurm.", rich_help_panel=WHERE)] = None,
    results: o.Results = o.RUNS,
    logs: Annotated[Path, typer.Option(help="Root folder of the sweeps' logs.", rich_help_panel=o.WORK)] = Path("results/sweeps"),
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Runs methods on datasets, each run a process of its own; skips what is recorded and goes on after failures.

    After Ctrl-C, or when anything failed, the same command continues where it was.

    \b
    Examples:
    ovbench sweep --methods clip,sc-clip,naclip --datasets voc21,ade20k --data-root ~/data
    ovbench sweep --methods all --datasets eight --data-root ~/data --executor ray --set dtype=bfloat16
    ovbench sweep -m sc-clip -d voc20 --data-root ~/data --vary stride=112 --vary stride=56 --dry-run
    ovbench sweep --paper direct-seg --table 1 --data-root ~/data --dry-run
    ovbench sweep sweep.yaml --executor slurm --slurm partition=gpu --slurm gpus_per_node=1
    """
    if executor not in EXECUTORS:
        raise UsageError(f"--executor {executor}: give {', '.join(EXECUTORS)}.")
    _require_fit(executor, devices=devices, ray_address=ray_address, slurm=slurm)
    root = results.expanduser().absolute()
    if paper is not None and (file is not None or vary):
        raise UsageError("--paper says what to run: leave the YAML file and --vary away.")
    if paper is None and number is not None:
        raise UsageError("--table belongs to --paper: name the paper.")
    look = (
        _plan_of(_grids(file, methods, datasets, data_root, demo, settings or [], vary or []))
        if paper is None
        else _plan_of_paper(paper, number, methods, datasets, data_root, demo, settings or [])
    )
    folder = logs.expanduser().absolute() / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    # Ray tells of workers on stdout, which is for data.
    with (
        terminable(),
        contextlib.redirect_stdout(sys.stderr),
        _executor(executor, devices, jobs, ray_address, retries, slurm or []) as place,
    ):
        with _counting("looking for records") as on_job:
            planned = look(results=root, device=place.device, again=again, on_job=on_job)
        outcomes, stopped = ({}, False) if dry_run else _run(planned, place, folder)
    (print_json(_report(planned, outcomes)) if json else _show(planned, outcomes, folder))
    if dry_run:
        return
    failed = [
        job for job in planned if job.problem or (job.index in outcomes and outcomes[job.index].state == "failed")
    ]
    ended = [outcome for outcome in outcomes.values() if outcome.state == "interrupted"]
    if stopped or ended:
        raise Interrupted("Interrupted. Finished images are kept; the same command continues.")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(planned)} runs failed; the same command tries them again. Logs: {folder}"
        )


def _plan_of(grids: list[Grid]) -> Callable[..., list[Job]]:
    """Plans the runs of grids."""
    from ovbench.evaluate.sweep.plan import plan

    return lambda **how: plan(grids, spec_of, **how)


def _plan_of_paper(
    paper: str,
    number: str | None,
    methods: str | None,
    datasets: str | None,
    data_root: Path | None,
    demo: bool,
    settings: list[str],
) -> Callable[..., list[Job]]:
    """Plans what makes a table of a paper; profiles and trainings are looked for beside the records."""
    from ovbench.evaluate.sweep.of_paper import Asked, jobs_of

    if demo and data_root is not None:
        raise UsageError("--demo makes its own scenes: leave --data-root away, or leave --demo away.")
    some, where = (
        tuple(part.strip() for part in (text or "").split(",") if part.strip()) for text in (methods, datasets)
    )
    asked = Asked(paper, number, some, where, data_root, demo, parse_options(settings, "--set"))

    def look(*, results: Path, **how: Any) -> list[Job]:
        near = results.parent
        return jobs_of(asked, spec_of, results=results, profiles=near / "profiles", trainings=near / "trainings", **how)

    return look


def _require_fit(executor: str, **given: Any) -> None:
    """Options of another executor than the chosen one are an error, not ignored."""
    owner = {"devices": "local", "ray_address": "ray", "slurm": "slurm"}
    for name, value in given.items():
        if value and owner[name] != executor:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is for --executor {owner[name]}, not {executor}.")


def _grids(
    file: Path | None,
    methods: str | None,
    datasets: str | None,
    data_root: Path | None,
    demo: bool,
    settings: list[str],
    vary: list[str],
) -> list[Grid]:
    """What to run; the command line's options add to the file's."""
    from dataclasses import replace

    from ovbench.evaluate.sweep.plan import Grid, read_grids

    chosen = parse_options(settings, "--set")
    varied: dict[str, tuple[str, ...]] = {}
    for pair in vary:
        for key, value in parse_options([pair], "--vary").items():
            varied[key] = (*varied.get(key, ()), value)
    names = {"methods": methods, "datasets": datasets}
    given = {name: tuple(parse_names(text, f"--{name}") or ()) for name, text in names.items() if text}
    if file is None:
        if len(given) < 2:
            raise UsageError("What to run? Give --methods A,B and --datasets A,B, or a YAML file that has both.")
        grids = [Grid(**given, data_root=data_root, demo=demo, set=chosen, vary=varied)]
    else:
        grids = [
            replace(
                grid, **given, data_root=data_root or grid.data_root, demo=demo or grid.demo,
                set={**{key: value for key, value in grid.set.items() if key not in varied}, **chosen},
                vary={**{key: value for key, value in grid.vary.items() if key not in chosen}, **varied},
            )
            for grid in read_grids(file)
        ]  # fmt: skip
    for grid in grids:
        require_own_scenes(grid.demo, grid.data_root)
    return grids


@contextlib.contextmanager
def _executor(
    name: str, devices: str | None, jobs: int, ray_address: str | None, retries: int, slurm: list[str]
) -> Iterator[Any]:
    """Where the jobs run, ready to take them."""
    if name == "local":
        from ovbench.evaluate.sweep.local import local

        yield local(devices, jobs)
    elif name == "ray":
        from ovbench.evaluate.sweep.on_ray import OnRay

        with OnRay(ray_address, retries, jobs) as place:
            yield place
    else:
        from ovbench.evaluate.sweep.on_slurm import OnSlurm

        yield OnSlurm(parse_options(slurm, "--slurm"))


def _run(planned: Sequence[Job], place: Any, folder: Path) -> tuple[Outcomes, bool]:
    """Outcomes of the jobs that had to run, and whether they were interrupted."""
    from ovbench.evaluate.sweep.job import PROGRAM, Work

    outcomes: Outcomes = {}
    todo = [job for job in planned if job.recorded is None and job.problem is None and job.skipped is None]
    if not todo:
        return outcomes, False
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, planned, outcomes)
    say(f"{len(todo)} of {len(planned)} runs to do; logs in {folder}")
    running = place.run(todo, Work(folder, Path.cwd(), PROGRAM))
    try:
        for job, outcome in running:
            outcomes[job.index] = outcome
            _write(folder, planned, outcomes)
            figure = "" if outcome.miou is None else f"  mIoU {outcome.miou:.2f}"
            reason = f": {outcome.message}" if outcome.message else ""
            say(f"[{len(outcomes)}/{len(todo)}] {job.title}: {outcome.state}{reason}{figure}  {outcome.seconds:.0f} s")
    except KeyboardInterrupt:
        say("Interrupted: the runs are being ended, which takes as long as the image that each is at.")
        return outcomes, True
    finally:
        running.close()
    return outcomes, False


def _write(folder: Path, planned: Sequence[Job], outcomes: Outcomes) -> None:
    text = json_module.dumps(_report(planned, outcomes), indent=2, ensure_ascii=False)
    (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")


def _report(planned: Sequence[Job], outcomes: Outcomes) -> list[dict[str, Any]]:
    """The jobs with their outcomes, for JSON."""
    rows = []
    for job in planned:
        outcome = outcomes.get(job.index)
        row = asdict(job) | ({} if outcome is None else asdict(outcome))
        row["state"] = _state(job, outcome)
        row["run_id"] = job.recorded if outcome is None else outcome.run_id
        row["spec_hash"] = (outcome.spec_hash if outcome else None) or job.spec_hash
        row["miou"] = job.miou if outcome is None else outcome.miou
        rows.append(row)
    return rows


def _state(job: Job, outcome: Outcome | None) -> str:
    if outcome is not None:
        return outcome.state
    return "recorded" if job.recorded else "failed" if job.problem else "skipped" if job.skipped else "to do"


def _show(planned: Sequence[Job], outcomes: Outcomes, folder: Path | None = None) -> None:
    """Prints a row per job."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="sweep", title_justify="left")
    for head in ("method", "dataset", "options", "spec", "state", "mIoU %", "s", "record"):
        table.add_column(head, justify="right" if head in {"mIoU %", "s"} else "left", overflow="fold")
    for job, row in zip(planned, _report(planned, outcomes), strict=True):
        spec = (
            "-"
            if row["spec_hash"] is None
            else row["spec_hash"][:8] + ("?" if not job.hash_is_final and not row["run_id"] else "")
        )
        miou, seconds = row["miou"], row.get("seconds")
        cells = (
            job.method, job.dataset, job.changed or "-", spec, row["state"], "-" if miou is None else f"{miou:.2f}",
            f"{seconds:.0f}" if seconds else "-", row["run_id"] or job.problem or job.skipped or row.get("message") or "-",
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    print_rich(table)
    if not outcomes and any(job.spec_hash and not job.hash_is_final for job in planned):
        print_text(
            "?: of what is known before the run; it looks itself whether it is recorded, once its weights are read."
        )
    if folder is not None and outcomes:
        print_text(f"logs     {folder}")


@contextlib.contextmanager
def _counting(title: str) -> Iterator[Any]:
    """A bar on stderr where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    target = console(sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=target, transient=True, disable=not target.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
