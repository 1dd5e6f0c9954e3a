"""Ctrl-C and SIGTERM: what must not be cut in two is finished first, and readers leave the decision to the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ASKED = (signal.SIGINT, signal.SIGTERM)
# torch raises an error wherever the program is when a reader dies
_HELD = (*ASKED, signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else ASKED


@contextmanager
def held_back(*, deliver: bool = True, patient: bool = True) -> Iterator[None]:
    """A signal that comes inside the block takes effect after it.

    Exceptions that signals raise anywhere would leave half lines, and locks of libraries taken for ever. Only the main
    thread handles signals; in others the block runs as it is.

    Args:
        deliver: False drops what comes.
        patient: False lets a second Ctrl-C or SIGTERM interrupt the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {}

    def note(number: int, frame: object) -> None:
        if not patient and number in ASKED and any(earlier in ASKED for earlier in came):
            raise KeyboardInterrupt
        came.append(number)

    try:
        for number in _HELD:
            handler = signal.signal(number, note)
            before[number] = signal.SIG_DFL if handler is None else handler
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in _HELD:
        if deliver and number in came:
            signal.raise_signal(number)


def leave_signals(worker: int = 0) -> None:
    """Ignores both in a reader process: a scheduler signals all processes, and the batch in flight is still wanted."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)
