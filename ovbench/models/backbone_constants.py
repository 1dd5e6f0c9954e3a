"""Constants that depend on the backbone: what was published for which one, and what is used on the others.

A method's class holds a literal table, ``BACKBONES``, so that the tables of results can read it as text:

    BACKBONES = {"ViT-B/16": {"source": "...", "values": {"pre": 8}}, "ViT-L/14": {"source": "...", "values": {"pre": 16}}}

A field that stands in the table has the default None in the method's config, "the backbone's own"; an entry without values
says that the config's own defaults were published for that backbone too. The first entry is the reference: a backbone that
the table does not know gets the values of one as deep, else those of the reference, and that is *inferred*. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

# Blocks of the ViTs of OpenAI and open_clip by the letter in their names
_DEPTHS = {"s": 12, "m": 12, "b": 12, "l": 24, "h": 32, "g": 40, "bigg": 48, "e": 56}
_NAMED = re.compile(r"(?:vit|eva01)[-_ ]?(bigg|[smblhge])[-/](\d+)", re.IGNORECASE)
_SHAPED = re.compile(r"openai-format-ViT-(\d+)x\d+-(\d+)")

Table = Mapping[str, Mapping[str, Any]]


class Backbone(NamedTuple):
    """What constants are published for.

    Attributes:
        depth: Blocks.
        patch: Side of a patch in pixels.
    """

    depth: int
    patch: int


class Constants(NamedTuple):
    """Constants in force on a backbone.

    Attributes:
        values: By field of the method's config.
        told: For people and records: where they are published, or "inferred for this backbone: ..." and how.
        inferred: Whether they were not published for this backbone.
    """

    values: Mapping[str, Any]
    told: str
    inferred: bool


def backbone_named(arch: str | None) -> Backbone | None:
    """Depth and patch of an architecture as papers, open_clip and records name it; None where the name does not tell."""
    name = arch or ""
    if name.startswith("builtin-ViT-12x"):
        return Backbone(12, 16)
    shaped = _SHAPED.match(name)
    if shaped:
        return Backbone(int(shaped[1]), int(shaped[2]))
    named = _NAMED.search(name)
    return Backbone(_DEPTHS[named[1].lower()], int(named[2])) if named else None


def constants_of(table: Table, backbone: Backbone, elsewhere: str = "") -> Constants:
    """The constants of a method on a backbone.

    Args:
        table: ``BACKBONES`` of the method's class, not empty.
        backbone: What it runs on.
        elsewhere: What the method does with them on backbones that are not in the table, in words.
    """
    known = {name: backbone_named(name) for name in table}
    for name, entry in table.items():
        if known[name] == backbone:
            return Constants(entry["values"], f"published for {name} ({entry['source']})", False)
    alike = [name for name, own in known.items() if own is not None and own.depth == backbone.depth]
    taken = alike[0] if alike else next(iter(table))
    told = (
        f"inferred for this backbone ({backbone.depth} blocks, patch {backbone.patch}): published for "
        f"{', '.join(table)}; those of {taken} are used{f', {elsewhere}' if elsewhere and not alike else ''}"
    )
    return Constants(table[taken]["values"], told, True)


def in_force(config: Any, constants: Constants) -> Any:
    """A method's config with the backbone's values where the user has set none."""
    unset = {field.name for field in fields(config) if getattr(config, field.name) is None}
    found = {name: value for name, value in constants.values.items() if name in unset}
    return replace(config, **found) if found else config
