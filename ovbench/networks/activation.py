"""Which activation a weights file was trained with: GELU or OpenAI's QuickGELU.

Both fit the same tensors, and a wrong one costs points without any error. A tag and a hub model know their own; for a
file this module looks at everything that tells: OpenAI's extra keys, an ``open_clip_config.json`` beside the file, and the
file's hash or name in open_clip's own table of releases. OpenAI trained and published in float16, so weights that are all
exact in float16 contradict an architecture with GELU.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ovbench.errors import OvbenchWarning, WeightsError

Activation = Literal["auto", "gelu", "quickgelu"]
CONFIG = "open_clip_config.json"  # what open_clip writes beside weights
# Keys that only OpenAI's own archives carry beside the tensors
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


def is_quick(
    path: Path, digest: str, state: Mapping[str, Any], asked: Activation, arch: str | None, arch_quick: bool | None
) -> bool:
    """Whether the weights of a file need QuickGELU.

    Args:
        path: The file.
        digest: Its SHA-256.
        state: Its state dict.
        asked: What the user said; ``gelu`` and ``quickgelu`` are obeyed.
        arch: open_clip architecture that the user named; None for a file in OpenAI's format.
        arch_quick: Whether that architecture is one with QuickGELU.

    Raises:
        WeightsError: The evidence contradicts the architecture, or is too thin for it.
    """
    if asked != "auto":
        return asked == "quickgelu"
    found = evidence(path, digest, state)
    if found is not None:
        quick, why = found
        if arch_quick and not quick:
            raise WeightsError(
                f"'{path}' was trained with GELU ({why}), but {arch} is an architecture with QuickGELU: use --arch "
                f"{str(arch).removesuffix('-quickgelu')}, or force it with --activation quickgelu."
            )
        return quick
    if arch is None:  # OpenAI's layout of keys, and its activation
        if not exact_in_float16(state):
            warnings.warn(
                f"Nothing in '{path}' says whether it was trained with GELU or QuickGELU: taken for QuickGELU, as all of "
                "OpenAI's are. For weights trained with open_clip say --activation gelu, or name --arch.",
                OvbenchWarning,
                stacklevel=2,
            )
        return True
    if not arch_quick and exact_in_float16(state):
        raise WeightsError(
            f"'{path}' holds float16 values as OpenAI's releases do, which need QuickGELU, but {arch} has GELU. Say which "
            "it is: --activation quickgelu or --activation gelu."
        )
    return bool(arch_quick)


def evidence(path: Path, digest: str, state: Mapping[str, Any]) -> tuple[bool, str] | None:
    """Whether a file is QuickGELU's and what tells it, or None.

    Args:
        path: The file.
        digest: Its SHA-256.
        state: Its state dict.
    """
    if any(key in state for key in OPENAI_EXTRAS):
        return True, "keys of OpenAI's archives"
    config = config_beside(path)
    if config is not None:
        return bool(config.get("quick_gelu", False)), CONFIG
    release = release_of(path, digest)
    if release is not None:
        name = release[1]["url"].rsplit("/", 1)[-1]
        return bool(release[1].get("quick_gelu", False)), f"open_clip's release {name}"
    return None


def config_beside(path: Path) -> dict[str, Any] | None:
    """The model's part of an ``open_clip_config.json`` beside a file of weights; None where none lies there.

    Raises:
        WeightsError: It cannot be read.
    """
    beside = path.parent / CONFIG
    if not beside.is_file():
        return None
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8"))["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"Cannot read '{beside}', which lies beside the weights: {error}.") from error


def release_of(path: Path, digest: str) -> tuple[str, dict[str, Any]] | None:
    """open_clip's architecture and entry of the release that a file is by its hash or its name; None for no such file."""
    for arch, release in _releases():
        name = release["url"].rsplit("/", 1)[-1]
        if digest in release["url"] or name.rsplit("-", 1)[-1].split(".")[0] == digest[:8] or name == path.name:
            return arch, release
    return None


def exact_in_float16(state: Mapping[str, Any]) -> bool:
    """Whether every matrix has values of float16, whatever its type."""
    matrices = [value for value in state.values() if isinstance(value, Tensor) and value.ndim >= 2]
    return bool(matrices) and all(
        value.is_floating_point() and bool((value.half().to(value.dtype) == value).all()) for value in matrices
    )


def _releases() -> list[tuple[str, dict[str, Any]]]:
    """open_clip's entries of weights at a direct address, each with its architecture."""
    import open_clip

    entries = ((arch, open_clip.get_pretrained_cfg(arch, tag)) for arch, tag in open_clip.list_pretrained())
    return [(arch, entry) for arch, entry in entries if entry.get("url")]
