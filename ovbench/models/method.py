"""What a method is: a frozen CLIP and a rule that turns images into dense features.

Windows, batching, synonyms, thresholds, resizing, precision and timing live once, in :mod:`ovbench.models.patch_model`.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import OvbenchWarning, UsageError, unknown_name
from ovbench.models.backbone_constants import Backbone, Constants, constants_of, in_force
from ovbench.models.base import Stage
from ovbench.models.trainable import Trainable
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.full_precision import product
from ovbench.ops.patch_logits import PatchLogits


@dataclass(frozen=True)
class NoOptions:
    """Config of a method without constants of its own."""


@dataclass(frozen=True)
class Vocabulary:
    """What the words of a run are.

    Attributes:
        word_class: Class index of each word (Q,), int64.
        classes: Number K of classes.
        logit_scale: Factor on cosine logits before the softmax over words.
    """

    word_class: Tensor
    classes: int
    logit_scale: float


class Method(Trainable):
    """Base of all training-free methods: override :meth:`features`.

    Class attributes:
        Config: Frozen dataclass of the method's constants, each with its source beside it.
        OFFLINE_OPTIONS: Options under which the method needs no weights besides CLIP's, for tests and ``--demo``.
        RECIPES: Training recipes by benchmark, of methods that can be trained (``losses``, ``parameter_groups``).
        POLICIES: Which parameters can be trained; the first is the recipes' own.
        MODEL: ``module:Class`` of what puts the method under a protocol.
        BEFORE: What options that came later stand at in records and trained files that do not have them.
        FIXED_BY_TRAINING: A trained file's options cannot be changed.
        ARITHMETIC: Version of what is computed in which precision in bfloat16 and float16, so that records of before and
            after a change are not taken for one run; see ``RunSpec.arithmetic``.
        BACKBONES: Constants by backbone, a literal; see :mod:`ovbench.models.backbone_constants`. Empty where none depends
            on it.
        ELSEWHERE: What is done with them on a backbone for which none were published, in words.

    Attributes:
        constants: Where the constants in force were published, or how they were inferred; None without such a table.
    """

    Config: ClassVar[type[Any]] = NoOptions
    OFFLINE_OPTIONS: ClassVar[dict[str, Any]] = {}
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {}
    POLICIES: ClassVar[tuple[str, ...]] = ()
    MODEL: ClassVar[str] = "ovbench.models.patch_model:OpenVocabModel"
    ARITHMETIC: ClassVar[int] = 2
    BACKBONES: ClassVar[dict[str, dict[str, Any]]] = {}
    ELSEWHERE: ClassVar[str] = ""
    BEFORE: ClassVar[dict[str, Any]] = {}
    FIXED_BY_TRAINING: ClassVar[bool] = False
    takes_segments: ClassVar[bool] = False  # losses are taken on true segments where the data has them

    def __init__(self, clip: DenseCLIP, config: Any = None) -> None:
        super().__init__()
        self.clip = clip
        self.config = self.Config() if config is None else config
        self.constants: str | None = None
        if self.BACKBONES:
            found = self.constants_on(Backbone(clip.depth, clip.patch))
            self.config, self.constants = in_force(self.config, found), found.told
            if found.inferred:
                warnings.warn(f"Constants of {type(self).__name__}: {found.told}.", OvbenchWarning, stacklevel=2)

    @classmethod
    def arithmetic(cls, dtype: str) -> int:
        """The version that a run in this precision records."""
        return 1 if dtype == "float32" else cls.ARITHMETIC

    @classmethod
    def constants_on(cls, backbone: Backbone) -> Constants:
        """The constants on a backbone; :attr:`BACKBONES` is not empty."""
        return constants_of(cls.BACKBONES, backbone, cls.ELSEWHERE)

    @classmethod
    def build(cls, clip: DenseCLIP, options: dict[str, Any] | None = None) -> Method:
        """The method on a loaded CLIP with the user's options.

        Raises:
            UsageError: An option that the method does not have, or of the wrong type.
        """
        return cls(clip, cls.configure(options or {}))

    @classmethod
    def load(
        cls,
        weights: str,
        arch: str | None,
        config: Any,
        *,
        activation: Any = "auto",
        seed: int = 0,
        device: str = "cpu",
    ) -> Method:
        """The method with the weights that ``--weights`` names, which are CLIP's unless it says otherwise.

        Args:
            weights: See :func:`ovbench.networks.clip_weights.load_clip`, as are arch, activation, seed and device.
            arch: open_clip architecture, or None.
            config: The method's constants.
            activation: ``auto``, ``gelu`` or ``quickgelu`` for weight files.
            seed: Of random weights.
            device: Torch device.

        Raises:
            UsageError: Unknown architecture or tag.
            WeightsError: The weights cannot be had or do not fit.
        """
        from ovbench.networks.clip_weights import load_clip

        return cls(load_clip(weights, arch, activation=activation, seed=seed, device=device), config)

    @classmethod
    def model_class(cls) -> Any:
        """The class of :attr:`MODEL`, which is made with (method, classes, protocol, dtype=, window_batch=, compile_mode=)."""
        module, _, name = cls.MODEL.partition(":")
        return getattr(importlib.import_module(module), name)

    @classmethod
    def configure(cls, options: dict[str, Any]) -> Any:
        """The config with ``options`` over its defaults (strings are converted to the default's type)."""
        return configured(cls, options)

    @classmethod
    def configure_for(cls, options: dict[str, Any], *, weights: str, demo: bool = False) -> Any:
        """The config for a run: without downloads in a demo, and no second backbone's weights where CLIP's are random."""
        given = {**(cls.OFFLINE_OPTIONS if demo else {}), **options}
        if weights == "random":
            given = {**random_backbones(cls, given), **given}
        return cls.configure(given)

    @classmethod
    def public_file(cls, path: Path) -> None:
        """Nothing: only networks with fixed classes are recognised by their weights alone."""

    def options(self) -> dict[str, Any]:
        """All constants in force, for the record."""
        return asdict(self.config)

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the networks' matrices in ``dtype``; a method with a second backbone converts it here as well."""
        self.clip.use_precision(dtype)

    def cache_proposals(self, limit: int) -> None:
        """Raises ``UsageError``: only mask-based methods have proposals that can be kept on disk."""
        raise UsageError(f"{type(self).__name__} proposes no masks: leave --cache-masks away.")

    def parameter_groups(self, policy: str | None = None) -> list[dict[str, Any]]:
        """What a policy trains: dicts with ``name``, ``params`` (names), ``lr_mult`` and ``weight_decay_mult``.

        Raises:
            UsageError: Unknown policy, or a method without any.
        """
        raise UsageError(f"{type(self).__name__} is training-free: there is nothing to train.")

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D), not normalised, of normalised images (B, 3, H, W)."""
        raise NotImplementedError

    def patch_logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Cosine logits (B, Q, h, w), float32, of normalised images (B, 3, H, W) against embeddings (Q, D)."""
        features = F.normalize(self.features(images).float(), dim=-1)
        return product(features, text.T).permute(0, 3, 1, 2)


class Solver(Method):
    """Base of methods that read the classes of a whole image out of its logits in another way than the best word."""

    def patch_logits_and_attention(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch logits as :meth:`Method.patch_logits`, and what :meth:`class_scores` may want of each window (B, ...)."""
        return self.patch_logits(images, text), None

    def class_scores(self, found: PatchLogits, vocabulary: Vocabulary, stage: Stage) -> Tensor:
        """Scores (K, h, w), float32, of one image on any grid that spans it: each pixel takes its best class.

        A class without a positive score anywhere is out.

        Args:
            found: Logits of the image.
            vocabulary: The words.
            stage: Times a named stage.
        """
        raise NotImplementedError


def configured(cls: Any, options: dict[str, Any]) -> Any:
    """``cls.Config`` with ``options`` over its defaults (strings are converted to the default's type).

    Raises:
        UsageError: An option that the class does not have, or of the wrong type.
    """
    known = {field.name: field for field in fields(cls.Config)}
    tables = [entry["values"] for entry in getattr(cls, "BACKBONES", {}).values()]
    examples: dict[str, Any] = tables[0] if tables else {}  # of fields that default to None
    values = {}
    for name, value in options.items():
        key = name.replace("-", "_")
        if key not in known:
            raise unknown_name(f"option of {cls.__name__}", name, known)
        values[key] = _convert(key, value, examples.get(key, known[key].default))
    return cls.Config(**values)


def _convert(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str) or default is None:
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}[value.lower()]
        return type(default)(value)
    except (KeyError, ValueError):
        raise UsageError(f"Option {name}={value!r}: a {type(default).__name__} is needed, e.g. {default}.") from None


def random_backbones(cls: Any, options: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Options that make a method's further backbones random too: the same cost, and nothing to download.

    By convention, the option for the weights of a further backbone NAME is NAME_weights, is None for the published ones,
    and takes ``"random"``; where NAME is ``clip``, it is the method's own. Options of a base method begin with ``base.``.
    """
    from ovbench.registry import method_class

    defaults = {field.name: field.default for field in fields(cls.Config)}
    values = {**defaults, **{key.removeprefix(prefix).replace("-", "_"): value for key, value in options.items()}}
    found = {
        prefix + name: "random"
        for name, default in defaults.items()
        if name.endswith("_weights") and default is None and values.get(name.removesuffix("_weights")) != "clip"
    }
    if "base" in defaults:
        theirs = {key: value for key, value in options.items() if key.startswith(f"{prefix}base.")}
        found |= random_backbones(method_class(str(values["base"])), theirs, f"{prefix}base.")
    return found
