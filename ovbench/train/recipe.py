"""How a network is trained: optimiser, schedule, augmentation, precision. Methods declare recipes by benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ovbench.errors import UsageError, unknown_name
from ovbench.paths import user_path
from ovbench.spec import long_dtype, validated

# Fields that the first released trainings do not have: at their defaults, which is what was done before, no hash knows them.
ADDED_LATER = (
    "accumulate", "checkpoint_activations", "data_fraction", "norm_of_parts", "head_lr_mult", "norm_decay",
)  # fmt: skip
# Fields that move the weights by rounding at most: a trained file need not tell them.
SAME_WEIGHTS = ("accumulate", "checkpoint_activations")
ANY = "*"  # stands for every benchmark that a method has no own recipe for


def _no_restarts(value: Any) -> Any:
    """The schedule as given.

    Raises:
        ValueError: One with warm restarts.
    """
    if "restart" in str(value).lower():
        raise ValueError(
            "a schedule falls once: after a warm restart nothing would tell the end of a training from its middle, nor weights "
            "of one from weights of the other. Start a second training from the weights of the first with --init."
        )
    return value


Schedule = Annotated[Literal["poly", "cosine", "constant"], BeforeValidator(_no_restarts)]


class Recipe(BaseModel):
    """Everything that moves the weights besides network, data and seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimiser")
    lr: float = Field(gt=0, description="learning rate; groups of parameters may have factors on it")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(ge=0, description="weight decay")
    schedule: Schedule = Field("poly", description="learning rate over the iterations")
    power: float = Field(0.9, gt=0, description="of the poly schedule")
    min_lr: float = Field(0.0, ge=0, description="learning rate that the schedule ends at")
    warmup_iters: int = Field(0, ge=0, description="iterations of linear warm-up")
    warmup_factor: float = Field(1e-3, gt=0, le=1, description="factor that the warm-up starts from")
    iters: int | None = Field(None, ge=1, description="iterations; either these or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training images")
    batch: int = Field(ge=1, description="images per iteration, of all processes together")
    crop: int = Field(ge=8, description="side of the square crop in pixels")
    resize: tuple[int, int] = Field(
        (2048, 512), description="limits of the long and the short side, before ratio_range scales both"
    )
    ratio_range: tuple[float, float] = Field((0.5, 2.0), description="random factor on the size")
    cat_max_ratio: float = Field(
        0.75, gt=0, le=1, description="most that one class may fill of a crop (tried ten times)"
    )
    flip: float = Field(0.5, ge=0, le=1, description="share of mirrored images")
    photometric: bool = Field(True, description="random brightness, contrast, saturation and hue")
    grad_clip: float | None = Field(None, gt=0, description="largest norm of the gradient; None = no limit")
    amp: Annotated[Literal["off", "bfloat16", "float16"], BeforeValidator(long_dtype)] = Field(
        "off", description="autocast of the forward"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="weight of the new parameters in their running mean; None = no mean"
    )
    sync_bn: bool = Field(True, description="batch statistics over all processes, where there are several GPUs")
    accumulate: int = Field(
        1, ge=1, description="parts in which a process takes its images of an iteration; their gradients are added up"
    )
    checkpoint_activations: bool = Field(
        False, description="keep less for the backward pass and compute it again: less memory, a third more operations"
    )
    data_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training images that is used, drawn once by the seed"
    )
    norm_of_parts: bool = Field(
        False, description="with accumulate, batch norm takes the statistics of each part, as of smaller batches"
    )
    head_lr_mult: float = Field(
        1.0, gt=0, description="factor on the learning rate of decode and auxiliary heads (closed-set methods)"
    )
    norm_decay: bool = Field(True, description="norms and biases decay as well, where a method does not say otherwise")
    policy: str = Field("all", description="which parameters are trained; the method says what it knows")

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        if (self.iters is None) == (self.epochs is None):
            raise ValueError("give either iters or epochs")
        if not 0 < self.ratio_range[0] <= self.ratio_range[1]:
            raise ValueError("ratio_range must be two factors above 0, the smaller first")
        return self

    def iterations(self, images: int) -> int:
        """Iterations on a training set of that many images."""
        return self.iters if self.iters is not None else math.ceil(images / self.batch * float(self.epochs or 0))


def recipe(
    declared: dict[str, dict[str, Any]],
    benchmark: str,
    source: Path | None = None,
    changes: dict[str, str] | None = None,
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of a method for a benchmark, and the fields that the user set against it.

    Args:
        declared: The method's recipes by benchmark; ``"*"`` for all others.
        benchmark: Benchmark id.
        source: File with fields (JSON or YAML) that replace the declared ones.
        changes: Fields as text, from ``--set key=value``. Setting ``iters`` takes ``epochs`` away and the other way round.

    Raises:
        UsageError: No recipe and no file; an unknown field; a value that does not fit.
    """
    fields = dict(declared.get(benchmark, declared.get(ANY, {})))
    given: dict[str, Any] = {} if source is None else _read(source)
    given |= {key: _value(text) for key, text in (changes or {}).items()}
    for key in given:
        if key not in Recipe.model_fields:
            raise unknown_name("field of a recipe", key, Recipe.model_fields, "ovbench train --help")
    if not fields and source is None:
        raise UsageError(
            f"There is no recipe for {benchmark}. Known: {', '.join(declared) or 'none'}. Give one with --recipe FILE."
        )
    for one, other in (("iters", "epochs"), ("epochs", "iters")):
        if given.get(one) is not None and other not in given:
            fields.pop(other, None)
    try:
        before = Recipe(**fields) if fields else None
    except ValueError:  # a declared recipe is complete; what is in a file alone is checked below
        before = None
    result: Recipe = validated(Recipe, {**fields, **given})
    moved = [key for key in given if before is None or getattr(before, key) != getattr(result, key)]
    return result, tuple(sorted(moved))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = user_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the recipe '{path}': {error}.") from None
    import yaml  # type: ignore[import-untyped]

    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # PyYAML lets some through
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"The recipe '{path}' is neither JSON nor YAML: {reason[0]}.") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"The recipe '{path}' must hold fields and values, e.g. 'lr: 0.01'.")
    if content.get("amp") is False:  # YAML reads "off" so
        content["amp"] = "off"
    return content


def _value(text: str) -> Any:
    """A value as typed: JSON where it is, ``a,b`` as two values, ``none`` as None, else the text."""
    if text.lower() in {"none", "null"}:
        return None
    for attempt in (text, f"[{text}]"):
        try:
            return json.loads(attempt)
        except ValueError:
            continue
    return text
