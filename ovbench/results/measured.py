"""Run records and profiles as one kind of thing: where a figure comes from, under which settings, and why it is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ovbench.results.comparable import kind_of, machine_of, random_parts
from ovbench.results.quantities import FIGURES
from ovbench.results.record import Efficiency, Environment, RunRecord

STAGE = "latency:"
CLASS = "iou:"  # of one class, named behind it
GROUP = "mIoU:group"  # mean over the classes that it stands beside


@dataclass(frozen=True)
class Measured:
    """A run or a profile, read for tables.

    Attributes:
        id: Run id or profile id.
        origin: ``run`` or ``profile``.
        finished: When it ended.
        method: Method id.
        arch: open_clip architecture or backbone; None where it is not known.
        weights: Tag, file name, ``random`` or ``builtin``.
        dataset: Benchmark id; None for a profile that names none.
        options: Method options in force.
        fields: All fields of the spec under dotted names.
        environment: Machine and numerics.
        efficiency: Cost; None when it was not measured.
        kinds: What keeps a run out of the results proper; of a profile only random weights do.
        status: ``ok``, ``failed`` or ``interrupted``.
        record: The run record; None for a profile.
        convention: What counted the operations, on which input.
        image_gmacs: 10^9 multiply-accumulates of a whole image (of the features, for a decode head).
        notes: What the measurement says about itself, e.g. that it was unstable.
    """

    id: str
    origin: str
    finished: datetime
    method: str
    arch: str | None
    weights: str
    dataset: str | None
    environment: Environment
    efficiency: Efficiency | None
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    status: str = "ok"
    record: RunRecord | None = None
    convention: str = ""
    image_gmacs: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def machine(self) -> dict[str, str]:
        """Machine fields as text."""
        return machine_of(self.environment)

    @property
    def random(self) -> tuple[str, ...]:
        """Networks with random weights."""
        return random_parts(self.weights, self.options)


def of_record(record: RunRecord) -> Measured:
    """A run record as a measurement."""
    spec = record.spec
    efficiency = record.efficiency
    counted = "" if efficiency is None or efficiency.gmacs is None else f"{efficiency.tool}; input {efficiency.input}"
    return Measured(
        id=record.run_id,
        origin="run",
        finished=record.provenance.finished,
        method=spec.method,
        arch=spec.arch,
        weights=spec.weights,
        dataset=spec.dataset,
        options=spec.method_options,
        fields={
            **flat(spec.model_dump(mode="json")),
            "classes": len(record.metrics.classes) if record.metrics else None,
        },
        environment=record.environment,
        efficiency=efficiency,
        kinds=kind_of(record),
        status=record.status,
        record=record,
        convention=counted,
        image_gmacs=None if efficiency is None else efficiency.image_gmacs,
    )


def flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    fields: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


@dataclass(frozen=True)
class Metric:
    """How a metric of ``published.csv`` is read from a measurement.

    Attributes:
        label: Words in headings.
        digits: Fewest digits after the point of ours.
        value: The figure in the unit of :attr:`unit`, or None.
        unit: Unit of ``value`` as the file writes it.
        why: Key of the reason when the figure is null (``<why>_reason`` of the efficiency).
        machine_bound: Whether it depends on the machine.
        counted: Whether the counting convention belongs beside it.
    """

    label: str
    digits: int
    value: Callable[[Measured], float | None]
    unit: str
    why: str = ""
    machine_bound: bool = False
    counted: bool = False

    @property
    def measured(self) -> bool:
        """Whether a run or a profile may have it at all."""
        return self.value is not _absent


def _accuracy(measured: Measured) -> float | None:
    record = measured.record
    return None if record is None or record.metrics is None else record.metrics.miou


def _panoptic(measured: Measured) -> float | None:
    return None if measured.record is None else FIGURES["pq"].value(measured.record)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _classes(*names: str) -> Callable[[Measured], float | None]:
    """The mean IoU over classes, each named by one of its words; None where one is not of the benchmark or does not occur."""

    def read(measured: Measured) -> float | None:
        if measured.record is None or measured.record.metrics is None:
            return None
        known = {_plain(score.name): score.iou for score in measured.record.metrics.classes}
        found = [known.get(_plain(name)) for name in names]
        values = [value for value in found if value is not None]
        return sum(values) / len(values) if values and len(values) == len(names) else None

    return read


def _cost(name: str, factor: float = 1.0) -> Callable[[Measured], float | None]:
    def read(measured: Measured) -> float | None:
        value = None if measured.efficiency is None else getattr(measured.efficiency, name)
        return None if value is None else float(value) * factor

    return read


def _latency(measured: Measured) -> float | None:
    timing = None if measured.efficiency is None else measured.efficiency.latency_ms
    return None if timing is None else timing.median


def _image_gmacs(measured: Measured) -> float | None:
    return measured.image_gmacs


def _stage(name: str) -> Callable[[Measured], float | None]:
    def read(measured: Measured) -> float | None:
        timing = None if measured.efficiency is None else measured.efficiency.stages_ms.get(name)
        return None if timing is None else timing.median

    return read


def _absent(measured: Measured) -> float | None:
    return None


MIB_IN_GB = 2**20 / 1e9

_METRICS = {
    "mIoU": Metric("mIoU", 2, _accuracy, "percent"),
    "PQ": Metric("PQ", 2, _panoptic, "percent"),
    "params": Metric("parameters", 2, _cost("params_m"), "M", "params_m"),
    "flops": Metric("MACs", 2, _image_gmacs, "G", "gmacs", counted=True),
    "latency": Metric("latency", 1, _latency, "ms", "latency_ms", machine_bound=True),
    "throughput": Metric("throughput", 2, _cost("images_per_s"), "img/s", "images_per_s", machine_bound=True),
    "peak_memory": Metric(
        "peak memory", 1, _cost("peak_memory_mib", MIB_IN_GB), "GB", "peak_memory_mib", machine_bound=True
    ),
    "mAP": Metric("mask AP", 2, _absent, "percent"),
    "referring": Metric("referring segmentation", 1, _absent, ""),
    "train_time": Metric("training time", 0, _absent, ""),
    "train_time_6k": Metric("training time of 6k iterations", 0, _absent, ""),
    "train_iterations": Metric("training iterations", 0, _absent, ""),
}

# Milliseconds and seconds are the only units that the papers mix.
_FACTORS = {("ms", "s"): 1e-3, ("s", "ms"): 1e3}


def metric(name: str, classes: Sequence[str] = ()) -> Metric:
    """How a metric of ``published.csv`` is read.

    ``latency:<stage>`` is the time of a stage, ``iou:<class>`` the IoU of a class, ``ratio:<class>`` its share of the
    training set, which no run has.

    Args:
        name: As in the file.
        classes: Of :data:`GROUP`, the classes.

    Raises:
        KeyError: No such metric.
    """
    if name.startswith(STAGE):
        stage = name.removeprefix(STAGE)
        return Metric(f"{stage} latency", 1, _stage(stage), "ms", machine_bound=True)
    kind, _, of = name.partition(":")
    if name == GROUP:
        return Metric("mIoU of the group", 2, _classes(*classes), "percent")
    if of and kind in ("iou", "ratio"):
        return Metric(of, 2, _classes(of) if kind == "iou" else _absent, "percent")
    return _METRICS[name]


def figure(measured: Measured, name: str, unit: str, classes: Sequence[str] = ()) -> float | None:
    """A measurement's figure in the unit of the published number; None where it has none."""
    reader = metric(name, classes)
    value = reader.value(measured)
    if value is None or unit == reader.unit:
        return value
    return value * _FACTORS[reader.unit, unit]
