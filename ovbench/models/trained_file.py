"""The file that a training leaves: safetensors with what the weights are of in its header."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ovbench.errors import RunError, WeightsError
from ovbench.registry import is_path

KEY = "ovbench"  # of the header's metadata


class About(BaseModel):
    """What a trained file is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="method id")
    method_options: dict[str, Any] = Field(description="every field of the method's config")
    arch: str = Field(description="encoder, or open_clip architecture")
    dataset: str = Field(description="benchmark it was trained on")
    class_names: list[str] = Field(description="classes in label order")
    words: list[str] = Field([], description="word of each class as trained; empty: see class_names")
    training: str = Field(description="id of the training's record")
    spec_hash: str = Field(description="hash of the training's spec")
    iterations: int = Field(description="iterations done")
    planned: int = Field(description="iterations of the recipe")
    overrides: list[str] = Field([], description="what was set against the method's recipe, 'policy=frozen-clip'")
    demo: bool = Field(False, description="trained on generated scenes")


def save(path: Path, state: dict[str, Tensor], about: About) -> None:
    """Writes the file under another name and moves it into place.

    Raises:
        RunError: It cannot be written.
    """
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
    try:
        save_file(tensors, partial, metadata={KEY: about.model_dump_json()})
        os.replace(partial, path)
    except Exception as error:  # safetensors wraps what the system says
        raise RunError(f"Cannot write the weights '{path}': {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def training_facts(about: About | None) -> dict[str, Any]:
    """What a run's record says of its weights' training beside the options; empty for weights that are not ours."""
    return {} if about is None else {"trained_on": about.dataset, "training_overrides": about.overrides}


def require_method(about: About, method: str) -> None:
    """Nothing, if the weights are of that method.

    Raises:
        WeightsError: They are of another.
    """
    if about.method != method:
        raise WeightsError(f"The weights are of '{about.method}', not of '{method}': use --method {about.method}.")


def options_again(recorded: dict[str, Any], cls: Any) -> dict[str, Any]:
    """The options that a network was trained with, of a record's options, which also hold what was found out.

    An option that came later stands at what was done before it existed (``BEFORE``), whatever its default is now.

    Raises:
        WeightsError: They name a method from a file: a file of weights does not decide which code is run.
    """
    if is_path(str(recorded.get("base", ""))):
        raise WeightsError(
            f"The weights name the file '{recorded['base']}' as their base method: give --option base=NAME."
        )
    known = {field.name for field in fields(cls.Config)}
    return {key: value for key, value in {**cls.BEFORE, **recorded}.items() if key in known and value is not None}


def read_about(path: Path) -> About | None:
    """What a file is of; None for one that no training of ovbench wrote.

    Raises:
        WeightsError: A header that is damaged.
    """
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
        return None if text is None else About(**json.loads(text))
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"What '{path}' says of itself cannot be read: {str(error).splitlines()[0]}.") from error
    except Exception as error:  # safetensors' own kinds
        raise WeightsError(f"Cannot read weights from '{path}': {str(error).splitlines()[0]}.") from error
