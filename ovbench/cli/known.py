"""What help says of names that are defined elsewhere, looked up when it is asked for; and options that have moved."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, get_args

import typer.core

# (verb, what was given) -> what to give; one release of a clear message, then they can go (0.3.0).
MOVED = {
    ("table", "-o"): "--out",
    ("report", "-o"): "--out",
    ("verify", "--images"): "--limit",
    ("compare", "--classes"): "--show-classes",
    ("data synth", "--classes"): "--num-classes",
    ("train", "--results"): "--trainings (of the evaluation's record: --runs)",
    ("profile", "--results"): "--profiles",
}

# Where the names that help speaks of are defined. Looked up late: most need an import that other commands do without.
_PLACES = {
    "solvers": "ovbench.registry:solver_names",
    "sources": "ovbench.networks.attention_names:source_names",
    "devices": "ovbench.spec:DEVICES",
    "dtypes": "ovbench.cli.known:dtypes",
    "launchers": "ovbench.evaluate.ranks:LAUNCHERS",
    "papers": "ovbench.tables.published:papers",
    "splits": "ovbench.cli.inputs:SPLITS",
    "attributes": "ovbench.words.prompts:ATTRIBUTES",
    "default_attributes": "ovbench.cli.known:default_attributes",
    "conventions": "ovbench.measure.conventions:CONVENTIONS",
    "trackers": "ovbench.evaluate.track:PACKAGES",
    "figures": "ovbench.results.quantities:FIGURES",
    "costs": "ovbench.tables.pareto:COSTS",
}


class Verb(typer.core.TyperCommand):
    """A command whose help has its names filled in."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help; ``{names}`` in the help of options are replaced by what there is."""
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            if text:
                parameter.help = filled(text)  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def filled(text: str) -> str:
    """A help text with ``{names}`` replaced: a key of :data:`_PLACES`, or a field of a run's spec that has choices.

    Raises:
        KeyError: There is no such list of names.
    """
    return re.sub(r"\{(\w+)\}", lambda found: listed(names(found[1])), text)


def listed(given: list[str]) -> str:
    """``["a", "b", "c"]`` as "a, b or c"."""
    return " or ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)


def moved(command: str, given: str) -> str | None:
    """What is called otherwise now, in words; None where nothing is known of it.

    Args:
        command: The verb with what stands before it, e.g. ``"ovbench data synth"``.
        given: The option that the verb does not have.
    """
    target = MOVED.get((command.partition(" ")[2], given))
    return None if target is None else f"'{given}' is called {target} now."


def names(key: str) -> list[str]:
    """The names behind a ``{key}``.

    Raises:
        KeyError: There is no such list.
    """
    if key in _PLACES:
        module, _, attribute = _PLACES[key].partition(":")
        found = getattr(import_module(module), attribute)
        return list(found() if callable(found) else found)
    from ovbench.spec import Protocol, RunSpec

    field = Protocol.model_fields.get(key) or RunSpec.model_fields[key]
    return list(get_args(field.annotation))


def dtypes() -> list[str]:
    """Precisions, each with its short spelling."""
    from ovbench.spec import DTYPES

    return [f"{name} ({short})" for name, short in DTYPES.items()]


def default_attributes() -> list[str]:
    """The customary attributes of a description, as ``--attributes`` takes them."""
    from ovbench.words.prompts import DEFAULT_ATTRIBUTES

    return ["+".join(DEFAULT_ATTRIBUTES)]
