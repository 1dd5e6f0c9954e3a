"""The tensors of a weights file, read without running code in it."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ovbench.errors import WeightsError, first_line


def read_state_dict(path: Path) -> dict[str, Any]:
    """The tensors of a ``.safetensors`` or pickled state dict, read without running foreign code.

    Raises:
        WeightsError: Missing, unreadable, or a pickle that holds more than tensors.
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds; all mean "not a readable state dict"
        raise WeightsError(
            f"Cannot read weights from '{path}': {first_line(error).rstrip('.')}. It must be a .safetensors file or a state "
            "dict saved by torch.save."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}, not a state dict.")
    state = dict(content)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = dict(state[wrapper])
            break
    return {key.removeprefix("module."): value for key, value in state.items()}


def _holds_code(path: Path) -> bool:
    """Whether a file is a TorchScript archive; damaged archives are left to torch's complaint."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, struct.error, NotImplementedError):
        return False
