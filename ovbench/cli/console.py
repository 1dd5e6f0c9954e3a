"""Where the command line writes: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import ProgressColumn

# A file or a pipe has no width: wide enough that no name in a table is folded.
_PIPE_WIDTH = 240


def print_json(data: Any) -> None:
    """Writes data to stdout as indented JSON."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Writes text to stdout as it is, with a line break at the end."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_rich(*items: RenderableType) -> None:
    """Writes rich renderables to stdout; plain and unfolded where it is no terminal."""
    target = console(sys.stdout)
    for item in items:
        target.print(item)


def say(message: str) -> None:
    """One line for the user on stderr."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def fail(message: str) -> None:
    """One red line on stderr that begins with ``Error:``."""
    target = console(sys.stderr)
    # Not folded: a path or a command in it must stay whole for copying.
    target.print(f"Error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def console(stream: IO[str]) -> Console:
    """A rich console on a stream: the terminal's width and colours, or a wide plain one."""
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH)


@contextmanager
def bar(title: str, *, of_bytes: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """A progress callback (done, all) that draws a bar on stderr where that is a terminal, else nothing."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    target = console(sys.stderr)
    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if of_bytes:
        counts = (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=target, transient=True, disable=not target.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def columns() -> tuple[ProgressColumn, ...]:
    """Of a bar of counted things: how many, the task's field ``text``, and the time."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip


@contextmanager
def progress(unit: str, title: str = "evaluating") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with rate and remaining time; a line now and then where stderr is no terminal."""
    from time import monotonic

    from rich.progress import Progress

    target = console(sys.stderr)
    first: list[float] = []
    told = [monotonic()]

    def rate(done: int) -> str:
        if not first:
            first.extend((monotonic(), float(done)))
        seconds = monotonic() - first[0]
        return f"{(done - first[1]) / seconds:.1f} {unit}/s" if seconds > 0 and done > first[1] else ""

    if not target.is_terminal:

        def tell(done: int, total: int) -> None:
            speed = rate(done)
            if monotonic() - told[0] > 30:
                told[0] = monotonic()
                say(f"{done}/{total} {unit}  {speed}")

        yield tell
        return
    with Progress(*columns(), console=target, transient=True) as bar:
        task = bar.add_task(title, total=None, text="")
        yield lambda done, total: bar.update(task, completed=done, total=total, text=rate(done))
