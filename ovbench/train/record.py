"""What is kept of a training: spec, machine, losses, and the state it is in; one folder for each."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ovbench.errors import DataError, OvbenchWarning, RunError
from ovbench.hashing import sha256_of, sha256_of_file
from ovbench.results.record import Environment, json_text
from ovbench.train.recipe import ADDED_LATER, Recipe

DEFAULT_ROOT = Path("results") / "trainings"
RECORD, LOSSES, CURVES, WEIGHTS, CHECKPOINTS, SUBSET = (
    "training.json", "losses.jsonl", "losses.png", "model.safetensors", "checkpoints", "images.txt",
)  # fmt: skip
VALIDATION, VALIDATION_CURVE, BEST = "validation.jsonl", "validation.png", "best.safetensors"
_STRICT = ConfigDict(extra="forbid", frozen=True)


class TrainSpec(BaseModel):
    """Everything that can move the weights."""

    model_config = _STRICT

    method: str = Field(description="method id")
    method_options: dict[str, Any] = Field(default_factory=dict, description="every field of the method's config")
    arch: str = Field(description="encoder, or open_clip architecture")
    weights: str = Field("random", description="what training starts from: 'random', a tag, or a file's name")
    weights_sha256: str | None = Field(None, description="hash of that file")
    init: str | None = Field(None, description="name of the file with a whole network that training starts from")
    init_sha256: str | None = Field(None, description="hash of that file")
    wording: str | None = Field(None, description="word list of the classes; null for closed-set methods")
    templates: str | None = Field(None, description="how words become sentences; null for closed-set methods")
    templates_sha256: str | None = Field(None, description="hash of those sentences")
    dataset: str = Field(description="benchmark id")
    dataset_version: int = Field(description="version of the benchmark definition")
    dataset_fingerprint: str = Field(description="of the training split's files")
    images: int = Field(ge=1, description="training images that are used")
    subset_sha256: str | None = Field(
        None, description="of the names of these where they are not all (recipe.data_fraction); images.txt lists them"
    )
    recipe: Recipe
    overrides: tuple[str, ...] = Field((), description="fields of the recipe that the user set against the method's")
    planned: int = Field(ge=1, description="iterations of the schedule")
    limit_iters: int | None = Field(None, ge=1, description="stop after so many (a trial)")
    seed: int = Field(0, description="of weights, order, augmentation and dropout")
    device: str = Field("cpu", description="cpu or cuda (index left out)")
    processes: int = Field(1, ge=1, description="processes that train together")
    demo: bool = Field(False, description="generated scenes: a check of the pipeline, no evidence about methods")

    @property
    def stop(self) -> int:
        """Iterations that are done."""
        return min(self.planned, self.limit_iters or self.planned)

    def spec_hash(self) -> str:
        """sha256 over the canonical JSON of all fields: equal hashes are the same training.

        Fields that came later count only where they differ from their default, so that a training keeps its hash.
        """
        content = self.model_dump(mode="json")
        for name in ADDED_LATER:
            if getattr(self.recipe, name) == Recipe.model_fields[name].default:
                del content["recipe"][name]
        for name in ("subset_sha256", "init", "init_sha256"):
            if content[name] is None:
                del content[name]
        return sha256_of(content)


class PartReport(BaseModel):
    """Parameters of one part of a network."""

    model_config = _STRICT

    part: str
    params: int = Field(description="parameters")
    trainable: int = Field(description="of which are trained")
    lr_mult: float | None = Field(description="factor on the learning rate; null where nothing is trained")


class ValidationPoint(BaseModel):
    """Scores on the validation split while a training runs."""

    model_config = _STRICT

    iteration: int = Field(ge=1, description="iterations done")
    miou: float = Field(description="of the exported weights under the method's protocol, in percent")
    branches: dict[str, float] = Field(
        default_factory=dict, description="mIoU of classifiers that are trained but do not decide, in percent"
    )


class TrainRecord(BaseModel):
    """A training, as its folder's ``training.json`` tells."""

    model_config = _STRICT

    schema_version: Literal[1] = 1
    train_id: str = Field(description="start time, digits of the spec's hash, random digits")
    spec: TrainSpec
    spec_hash: str
    status: Literal["running", "ok", "interrupted", "failed"]
    reason: str | None = Field(None, description="why it is not ok")
    iterations: int = Field(ge=0, description="iterations done")
    resumed: int = Field(0, ge=0, description="how often it was resumed")
    parts: tuple[PartReport, ...] = Field(description="parameters by part")
    start: str | None = Field(None, description="what was taken of the file of spec.init, what it left and what is new")
    seconds_per_iteration: float | None = Field(None, description="median of this process' iterations, data included")
    peak_memory_mib: float | None = None
    peak_memory_kind: str | None = None
    final_losses: dict[str, float] = Field(default_factory=dict, description="of the last iteration")
    weights_sha256: str | None = Field(None, description="of model.safetensors; null until there is one")
    validation: tuple[ValidationPoint, ...] = Field((), description="by iteration, with --val-every")
    best_iteration: int | None = Field(
        None, description="of the highest mIoU among them, whose weights are in best.safetensors"
    )
    best_weights_sha256: str | None = Field(None, description="of best.safetensors")
    environment: Environment
    git_commit: str | None
    git_dirty: bool | None
    git_reason: str | None = None
    package_versions: dict[str, str]
    command: str
    started: AwareDatetime
    finished: AwareDatetime | None = None


def write(record: TrainRecord, folder: Path) -> Path:
    """Stores a record whole or not at all.

    Raises:
        RunError: It cannot be written.
    """
    path = folder / RECORD
    partial = path.with_name(f".{RECORD}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json_text(record.model_dump(mode="json")) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"Cannot write '{path}': {error.strerror}. Choose another folder with --results DIR.") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(path: Path) -> TrainRecord:
    """A stored record.

    Raises:
        DataError: Missing or damaged.
    """
    try:
        return TrainRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, ValidationError) as error:
        raise DataError(f"The record '{path}' cannot be read: {str(error).splitlines()[0]}.") from error


def unfinished(root: Path, spec_hash: str) -> Path | None:
    """The newest folder below ``root`` with a training of that spec which did not end well; None where there is none."""
    found = [(record.started, folder) for record, folder in _of_spec(root, spec_hash) if record.status != "ok"]
    return max(found)[1] if found else None


def shorter(root: Path, spec: TrainSpec) -> Path | None:
    """A folder below ``root`` with a training that has ended and differs from ``spec`` in a shorter schedule alone, or None."""

    def rest(one: TrainSpec) -> dict[str, Any]:
        content = one.model_dump(mode="json", exclude={"planned", "overrides", "limit_iters"})
        return {**content, "recipe": {k: v for k, v in content["recipe"].items() if k not in ("iters", "epochs")}}

    for record, folder in _all_of(root):
        if record.status == "ok" and record.spec.planned < spec.planned and rest(record.spec) == rest(spec):
            return folder
    return None


def finished(root: Path, spec_hash: str) -> tuple[TrainRecord, Path] | None:
    """The newest training of that spec which ended well and whose weights are still there, and its folder."""
    for record, folder in sorted(_of_spec(root, spec_hash), key=lambda item: item[0].started, reverse=True):
        weights = folder / WEIGHTS
        if record.status == "ok" and weights.is_file() and sha256_of_file(weights) == record.weights_sha256:
            return record, folder
    return None


def _of_spec(root: Path, spec_hash: str) -> Iterator[tuple[TrainRecord, Path]]:
    return (found for found in _all_of(root) if found[0].spec_hash == spec_hash)


def _all_of(root: Path) -> Iterator[tuple[TrainRecord, Path]]:
    for path in root.glob(f"*/{RECORD}"):
        try:
            record = read(path)
        except DataError as error:
            warnings.warn(f"{error} It is passed over.", OvbenchWarning, stacklevel=2)
            continue
        yield record, path.parent


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is this process' alone; the system lets go of it when the process ends, however it ends.

    Raises:
        RunError: Another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"Another process trains in '{folder}': wait for its end, or start without --resume."
            ) from None
        yield


class LossLog:
    """The losses of every iteration, one JSON line each, appended as they come.

    Args:
        path: The file.
        iteration: Lines beyond this iteration, which a resumed training does again, are dropped.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        kept = [line for line in read_losses(path) if line["iteration"] <= iteration]
        partial = path.with_name(f".{path.name}.part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self.file = path.open("a", encoding="utf-8")

    def add(self, iteration: int, lr: float, losses: dict[str, float]) -> None:
        """Appends one line."""
        self.file.write(json.dumps({"iteration": iteration, "lr": lr, **losses}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Ends it."""
        self.file.close()


def read_losses(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a loss log in order; a last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if isinstance(entry, dict) and "iteration" in entry:
            yield entry
