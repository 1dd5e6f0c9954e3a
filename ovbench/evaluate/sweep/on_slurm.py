"""Jobs over a Slurm cluster with submitit: one Slurm job each, requeued where its time runs out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovbench.errors import RunError, UsageError
from ovbench.evaluate.sweep.job import Outcome, Work, run_job
from ovbench.evaluate.sweep.plan import Job

CLUSTERS = ("slurm", "local", "debug")
POLL_S = {"slurm": 10.0, "local": 0.3, "debug": 0.0}
SHARED = (
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
)


class Task:
    """What a Slurm job runs; submitit calls ``checkpoint`` before the time is over and submits what it returns."""

    def __call__(self, job: Job, work: Work) -> Outcome:
        return run_job(job, work)

    def checkpoint(self, job: Job, work: Work) -> Any:
        """The same again: the process ends with this one and is resumed by the next."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, job, work)


@dataclass(frozen=True)
class OnSlurm:
    """Submits jobs to Slurm.

    Attributes:
        options: Of the Slurm jobs by name: those that submitit shares between clusters (``timeout_min``, ``mem_gb``,
            ``gpus_per_node``, ``cpus_per_task`` ...) and Slurm's own (``partition``, ``account``, ``array_parallelism``
            ...). ``cluster`` may be ``local``: processes of this machine, to try it.
    """

    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """Where the jobs go."""
        return self.options.get("cluster", "slurm")

    @property
    def device(self) -> str:
        """Kind of device that a job gets."""
        names = ("gpus_per_node", "gpus_per_task", "gpus_per_socket", "gpus", "gres")
        return "cuda" if any(self.options.get(name, "0") != "0" for name in names) else "cpu"

    def executor(self, folder: Path) -> Any:
        """The executor of submitit with the options in force, its files in ``folder``.

        Raises:
            UsageError: submitit is missing, or does not know an option or its value.
            RunError: There is no Slurm here.
        """
        try:
            import submitit
        except ImportError:
            raise UsageError("--executor slurm needs submitit: pip install 'ovbench[slurm]'.") from None
        if self.cluster not in CLUSTERS:
            raise UsageError(f"--slurm cluster={self.cluster}: give {', '.join(CLUSTERS)}.")
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        except RuntimeError as error:
            raise RunError(
                f"No Slurm here ({error}): start the sweep on a node that has sbatch, or use --executor local."
            ) from None
        given = {"name": "ovbench", **self.options}
        given.pop("cluster", None)
        try:
            executor.update_parameters(
                **{name if name in SHARED else f"slurm_{name}": _typed(value) for name, value in given.items()}
            )
        except (NameError, TypeError, AssertionError, ValueError) as error:
            raise UsageError(f"--slurm: {' '.join(str(error).split())}") from None
        return executor

    def run(self, jobs: Sequence[Job], work: Work) -> Iterator[tuple[Job, Outcome]]:
        """Outcomes as they come; closing the iterator cancels what is queued or runs."""
        executor = self.executor(work.folder / "slurm")
        with executor.batch():  # one array of jobs
            submitted = [executor.submit(Task(), job, work) for job in jobs]
        running = dict(zip(jobs, submitted, strict=True))
        try:
            while running:
                for job in [job for job, handle in running.items() if handle.done()]:
                    yield job, _outcome(running.pop(job))
                if running:
                    time.sleep(POLL_S[self.cluster])
        finally:
            for handle in running.values():
                handle.cancel()
            give_up = time.monotonic() + work.grace_s
            while time.monotonic() < give_up and not all(handle.done() for handle in running.values()):
                time.sleep(POLL_S[self.cluster])


def _outcome(handle: Any) -> Outcome:
    """The outcome of a job of submitit, also where Slurm ended it."""
    import submitit

    try:
        found: Outcome = handle.result()
        return found
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        told = [line for line in str(error).splitlines() if line.strip()]
        log = str(handle.paths.stderr)
        return Outcome("failed", message=f"Slurm job {handle.job_id}: {told[0] if told else handle.state}", log=log)


def _typed(value: str) -> Any:
    """A value as submitit wants it: numbers as numbers."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value, value)
