"""Where published weights come from and what random ones are called, the same for every network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ovbench.errors import WeightsError, first_line

WEIGHTS_FILE = "model.safetensors"


def random_digest(architecture: object, seed: int) -> str:
    """Content hash of seeded random weights, which depend on the architecture, the seed and torch's generator."""
    text = f"random {architecture} seed {seed} torch {torch.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def fetching(what: str, instead: str) -> Iterator[None]:
    """Turns whatever goes wrong in the ``with`` block, which downloads, into one kind of error.

    Args:
        what: What is fetched and from where.
        instead: What can be given instead.

    Raises:
        WeightsError: Hub, network, cache or file errors; their kinds differ by version of the hub library.
    """
    try:
        yield
    except Exception as error:
        raise WeightsError(f"Could not get the weights {what}: {first_line(error)} {instead}") from error


def fetched(repository: str, what: str, instead: str) -> Path:
    """The weights file of a repository of the hub, or of the hub's cache; see :func:`fetching`."""
    from huggingface_hub import hf_hub_download

    with fetching(f"{what} ({repository})", instead):
        return Path(hf_hub_download(repository, WEIGHTS_FILE))
