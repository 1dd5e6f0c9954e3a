"""The built-in CLIP's weights: 12 transformer blocks of 128, really trained on generated scenes (see ``train``).

For trying the suite and for end-to-end tests where no real weights can be had. Every word it knows was trained, on the
same generator as the demo's scenes: its scores are a check of the pipeline and no evidence about open-vocabulary
ability or about the ranking of methods. On photographs it is meaningless.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.networks.builtin.appearances import digest, table

VOCABULARY = 49408
_TABLE, _ROWS = "token_embedding.weight", "token_embedding.rows"
_FILLER_SEED = 0


def weights_path() -> Path:
    """The weight file that ships with the package."""
    return Path(__file__).with_name("clip.safetensors")


def metadata(path: Path | None = None) -> dict[str, str]:
    """How the file was made: seed, steps, loss, seconds, date, command, and the looks it was trained on."""
    with safe_open(str(_existing(path)), framework="pt") as file:
        return dict(file.metadata() or {})


def _existing(path: Path | None) -> Path:
    path = path or weights_path()
    if not path.is_file():
        raise WeightsError(
            f"The built-in weights are missing: {path}. Reinstall ovbench, or make them with "
            "'python -m ovbench.networks.builtin.train --out RUN' and '--out RUN --export FILE'."
        )
    return path


def load_state_dict(path: Path | None = None) -> dict[str, Tensor]:
    """A complete state dict in OpenAI's CLIP layout, float32.

    The file holds only the token rows that were trained; the others of the 49408 are small fixed noise, so that an
    unknown word gives a finite, meaningless embedding.

    Raises:
        WeightsError: The file is missing or not one of ours.
    """
    path = _existing(path)
    state: dict[str, Tensor] = {}
    with safe_open(str(path), framework="pt") as file:
        if _ROWS not in file.keys():  # noqa: SIM118 - safe_open is no mapping
            raise WeightsError(f"{path} is not a built-in weight file: it has no '{_ROWS}'.")
        for name in file.keys():  # noqa: SIM118
            state[name] = file.get_tensor(name)
    rows = state.pop(_ROWS).long()
    trained = state[_TABLE].float()
    state = {name: tensor.float() for name, tensor in state.items()}
    filler = np.random.Generator(np.random.PCG64(_FILLER_SEED))
    full = torch.from_numpy(filler.standard_normal((VOCABULARY, trained.shape[1]), np.float32) * np.float32(0.02))
    full[rows] = trained
    state[_TABLE] = full
    return state


def export(checkpoint: Path, path: Path) -> Path:
    """Writes a training checkpoint as a weight file: float16, used token rows only, how it was made as metadata."""
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    tensors = {name: tensor.half().contiguous() for name, tensor in saved["model"].items()}
    tensors[_ROWS] = torch.tensor(saved["rows"], dtype=torch.int32)
    command = (
        f"python -m ovbench.networks.builtin.train --out RUN --seed {saved['seed']} --steps {saved['schedule_steps']} "
        f"--lr {saved['peak']}"
    )
    if saved["cooling"] is not None:
        command += f" --cool-at {saved['cooling']} --cooldown {saved['step'] - saved['cooling']}"
    keys = [entry.key for entry in table()]
    facts = {
        "format": "ovbench-builtin-clip 1",
        "seed": str(saved["seed"]),
        "steps": str(saved["step"]),
        "schedule_steps": str(saved["schedule_steps"]),
        "looks": json.dumps(keys),
        "looks_sha256": digest(keys),
        "seconds": str(round(saved["seconds"])),
        "loss": json.dumps({name: round(value, 4) for name, value in saved["loss"].items()}),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": str(saved["torch"]),
        "command": command,
        "note": "trained on generated scenes with the benchmarks' class names; a pipeline check, not a result",
    }
    partial = path.with_suffix(".tmp")
    save_file(tensors, str(partial), metadata=facts)
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(path)
    return path
