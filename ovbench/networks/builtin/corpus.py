"""Training batches of generated scenes and prompts: everything follows from (seed, step)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ovbench.networks.builtin.appearances import table
from ovbench.networks.builtin.scenes import TRAINING_SEEDS, Variety, render

PATCH = 16
MEAN = (122.771, 116.746, 104.094)
STD = (68.501, 66.632, 70.323)
# Side in pixels -> images per batch and share of the steps: about the same number of tokens in each.
SIDES: dict[int, tuple[int, float]] = {112: (96, 0.5), 160: (48, 0.1), 224: (24, 0.4)}
GROUP = 8  # images that share one resizing


def normalise_images(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32 with CLIP's mean and standard deviation."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() - mean) / std


def patch_shares(label: NDArray[np.int32], classes: int) -> NDArray[np.float32]:
    """Share of each class in each patch: (H, W) labels -> (N, classes), rows sum to one, patches row-major."""
    h, w = label.shape[0] // PATCH, label.shape[1] // PATCH
    cells = label[: h * PATCH, : w * PATCH].reshape(h, PATCH, w, PATCH).transpose(0, 2, 1, 3).reshape(h * w, -1)
    flat = (np.arange(h * w)[:, None] * classes + cells).ravel()
    counts = np.bincount(flat, minlength=h * w * classes).reshape(h * w, classes)
    return (counts / np.float32(PATCH * PATCH)).astype(np.float32)


def _jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


@dataclass(frozen=True)
class Batch:
    """``images`` (B, S, S, 3) uint8, ``shares`` (B, N, K) float32 of all looks in the table, ``corner`` of the grid."""

    images: Tensor
    shares: Tensor
    corner: tuple[int, int]
    step: int


class Scenes(Dataset[Batch]):
    """Batch number ``step`` of a training run."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed = steps, seed
        self.words = [entry.key for entry in table()]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.Generator(np.random.PCG64([self.seed, step]))
        side = int(rng.choice(list(SIDES), p=[share for _, share in SIDES.values()]))
        number = SIDES[side][0]
        images, labels = [], []
        for start in range(0, number, GROUP):
            # What an evaluation does to an image before the network sees it: resizing, JPEG.
            zoom = float(np.exp(rng.uniform(np.log(0.7), np.log(2.2)))) if rng.random() < 0.5 else 1.0
            drawn = max(16, round(side / zoom))
            variety = Variety(scale=(0.65, 1.5), turn=0.35, thing=(0.3, 1.3))
            pictures, maps = [], []
            for i in range(start, start + GROUP):
                things = None
                if rng.random() < 0.1:  # any look can be asked for as a thing or as a region
                    things = [word for word in self.words if rng.random() < 0.5]
                seed = TRAINING_SEEDS.start + (self.seed << 32) + step * 128 + i
                scene = render(self.words, drawn, drawn, seed, things=things, variety=variety)
                pictures.append(scene.image)
                maps.append(scene.label)
            stack, marks = np.stack(pictures), np.stack(maps)
            if drawn != side:
                resized = F.interpolate(
                    torch.from_numpy(stack).permute(0, 3, 1, 2).float(), (side, side), mode="bilinear"
                )
                stack = resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
                nearest = ((np.arange(side) + 0.5) * drawn / side).astype(np.int64)
                marks = marks[:, nearest][:, :, nearest]
            for picture, mark in zip(stack, marks, strict=True):
                images.append(_jpeg(picture, int(rng.integers(70, 96))) if rng.random() < 0.3 else picture)
                labels.append(patch_shares(mark, len(self.words)))
        span = 14 - side // PATCH
        corner = (int(rng.integers(0, span + 1)), int(rng.integers(0, span + 1)))
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), corner, step)


class Prompts:
    """Tokenised prompts in a compact vocabulary: only the rows of the token table that the prompts use.

    Attributes:
        rows: Token ids of OpenAI's vocabulary in use, sorted; a compact id is a position in it.
    """

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        self._tokenizer = SimpleTokenizer()
        self.templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES] + ["{}"]
        self.words = [entry.words for entry in table()]
        used: set[int] = {self._tokenizer.sot_token_id, self._tokenizer.eot_token_id}
        for text in [*self.templates, "a photo of , and.", *(word for words in self.words for word in words)]:
            used.update(self._tokenizer.encode(text.replace("{}", " ")))
        self.rows = sorted(used)
        self._compact = {token: i for i, token in enumerate(self.rows)}
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Compact ids of one prompt with start and end token."""
        if text not in self._cache:
            tokens = self._tokenizer.encode(text)[:75]
            whole = [self._tokenizer.sot_token_id, *tokens, self._tokenizer.eot_token_id]
            self._cache[text] = [self._compact[token] for token in whole]
        return self._cache[text]

    def batch(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(P, L) ids padded with 0 and the index of each end token, (P,)."""
        found = [self.ids(text) for text in texts]
        length = max(len(ids) for ids in found)
        padded = torch.tensor([ids + [0] * (length - len(ids)) for ids in found])
        return padded, torch.tensor([len(ids) - 1 for ids in found])

    def classes(self, rng: np.random.Generator) -> list[str]:
        """One prompt per look: a random synonym in a random template."""
        texts = []
        for words in self.words:
            template = self.templates[int(rng.integers(len(self.templates)))]
            texts.append(template.replace("{}", words[int(rng.integers(len(words)))]))
        return texts

    def captions(self, rng: np.random.Generator, shares: Tensor) -> list[str]:
        """A caption per image that names some of the looks covering >= 3 % of it; ``shares`` is (B, N, K)."""
        texts = []
        for row in shares.mean(1).numpy():
            seen = rng.permutation(np.nonzero(row >= min(0.03, row.max()))[0])
            seen = seen[: int(rng.integers(1, min(6, len(seen)) + 1))]
            names = [self.words[k][int(rng.integers(len(self.words[k])))] for k in seen]
            listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
            texts.append(f"a photo of {listed}.")
        return texts
