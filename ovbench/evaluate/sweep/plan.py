"""From methods x datasets x options to a list of jobs, each one ``ovbench run``, and which of them are recorded already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ovbench.errors import DataError, NoBackgroundError, OvbenchError, UsageError, WeightsError, unknown_name
from ovbench.spec import RunSpec, flags

# Options of ``ovbench run`` that a sweep has to say itself.
OWN = ("method", "dataset", "data_root", "results", "device", "resume", "skip_recorded", "json", "dump_config", "demo")
FIELDS = ("methods", "datasets", "data_root", "demo", "set", "vary")
ReadSpec = Callable[[Sequence[str]], RunSpec]


@dataclass(frozen=True)
class Grid:
    """Runs that differ in method, dataset and the options of ``vary``.

    Attributes:
        methods: Names, or ``all`` (of the open-vocabulary track), or a track.
        datasets: Names, paths of one's own, ``all``, or a group such as ``eight``.
        data_root: Folder of the datasets; None for demo runs and benchmarks with a place of their own.
        demo: Built-in CLIP on generated scenes.
        set: Options of ``ovbench run`` for all, by name; ``option.NAME`` is an option of the method.
        vary: The same with several values each, of which all combinations are run.
    """

    methods: tuple[str, ...]
    datasets: tuple[str, ...]
    data_root: Path | None = None
    demo: bool = False
    set: Mapping[str, str] = field(default_factory=dict)
    vary: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        index: Place in the list, from 0.
        method: Method id.
        dataset: Benchmark id.
        changed: The options of ``set`` and ``vary``, in words.
        arguments: Of ``ovbench``.
        spec_hash: Of the final spec as far as it is known before the run; None where the run cannot start.
        hash_is_final: Whether the record's hash will be the same; if not, the run finds out more than is known before.
        recorded: Id of the record that makes the run needless.
        miou: Of that record, percent.
        problem: Why the run cannot start.
        skipped: Why it is left out, which is no failure.
    """

    index: int
    method: str
    dataset: str
    changed: str
    arguments: tuple[str, ...]
    spec_hash: str | None = None
    hash_is_final: bool = False
    recorded: str | None = None
    miou: float | None = None
    problem: str | None = None
    skipped: str | None = None

    @property
    def title(self) -> str:
        """The job in words."""
        return f"{self.method} on {self.dataset}" + (f", {self.changed}" if self.changed else "")

    @property
    def file_name(self) -> str:
        """A name for its files."""
        from ovbench.results.store import path_name

        return path_name(f"{self.index + 1:03d}-{self.method}-{self.dataset}")


def plan(
    grids: Sequence[Grid],
    read_spec: ReadSpec,
    *,
    results: Path,
    device: str,
    again: bool = False,
    on_job: Callable[[int, int], None] = lambda done, total: None,
) -> list[Job]:
    """The jobs of several grids, each run once.

    Args:
        grids: What to run.
        read_spec: What ``ovbench run ARGUMENTS`` would run.
        results: Root folder of the records.
        device: Kind of device that the jobs get: cpu or cuda.
        again: Also run what is recorded.
        on_job: Progress callback (planned, total).

    Raises:
        UsageError: Unknown names, or options that a run does not have or that contradict each other; nothing is run.
    """
    wanted = list(dict.fromkeys(each for grid in grids for each in _combinations(grid)))
    fingerprints: dict[tuple[str, Path], str] = {}
    jobs: list[Job] = []
    for index, (method, dataset, data_root, demo, chosen) in enumerate(wanted):
        arguments = [
            "run", "--method", method, "--dataset", dataset, *flags(chosen), *(["--demo"] if demo else []),
            *(["--data-root", str(data_root)] if data_root is not None else []),
            "--device", device, "--results", str(results), "--resume", *([] if again else ["--skip-recorded"]), "--json",
        ]  # fmt: skip
        job = Job(index, method, dataset, " ".join(f"{key}={value}" for key, value in chosen), tuple(arguments))
        try:
            jobs.append(_look(job, read_spec(arguments[1:]), data_root, None if again else results, fingerprints))
        except (DataError, NoBackgroundError, WeightsError) as error:
            jobs.append(replace(job, problem=str(error)))
        except UsageError as error:
            raise UsageError(f"{job.title}: {error}") from None
        on_job(index + 1, len(wanted))
    return jobs


def _look(
    job: Job, spec: RunSpec, data_root: Path | None, results: Path | None, fingerprints: dict[tuple[str, Path], str]
) -> Job:
    """The job with the hash of its spec, and its record if there is one."""
    from ovbench.evaluate.expected import expected

    known = expected(spec, data_root, fingerprints)
    record = None if results is None else known.find(results)
    return replace(
        job,
        method=known.spec.method,
        dataset=known.spec.dataset,
        spec_hash=known.spec_hash if record is None else record.spec_hash,
        hash_is_final=known.is_final or record is not None,
        recorded=None if record is None else record.run_id,
        miou=None if record is None or record.metrics is None else record.metrics.miou,
    )


Combination = tuple[str, str, Path | None, bool, tuple[tuple[str, str], ...]]


def _combinations(grid: Grid) -> Iterable[Combination]:
    """Every run of a grid: method, dataset, data root, demo, options."""
    from ovbench import benchmarks
    from ovbench.benchmarks import own
    from ovbench.registry import expand_methods

    for key in (*grid.set, *grid.vary):
        if key.replace("-", "_") in OWN:
            raise UsageError(
                f"'{key}' is an option of 'ovbench sweep' itself: give it there, not with --set or --vary."
            )
    both = set(grid.set) & set(grid.vary)
    if both:
        raise UsageError(f"'{sorted(both)[0]}' is set and varied: give it once.")
    values = [[(key, value) for value in grid.vary[key]] for key in grid.vary]
    for dataset, method in itertools.product(benchmarks.expand(grid.datasets), expand_methods(grid.methods)):
        root = None if own.is_path(dataset) or grid.data_root is None else grid.data_root.expanduser().absolute()
        for chosen in itertools.product(*values):
            yield method, dataset, root, grid.demo, (*grid.set.items(), *chosen)


def read_grids(path: Path) -> list[Grid]:
    """The grids of a YAML file: one mapping, or a list of them.

    Raises:
        UsageError: No such file, no YAML, or fields that a grid does not have.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the sweep '{path}': {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is no YAML: {' '.join(str(error).split())}.") from None
    entries = content if isinstance(content, list) else [content]
    try:
        return [_grid(entry) for entry in entries]
    except OvbenchError as error:
        raise UsageError(f"'{path}': {error}") from None


def _grid(content: Any) -> Grid:
    if not isinstance(content, dict):
        raise UsageError(f"a sweep is a mapping with {', '.join(FIELDS)}, not {content!r}.")
    for key in content:
        if key not in FIELDS:
            raise unknown_name("field of a sweep", str(key), FIELDS)
    for key in ("methods", "datasets"):
        if not content.get(key):
            raise UsageError(f"'{key}' is missing.")
    chosen: dict[str, dict[str, Any]] = {}
    for key in ("set", "vary"):
        chosen[key] = content.get(key) or {}
        if not isinstance(chosen[key], dict):
            raise UsageError(f"'{key}' must be a mapping of options, e.g. {{dtype: bfloat16}}, not {chosen[key]!r}.")
    root = content.get("data_root")
    return Grid(
        methods=_texts(content["methods"]),
        datasets=_texts(content["datasets"]),
        data_root=None if root is None else Path(str(root)),
        demo=bool(content.get("demo", False)),
        set={str(key): _text(value) for key, value in chosen["set"].items()},
        vary={str(key): _texts(value) for key, value in chosen["vary"].items()},
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(each) for each in value) if isinstance(value, list) else (_text(value),)


def _text(value: Any) -> str:
    """As it would be typed: YAML's ``true`` and ``[0.5, 1]`` as ``true`` and ``0.5,1``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
