"""The one door from names to a model: runs, Python, ``predict``, mmseg's types and profiles all pass through :func:`build`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ovbench.errors import UsageError
from ovbench.methods.public import read_public  # type: ignore[import-not-found]
from ovbench.models.base import Background, Model
from ovbench.models.closed_set import ClosedSetMethod, ClosedSetModel
from ovbench.models.closed_set_weights import load_network
from ovbench.models.resolve import Resolved, resolve
from ovbench.models.trained_file import read_about
from ovbench.models.windowed import DTYPES
from ovbench.paths import user_path
from ovbench.spec import DEVICES, DType, Protocol, long_dtype, validated
from ovbench.spec import protocol as preset
from ovbench.words.class_list import Classes, class_words


@dataclass(frozen=True)
class ModelSpec:
    """What a model is built from.

    Attributes:
        method: Method id, or ``PATH.py:Class``.
        classes: K classes: each a word or a list of words; of a closed-set method the names it was trained on.
        protocol: Windows, scale and thresholds.
        weights: open_clip tag, file, ``hf-hub:...``, ``random`` or ``builtin``.
        arch: open_clip architecture, or the encoder of a closed-set method; None: what weights or method say.
        method_options: The user's options of the method.
        dtype: Precision of the network.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        window_batch: Windows per forward; None takes up to 32.
        compile_mode: ``off`` or a mode of ``torch.compile``.
        activation: ``auto``, ``gelu`` or ``quickgelu``, for files of CLIP.
        seed: Of random weights.
        demo: Take what needs no download.
        background: Class that thresholds leave pixels to.
        cache_masks: Bytes on disk that proposals of a mask generator may take; 0 = they are not kept.
    """

    method: str
    classes: Classes
    protocol: Protocol
    weights: str = "openai"
    arch: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: DType = "float32"
    device: str = "cpu"
    window_batch: int | None = None
    compile_mode: str = "off"
    activation: Any = "auto"
    seed: int = 0
    demo: bool = False
    background: Background = "named"
    cache_masks: int = 0


@dataclass(frozen=True)
class Built:
    """A model and what building it has found out.

    Attributes:
        model: Ready, in evaluation mode.
        method: Name of the method as recorded.
        method_options: All options in force, and what the weights' header says.
        arch: Architecture.
        activation: Of CLIP's towers; None for networks of another kind.
        weights_sha256: Hash of the weights; None for random ones of a closed-set network.
        demo: The weights were trained on generated scenes.
        partial: Why a run of this model is no result; None where it is one.
        constants: For which backbone the method's constants were published; None where none depends on it.
        arithmetic: As of a run's spec.
    """

    model: Model
    method: str
    method_options: dict[str, Any]
    arch: str
    activation: str | None
    weights_sha256: str | None
    demo: bool
    partial: str | None
    constants: str | None
    arithmetic: int

    def spec_fields(self) -> dict[str, Any]:
        """The fields of a run's or a profile's spec that are known now."""
        known = {
            "method": self.method,
            "method_options": self.method_options,
            "arch": self.arch,
            "weights_sha256": self.weights_sha256,
        }
        return known if self.activation is None else {**known, "activation": self.activation}


def method_of(weights: str) -> str | None:
    """The method that a weights file says it is of: of a training of ovbench, or a public checkpoint of a host; else None.

    Raises:
        WeightsError: A file that cannot be read.
    """
    path = user_path(weights)
    if not path.is_file():
        return None
    about = read_about(path)
    if about is not None:
        return about.method
    public = read_public(path)
    return None if public is None else str(public.method)


def build(spec: ModelSpec) -> Built:
    """The model of a spec, on its device.

    Raises:
        UsageError: Unknown names, or values that do not fit together.
        WeightsError: The weights cannot be had, or do not fit.
    """
    require_device(spec.device)
    resolved = resolve(spec.method, spec.weights, spec.method_options, demo=spec.demo)
    make = _closed_set if issubclass(resolved.cls, ClosedSetMethod) else _open_vocabulary
    model, options, arch, activation, digest = make(spec, resolved)
    reasons = [resolved.trial()]
    if model.needs_truth:
        reasons.append("an oracle has looked at the labels: an upper bound, no result")
    return Built(
        model=model,
        method=resolved.info.name,
        method_options=resolved.recorded(options),
        arch=arch,
        activation=activation,
        weights_sha256=digest,
        demo=resolved.demo,
        partial="; ".join(filter(None, reasons)) or None,
        constants=model.constants,
        arithmetic=1 if make is _closed_set else resolved.cls.arithmetic(spec.dtype),
    )


def _open_vocabulary(spec: ModelSpec, resolved: Resolved) -> tuple[Model, dict[str, Any], str, str | None, str | None]:
    """The model, its options, its architecture and activation, and the hash of its weights."""
    cls = resolved.cls
    method = cls.load(
        spec.weights, spec.arch, resolved.config, activation=spec.activation, seed=spec.seed, device=spec.device
    )
    if spec.cache_masks:
        method.cache_proposals(spec.cache_masks)
    model: Model = cls.model_class()(
        method,
        spec.classes,
        spec.protocol,
        dtype=spec.dtype,
        window_batch=spec.window_batch,
        compile_mode=spec.compile_mode,
        background=spec.background,
    )
    clip = method.clip
    return model, method.options(), clip.arch, clip.activation, clip.weights_sha256


def _closed_set(spec: ModelSpec, resolved: Resolved) -> tuple[Model, dict[str, Any], str, str | None, str | None]:
    """As :func:`_open_vocabulary`, of a network whose classes are those it was trained on."""
    words = class_words(spec.classes)
    several = next((entry for entry in words if len(entry) > 1), None)
    if several is not None:
        raise UsageError(f"'{spec.method}' knows its classes by name, it reads no synonyms: '{', '.join(several)}'.")
    names = [entry[0] for entry in words]
    loaded = load_network(
        resolved, arch=spec.arch, weights=spec.weights, class_names=names, seed=spec.seed, device=spec.device
    )
    model = ClosedSetModel(
        loaded.network,
        names,
        spec.protocol,
        dtype=spec.dtype,
        window_batch=spec.window_batch,
        compile_mode=spec.compile_mode,
    )
    return model, loaded.method.options(), loaded.arch, None, loaded.weights_sha256


def build_model(
    method: str,
    *,
    classes: Classes,
    protocol: Protocol | Mapping[str, Any] | str | None = None,
    benchmark: str | None = None,
    dtype: str = "float32",
    method_options: Mapping[str, Any] | None = None,
    weights: str = "openai",
    arch: str | None = None,
    device: str = "cpu",
    window_batch: int | None = None,
    compile_mode: str = "off",
    background: Background = "named",
    activation: Any = "auto",
    seed: int = 0,
    **overrides: Any,
) -> Model:
    """A ready model by names.

    Args:
        method: Method id, see ``ovbench list methods``.
        classes: K classes, each a word or a list of words.
        protocol: A full protocol (also as a dict), a preset's name, or None for the method's own preset.
        benchmark: Benchmark whose preset values are meant; None leaves its thresholds away.
        dtype: ``float32``, ``bfloat16`` or ``float16``, or as people shorten them (``bf16``).
        method_options: The method's own options.
        weights: As of :class:`ModelSpec`, like all that follow.
        arch: Architecture.
        device: Torch device.
        window_batch: Windows per forward.
        compile_mode: Of ``torch.compile``.
        background: Index of the class that thresholds leave pixels to, None for no such class, or ``"named"``: the
            benchmark's where one is given, else the class called "background".
        activation: Of a weights file.
        seed: Of random weights.
        **overrides: Protocol fields such as ``mode``, ``crop``, ``stride``, ``logit_scale``, ``prob_thd``.

    Raises:
        UsageError: Unknown names or invalid values.
        WeightsError: The weights cannot be had or do not fit.
    """
    if isinstance(protocol, Protocol):
        chosen = protocol
    elif isinstance(protocol, Mapping):
        chosen = validated(Protocol, dict(protocol))
    else:
        chosen, overrides = preset(protocol or "paper", benchmark, method=method, **overrides), {}
    if overrides:
        raise UsageError(f"Give either a full protocol or the fields {', '.join(sorted(overrides))}, not both.")
    if background == "named" and benchmark is not None:
        from ovbench import benchmarks

        background = benchmarks.get(benchmark).background
    dtype = long_dtype(dtype)
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
    spec = ModelSpec(
        method,
        class_words(classes),
        chosen,
        weights=weights,
        arch=arch,
        method_options=method_options or {},
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        window_batch=window_batch,
        compile_mode=compile_mode,
        background=background,
        activation=activation,
        seed=seed,
    )
    return build(spec).model


def require_device(device: str) -> None:
    """Nothing, if torch can run on ``device``.

    Raises:
        UsageError: No such device on this machine.
    """
    kind = device.split(":")[0]
    if kind not in {"cpu", "cuda"}:
        raise UsageError(f"Unknown device '{device}'. Known: {', '.join(DEVICES)}.")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.split(":")[1]) if device[5:].isdigit() else 0
        if index >= count:
            raise UsageError(f"Device '{device}' is not there: torch sees {count} CUDA device(s). Use --device cpu.")
