"""Several processes that evaluate one run: who is who, what the first one tells the others, and that all are alive.

Every process evaluates batches of its own and writes a shard of its own, so nothing is computed together and no collective
is needed, which would wait for a dead process as for a slow one. They share a key-value store of torch.distributed only
(that of torchrun, or one that the first process serves), on any device alike. Each tells there every few seconds that it is
alive, whatever it is busy with; who is silent for too long, or has failed, ends the run of all.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

from ovbench import errors
from ovbench.errors import Interrupted, OvbenchError, RunError, UsageError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

LAUNCHERS = ("none", "pytorch", "slurm")
_NUMBER = {"pytorch": "RANK", "slurm": "SLURM_PROCID"}
_TIMEOUT = "OVBENCH_PEER_TIMEOUT"
_JOIN = timedelta(minutes=10)  # until all processes of all nodes have started
_calls = count()  # runs of one process one after the other, each with keys of its own


def is_first(launcher: str) -> bool:
    """Whether this process is the one that speaks and writes the record; looks at the surroundings only."""
    return os.environ.get(_NUMBER.get(launcher, ""), "0") == "0"


@dataclass(frozen=True)
class Share:
    """What one process has done.

    Attributes:
        images: Images evaluated now.
        seconds: Wall time of its loop.
        peak_mib: Peak memory in MiB; None where the system does not tell.
    """

    images: int = 0
    seconds: float = 0.0
    peak_mib: float | None = None


class Team:
    """The processes of one run, seen from one of them; alone, everything here is trivial.

    Args:
        store: Shared by all; None for a single process.
        rank: Number of this process.
        world: Number of processes.
        timeout: Seconds of silence after which a process counts as dead.

    Attributes:
        finished: Images that this process has evaluated, for the progress of the first.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, world: int = 1, timeout: float = 120.0) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.finished = 0
        self._store = store
        self._others: dict[int, int] = {}
        self._lost: BaseException | None = None
        self._over: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._stay_alive, name="ovbench-ranks", daemon=True)
        if store is not None:
            self._watch.start()

    @property
    def lead(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    @property
    def finished_by_others(self) -> int:
        """Images that the other processes have evaluated, as far as the first process has heard."""
        return sum(self._others.values())

    def check(self) -> None:
        """Raises what has ended another process: ``RunError`` and its like, or ``KeyboardInterrupt``."""
        if self._lost is not None:
            raise self._lost

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before the others, which find what it has made."""
        if not self.lead:
            self._wait_for("prepared")
        yield
        if self.lead:
            self._set("prepared", "")

    def told(self, content: dict[str, Any], key: str = "plan") -> dict[str, Any]:
        """The first process' content (plain data), in all processes; every key is told once."""
        if self._store is None:
            return content
        if self.lead:
            self._set(key, json.dumps(content))
            return content
        found: dict[str, Any] = json.loads(self._wait_for(key))
        return found

    def shares(self, own: Share) -> list[Share]:
        """What all processes have done, in the first one, which waits for them; in the others their own."""
        if self._store is None or not self.lead:
            self._report({"status": "ok", **asdict(own)})
            return [own]
        found = [own]
        for rank in range(1, self.world):
            share = json.loads(self._wait_for(f"end/{rank}"))
            del share["status"]
            found.append(Share(**share))
        return found

    def failed(self, error: BaseException) -> None:
        """Tells the others why this process ends."""
        self._report(_told(error))

    def _report(self, content: dict[str, Any]) -> None:
        if self._store is None:
            return
        with suppress(RuntimeError):  # the store may have gone with its process
            if self.lead:
                self._store.set("over", json.dumps(content))
                self._goodbye()
            else:
                self._store.set(f"end/{self.rank}", json.dumps(content))

    def over(self, record: str = "") -> str:
        """The end of the whole run: the first process tells the record's path, and the others hear it.

        Raises:
            RunError: The first process ended otherwise.
        """
        if self._store is None:
            return record
        if self.lead:
            self._report({"status": "ok", "record": record})
            return record
        while self._over is None:
            self.check()
            time.sleep(0.05)
        return str(self._over["record"])

    def leave(self) -> None:
        """Stops telling that this process is alive."""
        self._ended.set()
        if self._watch.is_alive():
            self._watch.join(timeout=5)

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            with self._reaching():
                self._store.set(key, value)

    def _wait_for(self, key: str) -> str:
        assert self._store is not None  # only called with others
        while True:
            self.check()
            with self._reaching():
                if self._store.check([key]):
                    return self._store.get(key).decode()
            time.sleep(0.05)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # torch's DistNetworkError and DistStoreError among them
            raise self._silent(0) from None

    def _goodbye(self) -> None:
        """Waits until the others have heard the end, because the store may go with this process; not for dead ones."""
        assert self._store is not None
        until = time.monotonic() + min(10.0, self.timeout)
        left = set(range(1, self.world))
        while left and time.monotonic() < until:
            left = {rank for rank in left if not self._store.check([f"heard/{rank}"])}
            left = {rank for rank in left if not self._failed(rank)}
            time.sleep(0.05)

    def _failed(self, rank: int) -> bool:
        assert self._store is not None
        key = f"end/{rank}"
        return self._store.check([key]) and json.loads(self._store.get(key))["status"] != "ok"

    def _stay_alive(self) -> None:
        """The thread that tells and listens until the end."""
        pause = min(2.0, self.timeout / 8)
        seen: dict[int, tuple[str, float]] = {}
        beat = count()
        start = time.monotonic()
        try:
            while not self._ended.wait(pause):
                self._exchange(next(beat), seen, start)
        except RuntimeError:
            if not self._ended.is_set():
                self._lost = self._lost or self._silent(0)

    def _exchange(self, beat: int, seen: dict[int, tuple[str, float]], start: float) -> None:
        store = self._store
        assert store is not None
        store.set(f"alive/{self.rank}", f"{beat} {self.finished}")
        if not self.lead and self._over is None and store.check(["over"]):
            content = json.loads(store.get("over"))
            store.set(f"heard/{self.rank}", "")
            if content["status"] == "ok":
                self._over = content
            else:
                self._lost = _heard(content, 0, self.world)
        if self._over is not None or self._lost is not None:
            return
        for rank in range(1, self.world) if self.lead else (0,):
            now = time.monotonic()
            if store.check([f"end/{rank}"]):
                content = json.loads(store.get(f"end/{rank}"))
                if content["status"] != "ok":
                    self._lost = _heard(content, rank, self.world)
                elif self.lead:
                    self._others[rank] = content["images"]
                continue
            last = store.get(f"alive/{rank}").decode() if store.check([f"alive/{rank}"]) else ""
            if seen.get(rank, ("", 0.0))[0] != last:
                seen[rank] = last, now
                self._others[rank] = int(last.split()[1])
            if now - (seen[rank][1] if rank in seen else start) > self.timeout:
                self._lost = self._silent(rank)

    def _silent(self, rank: int) -> RunError:
        return RunError(
            f"Process {rank} of {self.world} has ended without a word (killed, out of memory, or its node is gone). "
            "Finished images are kept; continue with --resume, with any number of processes."
        )


def _told(error: BaseException) -> dict[str, Any]:
    status = "interrupted" if isinstance(error, (KeyboardInterrupt, Interrupted)) else "failed"
    return {"status": status, "kind": type(error).__name__, "message": str(error)}


def _heard(content: dict[str, Any], rank: int, world: int) -> BaseException:
    """What another process has told, as an error of the same kind."""
    if content["status"] == "interrupted":
        return KeyboardInterrupt()
    kind = getattr(errors, content["kind"], RunError)
    kind = kind if isinstance(kind, type) and issubclass(kind, OvbenchError) else RunError
    message = str(content["message"])
    return kind(message if message.startswith("Process ") else f"Process {rank} of {world}: {message}")


def require_launcher(launcher: str) -> None:
    """Nothing, if there is such a launcher.

    Raises:
        UsageError: There is not.
    """
    if launcher not in LAUNCHERS:
        raise UsageError(f"--launcher {launcher!r}: give {', '.join(LAUNCHERS)}.")


def join(launcher: str) -> Team:
    """The processes that a launcher has started together, this one joined to them now.

    Args:
        launcher: ``none``, ``pytorch`` (torchrun) or ``slurm`` (srun).

    Raises:
        UsageError: An unknown launcher, or this process was not started by it.
        RunError: The others cannot be reached.
    """
    require_launcher(launcher)
    if launcher == "none":
        return Team()
    require_started(launcher)
    timeout = _timeout()
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=_JOIN)))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"The other processes cannot be reached at {where}: {str(error).splitlines()[0]}") from error
    if world == 1:
        return Team()
    return Team(PrefixStore(f"ovbench-run-{next(_calls)}", store), rank, world, timeout)


def require_started(launcher: str) -> None:
    """Nothing, if that launcher has started this process; what slurm calls it then stands under torchrun's names as well.

    Raises:
        UsageError: It has not.
    """
    if launcher == "slurm":
        _name_as_torchrun()
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"--launcher pytorch is for processes that torchrun has started ({', '.join(missing)} not set): "
            "torchrun --nproc-per-node 4 -m ovbench run ... --launcher pytorch"
        )


def _timeout() -> float:
    text = os.environ.get(_TIMEOUT, "120")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{_TIMEOUT}={text!r}: give seconds, e.g. 120.")
    return seconds


def _name_as_torchrun() -> None:
    """What srun calls its tasks, under the names of torchrun.

    Raises:
        UsageError: No task of srun, or its first node cannot be asked for.
    """
    env = os.environ
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    missing = [name for name in names.values() if name not in env]
    if missing:
        raise UsageError(
            f"--launcher slurm is for tasks of srun ({', '.join(missing)} not set): srun ovbench run ... --launcher slurm"
        )
    env.update({name: env[source] for name, source in names.items()})
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
        try:
            told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            env["MASTER_ADDR"] = told.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise UsageError(f"scontrol does not tell the first of the nodes '{nodes}': set MASTER_ADDR.") from error
    # the same in all tasks of a job, and another than that of most jobs beside it
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
