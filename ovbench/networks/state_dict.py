"""The tensors of a weights file, read without running code in it."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovbench.errors import WeightsError, first_line

SHOWN = 3  # keys of each kind that a message names


class _Inert:
    """Stands for an object of a foreign class in a pickle: takes whatever it is made and filled with, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is kept."""

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""


# What training frameworks leave beside the weights: numpy's numbers and arrays, mmengine's and mmcv's log buffers (which name
# their own methods through getattr) and configs. Each is read as an :class:`_Inert`; nothing of them is imported or called.
_BESIDE = (
    *(f"numpy{core}.multiarray.{name}" for core in (".core", "._core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray", "numpy.dtype", "builtins.getattr", "__builtin__.getattr", "collections.defaultdict", "pathlib.PosixPath",
    "mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict",
)  # fmt: skip


def _inert(name: str) -> type[_Inert]:
    module, _, own = name.rpartition(".")
    return type(own, (_Inert,), {"__module__": module})


_STAND_INS: list[Any] = [_inert(name) for name in _BESIDE]


def read_content(path: Path) -> dict[str, Any]:
    """All that a ``.safetensors`` file or a pickled mapping holds, read without running or importing foreign code.

    Objects of a few known kinds that training frameworks leave beside the weights are read as inert ones.

    Raises:
        WeightsError: Missing, unreadable, no mapping, or a pickle that holds objects of other kinds.
    """
    if not path.is_file():
        raise WeightsError(
            f"No weights file '{path}'. Give an existing file, an open_clip tag such as 'openai', or 'random'."
        )
    if _holds_code(path):
        raise WeightsError(
            f"'{path}' is a TorchScript archive (OpenAI's original download), which holds code. Use "
            "'--pretrained openai', or save its state_dict() as .safetensors once and give that file."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds; all mean "not a readable state dict"
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds an object of {foreign[1]}" if foreign else first_line(error).rstrip(".")
        raise WeightsError(
            f"Cannot read weights from '{path}': {reason}. It must be a .safetensors file or a state dict saved by torch.save."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}, not a state dict.")
    return dict(content)


def state_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict among what a file holds, its keys without a wrapper's ``module.``."""
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    return {key.removeprefix("module."): value for key, value in content.items()}


def read_state_dict(path: Path) -> dict[str, Any]:
    """The tensors of a ``.safetensors`` or pickled state dict, read without running foreign code.

    Raises:
        WeightsError: As of :func:`read_content`, or values that are no tensors but objects.
    """
    state = state_of(read_content(path))
    foreign = next((key for key, value in state.items() if isinstance(value, _Inert)), None)
    if foreign is not None:
        kind = type(state[foreign])
        raise WeightsError(
            f"Cannot read weights from '{path}': {foreign} is an object of {kind.__module__}.{kind.__name__}, no tensor."
        )
    return state


def require_fit(
    what: str,
    *,
    missing: Iterable[str] = (),
    unknown: Iterable[str] = (),
    shapes: Iterable[str] = (),
    remedy: str = "",
) -> None:
    """Nothing, if no key is named.

    Args:
        what: The message until the colon, "'x.pth' does not fit the network".
        missing: Keys that the network has and the file lacks.
        unknown: Keys that the network does not have.
        shapes: Keys of another shape, or words about them.
        remedy: What to do instead, a sentence.

    Raises:
        WeightsError: Lists the first of each kind.
    """
    parts = []
    for label, keys in (("missing", missing), ("not known", unknown), ("of another shape", shapes)):
        names = [str(key).removeprefix("segmentor.") for key in keys]
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{label}: {', '.join(names[:SHOWN])}{more}")
    if parts:
        raise WeightsError(f"{what}: {'; '.join(parts)}.{remedy and f' {remedy}'}")


def require_finite(tensors: Iterable[tuple[str, Tensor]], path: Path | str) -> None:
    """Nothing, if no tensor of a file holds NaN or infinity.

    Raises:
        WeightsError: Names the first that does.
    """
    broken = next((key for key, value in tensors if not value.isfinite().all()), None)
    if broken is not None:
        raise WeightsError(f"'{path}' holds NaN or infinity in {broken}: the file is damaged, fetch it again.")


def _holds_code(path: Path) -> bool:
    """Whether a file is a TorchScript archive; damaged archives are left to torch's complaint."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, struct.error, NotImplementedError):
        return False
