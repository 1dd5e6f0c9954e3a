"""What ``ovbench profile`` stores: what was profiled, on what machine, and every figure with its convention.

Needs no torch, so that tables can read profiles at once. Numbers are unrounded; a figure that could not be had is null,
and the field ``<figure>_reason`` says why.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ovbench.errors import DataError, RunError
from ovbench.hashing import sha256_of
from ovbench.measure.conventions import Convention
from ovbench.results.record import Efficiency, Environment, Latency, Provenance, json_text
from ovbench.results.store import path_name
from ovbench.spec import DType, Protocol

SCHEMA_VERSION: Literal[1] = 1
DEFAULT_ROOT = Path("results") / "profiles"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProfileSpec(_Stored):
    """What is profiled. Fields that the user leaves open are filled in by the profiling process."""

    method: str = Field(description="method id, or a decode head's with part decode_head")
    method_options: dict[str, Any] = Field(default_factory=dict, description="every field of the method's config")
    part: Literal["decode_head"] | None = Field(None, description="decode_head: a closed-set head on features alone")
    arch: str | None = Field(None, description="open_clip architecture, or a decode head's encoder")
    weights: str = Field("random", description="as in a run's spec; the cost does not depend on them")
    weights_sha256: str | None = Field(None, description="hash of the weights used; null for decode heads")
    activation: Literal["auto", "gelu", "quickgelu"] = Field("auto", description="as in a run's spec")
    dataset: str | None = Field(None, description="benchmark whose preset values and words are meant; null = none")
    classes: int | None = Field(None, ge=1, description="K")
    words: int | None = Field(None, ge=1, description="Q, words over all classes; null for decode heads")
    protocol: Protocol | None = Field(
        None, description="windows and decision; templates are 'plain': text is embedded once and not profiled"
    )
    input: str | None = Field(None, description="whole image HxW at the network's input size, and of the label map")
    features: str | None = Field(None, description="grids HxW of C1 to C4 that a decode head takes")
    batch: int = Field(1, ge=1, description="images (inputs of a forward) per step; times are shared out")
    device: str | None = Field(None, description="cpu, cuda or cuda:N")
    dtype: DType = "float32"
    threads: int | None = Field(None, ge=1, description="CPU threads that the process is fixed to")
    window_batch: int | None = Field(None, ge=1, description="as in a run's spec")
    compile_mode: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    count: Convention = Field("torch", description="convention of gmacs and gflops")
    samples: int = Field(30, ge=1, description="timed passes per figure")
    repeat: int = Field(1, ge=1, description="fresh processes that the figures are taken in")
    params_only: bool = Field(False, description="parameters alone")
    throughput: bool = Field(True, description="whether the best batch was searched")
    seed: int = Field(0, description="seed of random weights and of the input")

    @field_validator("input", "features")
    @classmethod
    def _sizes(cls, value: str | None) -> str | None:
        return None if value is None else value.replace(" ", "").lower()

    def spec_hash(self) -> str:
        """sha256 over the canonical JSON of all fields."""
        return sha256_of(self.model_dump(mode="json"))


class PartSize(_Stored):
    """Parameters of one part."""

    params_m: float = Field(ge=0, description="million parameters")
    trainable_params_m: float = Field(ge=0, description="million parameters with requires_grad")


class Throughput(_Stored):
    """Images per second over batch sizes."""

    batch: int = Field(ge=1, description="batch with the highest rate")
    images_per_s: float = Field(gt=0, description="its rate")
    tried: dict[int, float] = Field(description="every batch that was tried and its rate")
    stopped: str = Field(description="why no larger batch was tried")


class ProfileEfficiency(Efficiency):
    """The figures of a record's ``efficiency``, and what only a profile has.

    ``gmacs`` and ``gflops`` are of one network forward on one input. ``latency_ms``, ``stages_ms``, ``images_per_s`` (at
    the best batch) and ``peak_memory_mib`` are of a whole image: all windows, and the decision at image size. For a
    decode head the features of one image are the input, and all figures are of that.
    """

    convention: Convention = Field(description="how operations are counted")
    counted: str = Field(description="what that counts")
    not_counted: str = Field(description="what it does not count")
    parts: dict[str, PartSize] = Field(description="parameters by part; a shared one counts in the first")
    gmacs_by_op: dict[str, float] = Field(default_factory=dict, description="gmacs by operator, largest first")
    image_gflops: float | None = Field(None, description="10^9 floating-point operations of a whole image")
    image_gflops_reason: str | None = None
    forward_ms: Latency | None = Field(None, description="one network forward, per input")
    forward_ms_reason: str | None = None
    forward_peak_memory_mib: float | None = Field(None, description="MiB over one forward; see peak_memory_kind")
    forward_peak_memory_mib_reason: str | None = None
    peak_reserved_mib: float | None = Field(None, description="MiB that torch reserved on the GPU for a whole image")
    peak_reserved_mib_reason: str | None = None
    throughput: Throughput | None = None
    throughput_reason: str | None = None
    warm_up: dict[str, int] = Field(default_factory=dict, description="passes before the samples, per figure")
    unsettled: tuple[str, ...] = Field((), description="figures whose times did not settle in the warm-up")
    noise: dict[str, float] = Field(default_factory=dict, description="IQR / median of each latency")
    repeats: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="medians in milliseconds of every repeated process"
    )
    unstable: dict[str, str] = Field(default_factory=dict, description="figures not to be relied on, and why")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        """Profiles of before call the forwards of an image ``windows``."""
        if isinstance(data, dict) and "windows" in data:
            data = {("forwards" if name == "windows" else name): value for name, value in data.items()}
        return data


class ProfileRecord(_Stored):
    """Everything that is kept of one profile."""

    schema_version: Literal[1] = Field(1, description="version of this layout")
    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="unique name, as a run's")
    spec: ProfileSpec
    spec_hash: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of spec's canonical JSON")
    efficiency: ProfileEfficiency
    environment: Environment
    provenance: Provenance

    def to_json(self) -> str:
        """The record as text; the same record gives the same bytes on every machine."""
        return json_text(self.model_dump(mode="json")) + "\n"

    def flat(self) -> dict[str, Any]:
        """The record with the figures at the top, under the keys of a run's ``efficiency``."""
        data = self.model_dump(mode="json")
        return {**data.pop("efficiency"), **data}


def profile_path(record: ProfileRecord, root: str | os.PathLike[str] = DEFAULT_ROOT) -> Path:
    """Where a profile belongs under ``root``."""
    return Path(root) / path_name(record.spec.method) / f"{record.run_id}.json"


def write(record: ProfileRecord, root: str | os.PathLike[str] = DEFAULT_ROOT) -> Path:
    """Stores a profile and returns its path; a reader sees the whole file or none.

    Raises:
        RunError: The folder cannot be made or written.
    """
    path = profile_path(record, root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".profile-") as folder:
            whole = Path(folder) / path.name
            whole.write_text(record.to_json(), encoding="utf-8", newline="\n")
            os.replace(whole, path)
    except OSError as error:
        raise RunError(
            f"Cannot write the profile to '{path}': {error.strerror or error}. Choose another folder with --profiles DIR."
        ) from error
    return path


def read(path: str | os.PathLike[str]) -> ProfileRecord:
    """The profile in a file.

    Raises:
        DataError: Missing, unreadable, no JSON, or no profile; names the file and the field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read the profile '{path}': {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise DataError(f"'{path}' is not a profile: it is no valid JSON ({error}).") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DataError(
            f"'{path}' has schema version {version}; this ovbench reads {SCHEMA_VERSION}. Install a newer one."
        )
    try:
        return ProfileRecord.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "profile"
        raise DataError(f"'{path}' is not a profile of this schema: {where}: {first['msg']}.") from error


def load_all(
    root: str | os.PathLike[str] = DEFAULT_ROOT, *, on_problem: Callable[[str], None] = lambda message: None
) -> list[ProfileRecord]:
    """All profiles under ``root``, sorted by path; ``on_problem`` gets the message of each file that is none."""
    records = []
    for path in sorted(Path(root).glob("*/*.json")):
        try:
            records.append(read(path))
        except DataError as error:
            on_problem(f"Left out: {error}")
    return records
