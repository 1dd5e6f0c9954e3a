"""Errors that reach a user: what is wrong, what was given, what is allowed, what to do.

Each class carries the exit code of the command line (see ``ovbench --help``). Programming errors stay ordinary Python
exceptions: only what a user can mend is an ``OvbenchError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OvbenchError(Exception):
    """A failure with a message written for the user. ``exit_code`` is the status of the process."""

    exit_code = 1


class UsageError(OvbenchError):
    """A wrong or contradictory option, an unknown name, an empty class list."""

    exit_code = 2


class NoBackgroundError(UsageError):
    """Thresholds that leave pixels to a background class, where there is none."""


class DataError(OvbenchError):
    """A dataset, image or label file that is missing, unreadable or in the wrong format."""

    exit_code = 3


class WeightsError(OvbenchError):
    """Weights that are missing, cannot be downloaded or do not fit the architecture."""

    exit_code = 4


class RunError(OvbenchError):
    """An evaluation that failed on the way (NaN logits, out of memory, no disk space); finished work is kept."""

    exit_code = 5


class Interrupted(OvbenchError):
    """Ctrl-C or SIGTERM; what was finished is kept and ``--resume`` continues."""

    exit_code = 130


class OvbenchWarning(UserWarning):
    """Something that a user should know and may want to change; the command line prints it as one line."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def unknown_name(kind: str, given: str, allowed: Iterable[str], see: str | None = None) -> UsageError:
    """The error for a name that is not in a registry, with the nearest names and where to find them all.

    Args:
        kind: What the name stands for, e.g. ``"dataset"``.
        given: The name as the user typed it.
        allowed: All known names.
        see: The command that lists them, e.g. ``"ovbench list datasets"``.
    """
    names = sorted(allowed)
    lowered = {name.lower().replace("_", "-"): name for name in names}
    key = given.lower().replace("_", "-")
    likeness = {name: difflib.SequenceMatcher(None, key, low).ratio() for low, name in lowered.items()}
    near = sorted((name for name in names if likeness[name] >= 0.5), key=lambda name: (-likeness[name], name))[:3]
    near += [name for low, name in sorted(lowered.items()) if key and low.startswith(key) and name not in near]
    message = f"Unknown {kind} '{given}'."
    if near:
        message += f" Did you mean: {', '.join(near[:4])}?"
    elif len(names) <= 12:
        message += f" Known: {', '.join(names)}."
    if see:
        message += f" See '{see}'."
    return UsageError(message)
