"""One job as a process: started from an argument list, ended cleanly, its outcome read from what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ovbench.evaluate.run import RECORDED
from ovbench.evaluate.sweep.child import GRACE_S
from ovbench.evaluate.sweep.plan import Job

PROGRAM = (sys.executable, "-m", "ovbench.evaluate.sweep.child")
POLL_S = 0.1
_TRY = "$ "  # begins the line of a log that says what was started

State = Literal["done", "recorded", "failed", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        state: ``done``, ``recorded`` (by an earlier run), ``failed`` or ``interrupted``.
        seconds: Wall time of the last try.
        tries: Times that it was started.
        run_id: Of the record.
        spec_hash: Of the record.
        miou: Of the record, percent.
        message: What went wrong.
        log: File with all that the process said.
    """

    state: State
    seconds: float = 0.0
    tries: int = 0
    run_id: str | None = None
    spec_hash: str | None = None
    miou: float | None = None
    message: str | None = None
    log: str | None = None


@dataclass(frozen=True)
class Work:
    """What all jobs of a sweep have in common.

    Attributes:
        folder: Where their logs go; every machine of a cluster must see it, as it must the data and the records.
        cwd: Folder that the jobs start in, which relative paths among their options mean.
        program: What is started with a job's arguments.
        grace_s: Seconds that an interrupted job has to end by itself.
    """

    folder: Path
    cwd: Path
    program: Sequence[str] = PROGRAM
    grace_s: float = GRACE_S


class Process:
    """A started job.

    Args:
        job: What to run.
        work: How.
        environment: Further variables, e.g. which GPU is its own.
    """

    def __init__(self, job: Job, work: Work, environment: Mapping[str, str] | None = None) -> None:
        self.job, self.work = job, work
        self.log = work.folder / f"{job.file_name}.log"
        self._stdout = work.folder / f"{job.file_name}.out"
        self._files: list[IO[bytes]] = []
        command = [*work.program, *job.arguments]
        out, log = self._open(self._stdout, "wb"), self._open(self.log, "ab")
        log.write(f"{_TRY}{json.dumps(command)}\n".encode())
        log.flush()
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end is what tells the child to end
            stdout=out,
            stderr=log,
            cwd=work.cwd,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the children in order
        )
        self.interrupted = False

    def _open(self, path: Path, mode: str) -> IO[bytes]:
        self._files.append(path.open(mode))
        return self._files[-1]

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def interrupt(self) -> None:
        """Asks it to end: what it has done is kept."""
        self.interrupted = True
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """Ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def outcome(self) -> Outcome:
        """How it ended; call once, after the end."""
        code, seconds = self._process.wait(), time.monotonic() - self.started
        if self._process.stdin is not None:
            self._process.stdin.close()
        for file in self._files:
            file.close()
        text = self._stdout.read_text(encoding="utf-8", errors="replace")
        self._stdout.unlink()
        return read_outcome(code, seconds, text, self.log, interrupted=self.interrupted)


def stop(processes: Sequence[Process]) -> None:
    """Ends processes: all are asked, then waited for, and those that do not end are killed."""
    for process in processes:
        process.interrupt()
    try:
        give_up = time.monotonic() + max((process.work.grace_s for process in processes), default=0.0)
        while time.monotonic() < give_up and not all(process.ended for process in processes):
            time.sleep(POLL_S)
    finally:  # also at a second Ctrl-C
        for process in processes:
            if not process.ended:
                process.kill()


def run_job(job: Job, work: Work) -> Outcome:
    """Runs a job to its end in a process of its own; whatever ends this function ends the process."""
    process = Process(job, work)
    try:
        while not process.ended:
            time.sleep(POLL_S)
    finally:
        if not process.ended:
            stop([process])
    return process.outcome()


def read_outcome(code: int, seconds: float, stdout: str, log: Path, *, interrupted: bool) -> Outcome:
    """The outcome of a process from its exit status, the record on its stdout and its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith(_TRY)]
    lines, tries = lines[starts[-1] + 1 if starts else 0 :], len(starts)
    known = {"seconds": seconds, "tries": tries, "log": str(log)}
    if code == 0:
        try:
            record = json.loads(stdout)
            state: State = "recorded" if any(line.startswith(RECORDED) for line in lines) else "done"
            miou = (record.get("metrics") or {}).get("miou")  # a profile has none
            return Outcome(state, run_id=record["run_id"], spec_hash=record["spec_hash"], miou=miou, **known)  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Outcome("failed", message=f"it printed no record ({error})", **known)  # type: ignore[arg-type]
    if interrupted or code == 130:
        return Outcome("interrupted", message="interrupted; its finished images are kept", **known)  # type: ignore[arg-type]
    return Outcome("failed", message=_reason(code, lines), **known)  # type: ignore[arg-type]


def _reason(code: int, lines: Sequence[str]) -> str:
    """Why a process failed: its error message, or the signal that ended it, or its last words."""
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    if errors:
        return errors[-1]
    spoken = [line for line in lines if line.strip()]
    return f"exit status {code}" + (f": {spoken[-1]}" if spoken else "")
