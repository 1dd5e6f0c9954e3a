"""Whether a run or profile may stand beside a printed number, with every reason why not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovbench.errors import UsageError
from ovbench.results.measured import Measured, figure, metric
from ovbench.tables.method_defaults import changed_options, inferred_constants
from ovbench.tables.published import Wanted, plain_arch

_OF_INPUT = ("features", "input", "protocol.mode")  # parameters do not depend on these
_FILE = re.compile(r"\.(pt|pth|bin|safetensors)$")
# Beside a record's options where a training of ours made the weights: its benchmark, and what it changed in the method's
# recipe, ["policy=frozen-clip"].
TRAINED_ON, TRAINING_OVERRIDES = "trained_on", "training_overrides"
# How good predictions are depends on these; what one forward costs does not.
_ACCURACY_ONLY = ("random-weights", "partial")


@dataclass(frozen=True)
class Verdict:
    """Whether a measurement fits a printed number.

    Attributes:
        value: The figure in the printed unit; None where it does not fit.
        reasons: Why it does not fit; empty where it does.
        remarks: What should be known where it does.
    """

    value: float | None
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the measurement may stand beside the number."""
        return not self.reasons


def judge(measured: Measured, want: Wanted, unit: str, protocol: str | None) -> Verdict:
    """A measurement of the wanted method held against one printed number.

    Args:
        measured: Run or profile; its method is the wanted one.
        want: What it must be.
        unit: Unit of the printed number.
        protocol: Name of the protocol preset that it must have been run under; None accepts any.
    """
    reasons: list[str] = []
    remarks: list[str] = []
    if want.unknown:
        reasons.append(want.unknown)
    if measured.status != "ok":
        reasons.append(f"the run {'was ' if measured.status == 'interrupted' else ''}{measured.status}")
    _judge_trust(measured, want, reasons, remarks)
    # A decode head has no backbone in it, but widths that depend on one: the method's own where none is named.
    head = measured.fields.get("part") is not None
    if want.arch and not (head and measured.arch is None) and plain_arch(measured.arch or "") not in want.arch:
        reasons.append(f"arch is {measured.arch}")
    elif not want.arch and measured.arch:
        remarks.append(f"arch is {measured.arch}; the paper does not say which")
    if measured.dataset is not None and measured.dataset not in want.datasets:
        reasons.append(f"dataset is {measured.dataset}")
    if want.metric != "params":  # of a network, however it is fed
        _judge_protocol(measured, want, protocol, reasons)
    _judge_fields(measured, want, reasons, remarks)
    _judge_options(measured, want, reasons, remarks)
    value = figure(measured, want.metric, unit, want.classes)
    if value is None:
        why = metric(want.metric).why
        told = getattr(measured.efficiency, f"{why}_reason", None) if why and measured.efficiency else None
        if want.metric == "PQ" and measured.record is not None and measured.record.metrics is not None:
            told = measured.record.metrics.panoptic_reason
        if want.metric == "flops" and measured.efficiency and measured.efficiency.gmacs is not None:
            told = f"{measured.efficiency.image_gmacs_reason}; ovbench profile counts whole images"
        reasons.append(f"it has no {metric(want.metric).label}" + (f" ({told})" if told else ""))
    return Verdict(None if reasons else value, tuple(reasons), tuple(remarks))


def _judge_trust(measured: Measured, want: Wanted, reasons: list[str], remarks: list[str]) -> None:
    for kind in measured.kinds:
        if want.accuracy or kind not in _ACCURACY_ONLY:
            reasons.append({"partial": "it is partial", "demo": "it is a demo"}.get(kind, kind.replace("-", " ")))
        elif kind == "partial":
            remarks.append("measured on a part of the benchmark's images")
    if measured.random and not want.accuracy:
        remarks.append(f"random {', '.join(measured.random)}")
    elif want.weights and want.accuracy and measured.weights != want.weights:
        if _FILE.search(measured.weights):
            remarks.append(f"weights are the file {measured.weights}; the paper's are '{want.weights}'")
        else:
            reasons.append(f"weights are {measured.weights}, not {want.weights}")
    if not want.accuracy:
        remarks += measured.notes


def _judge_protocol(measured: Measured, want: Wanted, protocol: str | None, reasons: list[str]) -> None:
    if measured.origin != "run":
        return
    name, overrides = measured.fields.get("protocol.name"), measured.fields.get("protocol.overrides") or ()
    # A table that states, say, whole images is met by setting just that.
    extra = [
        f"{key}={measured.fields[f'protocol.{key}']}" for key in overrides if f"protocol.{key}" not in want.require
    ]
    own = want.protocol and protocol == protocol_for(want.method, None)
    if protocol is not None and name != protocol and not (own and name == want.protocol):
        reasons.append(f"protocol is {name}, not {protocol}")
    if extra:
        reasons.append(f"protocol has overrides: {', '.join(extra)}")


def _judge_fields(measured: Measured, want: Wanted, reasons: list[str], remarks: list[str]) -> None:
    if "part" not in want.require and measured.fields.get("part"):
        reasons.append(f"part is {measured.fields['part']}, the number is for the whole method")
    for key, value in want.require.items():
        if want.metric == "params" and key in _OF_INPUT:
            continue
        if measured.fields.get(key) != value:
            reasons.append(f"{key} is {_brief(measured.fields.get(key))}, not {_brief(value)}")
    for key, value in want.assume.items():
        known = measured.fields.get(key)
        if known is None:
            remarks.append(f"{key} is not recorded; the paper's is {_brief(value)}")
        elif known != value:
            reasons.append(f"{key} is {_brief(known)}, not {_brief(value)}")
    for key, value in want.prefer.items():
        if want.metric != "params" and measured.fields.get(key) != value:
            remarks.append(f"{key} is {_brief(measured.fields.get(key))}; the paper's is {value}")


def _judge_options(measured: Measured, want: Wanted, reasons: list[str], remarks: list[str]) -> None:
    """A row without a variant is the method as it is; options that a rule asks for may differ."""
    overrides = measured.options.get(TRAINING_OVERRIDES)
    if want.accuracy and overrides and f"method_options.{TRAINING_OVERRIDES}" not in want.require:
        reasons.append(f"training has overrides: {', '.join(overrides)}")
    options = _as_json(measured.options)
    inferred = inferred_constants(measured.method, options, measured.arch)
    if inferred and want.accuracy:
        remarks.append(inferred)
    changed = changed_options(measured.method, options, measured.arch)
    if changed is None:
        if measured.options:
            remarks.append("the method's default options cannot be read: they are taken as the paper's")
        return
    told = [
        f"{name}={_brief(value)}" for name, value in changed.items() if f"method_options.{name}" not in want.require
    ]
    if told:
        reasons.append(f"options are not the method's own: {', '.join(told)}")


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON, which has no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain


def _brief(value: Any) -> str:
    return "not recorded" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def protocol_for(method: str, chosen: str | None) -> str | None:
    """The preset that runs of a method must have been made under; None where nothing says which.

    Args:
        method: Method id.
        chosen: What the user asked for; None or ``paper`` is the method's own.
    """
    if chosen not in (None, "paper"):
        return chosen
    from ovbench.registry import method_info

    try:
        return method_info(method).protocol
    except UsageError:
        return None


def same_machine(machine: str, measured: Measured) -> bool:
    """Whether a GPU's words in a paper, e.g. ``RTX 3090`` or ``L40``, name the device of a measurement."""
    if not machine or measured.environment.gpu is None:
        return False
    return re.search(rf"\b{re.escape(machine)}\b", measured.environment.gpu, re.IGNORECASE) is not None


def settings_brief(measured: Measured) -> Mapping[str, str]:
    """What the runs of one row of a table must share for their mean to mean something."""
    return {
        "arch": str(measured.arch),
        "weights": measured.weights,
        "weights sha256": str(measured.fields.get("weights_sha256"))[:8],
        "options": json.dumps(measured.options, sort_keys=True, default=str),
        "protocol": str(measured.fields.get("protocol.name")),
        "dtype": str(measured.fields.get("dtype")),
    }
