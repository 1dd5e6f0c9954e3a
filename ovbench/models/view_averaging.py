"""A model whose views of an image are averaged as probabilities: windows of a square and the whole image besides.

CAT-Seg's protocol: an image is resized to a square (its aspect lost), windows of it and the whole image at the windows' size
go through the network together, the sigmoid of each view's upsampled logits is averaged over the windows, and with the whole
image's, and that is resized to the label's size. The sigmoid stands between the averages, so this is no pair of matrices as
in :mod:`ovbench.ops.assemble`; classes are therefore taken in portions, and only the best of them is kept at each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.models.base import Background
from ovbench.models.method import Method
from ovbench.models.patch_model import OpenVocabModel
from ovbench.models.windowed import AUTO_WINDOWS
from ovbench.networks.cost_aggregation.aggregator import DROPPED
from ovbench.ops.windows import Box, windows
from ovbench.spec import DType, Protocol
from ovbench.words.class_list import Classes, class_words
from ovbench.words.embeddings import prompts

PORTION_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of one portion's maps at the square's size
MAPS_PER_FORWARD = 1280  # views x classes that aggregation takes at once where the number of views is free
DIVISIBLE = 32  # without windows, the public code pads images to multiples of this and keeps the padding


@dataclass(frozen=True)
class ImageViews:
    """Logits of all views of one image.

    Attributes:
        logits: (V, k, h, w), float32, of the windows in reading order, then of the whole image.
        kept: Class of each logit (V, k), ascending; None: all classes.
        classes: Number K of classes.
        canvas: Size (H, W) of the square that the windows lie in.
        boxes: The windows; empty: one view of the whole image, whose sigmoid comes before its upsampling.
        whole: The last view is the whole image.
    """

    logits: Tensor
    kept: Tensor | None
    classes: int
    canvas: tuple[int, int]
    boxes: tuple[Box, ...]
    whole: bool

    def candidates(self) -> Tensor:
        """Classes that some view kept, ascending; all others have the probability 0 everywhere."""
        if self.kept is None:
            return torch.arange(self.classes, device=self.logits.device)
        kept: Tensor = self.kept.unique()
        return kept

    def of(self, chosen: Tensor) -> Tensor:
        """Logits (V, c, h, w) of some classes, -100 in views that dropped one."""
        found: Tensor
        if self.kept is None:
            found = self.logits[:, chosen]
            return found
        match = self.kept[:, :, None] == chosen  # (V, k, c)
        place = match.int().argmax(dim=1)  # (V, c)
        found = self.logits.gather(1, place[:, :, None, None].expand(-1, -1, *self.logits.shape[2:]))
        return torch.where(match.any(dim=1)[:, :, None, None], found, DROPPED)

    def probabilities(self, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """Averaged probabilities (c, H, W), float32, of some classes."""
        logits = self.of(chosen)
        if not self.boxes:
            return _resized(logits.sigmoid(), size)[0]
        top, left, bottom, right = self.boxes[0]
        maps = _resized(logits, (bottom - top, right - left)).sigmoid_()
        total = maps.new_zeros(len(chosen), *self.canvas)
        count = maps.new_zeros(self.canvas)
        for part, (top, left, bottom, right) in zip(maps, self.boxes, strict=False):
            total[:, top:bottom, left:right] += part
            count[top:bottom, left:right] += 1
        total /= count
        if self.whole:
            total = (total + _resized(maps[-1:], self.canvas)[0]) / 2
        return _resized(total[None], size)[0]

    def portions(self, chosen: Tensor) -> Sequence[Tensor]:
        """The classes in portions whose maps stay small."""
        each = 4 * (self.canvas[0] * self.canvas[1] + self.logits.shape[0] * self.logits.shape[-1] ** 2 * 16)
        return torch.split(chosen, max(1, PORTION_BYTES.get(self.logits.device.type, 64 << 20) // each))

    def at(self, size: tuple[int, int]) -> Tensor:
        """Averaged probabilities (K, H, W), float32, of all classes."""
        found = self.logits.new_zeros(self.classes, *size)
        for portion in self.portions(self.candidates()):
            found[portion] = self.probabilities(portion, size)
        return found

    def labels(self, size: tuple[int, int]) -> Tensor:
        """Label map (H, W), int64: the class with the largest probability, the first of equal ones."""
        best = self.logits.new_full(size, -1.0)
        labels = torch.zeros(size, dtype=torch.int64, device=self.logits.device)
        for portion in self.portions(self.candidates()):
            value, index = self.probabilities(portion, size).max(dim=0)
            better = value > best
            labels = torch.where(better, portion[index], labels)
            best = torch.where(better, value, best)
        return labels


class ViewModel(OpenVocabModel):
    """As :class:`OpenVocabModel`, for methods that give logits of classes (``class_logits``) rather than of words.

    Each word of a class is a class to the network, and a pixel gets the class of its best word; the public code takes only
    the first of several synonyms, as the wording ``spaced`` does. ``seg_logits`` are probabilities (B, Q, H, W): they are
    averaged after the sigmoid.

    Args:
        method: Has ``class_logits`` and ``text_embeddings``, as CAT-Seg.
        classes: K classes, each a word or a list of words.
        protocol: Windows; ``square`` and ``global_view``.
        dtype: Precision of the network; probabilities and sums stay float32.
        window_batch: Views per forward, the tail padded; None takes as many as classes allow, and goes on with half of
            them when memory runs out.
        compile_mode: ``off``, or a mode of ``torch.compile``.
    """

    takes_views = True

    def __init__(
        self,
        method: Method,
        classes: Classes,
        protocol: Protocol,
        *,
        dtype: DType = "float32",
        window_batch: int | None = None,
        compile_mode: str = "off",
        background: Background = "named",
    ) -> None:
        for name, off in (("prob_thd", 0.0), ("area_thd", None), ("upsample", "bilinear"), ("pamr", 0)):
            if getattr(protocol, name) != off:
                raise UsageError(
                    f"Views are averaged as probabilities of single classes: leave --{name.replace('_', '-')} away."
                )
        window_batch = window_batch or (AUTO_WINDOWS if compile_mode != "off" else None)
        super().__init__(method, classes, protocol, dtype=dtype, window_batch=window_batch, background=background)
        self.network = method.class_logits  # type: ignore[assignment]
        if compile_mode != "off":
            self.network = torch.compile(self.network, mode=compile_mode, dynamic=False)

    def set_classes(self, classes: Classes) -> None:
        """Replace the vocabulary; embeddings are looked up by content, so nothing stale can stay."""
        self.words = class_words(classes)
        self.query_words = [word for entry in self.words for word in entry]
        text = self.method.text_embeddings(self.query_words, prompts(self.protocol.templates))  # type: ignore[operator]
        self.register_buffer("text", text, persistent=False)
        owner = [index for index, entry in enumerate(self.words) for _ in entry]
        self.register_buffer("word_class", torch.tensor(owner, device=text.device), persistent=False)

    def step(self, window: tuple[int, int]) -> int:
        """Views of this size (h, w) that go through the network in one forward now."""
        if self.window_batch:
            return self.window_batch
        words = len(self.query_words)
        keep = getattr(getattr(self.method, "aggregator", None), "keep", 0) or words
        return min(super().step(window), max(1, MAPS_PER_FORWARD // min(keep, words)))

    def views(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes (h, w) of the network's inputs for one image of this size (h, w)."""
        p = self.protocol
        if p.mode == "whole":
            return [(p.crop, p.crop)]
        found = [(bottom - top, right - left) for top, left, bottom, right in self._boxes(self._canvas(size))]
        return found + ([(p.crop, p.crop)] if p.global_view else [])

    def _canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        return (self.protocol.square, self.protocol.square) if self.protocol.square else size

    def _boxes(self, canvas: tuple[int, int]) -> list[Box]:
        return windows(*canvas, self.protocol.crop, self.protocol.stride)

    @torch.inference_mode()
    def patch_logits(self, images: Sequence[Tensor], names: Sequence[str] | None = None) -> list[ImageViews]:  # type: ignore[override]
        """Logits of all views of each image (3, h, w), those of all images in common forwards."""
        p = self.protocol
        pieces: list[Tensor] = []  # what views are cut from
        owners: list[int] = []
        groups: dict[tuple[int, int], list[tuple[int, Box]]] = {}  # by size
        layouts: list[tuple[tuple[int, int], tuple[Box, ...]]] = []
        places: list[list[tuple[tuple[int, int], int]]] = [
            [] for _ in images
        ]  # of each view: its group, and where there

        def add(index: int, piece: Tensor, boxes: Sequence[Box]) -> None:
            for box in boxes:
                jobs = groups.setdefault((box[2] - box[0], box[3] - box[1]), [])
                places[index].append(((box[2] - box[0], box[3] - box[1]), len(jobs)))
                jobs.append((len(pieces), box))
            pieces.append(piece)
            owners.append(index)

        with self.stage("prepare"):
            for index, image in enumerate(images):
                raw = image.to(self.device, non_blocking=True).float()
                size = (int(image.shape[-2]), int(image.shape[-1]))
                whole = (0, 0, p.crop, p.crop)
                if p.mode == "whole":
                    add(index, _resized(self._divisible(raw)[None], (p.crop, p.crop))[0], [whole])
                    layouts.append((size, ()))
                    continue
                canvas = self._canvas(size)
                boxes = tuple(self._boxes(canvas))
                add(index, _resized(raw[None], canvas)[0], boxes)
                if p.global_view:
                    add(index, _resized(raw[None], (p.crop, p.crop))[0], [whole])
                layouts.append((canvas, boxes))
        piece_names = [(names[owner] if names else f"image {owner} of the batch") for owner in owners]
        done = {window: self._forwards(pieces, jobs, piece_names) for window, jobs in groups.items()}
        found = []
        for (canvas, boxes), of_image in zip(layouts, places, strict=True):
            rows = [done[window][place] for window, place in of_image]
            kept = [row[1] for row in rows]
            found.append(
                ImageViews(
                    torch.stack([row[0] for row in rows]),
                    torch.stack(kept) if kept[0] is not None else None,  # type: ignore[arg-type]
                    len(self.query_words),
                    canvas,
                    boxes,
                    p.global_view and bool(boxes),
                )
            )
        return found

    def _forwards(
        self, pieces: list[Tensor], jobs: list[tuple[int, Box]], names: list[str]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Logits (k, h, w) of views of one size, and their classes (k,)."""
        found: list[tuple[Tensor, Tensor | None]] = []
        while len(found) < len(jobs):
            top, left, bottom, right = jobs[0][1]
            some = jobs[len(found) : len(found) + self.step((bottom - top, right - left))]
            result = self._attempt(pieces, some, names)
            if result is None:  # out of memory: once more with half the views
                continue
            logits, kept = result
            found += [(logits[row], None if kept is None else kept[row]) for row in range(len(some))]
        return found

    def _divisible(self, image: Tensor) -> Tensor:
        """The image with the mean colour at its right and bottom, up to multiples of 32 pixels."""
        down, right = -image.shape[-2] % DIVISIBLE, -image.shape[-1] % DIVISIBLE
        if not down and not right:
            return image
        mean: Tensor = self.clip.mean[0]  # type: ignore[index]
        return F.pad(image - mean, (0, right, 0, down)) + mean

    @torch.inference_mode()
    def seg_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Probabilities (B, K, H, W), float32.

        Args:
            images: RGB images (B, 3, h, w), values 0..255.
            size: Output size (H, W); None keeps (h, w).
        """
        size = size or (images.shape[-2], images.shape[-1])
        return torch.stack([found.at(size) for found in self.patch_logits(list(images))])

    @torch.inference_mode()
    def decide(self, logits: ImageViews, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Label map (H, W), int64, of one image."""
        return self.word_class[logits.labels(size)]  # type: ignore[index]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (n, c, H, W) of maps (n, c, h, w), bilinear."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    found: Tensor = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return found
