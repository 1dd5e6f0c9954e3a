"""The jobs that make a table of a paper: its commands, less what is recorded or cannot run, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovbench.errors import OvbenchError
from ovbench.evaluate.sweep.plan import Grid, Job, ReadSpec, plan
from ovbench.results.measured import Measured
from ovbench.spec import flags
from ovbench.tables import published
from ovbench.tables.commands import Command, recorded_by, table_commands

_OF_WEIGHTS = ("arch", "pretrained", "weights")  # which a demo brings itself


@dataclass(frozen=True)
class Asked:
    """A table and what the user says besides.

    Attributes:
        paper: Paper id.
        table: Table id; None is the only one.
        methods: Only rows of these; empty is all.
        datasets: Only these benchmarks; empty is all.
        data_root: Folder of the datasets; None without ``demo`` leaves the runs out.
        demo: On the built-in CLIP and generated scenes: does everything run?
        set: Options for all runs, which replace the table's.
    """

    paper: str
    table: str | None = None
    methods: Collection[str] = ()
    datasets: Collection[str] = ()
    data_root: Path | None = None
    demo: bool = False
    set: Mapping[str, str] | None = None


def jobs_of(
    asked: Asked,
    read_spec: ReadSpec,
    *,
    results: Path,
    profiles: Path,
    trainings: Path,
    device: str,
    again: bool = False,
    on_job: Callable[[int, int], None] = lambda done, total: None,
) -> list[Job]:
    """One job per command of the table, and one that is skipped per row that has none.

    Args:
        asked: What to run.
        read_spec: What ``ovbench run ARGUMENTS`` would run.
        results: Root folder of the records.
        profiles: Root folder of the profiles.
        trainings: Root folder of the trainings, in which trained weights are looked for.
        device: Kind of device that the jobs get: cpu or cuda.
        again: Also run what is recorded.
        on_job: Progress callback (planned, total).

    Raises:
        UsageError: No such paper or table, or several tables and none named.
    """
    from ovbench.results.profiles import load_all

    rows = table_commands(asked.paper, published.table_of(asked.paper, asked.table))
    stored = [] if again else load_all(profiles)
    jobs: list[Job] = []
    seen: set[Command] = set()
    for index, row in enumerate(rows):
        if not (asked.methods or asked.datasets):
            jobs += [Job(0, row.label, "-", "", (), skipped=why) for why in row.reasons]
        for command in row.commands:
            if command in seen or (asked.methods and command.method not in asked.methods):
                continue
            if asked.datasets and command.dataset not in asked.datasets:
                continue
            seen.add(command)
            if command.verb == "profile":
                jobs.append(_profile(command, asked, stored, profiles, device))
            else:
                jobs.append(_run(command, asked, read_spec, results, trainings, device, again))
        on_job(index + 1, len(rows))
    once = dict.fromkeys(replace(job, index=0) for job in jobs)  # a demo makes rows alike
    return [replace(job, index=place) for place, job in enumerate(once)]


def _words(settings: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings)


def _run(
    command: Command, asked: Asked, read_spec: ReadSpec, results: Path, trainings: Path, device: str, again: bool
) -> Job:
    """A run of the table; what keeps it from running is said, and no failure of the sweep."""
    settings = {**dict(command.settings), **(asked.set or {})}
    without = Job(0, command.method, command.dataset, _words(tuple(settings.items())), ())
    if asked.demo:
        settings = {name: value for name, value in settings.items() if name not in _OF_WEIGHTS}
        if command.training is not None:
            return replace(without, skipped="the demo has no trained weights")
    elif asked.data_root is None:
        return replace(without, skipped="no data: give --data-root")
    elif command.training is not None and "weights" not in settings:
        found = command.training.find(trainings)
        if found is None:
            how = f"ovbench {' '.join(command.training.arguments())}"
            return replace(without, skipped=f"no weights {command.weights[0]} in '{trainings}': {how}")
        settings["weights"] = str(found.absolute())
    if "weights" in settings:
        settings.pop("pretrained", None)
    grid = Grid((command.method,), (command.dataset,), asked.data_root, asked.demo, settings)
    try:
        (job,) = plan([grid], read_spec, results=results, device=device, again=again)
    except OvbenchError as error:
        return replace(without, skipped=str(error))
    return job if job.problem is None else replace(job, problem=None, skipped=job.problem)


def _profile(command: Command, asked: Asked, stored: Sequence[Measured], profiles: Path, device: str) -> Job:
    chosen = {**dict(command.settings), **{name: value for name, value in (asked.set or {}).items() if name == "dtype"}}
    arguments = (
        "profile", "--method", command.method, "--dataset", command.dataset, *flags(chosen.items()),
        "--device", device, "--profiles", str(profiles), "--save", "--json",
    )  # fmt: skip
    job = Job(0, command.method, command.dataset, f"profile {_words(tuple(chosen.items()))}".strip(), arguments)
    return replace(job, recorded=recorded_by(command, stored))
