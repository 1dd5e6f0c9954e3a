"""Checkpoints to resume from: plain tensors and numbers, written whole or not at all, read with ``weights_only``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ovbench.errors import RunError, WeightsError

_NAME = re.compile(r"iteration-(\d+)\.pt")
KEPT = 2  # the newest, and one before it should a disk fail


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Iterations and files of a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("iteration-*.pt") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def write(folder: Path, iteration: int, content: dict[str, Any]) -> Path:
    """Writes a checkpoint after that many iterations and removes those that are not needed any more.

    Raises:
        RunError: It cannot be written; the earlier ones are still there.
    """
    path = folder / f"iteration-{iteration:08d}.pt"
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"iteration": iteration, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise RunError(
            f"Cannot write the checkpoint '{path}': {error}. Free some space and go on with --resume."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    for _, old in checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        WeightsError: Damaged, or holding more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean "not a checkpoint"
        raise WeightsError(
            f"The checkpoint '{path}' cannot be read: {str(error).splitlines()[0]} Delete it to resume from the one before."
        ) from error
    if not isinstance(content, dict) or not {"iteration", "state_dict", "optimizer", "schedulers"} <= set(content):
        raise WeightsError(f"'{path}' is no checkpoint of ovbench train.")
    return content
