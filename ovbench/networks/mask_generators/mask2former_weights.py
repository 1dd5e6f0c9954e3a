"""Where a Mask2Former comes from: the hub (or its cache), a folder in transformers' layout, or random numbers.

Published for COCO panoptic are Swin-T, -S, -B (100 queries) and -L (200). The hub's Swin-B is the one from ImageNet-1k (its
authors: PQ 55.1). The stronger one from ImageNet-21k (56.4) and that with ResNet-50 (51.9) exist as detectron2's pickles
alone, which are not read here; converted to transformers' layout they load from a folder.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ovbench.errors import WeightsError, first_line
from ovbench.hashing import sha256_of, sha256_of_file
from ovbench.networks.mask_generators.mask2former import Mask2Former
from ovbench.networks.published import fetching
from ovbench.networks.state_dict import require_finite

FILES = ("model.safetensors", "pytorch_model.bin")  # the second only where the first is not
STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = 133  # of COCO panoptic; seen only in the size of the classifier
# Buffers that some releases of transformers saved and others derive.
_DERIVED = re.compile(r"(relative_position_index|criterion\.empty_weight|num_batches_tracked)$")


@dataclass(frozen=True)
class Recipe:
    """An architecture and where it is published.

    Attributes:
        backbone: transformers' configuration of the backbone, as far as it says which one it is.
        queries: Number of masks.
        hub: Repository with COCO panoptic weights; None: there is none in transformers' layout.
    """

    backbone: dict[str, Any]
    queries: int = 100
    hub: str | None = None


def _swin(width: int, third: int, heads: int, window: int) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "embed_dim": width,
        "depths": [2, 2, third, 2],
        "num_heads": [heads, 2 * heads, 4 * heads, 8 * heads],
        "window_size": window,
    }


RECIPES = {
    "mask2former-r50": Recipe({"model_type": "resnet", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]}),
    "mask2former-swin-t": Recipe(_swin(96, 6, 3, 7), hub="facebook/mask2former-swin-tiny-coco-panoptic"),
    "mask2former-swin-s": Recipe(_swin(96, 18, 3, 7), hub="facebook/mask2former-swin-small-coco-panoptic"),
    "mask2former-swin-b": Recipe(_swin(128, 18, 4, 12), hub="facebook/mask2former-swin-base-coco-panoptic"),
    "mask2former-swin-l": Recipe(_swin(192, 18, 6, 12), 200, "facebook/mask2former-swin-large-coco-panoptic"),
}


def random_mask2former(name: str, seed: int = 0, config: dict[str, Any] | None = None) -> Mask2Former:
    """The architecture with transformers' own initial weights, seeded.

    Args:
        name: Key of :data:`RECIPES`.
        seed: Seed of the weights.
        config: Fields of ``Mask2FormerConfig`` that differ from its defaults; None is the published architecture.
    """
    transformers: Any = importlib.import_module("transformers")  # takes seconds
    if config is None:
        recipe = RECIPES[name]
        backbone = {**recipe.backbone, "out_features": STAGES}
        config = {"backbone_config": backbone, "num_queries": recipe.queries, "num_labels": CLASSES}
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**deepcopy(config)))
    digest = sha256_of(
        {"random": config, "seed": seed, "torch": torch.__version__, "transformers": transformers.__version__}
    )
    return Mask2Former(name, model.float(), "random", digest)


def load_mask2former(name: str, weights: str | None = None, *, seed: int = 0) -> Mask2Former:
    """A generator of :data:`RECIPES` in float32 and evaluation mode on the CPU.

    Args:
        name: Key of :data:`RECIPES`.
        weights: None fetches the published weights from the hub (or its cache); ``"random"`` gives the architecture
            alone; else a folder with config.json and model.safetensors (pytorch_model.bin only in its absence), or
            ``owner/name`` of the hub where there is no such folder.
        seed: Seed of random weights.

    Raises:
        WeightsError: The download failed, or files are missing, unreadable or do not fit.
    """
    transformers: Any = importlib.import_module("transformers")  # takes seconds
    if weights == "random":
        return random_mask2former(name, seed)
    given = RECIPES[name].hub if weights is None else weights
    if given is None:
        raise WeightsError(
            f"No COCO panoptic weights of '{name}' are published in transformers' layout: give a folder with config.json "
            "and model.safetensors, 'random' (for timing), or use mask2former-swin-t or mask2former-swin-b."
        )
    folder = Path(given).expanduser()
    if weights is None or (not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given)):
        folder, shown = _download(name, given), given
    else:
        shown = folder.name
    file, config = _files(transformers, name, folder)
    model = _read(transformers, name, folder, file)
    return Mask2Former(name, model, shown, sha256_of([sha256_of_file(config), sha256_of_file(file)]))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' warning of a backbone that its authors did not list, and its progress bars."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _download(name: str, repository: str) -> Path:
    """Folder of the hub's cache with the needed files of a repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    instead = (
        "Without a network give a folder with config.json and model.safetensors, 'random' (for timing), or use another "
        "generator, e.g. grid."
    )
    with fetching(f"of the mask generator '{name}' ({repository})", instead):
        config = hf_hub_download(repository, "config.json")
        try:
            hf_hub_download(repository, FILES[0])
        except EntryNotFoundError:  # of the hub, or, without a network, of its cache
            hf_hub_download(repository, FILES[1])
    return Path(config).parent


def _files(transformers: Any, name: str, folder: Path) -> tuple[Path, Path]:
    """Weights and configuration in a folder; the latter is of the architecture."""
    recipe = RECIPES[name]
    config = folder / "config.json"
    file = next((folder / each for each in FILES if (folder / each).is_file()), None)
    if file is None or not config.is_file():
        raise WeightsError(
            f"No weights in '{folder}' for the mask generator '{name}': it must be a folder with config.json and "
            f"{FILES[0]} (or {FILES[1]}). Or give 'random'"
            f"{f', or leave the weights away to fetch {recipe.hub}' if recipe.hub else ''}."
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["model_type"]
        if kind == "mask2former":  # read by transformers, which fills what the file leaves at its default
            with _quiet(transformers):
                backbone = transformers.Mask2FormerConfig.from_pretrained(str(folder)).backbone_config.to_dict()
    except Exception as error:  # whatever a stranger's file makes json or transformers raise
        raise WeightsError(f"Cannot read '{config}' as a configuration of Mask2Former: {first_line(error)}") from error
    seen = {key: backbone.get(key) for key in recipe.backbone} if kind == "mask2former" else {"model_type": kind}
    if seen != recipe.backbone:
        raise WeightsError(
            f"'{config}' is not of '{name}': it has {_listed(seen)}, needed is {_listed(recipe.backbone)}. "
            f"Generators of this kind: {', '.join(RECIPES)}."
        )
    return file, config


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in fields.items())


def _read(transformers: Any, name: str, folder: Path, file: Path) -> Any:
    """The model in float32 with a folder's weights, all keys and shapes checked."""
    try:
        with _quiet(transformers), torch.random.fork_rng(devices=[]):
            model, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
                str(folder),
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are told below
                use_safetensors=file.suffix == ".safetensors",
                weights_only=True,
            )
    except Exception as error:  # damaged files and configurations raise whatever the library meets first
        raise WeightsError(f"Cannot read '{file}' as the weights of '{name}': {first_line(error)}") from error
    problems = {
        "missing": [key for key in info["missing_keys"] if not _DERIVED.search(str(key))],
        "unknown": [key for key in info["unexpected_keys"] if not _DERIVED.search(str(key))],
        "of another shape": list(info["mismatched_keys"]),
    }
    parts = [f"{label}: {'; '.join(sorted(map(str, keys))[:3])}" for label, keys in problems.items() if keys]
    if parts:
        raise WeightsError(f"'{file}' does not fit the mask generator '{name}' ({'. '.join(parts)}).")
    require_finite(model.named_parameters(), file)
    return model.float()
