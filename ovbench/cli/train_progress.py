"""Progress of a training on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic

from ovbench.cli.console import columns, console, say

EVERY = 30.0  # seconds between lines


class LogLines:
    """Lines with all losses and the time that is left: the first iteration, then one every half minute, and the last.

    Args:
        clock: Seconds, running.
        tell: Receives the lines.
    """

    def __init__(self, clock: Callable[[], float] = monotonic, tell: Callable[[str], None] = say) -> None:
        self.clock, self.tell = clock, tell
        self.first: tuple[int, float] | None = None
        self.told = 0.0

    def __call__(self, done: int, total: int, lr: float, losses: Mapping[str, float]) -> None:
        """After an iteration."""
        now = self.clock()
        start = self.first is None
        if self.first is None:
            self.first = done, now
        if not start and now - self.told < EVERY and done != total:
            return
        self.told = now
        told = "  ".join(f"{name} {value:.4g}" for name, value in losses.items() if name != "loss")
        text = f"{done}/{total} iterations  lr {lr:.3g}  loss {total_loss(losses):.4g}  {told}"
        passed = done - self.first[0]
        if passed and done < total:
            text += f"  {_duration((now - self.first[1]) / passed * (total - done))} left"
        self.tell(text)


def total_loss(losses: Mapping[str, float]) -> float:
    """What is optimised: ``loss``, or the sum of the parts."""
    return losses.get("loss", sum(value for name, value in losses.items() if "loss" in name))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def bars(launcher: str) -> Iterator[tuple[Callable[..., None], Callable[[int, int], None]]]:
    """Progress of iterations (with losses and remaining time) and of counted files, on stderr."""
    from rich.progress import Progress

    target = console(sys.stderr)
    if not target.is_terminal or launcher != "none":
        yield LogLines(), lambda done, total: None
        return
    with Progress(*columns(), console=target, transient=True, speed_estimate_period=120) as bar:
        training = bar.add_task("training", total=None, text="", visible=False)
        counting = bar.add_task("counting pixels of classes", total=None, text="", visible=False)

        def step(done: int, total: int, lr: float, losses: dict[str, float]) -> None:
            text = f"lr {lr:.3g}  loss {total_loss(losses):.4g}"
            bar.update(training, completed=done, total=total, text=text, visible=True)

        def count(done: int, total: int) -> None:
            bar.update(counting, completed=done, total=total, visible=done < total)

        yield step, count
