"""Runs on a few generated images with a tiny random CLIP, in this process or in ones that may be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import warm

from ovbench.errors import OvbenchError

IMAGES = 7


def spec(weights: str, **fields: Any) -> dict[str, Any]:
    """A run of a second; ``window_batch`` is fixed, so that its areas do not depend on the batch."""
    protocol = {"name": "common", "templates": "plain", "short_side": 96, "crop": 96, "stride": 96}
    return {"method": "clip", "dataset": "voc21", "weights": weights, "window_batch": 2, "protocol": protocol, **fields}


def outcome(run: Any) -> tuple[int, str]:
    """Exit code and message that the command line would give."""
    try:
        run()
    except OvbenchError as error:
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted."
    return 0, ""


def areas_of(record: Any) -> list[tuple[int, ...]]:
    """What must be the same to the pixel."""
    return [(c.intersect, c.union, c.pred, c.label) for c in record.metrics.classes]


def _child(fields: dict[str, Any], options: dict[str, Any], env: dict[str, str], told: Path, slow: float) -> None:
    os.setsid()  # a group that can be signalled as a scheduler does
    os.environ.update(env)
    import torch

    import ovbench
    from ovbench.cli.run import terminable
    from ovbench.evaluate.loop import Monitor

    torch.set_num_threads(1)
    tell = Monitor.tell
    Monitor.tell = lambda monitor: (tell(monitor), time.sleep(slow))[0]  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run() -> None:
        with terminable():
            ovbench.run(fields, **options)

    code, message = outcome(run)
    told.write_text(json.dumps({"code": code, "message": message}))
    os._exit(code)


class Processes:
    """Starts runs in processes forked from one that has imported everything, and ends what is left of them.

    Args:
        folder: For what they tell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []  # type: ignore[var-annotated]
        self.context = warm.context()

    def start(
        self, fields: dict[str, Any], *, slow: float = 0.0, env: dict[str, str] | None = None, **options: Any
    ) -> Any:
        """A process with the run; ``slow`` seconds more per image."""
        told = self.folder / f"{len(self.started)}.json"
        process = self.context.Process(target=_child, args=(fields, options, env or {}, told, slow))
        process.start()
        self.started.append(process)
        return process, told

    def ranks(self, world: int, fields: Any, **options: Any) -> list[Any]:
        """Processes that share a run, as torchrun would start them; lists of specs and of results folders have one for each."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OVBENCH_PEER_TIMEOUT": "8",
        }
        if options.setdefault("launcher", "pytorch") == "slurm":
            env |= {"SLURM_NTASKS": str(world), "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
        env |= options.pop("env", {})
        results = options.pop("results")
        found = []
        for rank in range(world):
            own, home = (
                {**env, "RANK": str(rank), "SLURM_PROCID": str(rank)},
                results[rank] if isinstance(results, list) else results,
            )
            own_fields = fields[rank] if isinstance(fields, list) else fields
            found.append(self.start(own_fields, env=own, results=home, **options))
        return found

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.started:
            if process.is_alive():
                process.kill()
            process.join()


def told(process: BaseProcess, path: Path) -> tuple[int | None, str]:
    """Exit code and message of a process, when it has ended."""
    process.join()
    message = json.loads(path.read_text())["message"] if path.exists() else ""
    return process.exitcode, message


def lines(results: Path) -> int:
    """Images in all shards below a folder."""
    return sum(path.read_bytes().count(b'"classes"') for path in results.rglob("*.areas.jsonl"))
