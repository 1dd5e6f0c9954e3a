"""``ovbench env``: what a record would say about this machine."""

from __future__ import annotations

from typing import Any

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich
from ovbench.cli.inputs import default_device


def env(
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Shows the machine, the precision settings, package versions and the code's commit.

    \b
    Examples:
    ovbench env
    ovbench env --json > env.json
    """
    from ovbench import __version__
    from ovbench.measure.environment import environment, git_state, package_versions
    from ovbench.models.build import require_device
    from ovbench.paths import cache_dir

    device = device or default_device()
    require_device(device)
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
