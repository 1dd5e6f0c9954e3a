"""The command line: one file per verb; the only code that prints or exits."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status (the entry point ``ovbench``).

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    from ovbench.cli.app import run_command

    raise SystemExit(run_command(argv))
