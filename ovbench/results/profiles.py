"""Profiles that ``ovbench profile --save`` stored, read for tables: only the fields that tables need."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ovbench.errors import DataError
from ovbench.results.measured import Measured, flat
from ovbench.results.record import Efficiency, Environment

DEFAULT_ROOT = Path("results") / "profiles"


class _Provenance(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    finished: datetime


class _ProfileFigures(Efficiency):
    """The figures of a record and those of a profile that tables show."""

    # A profile holds more than a table needs; what it needs is checked as in a record.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    convention: str = "not recorded"
    counted: str = ""
    forwards: int | None = Field(None, validation_alias=AliasChoices("forwards", "windows"))  # the older name
    unstable: dict[str, str] = Field(default_factory=dict)


class _Profile(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    run_id: str
    spec: dict[str, Any]
    efficiency: _ProfileFigures
    environment: Environment
    provenance: _Provenance


def read(path: str | os.PathLike[str]) -> Measured:
    """The profile in a file.

    Raises:
        DataError: Missing, unreadable, no JSON, or no profile; names the file and the field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        profile = _Profile.model_validate(data)
        method = str(profile.spec["method"])
    except OSError as error:
        raise DataError(f"Cannot read the profile '{path}': {error.strerror or error}.") from error
    except ValidationError as error:  # before ValueError, whose subclass it is
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "profile"
        raise DataError(f"'{path}' is not a profile: {where}: {first['msg']}.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise DataError(f"'{path}' is not a profile: it is no valid JSON ({error}).") from error
    except KeyError:
        raise DataError(f"'{path}' is not a profile: spec.method: Field required.") from None
    return _measured(profile, str(method))


def _measured(profile: _Profile, method: str) -> Measured:
    spec, figures = profile.spec, profile.efficiency
    options: Mapping[str, Any] = spec.get("method_options") or {}
    weights = str(spec.get("weights", "random"))
    whole = figures.image_gmacs if figures.image_gmacs is not None or spec.get("part") is None else figures.gmacs
    counted = f" ({figures.counted})" if figures.counted else ""
    times = f", {figures.forwards} forwards" if figures.forwards not in (None, 1) else ""
    return Measured(
        id=profile.run_id,
        origin="profile",
        finished=profile.provenance.finished,
        method=method,
        arch=spec.get("arch"),
        weights=weights,
        dataset=spec.get("dataset"),
        environment=profile.environment,
        efficiency=figures,
        options=options,
        fields=flat(spec),
        kinds=("builtin-weights",) if weights == "builtin" else (),
        convention="" if whole is None else f"{figures.convention}{counted}; input {figures.input}{times}",
        image_gmacs=whole,
        notes=tuple(f"{name} marked unstable: {why}" for name, why in sorted(figures.unstable.items())),
    )


def load_all(
    root: str | os.PathLike[str] = DEFAULT_ROOT, *, on_problem: Callable[[str], None] = lambda message: None
) -> list[Measured]:
    """All profiles under ``root``, sorted by path; ``on_problem`` gets the message of each file that is none."""
    found = []
    for path in sorted(Path(root).glob("*/*.json")):
        if path.name.startswith("."):
            continue
        try:
            found.append(read(path))
        except DataError as error:
            on_problem(f"Left out: {error}")
    return found
