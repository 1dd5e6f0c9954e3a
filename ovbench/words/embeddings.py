"""Words to text embeddings: prompts, a short-context text forward, and a cache keyed by content.

A class word becomes sentences: it is put into templates, or its descriptions are looked up (:mod:`ovbench.words.prompts`).
Each sentence's embedding is L2-normalised, the mean over the word's sentences is taken and normalised again (CLIP's
zero-shot recipe).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.hashing import sha256_of
from ovbench.networks.frozen_clip import FrozenCLIP
from ovbench.paths import cache_dir, user_path
from ovbench.words.prompts import Prompts, described

# ViLD's, as FC-CLIP's public code writes them, full stops included
_SIZES = ("small", "medium", "large")
FC_CLIP = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(f"a photo of a {size} {{}}." for size in _SIZES),
    *(f"This is a photo of a {size} {{}}." for size in _SIZES),
    *(f"There is a {size} {{}} in the scene." for size in _SIZES),
)
PROMPTS_PER_BATCH = 256  # fixed, so that an embedding never depends on free memory
_memory: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Templates:
    """The same sentences for every word: a :class:`ovbench.words.prompts.Prompts`.

    Attributes:
        texts: Strings with one ``{}`` each, the place of the word.
    """

    texts: tuple[str, ...]

    def sentences(self, words: Sequence[str]) -> list[list[str]]:
        """Each word in every template."""
        return [[text.replace("{}", word) for text in self.texts] for word in words]

    def sha256(self, words: Sequence[str]) -> str:
        """The hash of the templates alone, whichever the words."""
        return sha256_of(list(self.texts))


def prompts(name: str) -> Prompts:
    """How words become sentences, by the name in ``Protocol.templates``.

    Args:
        name: ``imagenet80``, ``fc-clip``, ``plain`` or ``name`` (the word alone), ``lsmseg``, a JSON file of descriptions, either
            with ``:ATTRIBUTES`` behind it or not, or a text file with one template per line.

    Raises:
        UsageError: No such name, file or attribute.
        DataError: A JSON file that is not in the format.
    """
    return described(name) or Templates(tuple(templates(name)))


def templates(name: str) -> list[str]:
    """Prompt templates with one ``{}`` each, by name, or a file's lines.

    Names: ``imagenet80``, ``cat-seg``, ``fc-clip``, ``plain`` or ``name`` (the word alone).

    Raises:
        UsageError: No such file, or a line without ``{}``.
    """
    if name in ("plain", "name"):
        return ["{}"]
    if name == "cat-seg":  # PROMPT_ENSEMBLE_TYPE "single" of its code
        return ["A photo of a {} in the scene"]
    if name == "fc-clip":
        return list(FC_CLIP)
    if name == "imagenet80":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    path = user_path(name)
    if not path.is_file():
        raise UsageError(
            f"Unknown prompts '{name}': give imagenet80, fc-clip, plain, lsmseg, lsmseg:ATTRIBUTE+ATTRIBUTE, a .json file of "
            "descriptions, or a file with one template per line."
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the templates '{name}': {error}.") from None
    bad = next((line for line in lines if line.count("{}") != 1), None)
    if bad is not None or not lines:
        raise UsageError(f"Templates in '{name}': every line needs exactly one '{{}}' for the word; got {bad!r}.")
    return lines


def embed_words(clip: FrozenCLIP, words: Sequence[str], prompts: Prompts | Sequence[str]) -> Tensor:
    """Text embeddings (Q, D), float32, L2-normalised, of class words; cached in memory and on disk by content.

    The cache key holds the weights' hash, the activation, every word with its sentences, and the kind of device: two
    vocabularies can never share an entry by their name, nor can a changed description.

    Args:
        clip: The model whose text tower is used; embeddings are made on its device.
        words: Q class words.
        prompts: How they become sentences, or templates with ``{}``.

    Raises:
        UsageError: A word has no sentence, or one that is too long for the text tower.
    """
    if isinstance(prompts, Sequence):
        prompts = Templates(tuple(prompts))
    device = next(clip.parameters()).device
    sentences = prompts.sentences(words)
    key = sha256_of(
        [
            clip.weights_sha256,
            clip.arch,
            clip.activation,
            list(words),
            sentences,
            device.type,
            torch.__version__,
        ]
    )
    if key not in _memory:
        path = cache_dir() / "text" / f"{key}.safetensors"
        cached = _read(path, (len(words), clip.embed_dim))
        if cached is None:
            cached = _embed(clip, words, sentences).cpu()
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
def _embed(clip: FrozenCLIP, words: Sequence[str], sentences: Sequence[Sequence[str]]) -> Tensor:
    device = next(clip.parameters()).device
    of_word = dict(zip(words, sentences, strict=True))
    texts = [text for group in of_word.values() for text in group]
    tokens = clip.tokenizer(texts)  # (n, context)
    lengths = (tokens != 0).sum(dim=1)
    _require_short(clip, of_word, texts, tokens)
    order = torch.argsort(lengths, stable=True)
    out = torch.empty(len(texts), clip.embed_dim)
    for rows in order.split(PROMPTS_PER_BATCH):
        features = encode_tokens(clip.clip, tokens[rows].to(device), int(lengths[rows].max()))
        out[rows] = F.normalize(features.float(), dim=-1).cpu()
    groups = out.split([len(group) for group in of_word.values()])
    mean = F.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)
    place = {word: row for row, word in enumerate(of_word)}
    return mean[[place[word] for word in words]].clone()


def _require_short(clip: FrozenCLIP, of_word: dict[str, Sequence[str]], texts: Sequence[str], tokens: Tensor) -> None:
    """Nothing, if the tokenizer has cut no text: ``tokens`` (n, context) are those of ``texts``.

    Raises:
        UsageError: It has; the message names the class.
    """
    context = tokens.shape[1]
    rows = (tokens[:, -1] != 0).nonzero().flatten().tolist()
    if not rows:
        return
    tokenizer: Any = clip.tokenizer  # of open_clip: given one place more, it changes only what was cut
    longer = tokenizer([texts[row] for row in rows], context_length=context + 1)[:, :context]
    is_cut = (longer != tokens[rows]).any(dim=1).tolist()
    cut = {texts[row] for row, wrong in zip(rows, is_cut, strict=True) if wrong}
    for word, group in of_word.items():
        for text in group:
            if text in cut:
                raise UsageError(
                    f"The prompt of the class '{word}' has more than the {context} tokens that the text encoder of "
                    f"{clip.arch} reads: '{text}'. Shorten it, or say fewer attributes (--prompts lsmseg:size+shape)."
                )


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
