"""Processes forked from one that has imported everything: a test waits for what it tests, not for torch's imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What the slowest commands import; the first to start a process decides for all that follow in a test session.
PRELOAD = (
    "open_clip", "matplotlib.pyplot", "ovbench.cli.app", "ovbench.evaluate.session", "ovbench.evaluate.loop",
    "ovbench.mm.segmentor", "ovbench.train.runner",
)  # fmt: skip


def context() -> Any:
    """The context of :mod:`multiprocessing` whose processes are forked from the one that has imported everything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(PRELOAD))
    return found


def _call(function: Callable[..., int], arguments: Any, cwd: str, env: dict[str, str], out: str, err: str) -> None:
    os.setsid()  # a group that can be signalled as a scheduler does
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, stream)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # the usual one for what it starts itself
    import torch

    torch.set_num_threads(1)
    raise SystemExit(function(arguments))


def ovbench(argv: Sequence[str]) -> int:
    """What the command ``ovbench`` does."""
    from ovbench.cli.app import run_command

    sys.argv = ["ovbench", *argv]
    return run_command(argv)


def python(code: str) -> int:
    """What ``python -c CODE`` does."""
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    return 0


class Started:
    """A process that was started, as :class:`subprocess.Popen` shows one.

    Args:
        function: :func:`ovbench` or :func:`python`.
        arguments: Of it.
        cwd: Its working folder.
        env: Changes of its environment.
    """

    def __init__(
        self, function: Callable[[Any], int], arguments: Any, *, cwd: Path | str, env: Mapping[str, str] | None = None
    ) -> None:
        self._said = tempfile.TemporaryDirectory()
        self._files = [Path(self._said.name, name) for name in ("out", "err")]
        for path in self._files:
            path.touch()
        files = [str(path) for path in self._files]
        self._process = context().Process(
            target=_call, args=(function, arguments, str(cwd), {**os.environ, **(env or {})}, *files)
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, the negative number of the signal that ended it, or None."""
        return self._process.exitcode  # type: ignore[no-any-return]

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote on stdout and stderr, when it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        out, err = (path.read_text(encoding="utf-8") for path in self._files)
        return out, err
