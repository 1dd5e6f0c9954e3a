"""What a run is: method, benchmark, protocol and precision, validated and hashed.

Method, benchmark, protocol and machine are four separate things. Everything that can move a score is in
:class:`RunSpec` and therefore in the record and in :meth:`RunSpec.spec_hash`; where files lie and how many workers read
them is in :class:`RunOptions` and is not.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ovbench.errors import NoBackgroundError, UsageError, unknown_name
from ovbench.hashing import sha256_of
from ovbench.paths import config_dir

Mode = Literal["slide", "whole"]
DEVICES = ("cpu", "cuda", "cuda:N")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Precisions as records name them, and how each may be written as well."""


def long_dtype(given: Any) -> Any:
    """The long name of a precision, "bf16" as "bfloat16"; anything else as it is."""
    return next((name for name, short in DTYPES.items() if given == short), given)


DType = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(long_dtype)]
ADDED_LATER = (
    "scales",
    "flip",
    "square",
    "global_view",
    "clip_resize",
    "pad",
    "object_thd",
    "overlap_thd",
)  # fields of Protocol that the first released records do not have


class Protocol(BaseModel):
    """How images are resized, windowed and thresholded, and how classes are worded (specs: evaluation protocol)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="preset this block started from")
    overrides: tuple[str, ...] = Field((), description="fields that the user set against the preset")
    short_side: int = Field(336, ge=0, description="short side of the network input in pixels; 0 = image as it is")
    long_side: int = Field(2048, ge=1, description="upper limit of the long side in pixels (ignored at short_side 0)")
    mode: Mode = Field("slide", description="sliding window, or the whole image in one forward")
    crop: int = Field(224, ge=1, description="side of a square window in pixels (mode slide)")
    stride: int = Field(112, ge=1, description="step between windows in pixels (mode slide)")
    patch_pad: Literal["none", "symmetric"] = Field(
        "symmetric",
        description="input that is no multiple of the patch size: drop the rest at the right and bottom, as plain "
        "CLIP does, or pad with the mean colour on both sides and cut the logits back",
    )
    pos_interp: Literal["offset", "size", "bilinear"] = Field(
        "offset",
        description="position embeddings: bicubic by scale (h + 0.1)/g, as public numbers used; bicubic to the size; or "
        "bilinear to the size",
    )
    logit_scale: float = Field(40.0, gt=0, description="factor on cosine logits before the softmax over words")
    prob_thd: float = Field(0.0, ge=0, le=1, description="below this winning probability: the background class")
    area_thd: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a foreground class with at most this share of the predicted foreground is dropped",
    )
    area_rule: Literal["background", "next-best"] = Field(
        "background",
        description="where pixels of a dropped class go: to the background, or to the most probable class that is left "
        "(what the public code does, in spite of its comment)",
    )
    upsample: Literal["bilinear", "jbu"] = Field(
        "bilinear", description="patch logits to the input's size: bilinear, or joint bilateral guided by the image"
    )
    pamr: int = Field(0, ge=0, description="iterations of PAMR on the logits at the input's size; 0 = off")
    pamr_dilations: tuple[int, ...] = Field((8, 16), description="dilations of PAMR's neighbourhoods in pixels")
    scales: tuple[float, ...] = Field(
        (1.0,), description="factors on short_side and long_side; probabilities of several are averaged (closed-set)"
    )
    flip: bool = Field(False, description="average with the mirrored image's probabilities (closed-set)")
    square: int = Field(
        0,
        ge=0,
        description="side of the square that an image is resized to before windows are taken; 0 = off (cat-seg)",
    )
    global_view: bool = Field(
        False,
        description="average the windows' probabilities with those of the whole image at the crop's size (cat-seg)",
    )
    clip_resize: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="how the image is resized to what CLIP sees beside a mask generator; no antialiasing"
    )
    pad: int = Field(
        0,
        ge=0,
        description="mask-based: before CLIP, pad the image with its mean colour at the right and bottom to multiples of this "
        "(of the patch where that does not divide it), as detectron2 does; 0 = resize to whole patches",
    )
    object_thd: float = Field(
        0.0, ge=0, le=1, description="mask-based, panoptic: masks whose best class is not more probable are left out"
    )
    overlap_thd: float = Field(
        0.8, ge=0, le=1, description="mask-based, panoptic: a mask that keeps less of its own area is dropped"
    )
    wording: str = Field("sclip", description="named class word list of the benchmark")
    wording_sha256: str | None = Field(None, description="hash of the words used; filled in by the run")
    templates: str = Field(
        "imagenet80",
        description="how words become sentences: imagenet80, plain, lsmseg[:attributes], or a file of templates or "
        "descriptions",
    )
    templates_sha256: str | None = Field(
        None, description="hash of the templates, or of the words' sentences; filled in by the run"
    )

    @property
    def has_thresholds(self) -> bool:
        """Whether some pixels are left to the background."""
        return self.prob_thd > 0 or self.area_thd is not None

    def require_background(self, background: int | None, whose: str) -> None:
        """Nothing, if no threshold is set or there is a class that it can leave pixels to.

        Args:
            background: Index of the background class; None where there is none.
            whose: The benchmark or class list, for the message.

        Raises:
            NoBackgroundError: A threshold without a background, which would give pixels to a class that means something.
        """
        if background is None and self.has_thresholds:
            given = ["--prob-thd"] * (self.prob_thd > 0) + ["--area-thd"] * (self.area_thd is not None)
            raise NoBackgroundError(
                f"{' and '.join(given)}: thresholds leave pixels to the background, and {whose} has no background class. "
                "They would count for a class that means something else. Leave thresholds away here, or choose a benchmark "
                "with a background. In a class list of your own the class called 'background' is the background."
            )

    @field_validator("scales")
    @classmethod
    def _scales_are_factors(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0 or len(set(value)) != len(value):
            raise ValueError("give at least one factor, each above 0 and once, e.g. 0.5,1,1.5")
        return value

    @model_validator(mode="after")
    def _stride_fits(self) -> Protocol:
        if self.mode == "slide" and self.stride > self.crop:
            raise ValueError(
                f"stride {self.stride} is larger than crop {self.crop}: pixels between windows would be lost"
            )
        return self


@lru_cache(maxsize=1)
def _presets() -> dict[str, dict[str, Any]]:
    text = (config_dir() / "protocols.json").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = json.loads(text)
    return presets


def protocol_names() -> list[str]:
    """The preset names; ``paper`` besides stands for each method's own."""
    return list(_presets())


def protocol_summary(name: str) -> str:
    """One line that says whose setting a preset is."""
    return str(_presets()[name]["summary"])


def protocol(name: str, benchmark: str | None = None, *, method: str | None = None, **overrides: Any) -> Protocol:
    """A preset for one benchmark with the user's overrides applied.

    Args:
        name: Preset, or ``"paper"`` for the preset of ``method``.
        benchmark: Benchmark id; None gives the preset's defaults (used by ``predict``).
        method: Method id, needed for ``"paper"``; some presets have values of their own for a baseline.
        **overrides: Fields of :class:`Protocol`; None means "not set".

    Raises:
        UsageError: Unknown preset or an invalid value.
    """
    if name == "paper":
        from ovbench.registry import method_info

        if method is None:
            raise UsageError("The protocol 'paper' is the method's own preset: name the method as well.")
        name = method_info(method).protocol
    presets = _presets()
    if name not in presets:
        raise unknown_name("protocol", name, [*presets, "paper"], "ovbench list protocols")
    fields: dict[str, Any] = {**presets[name]["defaults"], **presets[name]["benchmarks"].get(benchmark, {})}
    fields |= presets[name].get("methods", {}).get(method, {}).get("benchmarks", {}).get(benchmark, {})
    before = Protocol(name=name, **fields)
    changed = {key: value for key, value in overrides.items() if value is not None}
    known = set(Protocol.model_fields) - {"name", "overrides"}
    for key in changed:
        if key not in known:
            raise unknown_name("protocol field", key, known, "ovbench run --help")
    moved = tuple(sorted(key for key, value in changed.items() if getattr(before, key) != value))
    checked: Protocol = validated(Protocol, {**fields, **changed, "name": name, "overrides": moved})
    return checked


class RunSpec(BaseModel):
    """Everything that can move a number of one run.

    ``protocol`` may be given as a preset's name or as a dict with ``name`` and overrides; it is stored in full.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="method id")
    method_options: dict[str, Any] = Field(default_factory=dict, description="every field of the method's config")
    dataset: str = Field(description="benchmark id")
    dataset_version: int = Field(1, description="version of the benchmark definition")
    protocol: Protocol
    mode: Mode = Field("slide", description="same as protocol.mode")
    arch: str | None = Field(None, description="open_clip architecture; None until read from an OpenAI-format file")
    weights: str = Field("openai", description="open_clip tag, hf-hub:org/name, 'random', 'builtin', or a file's name")
    dtype: DType = Field("float32", description="precision of the network; softmax and accumulation stay float32")
    arithmetic: int = Field(
        1,
        ge=1,
        description="version of what a method computes in which precision, where dtype is not float32; filled in by the run; 2: "
        "products of features and words are float32",
    )
    device: str = Field("cpu", description="cpu or cuda (index left out)")
    weights_sha256: str | None = Field(None, description="hash of the weights used; filled in by the run")
    activation: Literal["auto", "gelu", "quickgelu"] = Field(
        "auto", description="activation of the towers; auto is replaced by what the weights say"
    )
    window_batch: int | None = Field(
        None, ge=1, description="windows per forward, the tail padded; None = up to 32, halved when memory runs out"
    )
    compile_mode: Literal["off", "default", "reduce-overhead", "max-autotune"] = Field(
        "off", description="torch.compile of the network; reduce-overhead uses CUDA graphs"
    )
    limit: int | None = Field(None, ge=1, description="only the first N images (marks the run partial)")
    seed: int = Field(0, description="seed of random weights")
    demo: bool = Field(
        False, description="built-in CLIP or generated scenes: a check of the pipeline, no evidence about methods"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "method" not in data or "dataset" not in data:
            return data
        data = dict(data)
        given = data.get("protocol", "paper")
        if isinstance(given, str):
            data["protocol"] = protocol(given, data["dataset"], method=data["method"])
        elif isinstance(given, dict) and "overrides" not in given:
            overrides = {key: value for key, value in given.items() if key != "name"}
            data["protocol"] = protocol(given.get("name", "paper"), data["dataset"], method=data["method"], **overrides)
        resolved = data["protocol"]
        if "mode" not in data:
            data["mode"] = resolved.mode if isinstance(resolved, Protocol) else resolved["mode"]
        return data

    @field_validator("device")
    @classmethod
    def _device_kind(cls, value: str) -> str:
        return value.split(":")[0]

    @model_validator(mode="after")
    def _one_mode(self) -> RunSpec:
        if self.mode != self.protocol.mode:
            raise ValueError(f"mode is '{self.mode}' but protocol.mode is '{self.protocol.mode}': set it in protocol")
        return self

    def spec_hash(self) -> str:
        """sha256 over the canonical JSON of all fields: equal hashes are the same run.

        Fields that came later count only where they differ from their default, which is what was done before they existed:
        so a run keeps its hash.
        """
        content = self.model_dump(mode="json")
        for name in ADDED_LATER:
            if getattr(self.protocol, name) == Protocol.model_fields[name].default:
                del content["protocol"][name]
        if self.arithmetic == 1:
            del content["arithmetic"]
        return sha256_of(content)


# Values of strangers may be nested in themselves, or endless.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def validated(model: type[Any], fields: dict[str, Any]) -> Any:
    """An instance of a pydantic model, its complaints turned into one clear ``UsageError``."""
    from pydantic import ValidationError

    try:
        return model(**fields)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = "--" + ".".join(str(part) for part in item["loc"]).replace("_", "-") if item["loc"] else "spec"
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')} (given: {_SHORT.repr(item['input'])})")
        raise UsageError("; ".join(lines)) from None


def flags(chosen: Iterable[tuple[str, str]]) -> list[str]:
    """Settings as they are typed: ``dtype=bfloat16`` as ``--dtype=bfloat16``, ``flip=false`` as ``--no-flip``."""
    found = []
    for key, value in chosen:
        name = key.replace("_", "-")
        if key.startswith("option."):
            found += ["--option", f"{key.removeprefix('option.')}={value}"]
        elif value in {"true", "false"}:
            found.append(f"--{name}" if value == "true" else f"--no-{name}")
        else:
            found.append(f"--{name}={value}")
    return found
