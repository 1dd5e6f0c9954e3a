"""Processes that read images: they leave signals to the run, and they end with it, however it ends."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from ovbench.evaluate.signals import held_back, leave_signals


class Readers(DataLoader[Any]):
    """A loader whose processes ignore Ctrl-C and SIGTERM, so somebody must end them: read it inside ``with``.

    At its exit Python sends SIGTERM to processes that are left over and waits for them, which would be for ever; and an
    exception keeps the loader until then, through the frames of its traceback.

    Args:
        dataset: What is read.
        options: Of torch's ``DataLoader``.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=leave_signals, **options)
        self._reading: list[Any] = []

    def __iter__(self) -> Any:
        with held_back():  # a process that is being started would take the signal as its own
            batches = super().__iter__()
        if self.num_workers:
            self._reading.append(batches)
        return batches

    def close(self) -> None:
        """Ends the processes. A pass over the data that is not finished cannot go on."""
        self._iterator = None  # of processes that outlive a pass
        while self._reading:
            batches = self._reading.pop()
            batches._shutdown_workers()
            for process in batches._workers:
                if process.is_alive():  # busy with a file for longer than torch waits
                    process.kill()
                    process.join()

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
