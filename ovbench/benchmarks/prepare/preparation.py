"""Carries a plan out: in processes, whole files only, nothing outside the data root, nothing twice."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ovbench.benchmarks import get
from ovbench.benchmarks.prepare import sources
from ovbench.benchmarks.prepare.convert import COPY, RULES, same
from ovbench.benchmarks.prepare.journal import WORK, Journal
from ovbench.benchmarks.prepare.recipes import Job, Plan, SplitPlan, plan
from ovbench.errors import DataError, Interrupted, RunError, UsageError
from ovbench.paths import user_path

_MOST_WORKERS = 16
# Starting a process takes as long as some hundred conversions.
_JOBS_PER_WORKER = 24

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """The outcome of a preparation.

    Attributes:
        root: The data root, for ``--data-root``.
        splits: What is there of each split.
        missing: Splits of which the sources have no image.
        done: Files that were there already.
        converted: Labels and images that are written, or would be.
        copied: Files that are copied unchanged, or would be.
    """

    benchmark: str
    root: Path
    splits: tuple[SplitPlan, ...]
    missing: tuple[str, ...]
    done: int
    converted: int
    copied: int
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain dicts, lists, strings and numbers."""
        return {**asdict(self), "root": str(self.root)}


def prepare(
    name: str,
    source: Sequence[Path | str],
    out: Path | str | None = None,
    *,
    split: str = "all",
    workers: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Makes a benchmark's files from what was downloaded. Repeated or resumed, it does only what is missing.

    Args:
        name: Benchmark id.
        source: Folders, zip or tar archives, single .json or .txt files.
        out: The data root; by default the one folder among the sources.
        split: "val", "train", or "all" for those of which there are images.
        workers: Processes; by default one per core, fewer for few files.
        dry_run: Only look.
        progress: Called with (files done, files in all).

    Raises:
        UsageError: Unknown benchmark or split, no such source, or no place to write to.
        DataError: The sources lack something or are damaged, an archive has harmful members, or a file is in the way
            that was not made from these sources.
        RunError: Files cannot be written, or a worker process died; finished files stay.
        Interrupted: Ctrl-C; finished files stay.
    """
    benchmark = get(name)
    given = [user_path(one) for one in source]
    target, in_place = _target(given, out)
    files = [file for one in given for file in sources.list_files(one) if not _is_output(file, target)]
    made = plan(benchmark, files, target, in_place=in_place, split=split)
    journal = Journal(made.root)
    jobs = list({job.output: job for job in made.jobs}.values())
    pending = [job for job in jobs if not journal.is_done(job)]
    _refuse_huge(pending)
    if not dry_run and pending:
        try:
            _carry_out(made, journal, pending, len(jobs), workers, progress)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError(
                f"'{error.filename or made.root}' cannot be written: {reason}. Finished files are kept: mend it and give "
                "the same command again."
            ) from error
        except KeyboardInterrupt:
            raise Interrupted("Interrupted. Finished files are kept: the same command goes on from there.") from None
    copied = sum(job.rule == COPY for job in pending)
    return Prepared(
        benchmark=benchmark.name,
        root=made.root,
        splits=tuple(made.splits),
        missing=tuple(made.missing),
        done=len(jobs) - len(pending),
        converted=len(pending) - copied,
        copied=copied,
        dry_run=dry_run,
    )


def _target(given: Sequence[Path], out: Path | str | None) -> tuple[Path, bool]:
    """Where to write, and whether that is one of the sources."""
    folders = [one for one in given if one.is_dir()]
    if out is None:
        if len(folders) != 1:
            missing = [str(one) for one in given if not one.exists()]
            if missing:
                raise UsageError(
                    f"The source '{missing[0]}' does not exist: give a folder or archive that you downloaded."
                )
            raise UsageError("Where should the files go? Give a folder with --out DIR.")
        return folders[0], True
    target = user_path(out)
    if target.exists() and not target.is_dir():
        raise UsageError(f"'{target}' is a file: give a folder as --out.")
    inside = [one for one in folders if target.exists() and one.samefile(target)]
    return (inside[0], True) if inside else (target, False)


def _is_output(file: sources.SourceFile, target: Path) -> bool:
    """Whether a source's file lies in the target folder inside that source."""
    home, place = file.home.absolute(), target.absolute()
    return not file.member and place != home and file.on_disk.absolute().is_relative_to(place)


def _refuse_huge(jobs: Iterable[Job]) -> None:
    for job in jobs:
        if job.content is None and job.source.size > sources.MOST_BYTES:
            raise DataError(f"'{job.source.where}' has {job.source.size} bytes: no image or label. Fetch it again.")


def _carry_out(
    made: Plan, journal: Journal, pending: list[Job], total: int, workers: int | None, progress: Progress | None
) -> None:
    """Writes all pending files, each recorded when it is whole."""
    parts = made.root / WORK / "parts"
    for folder in {(made.root / job.output).parent for job in pending} | {parts}:
        # Before anything is made: a link may lead elsewhere.
        if not folder.resolve().is_relative_to(made.root.resolve()):
            raise DataError(
                f"'{folder}' leads out of '{made.root}': nothing was written. Remove the link, or give another --out."
            )
    shutil.rmtree(parts, ignore_errors=True)  # of a call that was killed
    for folder in {(made.root / job.output).parent for job in pending} | {parts}:
        folder.mkdir(parents=True, exist_ok=True)
    done = total - len(pending)
    if progress:
        progress(done, total)
    wanted = min(workers or min(os.cpu_count() or 1, _MOST_WORKERS), -(-len(pending) // _JOBS_PER_WORKER))
    with journal.appending() as file:
        finished = _finished(made.root, journal, pending, wanted)
        try:
            for job, size in finished:
                journal.record(file, job, size)
                done += 1
                if progress:
                    progress(done, total)
        finally:
            finished.close()  # ends the processes before their folder goes
            shutil.rmtree(parts, ignore_errors=True)


def _finished(root: Path, journal: Journal, pending: list[Job], workers: int) -> Generator[tuple[Job, int], None, None]:
    """Does the jobs; gives each with the size of its file as soon as that is in its place."""
    tasks = ((job, root, content, journal.is_ours(job)) for job, content in _contents(pending))
    if workers <= 1:
        for job, *rest in tasks:
            yield job, _do(job, *rest)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    running: dict[Future[int], Job] = {}
    try:
        for task in tasks:
            running[executor.submit(_do, *task)] = task[0]
            # Content of archives goes along with its job: only so much of it at a time.
            if len(running) >= 4 * workers:
                yield from _collect(running)
        while running:
            yield from _collect(running)
    except BrokenProcessPool:
        raise RunError(
            "A worker process died, perhaps for lack of memory. Finished files are kept: give the same command again, "
            "with --workers 1."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _collect(running: dict[Future[int], Job]) -> Iterator[tuple[Job, int]]:
    """Takes out what has ended, at least one; of several, failures come last."""
    ended, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in sorted(ended, key=lambda one: one.exception() is not None):
        yield running.pop(future), future.result()


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends when the parent was killed: the queue would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _contents(pending: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
    """The jobs with what their rules are given; None for files on disk, which the worker reads."""
    inside: dict[str, list[Job]] = {}
    for job in pending:
        if job.content is not None:
            yield job, job.content
        elif job.source.member:
            inside.setdefault(f"{job.source.home}\0{job.source.member}", []).append(job)
        else:
            yield job, None
    by_archive = sources.grouped(jobs[0].source for jobs in inside.values())
    for home, files in by_archive.items():
        for file, content in sources.read(files):
            for job in inside[f"{home}\0{file.member}"]:
                yield job, content


def _do(job: Job, root: Path, content: Any, ours: bool) -> int:
    """Writes one file and gives its size.

    Raises:
        DataError: The source is damaged, or another file is in the way.
    """
    output = root / job.output
    source = job.source.where
    if job.rule == COPY and content is None:
        return _place(job, root, output, ours)
    if content is None:
        [(_, content)] = sources.read([job.source])
    made = RULES[job.rule](content, source)
    if output.exists() and not ours:
        if same(job.rule, output.read_bytes(), made):
            return output.stat().st_size
        _refuse(output, source)
    part = _part(root, job)
    part.write_bytes(made)
    os.replace(part, output)
    return len(made)


def _place(job: Job, root: Path, output: Path, ours: bool) -> int:
    """A file on disk under another name: the same data where the file system can, else a copy."""
    if output.exists() and not ours:
        if output.stat().st_size == job.source.size:
            return job.source.size
        _refuse(output, job.source.where)
    part = _part(root, job)
    try:
        os.link(job.source.on_disk.resolve(), part)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(job.source.on_disk, part)
    os.replace(part, output)
    with suppress(FileNotFoundError):  # replacing a link by its twin leaves both
        part.unlink()
    return output.stat().st_size


def _refuse(output: Path, source: str) -> None:
    raise DataError(
        f"'{output}' is not what '{source}' gives and was not made by 'ovbench data prepare': it is left as it is. Remove "
        "it, or give another --out."
    )


def _part(root: Path, job: Job) -> Path:
    """Where a file is written before it is moved into place."""
    return root / WORK / "parts" / f"{os.getpid()}.{Path(job.output).name}"
