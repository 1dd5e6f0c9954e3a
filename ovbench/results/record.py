"""One run as it is stored: what was measured, on what, with what, and whether it can be trusted.

A record is a JSON file that :mod:`ovbench.results.store` writes and reads; ``ovbench schema`` prints its JSON schema.
Numbers are kept unrounded. A figure that could not be had is null, and the field ``<figure>_reason`` says why.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import AwareDatetime, Field, field_validator, model_validator

from ovbench.errors import DataError
from ovbench.results.panoptic_quality import PanopticMetrics
from ovbench.results.stored import Stored
from ovbench.spec import RunSpec

SCHEMA_VERSION: Literal[2] = 2

Status = Literal["ok", "failed", "interrupted"]

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ClassScore(Stored):
    """Areas and scores of one class over all evaluated images."""

    name: str = Field(description="class name in label order")
    intersect: int = Field(ge=0, description="pixels predicted and labelled as this class (int64)")
    union: int = Field(ge=0, description="pixels predicted or labelled as this class (int64)")
    pred: int = Field(ge=0, description="pixels predicted as this class, ignored pixels left out (int64)")
    label: int = Field(ge=0, description="pixels labelled as this class (int64)")
    iou: float | None = Field(description="percent, intersect / union, unrounded; null where the union is 0")
    acc: float | None = Field(description="percent, intersect / label, unrounded; null where label is 0")


class Metrics(Stored):
    """Accuracy over the evaluated images; every figure follows from the areas of ``classes``."""

    miou: float | None = Field(description="percent, mean of iou over the classes whose union is not 0, unrounded")
    macc: float | None = Field(description="percent, mean of acc over the classes whose label area is not 0, unrounded")
    aacc: float | None = Field(description="percent, correct pixels / labelled pixels, unrounded")
    images: int = Field(ge=0, description="number of evaluated images")
    classes: tuple[ClassScore, ...] = Field(description="one entry per class in label order")
    absent_classes: tuple[str, ...] = Field(description="classes left out of miou because their union is 0")
    panoptic: PanopticMetrics | None = Field(
        None, description="panoptic quality; null where the benchmark has no segments, or for panoptic_reason"
    )
    panoptic_reason: str | None = Field(None, description="why panoptic is null though the benchmark has true segments")


class ImageFailure(Stored):
    """An image that could not be evaluated and was skipped."""

    name: str = Field(description="file name")
    reason: str = Field(description="what was wrong with it")


class Latency(Stored):
    """Repeated timings of one thing; the statistics follow from ``samples``."""

    median: float = Field(ge=0, description="milliseconds")
    iqr: float = Field(ge=0, description="milliseconds, third minus first quartile (linear interpolation)")
    p95: float = Field(ge=0, description="milliseconds, 95th percentile (linear interpolation)")
    n: int = Field(ge=1, description="number of samples")
    samples: tuple[float, ...] = Field(description="milliseconds, in order of measurement, to 0.1 microsecond")

    @model_validator(mode="after")
    def _counts(self) -> Latency:
        if len(self.samples) != self.n:
            raise ValueError(f"n is {self.n} but there are {len(self.samples)} samples")
        return self


class Efficiency(Stored):
    """Cost of one image. A null figure has its reason in ``<figure>_reason``."""

    params_m: float | None = Field(None, description="million parameters, all networks that the method runs")
    params_m_reason: str | None = None
    trainable_params_m: float | None = Field(None, description="million parameters with requires_grad")
    trainable_params_m_reason: str | None = None
    gmacs: float | None = Field(None, description="10^9 multiply-accumulates of one network forward, see input")
    gmacs_reason: str | None = None
    gflops: float | None = Field(None, description="10^9 floating-point operations of it; 1 MAC = 2 FLOP")
    gflops_reason: str | None = None
    forwards: int | None = Field(
        None, ge=1, description="such forwards that an image takes; null where they are not of one size"
    )
    image_gmacs: float | None = Field(None, description="10^9 multiply-accumulates of a whole image")
    image_gmacs_reason: str | None = None
    input: str | None = Field(None, description="network input BxCxHxW that was counted, and how many an image takes")
    tool: str | None = Field(None, description="what counted the operations, with version")
    batch: int | None = Field(None, ge=1, description="images per step of the timings; times of a step are shared out")
    processes: int = Field(1, ge=1, description="processes that shared the images (in the session that ended the run)")
    latency_ms: Latency | None = Field(None, description="wall time of one image, synchronised, warm-up left out")
    latency_ms_reason: str | None = None
    stages_ms: dict[str, Latency] = Field(default_factory=dict, description="the same per named stage of an image")
    images_per_s: float | None = Field(
        None, description="evaluated images / wall time of the evaluation loop (of the slowest process)"
    )
    images_per_s_reason: str | None = None
    peak_memory_mib: float | None = Field(None, description="MiB; see peak_memory_kind")
    peak_memory_mib_reason: str | None = None
    peak_memory_kind: str | None = Field(
        None,
        description="cuda-allocated (torch's peak of allocated device memory) or process-rss (peak resident set), of several "
        "processes that of the largest",
    )

    @model_validator(mode="after")
    def _null_has_reason(self) -> Efficiency:
        for name in type(self).model_fields:
            if name.endswith("_reason"):
                figure = name.removesuffix("_reason")
                missing, reason = getattr(self, figure) is None, getattr(self, name)
                if missing and not reason:
                    raise ValueError(f"{figure} is null: give {name}")
                if reason and not missing:
                    raise ValueError(f"{figure} has a value: {name} must be null")
        return self


class Precision(Stored):
    """Torch settings that change results or speed at the same dtype."""

    float32_matmul: str = Field(description="torch.get_float32_matmul_precision()")
    cuda_matmul_tf32: bool = Field(description="torch.backends.cuda.matmul.allow_tf32")
    cudnn_tf32: bool = Field(description="torch.backends.cudnn.allow_tf32")
    cudnn_benchmark: bool = Field(description="torch.backends.cudnn.benchmark")
    deterministic: bool = Field(description="torch.are_deterministic_algorithms_enabled()")


class Environment(Stored):
    """The machine and the numerics of a run, as :func:`ovbench.measure.environment.environment` finds them."""

    python: str = Field(description="Python version")
    os: str = Field(description="operating system, release and architecture")
    cpu: str = Field(description="CPU model")
    cores: int = Field(ge=1, description="CPU cores that this process may use")
    threads: int = Field(ge=1, description="torch.get_num_threads()")
    ram_gib: float | None = Field(description="GiB of main memory (of the container where it has a limit)")
    device: str = Field(description="device of the run: cpu or cuda")
    gpu: str | None = Field(description="GPU model; null on cpu")
    gpu_memory_gib: float | None = Field(description="GiB of GPU memory; null on cpu")
    gpu_driver: str | None = Field(description="version of the GPU driver; null on cpu or where it cannot be asked")
    cuda: str | None = Field(description="CUDA version that torch was built with; null for a CPU build")
    cudnn: str | None = Field(description="cuDNN version; null on cpu")
    torch: str = Field(description="torch version")
    precision: Precision


class Provenance(Stored):
    """Where a run came from: code, weights, data and command."""

    git_commit: str | None = Field(description="commit of the ovbench checkout; null when it does not run from one")
    git_dirty: bool | None = Field(description="whether that checkout had uncommitted changes")
    git_reason: str | None = Field(None, description="why git_commit is null")
    weights_sha256: str | None = Field(description="sha256 of the loaded weights; null when the run ended before them")
    dataset_fingerprint: str | None = Field(
        description="sha256 over names and sizes of all image and label files; null when the run ended before them"
    )
    command: str = Field(description="command line, or the Python call")
    started: AwareDatetime = Field(description="ISO 8601, UTC")
    finished: AwareDatetime = Field(description="ISO 8601, UTC")
    package_versions: dict[str, str] = Field(description="installed versions of the packages that can move a number")


class RunRecord(Stored):
    """Everything that is kept of one run."""

    schema_version: Literal[2] = Field(2, description="version of this layout")
    run_id: str = Field(description="unique name: start time (UTC), first digits of spec_hash, random digits")
    spec: RunSpec = Field(description="what was run: method, dataset, protocol, weights, precision")
    spec_hash: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of spec's canonical JSON")
    metrics: Metrics | None = Field(description="accuracy; null when no image was finished")
    efficiency: Efficiency | None = Field(description="cost; null when the run ended before it was measured")
    environment: Environment
    provenance: Provenance
    status: Status = Field(description="ok, failed or interrupted")
    partial: bool = Field(description="true when not all images of the benchmark were evaluated")
    demo: bool = Field(description="true for the built-in CLIP on generated scenes: a check of the pipeline only")
    reason: str | None = Field(description="why the run is not ok, or why it is partial")
    failures: tuple[ImageFailure, ...] = Field((), description="images that were skipped (--on-error skip)")
    constants: str | None = Field(
        None,
        description="for which backbone the method's constants were published and where, or that they are inferred for this "
        "one; null where none depends on the backbone",
    )

    @field_validator("run_id")
    @classmethod
    def _path_safe(cls, value: str) -> str:
        if not _RUN_ID.fullmatch(value):
            raise ValueError("only letters, digits, '.', '_' and '-', starting with a letter or digit")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunRecord:
        if self.demo != self.spec.demo:
            raise ValueError(f"demo is {self.demo} but spec.demo is {self.spec.demo}")
        if self.status == "ok" and self.metrics is None:
            raise ValueError("status is ok but metrics is null")
        if (self.status != "ok" or self.partial) and not self.reason:
            raise ValueError(f"reason is needed: status is {self.status}, partial is {self.partial}")
        return self

    def to_json(self) -> str:
        """The record as text; the same record gives the same bytes on every machine."""
        return json_text(self.model_dump(mode="json")) + "\n"


def metrics_from_areas(
    names: Sequence[str],
    intersect: Sequence[int],
    union: Sequence[int],
    pred: Sequence[int],
    label: Sequence[int],
    *,
    images: int,
    panoptic: PanopticMetrics | None = None,
    panoptic_reason: str | None = None,
) -> Metrics:
    """Scores from the areas of each class summed over a dataset, unrounded.

    Args:
        names: K class names in label order.
        intersect: K areas in pixels (integers; a list or an integer array).
        union: K areas in pixels.
        pred: K areas in pixels.
        label: K areas in pixels.
        images: Number of images that the areas were summed over.
        panoptic: What goes with them.
        panoptic_reason: Why that is missing.

    Raises:
        ValueError: The areas do not have K entries or contradict each other.
    """
    rows = [tuple(int(area) for area in areas) for areas in (intersect, union, pred, label)]
    if any(len(row) != len(names) for row in rows):
        raise ValueError(f"{len(names)} class names but {[len(row) for row in rows]} areas")
    classes = []
    for name, inter, uni, predicted, labelled in zip(names, *rows, strict=True):
        if not 0 <= inter <= min(predicted, labelled) or uni != predicted + labelled - inter:
            raise ValueError(f"Areas of '{name}' contradict: {inter=} {uni=} {predicted=} {labelled=}")
        iou = 100.0 * inter / uni if uni else None
        acc = 100.0 * inter / labelled if labelled else None
        classes.append(
            ClassScore(name=name, intersect=inter, union=uni, pred=predicted, label=labelled, iou=iou, acc=acc)
        )
    total = sum(score.label for score in classes)
    return Metrics(
        miou=_mean([score.iou for score in classes]),
        macc=_mean([score.acc for score in classes]),
        aacc=100.0 * sum(score.intersect for score in classes) / total if total else None,
        images=images,
        classes=tuple(classes),
        absent_classes=tuple(score.name for score in classes if score.union == 0),
        panoptic=panoptic,
        panoptic_reason=panoptic_reason,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def new_run_id(spec_hash: str, started: datetime) -> str:
    """A name no other run has: start time in UTC, 8 digits of the spec hash, 4 random digits."""
    return f"{started.astimezone(timezone.utc):%Y%m%dT%H%M%SZ}-{spec_hash[:8]}-{secrets.token_hex(2)}"


def schema() -> dict[str, Any]:
    """The JSON schema of :class:`RunRecord`."""
    return RunRecord.model_json_schema()


_FORWARDS = re.compile(r"one forward.*; the first image takes (\d+)(?: at scale 1; it has (\d+) views)?$")
_WHOLE = ", one whole image: "
SEVERAL_SIZES = "the views of an image have several sizes: one was counted"


def _count_forwards(data: dict[str, Any]) -> dict[str, Any]:
    """Version 1 told in a sentence how many forwards an image takes; version 2 has the number, and an image's operations."""
    efficiency = data.get("efficiency")
    if not isinstance(efficiency, dict):
        return data
    text, gmacs = str(efficiency.get("input") or ""), efficiency.get("gmacs")
    told = _FORWARDS.search(text)
    forwards = 1 if _WHOLE in text else int(told[1]) if told and told[2] in (None, "1") else None
    if gmacs is None:
        reason = efficiency.get("gmacs_reason")
    else:
        reason = SEVERAL_SIZES if told else "not recorded how many forwards an image takes"
    whole = gmacs * forwards if gmacs is not None and forwards is not None else None
    added = {"forwards": forwards, "image_gmacs": whole, "image_gmacs_reason": reason if whole is None else None}
    return {**data, "efficiency": {**efficiency, **added}}


# From each old schema version, the function that rewrites a record's dict into the next version's layout.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _count_forwards}


def migrate(data: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record's dict in the layout of :data:`SCHEMA_VERSION`.

    Raises:
        DataError: The version is missing, not a positive integer, or newer than this ovbench knows.
    """
    current = dict(data)
    version = current.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DataError(f"schema_version must be an integer from 1 to {SCHEMA_VERSION}, not {version!r}.")
    if version > SCHEMA_VERSION:
        raise DataError(
            f"The record has schema version {version}; this ovbench reads versions up to {SCHEMA_VERSION}. "
            "Install a newer ovbench to read it."
        )
    while version < SCHEMA_VERSION:
        current = _MIGRATIONS[version](current)
        version += 1
        current["schema_version"] = version
    return current


def json_text(value: Any, indent: str = "") -> str:
    """JSON with one line per entry, but arrays and objects without further nesting on one line."""
    nested = isinstance(value, (dict, list)) and any(
        isinstance(item, (dict, list)) for item in (value.values() if isinstance(value, dict) else value)
    )
    if not nested and (indent or not isinstance(value, dict)):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {json_text(item, inner)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    return "[\n" + ",\n".join(inner + json_text(item, inner) for item in value) + "\n" + indent + "]"
