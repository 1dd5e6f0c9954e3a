"""A mask-based method under a protocol: images to masks, their classes, label maps and panoptic segments.

The generator sees an image as the protocol resizes it; CLIP sees it padded to the protocol's multiples, or else with its sides
rounded to whole patches, and resized to the protocol's square where there is one. Masks and patches span the same image: of a
padded image the masks are padded too. All masks of an image go through CLIP in one pass, and
images whose inputs and masks have one size go together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import RunError, UsageError
from ovbench.models.base import Background, Prediction
from ovbench.models.mask_method import MaskMethod, Words, seen_classes, whole_patches
from ovbench.models.patch_model import OpenVocabModel
from ovbench.networks.mask_generators.generator import Proposals
from ovbench.ops.masks import (
    mask_iou,
    padded,
    panoptic_ids,
    resized,
    semantic_labels,
    with_padding,
    without_padding,
)
from ovbench.ops.panoptic import Segments
from ovbench.spec import DType, Protocol
from ovbench.words.class_list import Classes

MASKS_STEP = 100  # at a fixed window batch, the number of masks is padded to a multiple of this


@dataclass(frozen=True)
class ImageMasks:
    """Masks of one image and what they are.

    Attributes:
        masks: Logits (M, h, w), float32.
        probabilities: Of the classes (M, K), float32; scores where an oracle or the generator's objectness had a say.
        logits: Of the classes (M, K), float32, of which the probabilities are made.
        embeddings: (M, D), float32, not normalised; None where the method has none.
    """

    masks: Tensor
    probabilities: Tensor
    logits: Tensor
    embeddings: Tensor | None = None

    def at(self, size: tuple[int, int]) -> Tensor:
        """Sums (K, H, W), float32, over masks of class probability times mask probability."""
        if not len(self.masks):
            return self.probabilities.new_zeros(self.probabilities.shape[1], *size)
        inside = resized(self.masks, size).sigmoid()
        sums: Tensor = (self.probabilities.T @ inside.flatten(1)).unflatten(1, size)
        return sums


class _Answer(NamedTuple):
    """What the network says of one image: masks (M, h, w), logits (M, Q or K) and embeddings (M, D)."""

    masks: Tensor
    logits: Tensor
    embeddings: Tensor | None


class MaskModel(OpenVocabModel):
    """A mask-based method, a vocabulary and a protocol.

    Args:
        method: Built method.
        classes: K classes, each a word or a list of words.
        protocol: ``short_side`` and ``long_side`` say what the generator sees, ``square`` what CLIP sees.
        dtype: Precision of CLIP; the generator, logits and sums stay float32.
        window_batch: Images per forward of CLIP, the tail and the masks padded; None takes what fits about 32 windows of
            224 x 224 and pads nothing.
        compile_mode: ``off`` only.

    Raises:
        UsageError: A protocol for windows or thresholds.
    """

    takes_views = True
    gives_segments = True  # after set_things
    method: MaskMethod

    def __init__(
        self,
        method: MaskMethod,
        classes: Classes,
        protocol: Protocol,
        *,
        dtype: DType = "float32",
        window_batch: int | None = None,
        compile_mode: str = "off",
        background: Background = "named",
    ) -> None:
        if compile_mode != "off":
            raise UsageError("Mask-based methods run uncompiled: the number of masks changes from image to image.")
        off = {
            "mode": "whole", "prob_thd": 0.0, "area_thd": None, "upsample": "bilinear", "pamr": 0, "global_view": False,
        }  # fmt: skip
        for name, value in off.items():
            if getattr(protocol, name) != value:
                raise UsageError(
                    f"A mask-based method sees the whole image and decides by masks: {name} must be {value}. Use --protocol "
                    "fisa or fc-clip."
                )
        super().__init__(method, classes, protocol, dtype=dtype, window_batch=window_batch, background=background)
        self.network_stage = "classify"
        self.things: Tensor | None = None

    def set_things(self, things: Collection[int] | None) -> None:
        """Indices of the classes that have instances; with None, no segments are made."""
        found = None if things is None else [index in things for index in range(self.num_classes)]
        self.things = None if found is None else torch.tensor(found, device=self.device)

    @property
    def needs_truth(self) -> bool:
        """Whether an oracle looks at the labels."""
        return self.method.generator.needs_truth or self.method.config.classifier == "oracle"

    def vocabulary(self) -> Words:
        """The words as methods want them."""
        seen = torch.tensor(seen_classes(self.words, self.method.seen_words), device=self.text.device)  # type: ignore[arg-type]
        return Words(self.text, self.word_class, self.num_classes, self.protocol.logit_scale, seen)  # type: ignore[arg-type]

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) of CLIP's input for an image of this size."""
        if self.protocol.square:
            return self.protocol.square, self.protocol.square
        return self.padded_size(size) if self.protocol.pad else whole_patches(size, self.patch)

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) of an image of this size with the protocol's padding."""
        step = self.protocol.pad
        if not step:
            return size
        if step % self.patch and not self.protocol.square:  # an image of whole patches is needed
            step = self.patch
        return -(-size[0] // step) * step, -(-size[1] // step) * step

    def views(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes (h, w) of CLIP's inputs for one image of this size: there is one."""
        return [self.input_size(size)]

    def network_input(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255, at CLIP's input size, normalised on the device."""
        moved = images.to(self.device, non_blocking=True)
        own = (images.shape[-2], images.shape[-1])
        whole, size = self.padded_size(own), self.input_size(own)
        if whole != own:
            colour = self.method.PAD_COLOUR
            fill = self.clip.mean if colour is None else moved.new_tensor(colour, dtype=torch.float32).view(1, 3, 1, 1)
            larger = fill.repeat(len(moved), 1, *whole)  # type: ignore[operator]
            larger[..., : own[0], : own[1]] = moved
            moved = larger
        if whole != size:
            moved = F.interpolate(moved.float(), size=size, mode=self.protocol.clip_resize, align_corners=False)
        return self.normalise(moved)

    def run_network(self, batch: Tensor) -> Tensor:
        """Logits (B, M, Q) of as many masks as ``config.masks`` says, for measuring, in network inputs (B, 3, H, W)."""
        count = self.method.config.masks
        masks = example_masks(count, (batch.shape[-2] // 4, batch.shape[-1] // 4)).to(batch.device)
        return self.method.classify(batch, masks.expand(batch.shape[0], -1, -1, -1), self.vocabulary()).logits

    def forward_in_words(self) -> str:
        """One forward, as records say it."""
        return f"one forward with {self.method.config.masks} masks, the generator left out"

    @torch.inference_mode()
    def classified(
        self,
        images: Sequence[Tensor],
        names: Sequence[str] | None = None,
        truths: Sequence[Segments | None] | None = None,
    ) -> list[ImageMasks]:
        """Masks of images (3, h, w), uint8, RGB, and their classes.

        Raises:
            UsageError: An oracle, and no truth.
            RunError: NaN or infinity in the logits.
        """
        known = list(truths) if truths is not None else [None] * len(images)
        if self.needs_truth and any(own is None for own in known):
            raise UsageError(
                "An oracle needs labels, which there are in 'ovbench run': choose another generator or classifier."
            )
        moved = [image.to(self.device, non_blocking=True) for image in images]
        with self.stage("generator"):
            ids = [None if own is None else own.ids.to(self.device) for own in known]
            known_by = {"names": names} if self.method.generator.needs_names else {}
            proposals = self.method.generator.propose(moved, ids, **known_by)
        with self.stage(self.network_stage), self.precision():
            found = self._classify(moved, proposals, names)
        with self.stage("decide"):
            return [self._judged(one, own, truth) for one, own, truth in zip(found, proposals, known, strict=True)]

    def _classify(self, images: list[Tensor], proposals: list[Proposals], names: Sequence[str] | None) -> list[_Answer]:
        """What the network says of each image."""
        found: dict[int, _Answer] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        spanning: list[Tensor] = []
        for index, (image, own) in enumerate(zip(images, proposals, strict=True)):
            pixels = (image.shape[-2], image.shape[-1])
            spanning.append(with_padding(own.masks, pixels, self.padded_size(pixels)))
            count = -(-len(own.masks) // MASKS_STEP) * MASKS_STEP if self.window_batch else 0
            groups.setdefault((*self.input_size(pixels), *spanning[-1].shape[-2:], count), []).append(index)
        for (height, width, *_, count), members in groups.items():
            step = self.step((height, width))
            for first in range(0, len(members), step):
                some = members[first : first + step]
                for index, one in zip(some, self._forward_some(some, images, spanning, count), strict=True):
                    found[index] = one._replace(
                        masks=self._cut(one.masks, spanning[index], images[index], proposals[index])
                    )
        for index, one in found.items():
            if not bool(one.logits.isfinite().all()):
                name = names[index] if names else f"image {index} of the batch"
                advice = "Try --dtype float32 or bfloat16." if self.dtype == "float16" else "Check the weights file."
                raise RunError(f"NaN or infinity in the mask logits of {name} ({self.dtype}). {advice}")
        return [found[index] for index in range(len(images))]

    def _forward_some(self, some: list[int], images: list[Tensor], spanning: list[Tensor], count: int) -> list[_Answer]:
        """As :meth:`_classify`, of images that fit into one forward; with half of them where memory runs out.

        Args:
            some: Indices of the images.
            images: All images.
            spanning: Masks of each, of a padded image with the padding.
            count: Number of masks that they are padded to; 0: the most of any.
        """
        if all(not len(spanning[index]) for index in some):
            none = self.text.new_zeros(0, self.num_classes)  # type: ignore[operator]
            return [_Answer(spanning[index], none, None) for index in some]
        try:
            batch = torch.cat([self.network_input(images[index][None]) for index in some])
            masks = padded(
                [spanning[index].to(self.device) for index in some],
                count or max(len(spanning[index]) for index in some),
            )
            if self.window_batch and len(some) < self.window_batch:
                rest = self.window_batch - len(some)
                batch = torch.cat([batch, batch.new_zeros(rest, *batch.shape[1:])])
                masks = torch.cat([masks, masks.new_zeros(rest, *masks.shape[1:])])
            result = self.method.classify(batch, masks, self.vocabulary())
        except (torch.OutOfMemoryError, RuntimeError) as error:
            short = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
            if not short or self.window_batch or len(some) == 1:
                raise
            half = len(some) // 2
            return [
                *self._forward_some(some[:half], images, spanning, count),
                *self._forward_some(some[half:], images, spanning, count),
            ]
        answers = []
        for row, index in enumerate(some):
            number = len(spanning[index])
            own = spanning[index] if result.masks is masks else result.masks[row, :number].float()
            embeddings = None if result.embeddings is None else result.embeddings[row, :number].float()
            answers.append(_Answer(own, result.logits[row, :number].float(), embeddings))
        return answers

    def _cut(self, masks: Tensor, spanning: Tensor, image: Tensor, own: Proposals) -> Tensor:
        """Masks of an image without its padding; those that the method has left as they are need no way back."""
        pixels = (image.shape[-2], image.shape[-1])
        if masks is spanning:
            return own.masks
        return without_padding(masks, (own.masks.shape[-2], own.masks.shape[-1]), pixels, self.padded_size(pixels))

    def _judged(self, found: _Answer, own: Proposals, truth: Segments | None) -> ImageMasks:
        """Masks with the probabilities of their classes."""
        masks, classes = found.masks.to(self.device), self.vocabulary().best(found.logits)
        if self.method.config.classifier == "oracle" and truth is not None:
            return ImageMasks(masks, oracle_classes(masks, truth, self.num_classes), classes, found.embeddings)
        probabilities = classes.softmax(dim=-1)
        if self.method.config.objectness and own.objectness is not None:
            probabilities = probabilities * own.objectness.to(probabilities.device)[:, None]
        return ImageMasks(masks, probabilities, classes, found.embeddings)

    @torch.inference_mode()
    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        names: Sequence[str] | None = None,
        truths: Sequence[Segments | None] | None = None,
    ) -> list[Prediction]:
        """Label map (H, W), int64, and segments of each image; no segments before :meth:`set_things`.

        Args:
            images: RGB images, uint8: (B, 3, h, w), or a list of (3, h, w) of any sizes.
            sizes: Output size (H, W) of each image, the size of its label.
            names: File names for error messages.
            truths: True segments, for oracles.
        """
        batch = list(images)
        if len(sizes) != len(batch):
            raise ValueError(f"{len(batch)} images but {len(sizes)} sizes")
        found = self.classified(batch, names, truths)
        with self.stage("decide"):
            return [self._output(one, size) for one, size in zip(found, sizes, strict=True)]

    def _output(self, found: ImageMasks, size: tuple[int, int]) -> Prediction:
        labels = self.decide(found, size)
        if self.things is None:
            return Prediction(labels)
        p = self.protocol
        ids, classes = panoptic_ids(
            found.probabilities,
            found.masks,
            size,
            self.things.to(labels.device),
            object_thd=p.object_thd,
            overlap_thd=p.overlap_thd,
        )
        return Prediction(labels, Segments(ids, classes, torch.zeros_like(classes, dtype=torch.bool)))

    def arrays(self, found: ImageMasks) -> dict[str, Any]:
        """What is known of one image's masks, as arrays to be saved.

        ``masks`` (M, h, w): logits, float32, a pixel inside where at least 0; ``embeddings`` (M, D): float32, not
        normalised; ``logits`` (M, K): scaled cosines with each class's best word, or what the method makes of them;
        ``scores`` (M, K): class probabilities; ``words`` (Q,) and ``word_class`` (Q,), int64.
        """
        embeddings = found.embeddings
        if embeddings is None:
            embeddings = found.masks.new_zeros(0, self.clip.embed_dim)
        tensors = {"masks": found.masks.float(), "embeddings": embeddings, "logits": found.logits,
                   "scores": found.probabilities, "word_class": self.word_class}  # fmt: skip
        return {**{name: value.cpu().numpy() for name, value in tensors.items()}, "words": self.query_words}  # type: ignore[operator]

    def predict_labels(
        self, images: Tensor | Sequence[Tensor], sizes: Sequence[tuple[int, int]], names: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Label maps, one (H, W) int64 tensor per image; see :meth:`predict`."""
        return [found.labels for found in self.predict(images, sizes, names)]

    @torch.inference_mode()
    def seg_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Sums (B, K, H, W), float32, over masks of class probability times mask probability.

        Args:
            images: RGB images (B, 3, h, w), values 0..255.
            size: Output size (H, W); None keeps (h, w).
        """
        size = size or (images.shape[-2], images.shape[-1])
        return torch.stack([found.at(size) for found in self.classified(list(images))])

    def patch_logits(self, images: Sequence[Tensor], names: Sequence[str] | None = None) -> list[ImageMasks]:  # type: ignore[override]
        """As :meth:`classified`, where there is no truth."""
        return self.classified(images, names)

    @torch.inference_mode()
    def decide(self, logits: ImageMasks, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Label map (H, W), int64, of one image."""
        return semantic_labels(logits.probabilities, logits.masks, size)


def oracle_classes(masks: Tensor, truth: Segments, classes: int) -> Tensor:
    """Scores (M, K): 1 for the class of the true segment with the largest IoU, 0 where a mask overlaps none."""
    scores = masks.new_zeros(len(masks), classes)
    if not len(masks) or not len(truth.classes):
        return scores
    ids = truth.ids.to(masks.device)
    inside = resized(masks, (ids.shape[0], ids.shape[1])) >= 0
    own = ids[None] == torch.arange(len(truth.classes), device=ids.device)[:, None, None]
    best, segment = mask_iou(inside.flatten(1), own.flatten(1)).max(dim=1)
    scores.scatter_(1, truth.classes.to(masks.device)[segment][:, None], (best > 0).to(scores)[:, None])
    return scores


def example_masks(count: int, size: tuple[int, int]) -> Tensor:
    """Logits (count, h, w) of rectangles in various places, for measuring."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(count, 4, generator=generator)
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    top, left = (places[:, 0] * height * 0.7)[:, None, None], (places[:, 1] * width * 0.7)[:, None, None]
    high, wide = ((0.1 + 0.3 * places[:, i]) * side for i, side in ((2, height), (3, width)))
    inside = (
        (rows >= top) & (rows < top + high[:, None, None]) & (columns >= left) & (columns < left + wide[:, None, None])
    )
    return torch.where(inside, 6.0, -6.0)
