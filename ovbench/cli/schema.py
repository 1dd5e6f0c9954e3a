"""``ovbench schema``: the JSON schema of a record."""

from __future__ import annotations

from ovbench.cli import options as o
from ovbench.cli.console import print_json


def schema(
    json: o.Json = False,
) -> None:
    """Prints the JSON schema of a run record, with the unit of every figure; it is JSON with or without --json.

    \b
    Examples:
    ovbench schema > record.schema.json
    """
    from ovbench.results.record import schema as record_schema

    print_json(record_schema())
