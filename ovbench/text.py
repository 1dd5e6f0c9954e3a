"""Words to text embeddings: prompt templates, a short-context text forward, and a cache keyed by content.

A class word is put into every template; each prompt's embedding is L2-normalised, the mean over templates is taken and
normalised again (CLIP's zero-shot recipe).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovbench.backbones.dense_clip import DenseCLIP
from ovbench.errors import UsageError
from ovbench.hashing import sha256_of
from ovbench.paths import cache_dir

PROMPTS_PER_BATCH = 256  # fixed, so that an embedding never depends on free memory
_memory: dict[str, Tensor] = {}


def templates(name: str) -> list[str]:
    """Prompt templates with one ``{}`` each: ``imagenet80``, ``plain`` (the word alone), or a file's lines.

    Raises:
        UsageError: No such file, or a line without ``{}``.
    """
    if name == "plain":
        return ["{}"]
    if name == "imagenet80":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"Unknown templates '{name}': give imagenet80, plain, or a file with one template per line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    bad = next((line for line in lines if line.count("{}") != 1), None)
    if bad is not None or not lines:
        raise UsageError(f"Templates in '{name}': every line needs exactly one '{{}}' for the word; got {bad!r}.")
    return lines


def embed_words(clip: DenseCLIP, words: Sequence[str], prompt_templates: Sequence[str]) -> Tensor:
    """Text embeddings (Q, D), float32, L2-normalised, of class words; cached in memory and on disk by content.

    The cache key holds the weights' hash, the activation, every word and template, and the kind of device: two
    vocabularies can never share an entry by their name.

    Args:
        clip: The model whose text tower is used; embeddings are made on its device.
        words: Q class words.
        prompt_templates: Strings with ``{}``.
    """
    device = next(clip.parameters()).device
    key = sha256_of(
        [
            clip.weights_sha256,
            clip.arch,
            clip.activation,
            list(words),
            list(prompt_templates),
            device.type,
            torch.__version__,
        ]
    )
    if key not in _memory:
        path = cache_dir() / "text" / f"{key}.safetensors"
        cached = _read(path, (len(words), clip.embed_dim))
        if cached is None:
            cached = _embed(clip, words, prompt_templates).cpu()
            _write(path, cached)
        _memory[key] = cached
    return _memory[key].to(device)


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The cached embeddings, or None when there are none that can be used (they are then made anew)."""
    try:
        found = load_file(path)["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if tuple(found.shape) == shape and bool(found.isfinite().all()) else None


def _write(path: Path, embeddings: Tensor) -> None:
    """Store for next time; a folder that cannot be written only costs the next run some seconds."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file({"embeddings": embeddings.contiguous()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@torch.inference_mode()
def _embed(clip: DenseCLIP, words: Sequence[str], prompt_templates: Sequence[str]) -> Tensor:
    device = next(clip.parameters()).device
    unique = list(dict.fromkeys(words))
    prompts = [template.replace("{}", word) for word in unique for template in prompt_templates]
    tokens = clip.tokenizer(prompts)  # (n, context)
    lengths = (tokens != 0).sum(dim=1)
    order = torch.argsort(lengths, stable=True)
    out = torch.empty(len(prompts), clip.embed_dim)
    for rows in order.split(PROMPTS_PER_BATCH):
        features = encode_tokens(clip.clip, tokens[rows].to(device), int(lengths[rows].max()))
        out[rows] = F.normalize(features.float(), dim=-1).cpu()
    mean = F.normalize(out.view(len(unique), len(prompt_templates), -1).mean(dim=1), dim=-1)
    place = {word: row for row, word in enumerate(unique)}
    return mean[[place[word] for word in words]].clone()


def encode_tokens(model: Any, tokens: Tensor, length: int) -> Tensor:
    """Text features (n, D) of tokens (n, context), computed on the first ``length`` positions only.

    Attention in CLIP's text tower is causal and the feature is read at the end-of-text token, so padding behind it
    changes nothing; cutting it makes short prompts about five times cheaper. Towers built otherwise run in full.
    """
    tower = getattr(model, "text", model)
    plain = (
        hasattr(tower, "token_embedding")
        and getattr(tower, "attn_mask", None) is not None
        and getattr(model, "text_pool_type", getattr(tower, "pool_type", "")) == "argmax"
        and getattr(tower, "cls_emb", None) is None
    )
    if not plain:
        return model.encode_text(tokens)  # type: ignore[no-any-return]
    tokens = tokens[:, :length]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x)
    x = x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]  # end-of-text has the largest id
    projection = tower.text_projection
    if projection is None:
        return x  # type: ignore[no-any-return]
    return projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection  # type: ignore[no-any-return]
