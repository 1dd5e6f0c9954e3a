"""``ovbench schema``: the JSON schema of a record."""

from __future__ import annotations

from typing import Annotated

import typer

from ovbench.cli.console import print_json


def schema(
    json: Annotated[bool, typer.Option("--json", help="The schema is JSON with or without this.")] = False,
) -> None:
    """Prints the JSON schema of a run record, with the unit of every figure.

    \b
    Examples:
    ovbench schema > record.schema.json
    """
    from ovbench.results.record import schema as record_schema

    print_json(record_schema())
