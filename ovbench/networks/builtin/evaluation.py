"""mIoU of the built-in CLIP on held-out generated scenes, per benchmark and read-out.

A check of the weights that needs neither the suite's backbone nor mmseg: sliding windows, synonyms and thresholds are
repeated here in their shortest form, on the differentiable read-outs of ``readouts``. The suite's own numbers come from
``ovbench run --demo``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.networks.builtin import readouts
from ovbench.networks.builtin.corpus import normalise_images
from ovbench.networks.builtin.scenes import appearance_key, render
from ovbench.networks.builtin.weights import load_state_dict

CROP, STRIDE = 224, 112
# Benchmark -> (height, width) of the scenes, short side they are resized to, logit scale, threshold.
SETTINGS: dict[str, tuple[tuple[int, int], int, float, float]] = {
    "voc21": ((280, 372), 336, 50.0, 0.15),
    "voc20": ((280, 372), 336, 40.0, 0.0),
    "context60": ((280, 372), 336, 40.0, 0.15),
    "context59": ((280, 372), 336, 40.0, 0.0),
    "coco_object": ((300, 400), 336, 55.0, 0.35),
    "coco_stuff": ((320, 427), 448, 40.0, 0.0),
    "cityscapes": ((400, 800), 560, 40.0, 0.0),
    "ade20k": ((300, 400), 336, 40.0, 0.0),
}
HELD_OUT = 1 << 30  # first seed of these scenes

Encode = Callable[[list[str]], Tensor]
Dense = Callable[[Any, list[Tensor]], Tensor]

READOUTS: dict[str, Dense] = {
    "vanilla": lambda visual, feats: feats[-1][:, 1:],
    "value-only": lambda visual, feats: readouts.value_only(visual, feats[-2][:, 1:]),
    "k-k": lambda visual, feats: readouts.self_self(visual, feats[-2][:, 1:], "kk"),
    "sc-clip": readouts.sc,
}


def build(path: Path | None = None) -> Any:
    """The built-in network with its weights, in evaluation mode."""
    state = load_state_dict(path)
    model: Any = readouts.small_clip(state["token_embedding.weight"].shape[0], 0)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def word_embeddings(model: Any, words: list[str]) -> Tensor:
    """Mean over the 80 ImageNet templates, normalised before and after, (Q, E)."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    tokenizer = SimpleTokenizer()
    rows = []
    for word in words:
        ids = tokenizer([template(word) for template in OPENAI_IMAGENET_TEMPLATES])
        lengths = ids.argmax(-1)
        embedded = readouts.encode_text(model, ids[:, : int(lengths.max()) + 1], lengths)
        rows.append(F.normalize(embedded.mean(0), dim=-1))
    return torch.stack(rows)


def _starts(length: int) -> list[int]:
    return sorted({min(start, length - CROP) for start in range(0, max(1, length - CROP + STRIDE), STRIDE)})


@torch.no_grad()
def dense_logits(model: Any, image: Tensor, text: Tensor, dense: list[Dense]) -> list[Tensor]:
    """Cosine logits by sliding window, one (Q, H, W) per read-out, for an image (1, 3, H, W) of at least 224 px."""
    h, w = image.shape[2:]
    corners = [(y, x) for y in _starts(h) for x in _starts(w)]
    totals = [torch.zeros(len(text), h, w) for _ in dense]
    seen = torch.zeros(h, w)
    for start in range(0, len(corners), 12):
        part = corners[start : start + 12]
        crops = torch.cat([image[:, :, y : y + CROP, x : x + CROP] for y, x in part])
        feats = readouts.visual_tokens(model.visual, crops)
        for total, rule in zip(totals, dense, strict=True):
            cosines = readouts.project(model.visual, rule(model.visual, feats)) @ text.T
            side = CROP // 16
            maps = cosines.transpose(1, 2).reshape(len(part), -1, side, side)
            large = F.interpolate(maps, (CROP, CROP), mode="bilinear")
            for (y, x), one in zip(part, large, strict=True):
                total[:, y : y + CROP, x : x + CROP] += one
        for y, x in part:
            seen[y : y + CROP, x : x + CROP] += 1
    return [total / seen for total in totals]


def miou(
    model: Any,
    benchmark: str,
    words: list[list[str]],
    images: int,
    background: bool,
    queries: list[list[str]] | None = None,
) -> dict[str, float]:
    """Percent per read-out over classes that occur or are predicted.

    Args:
        model: From ``build``.
        benchmark: A key of ``SETTINGS``.
        words: Per class its words.
        images: Number of scenes.
        background: Whether class 0 takes pixels below the threshold.
        queries: Words to ask for in place of those that are drawn, to see what a wrong class list does.
    """
    (height, width), short, scale, threshold = SETTINGS[benchmark]
    asked = words if queries is None else queries
    text = word_embeddings(model, [word for group in asked for word in group])
    owner = torch.tensor([k for k, group in enumerate(asked) for _ in group])
    # A look that two classes share (bed in coco_object) is drawn for the first only, as predictions take the first.
    drawn: dict[str, int] = {}
    owners: dict[str, int] = {}
    for k, group in enumerate(words):
        for word in group:
            if owners.setdefault(appearance_key(word) or word, k) == k:
                drawn.setdefault(word, k)
    names = list(drawn)
    confusion = {name: np.zeros((len(words), len(words)), np.int64) for name in READOUTS}
    for i in range(images):
        include = [names[(i * 5 + j) % len(names)] for j in range(5)]
        scene = render(names, height, width, HELD_OUT + i, include=include)
        truth = np.array([drawn[name] for name in names])[scene.label]
        pixels = normalise_images(torch.from_numpy(scene.image)[None])
        resized = F.interpolate(pixels, (short, round(width * short / height)), mode="bilinear")
        for name, logits in zip(READOUTS, dense_logits(model, resized, text, list(READOUTS.values())), strict=True):
            logits = F.interpolate(logits[None], (height, width), mode="bilinear")[0]
            probs = torch.softmax(scale * logits, 0)
            classes = torch.zeros(len(words), height, width)
            classes = classes.scatter_reduce(0, owner[:, None, None].expand_as(probs), probs, "amax")
            best, predicted = classes.max(0)
            if background:
                predicted[best < threshold] = 0
            cell = truth.ravel() * len(words) + predicted.numpy().ravel()
            confusion[name] += np.bincount(cell, minlength=len(words) ** 2).reshape(len(words), -1)
    result = {}
    for name, table in confusion.items():
        union = table.sum(0) + table.sum(1) - table.diagonal()
        iou = table.diagonal()[union > 0] / union[union > 0]
        result[name] = 100.0 * float(iou.mean())
    return result


def report(path: Path | None = None, images: int = 24) -> str:
    """A plain text table: benchmarks down, read-outs across."""
    from ovbench import benchmarks

    model = build(path)
    lines = [f"{'benchmark':<12} " + " ".join(f"{name:>10}" for name in READOUTS)]
    for name in SETTINGS:
        benchmark = benchmarks.get(name)
        scores = miou(model, name, benchmark.words("sclip"), images, benchmark.has_background)
        lines.append(f"{name:<12} " + " ".join(f"{scores[column]:10.1f}" for column in READOUTS))
    return "\n".join(lines) + "\n"
