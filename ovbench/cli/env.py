"""``ovbench env``: what a record would say about this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ovbench.cli.console import print_json, print_rich
from ovbench.errors import UsageError


def env(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one when left out.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows the machine, the precision settings, package versions and the code's commit.

    \b
    Examples:
    ovbench env
    ovbench env --json > env.json
    """
    import torch

    from ovbench import __version__
    from ovbench.measure.environment import environment, git_state, package_versions
    from ovbench.paths import cache_dir

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"Unknown device '{device}'. Known: cpu, cuda, cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here. Use --device cpu.")
    facts = {
        "ovbench": __version__,
        "environment": environment(device),
        "git": git_state(),
        "package_versions": package_versions(),
        "cache": str(cache_dir()),
    }
    if json:
        print_json(facts)
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in _flat(facts):
        grid.add_row(Text(key), Text("–" if value is None else str(value)))
    print_rich(grid)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((prefix + key, f"{value:.1f}" if isinstance(value, float) else value))
    return lines
