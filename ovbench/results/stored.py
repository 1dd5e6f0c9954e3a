"""The base of everything that a record holds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Stored(BaseModel):
    """A part of a record: unknown fields are refused, and it does not change."""

    # NaN and infinity are no JSON: a figure that cannot be had is null with a reason.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
