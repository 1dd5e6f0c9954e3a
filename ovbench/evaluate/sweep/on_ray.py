"""Jobs over a Ray cluster: one that runs already, or one on this machine that ends with the sweep."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovbench.errors import RunError, UsageError, first_line
from ovbench.evaluate.sweep.job import Outcome, Work, run_job
from ovbench.evaluate.sweep.plan import Job

LOOPBACK = "127.0.0.1"
OBJECTS_BYTES = 100 * 2**20  # records are small; Ray's own default takes a third of the shared memory


@dataclass
class OnRay:
    """Runs jobs as Ray tasks, each with a GPU of its own where the cluster has GPUs.

    Args:
        address: ``HOST:PORT`` of a cluster, or ``auto`` for the one that this machine is part of; None starts one.
        retries: Times that a job is started again when the worker that runs it dies.
        workers: Of a cluster on this machine: jobs at a time where there are no GPUs.
        folder: Of a cluster on this machine: where Ray keeps its own files; None is Ray's choice. Its sockets lie in it,
            so the path must be short.
    """

    address: str | None = None
    retries: int = 2
    workers: int = 1
    folder: Path | None = None
    gpus: float = field(default=0.0, init=False)

    @property
    def device(self) -> str:
        """Kind of device that a job gets."""
        return "cuda" if self.gpus else "cpu"

    def __enter__(self) -> OnRay:
        """Connects, or starts the cluster.

        Raises:
            UsageError: Ray is not installed.
            RunError: No cluster there, or it does not start.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anyone
        # A job without a GPU of Ray's keeps what the user says of GPUs.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if self.address is None:
            # Read when Ray is imported: without it Ray takes the machine's own address even where loopback is asked for.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would keep one in the home folder
        ray = _ray()
        options: dict[str, Any] = {"address": self.address}
        if self.address is None:
            options = {
                "address": "local",
                "num_cpus": self.workers,
                "include_dashboard": False,
                "object_store_memory": OBJECTS_BYTES,
                "_node_ip_address": LOOPBACK,
                "_temp_dir": None if self.folder is None else str(self.folder),
            }
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
        except Exception as error:  # Ray's own kinds, and those of its transport
            what = f"There is no Ray cluster at '{self.address}'" if self.address else "Ray does not start here"
            raise RunError(f"{what}: {first_line(error)}") from error
        self.gpus = float(ray.cluster_resources().get("GPU", 0))
        return self

    def __exit__(self, *error: object) -> None:
        _ray().shutdown()

    def run(self, jobs: Sequence[Job], work: Work) -> Iterator[tuple[Job, Outcome]]:
        """Outcomes as they come; closing the iterator ends what runs, in order."""
        ray = _ray()
        task = ray.remote(run_job).options(
            num_cpus=1, num_gpus=1 if self.gpus else 0, max_retries=self.retries, retry_exceptions=False
        )
        running = {task.remote(job, work): job for job in jobs}
        try:
            while running:
                ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                for reference in ready:
                    yield running.pop(reference), self._outcome(reference)
        finally:
            for reference in running:
                with contextlib.suppress(Exception):  # it has ended meanwhile
                    ray.cancel(reference, force=False)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=work.grace_s)

    def _outcome(self, reference: Any) -> Outcome:
        ray = _ray()
        try:
            found: Outcome = ray.get(reference)
            return found
        except ray.exceptions.RayError as error:
            lost = isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.NodeDiedError)
            what = f"its worker died, also after {self.retries} retries" if lost else "Ray could not run it"
            return Outcome("failed", message=f"{what}: {str(error).strip().splitlines()[-1]}")


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("--executor ray needs Ray: pip install 'ovbench[ray]'.") from None
    return ray
