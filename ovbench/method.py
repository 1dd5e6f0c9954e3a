"""What a method is: a frozen CLIP and a rule that turns images into dense features.

Windows, batching, synonyms, thresholds, resizing, precision and timing live once, in :mod:`ovbench.model`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.backbones.dense_clip import DenseCLIP
from ovbench.errors import UsageError, unknown_name


@dataclass(frozen=True)
class NoOptions:
    """Config of a method without constants of its own."""


class Method(nn.Module):
    """Base of all training-free methods: override :meth:`features`.

    Class attributes:
        Config: Frozen dataclass of the method's constants, each with its source beside it.
        OFFLINE_OPTIONS: Options under which the method needs no weights besides CLIP's, for tests and ``--demo``.
    """

    Config: ClassVar[type[Any]] = NoOptions
    OFFLINE_OPTIONS: ClassVar[dict[str, Any]] = {}

    def __init__(self, clip: DenseCLIP, config: Any = None) -> None:
        super().__init__()
        self.clip = clip
        self.config = self.Config() if config is None else config

    @classmethod
    def build(cls, clip: DenseCLIP, options: dict[str, Any] | None = None) -> Method:
        """The method on a loaded CLIP with the user's options.

        Raises:
            UsageError: An option that the method does not have, or of the wrong type.
        """
        return cls(clip, cls.configure(options or {}))

    @classmethod
    def configure(cls, options: dict[str, Any]) -> Any:
        """The config with ``options`` over its defaults (strings are converted to the default's type)."""
        known = {field.name: field for field in fields(cls.Config)}
        values = {}
        for name, value in options.items():
            key = name.replace("-", "_")
            if key not in known:
                raise unknown_name(f"option of {cls.__name__}", name, known)
            values[key] = _convert(key, value, known[key].default)
        return cls.Config(**values)

    def options(self) -> dict[str, Any]:
        """All constants in force, for the record."""
        return asdict(self.config)

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the networks' matrices in ``dtype``; a method with a second backbone converts it here as well."""
        self.clip.use_precision(dtype)

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D), not normalised, of normalised images (B, 3, H, W)."""
        raise NotImplementedError

    def patch_logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Cosine logits (B, Q, h, w), float32, of normalised images (B, 3, H, W) against embeddings (Q, D)."""
        features = F.normalize(self.features(images).float(), dim=-1)
        return (features @ text.T).permute(0, 3, 1, 2)


def _convert(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str) or default is None:
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}[value.lower()]
        return type(default)(value)
    except (KeyError, ValueError):
        raise UsageError(f"Option {name}={value!r}: a {type(default).__name__} is needed, e.g. {default}.") from None
