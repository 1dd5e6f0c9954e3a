"""``ovbench list``: the names that other verbs take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich
from ovbench.errors import unknown_name

Entries = list[dict[str, Any]]


def list_names(
    what: Annotated[str | None, typer.Argument(help="methods, datasets or protocols; all three when left out.")] = None,
    json: o.Json = False,
) -> None:
    """Lists the methods, datasets or protocols that there are.

    \b
    Examples:
    ovbench list methods
    ovbench list datasets --json
    """
    if what is not None and what not in _LISTS:
        raise unknown_name("list", what, _LISTS, "ovbench list --help")
    chosen = list(_LISTS) if what is None else [what]
    if json:
        found = {name: _LISTS[name]() for name in chosen}
        print_json(found if what is None else found[what])
        return
    for name in chosen:
        _show(name, _LISTS[name]())


def _methods() -> Entries:
    from ovbench.registry import method_info, method_names

    infos = [method_info(name) for name in method_names(None)]
    infos.sort(key=lambda info: info.track, reverse=True)  # open vocabulary first
    keys = ("name", "summary", "paper", "track", "protocol")
    return [{key: getattr(info, key) for key in keys} for info in infos]


def _datasets() -> Entries:
    from ovbench import benchmarks

    found = [benchmarks.get(name) for name in benchmarks.names()]
    return [
        {
            "name": item.name,
            "title": item.title,
            "version": item.version,
            "classes": item.num_classes,
            "background": item.background is not None,
            "images": item.expected_images,
            "splits": list(item.splits),
            "group": item.group,
            "wordings": list(item.wordings),
        }
        for item in found
    ]


def _protocols() -> Entries:
    from ovbench.spec import protocol_names, protocol_summary

    paper = {"name": "paper", "summary": "each method's own preset (see 'ovbench list methods')"}
    return [{"name": name, "summary": protocol_summary(name)} for name in protocol_names()] + [paper]


_LISTS: dict[str, Callable[[], Entries]] = {"methods": _methods, "datasets": _datasets, "protocols": _protocols}


def _show(title: str, entries: Entries) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title, style="bold"))
    for key in entries[0] if entries else ("name",):
        grid.add_column(key, no_wrap=key == "name", overflow="fold")
    for entry in entries:
        grid.add_row(*(Text(_cell(value)) for value in entry.values()))
    print_rich(grid)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
