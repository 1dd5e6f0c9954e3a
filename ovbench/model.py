"""The one open-vocabulary segmenter in plain torch: images to cosine logits over words, and to label maps.

Windows of all images of a batch go through the network together; logits stay at patch resolution until they are
upsampled once per window batch into an accumulator. The result for an image does not depend on what else is in the
batch: at a fixed ``window_batch`` to the bit (the last batch is padded, because matrix kernels change with the shape).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.backbones.dense_clip import DenseCLIP
from ovbench.errors import RunError, UsageError
from ovbench.method import Method
from ovbench.ops.labels import decide, resize
from ovbench.ops.windows import Box, patch_padding, windows
from ovbench.spec import DType, Protocol, validated
from ovbench.text import embed_words, templates

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_WINDOWS = 32  # windows per forward when window_batch is not set
UPSAMPLED_BYTES = 256 << 20  # of upsampled window logits held at a time
Classes = Sequence[str | Sequence[str]]
Stage = Callable[[str], AbstractContextManager[Any]]


def class_words(classes: Classes) -> list[list[str]]:
    """Each class as a list of words (a class may be given as one word).

    Raises:
        UsageError: No class, or a class without a word.
    """
    words = [[entry] if isinstance(entry, str) else list(entry) for entry in classes]
    words = [[word.strip() for word in entry if word.strip()] for entry in words]
    if not words:
        raise UsageError("The class list is empty: give at least one class, e.g. --classes 'road, car, sky'.")
    bare = next((index for index, entry in enumerate(words) if not entry), None)
    if bare is not None:
        raise UsageError(f"Class {bare} of the class list has no word.")
    return words


class OpenVocabModel(nn.Module):
    """A method, a vocabulary and a protocol.

    Args:
        method: Built method on its CLIP.
        classes: K classes, each a word or a list of words.
        protocol: Windows, scale and thresholds.
        dtype: Precision of the network; logits, softmax and sums stay float32.
        window_batch: Windows per forward, the tail padded; None takes up to 32 and pads nothing.
    """

    def __init__(
        self,
        method: Method,
        classes: Classes,
        protocol: Protocol,
        *,
        dtype: DType = "float32",
        window_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.protocol = protocol
        self.dtype: DType = dtype
        self.window_batch = window_batch
        self.stage: Stage = lambda name: nullcontext()
        method.clip.pos_interp = protocol.pos_interp
        self.set_classes(classes)
        self.eval()

    def set_classes(self, classes: Classes) -> None:
        """Replace the vocabulary; embeddings are looked up by content, so nothing stale can stay."""
        self.words = class_words(classes)
        self.query_words = [word for entry in self.words for word in entry]
        owner = [index for index, entry in enumerate(self.words) for _ in entry]
        text = embed_words(self.clip, self.query_words, templates(self.protocol.templates))
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("word_class", torch.tensor(owner, device=text.device), persistent=False)

    @property
    def clip(self) -> DenseCLIP:
        """The frozen CLIP underneath."""
        return self.method.clip

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.clip.mean.device  # type: ignore[return-value]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.words)

    @torch.inference_mode()
    def seg_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Cosine logits (B, Q, H, W), float32, before scale and softmax.

        Args:
            images: RGB images (B, 3, h, w), uint8 (or any dtype with values 0..255), at the network's input size.
            size: Output size (H, W); None keeps (h, w).

        Raises:
            RunError: NaN or infinity in the logits.
        """
        _check_images(images)
        size = size or (images.shape[-2], images.shape[-1])
        return torch.stack([resize(logits, size) for logits in self.window_logits(list(images))])

    @torch.inference_mode()
    def predict_labels(
        self, images: Tensor | Sequence[Tensor], sizes: Sequence[tuple[int, int]], names: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Label maps, one (H, W) int64 tensor per image, with values 0 .. K-1.

        Args:
            images: RGB images, uint8: (B, 3, h, w), or a list of (3, h, w) of any sizes.
            sizes: Output size (H, W) of each image, the size of its label.
            names: File names for error messages.
        """
        batch = list(images)
        if len(sizes) != len(batch):
            raise ValueError(f"{len(batch)} images but {len(sizes)} sizes")
        averaged = self.window_logits(batch, names)
        with self.stage("decide"):
            return [self.decide(logits, size) for logits, size in zip(averaged, sizes, strict=True)]

    def decide(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Label map (H, W) of averaged cosine logits (Q, h, w) under the protocol's scale and thresholds."""
        p = self.protocol
        return decide(
            logits,
            size,
            self.word_class,  # type: ignore[arg-type]
            logit_scale=p.logit_scale,
            prob_thd=p.prob_thd,
            area_thd=p.area_thd,
            area_rule=p.area_rule,
        )

    @torch.inference_mode()
    def dense_features(self, image: Tensor) -> Tensor:
        """Dense features (h, w, D), float32, not normalised, of one whole RGB image (3, H, W)."""
        _check_images(image[None])
        padded, _ = self._pad(self.clip.normalise(image[None].to(self.device)))
        with self._precision():
            return self.method.features(padded)[0].float()

    @torch.inference_mode()
    def window_logits(self, images: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Tensor]:
        """Window-averaged cosine logits (Q, h, w), float32, of each image (3, h, w) at its own size."""
        p = self.protocol
        boxes: list[list[Box]] = []
        for image in images:
            h, w = image.shape[-2:]
            boxes.append([(0, 0, h, w)] if p.mode == "whole" else windows(h, w, p.crop, p.stride))
        q = len(self.query_words)
        sums = [torch.zeros(q, *image.shape[-2:], device=self.device) for image in images]
        for jobs in self._batches(boxes):
            logits, pad = self._forward_windows(images, jobs, names)
            with self.stage("upsample"):
                _accumulate(sums, jobs, logits, pad)
        with self.stage("upsample"):
            for total, image_boxes in zip(sums, boxes, strict=True):
                if len(image_boxes) > 1:
                    count = torch.zeros(total.shape[-2:], device=self.device)
                    for top, left, bottom, right in image_boxes:
                        count[top:bottom, left:right] += 1
                    total /= count
        return sums

    def _batches(self, boxes: list[list[Box]]) -> Iterator[list[tuple[int, Box]]]:
        """Windows of equal size grouped over all images, ``window_batch`` at a time."""
        groups: dict[tuple[int, int], list[tuple[int, Box]]] = {}
        for index, image_boxes in enumerate(boxes):
            for box in image_boxes:
                groups.setdefault((box[2] - box[0], box[3] - box[1]), []).append((index, box))
        step = self.window_batch or AUTO_WINDOWS
        for jobs in groups.values():
            for first in range(0, len(jobs), step):
                yield jobs[first : first + step]

    def _forward_windows(
        self, images: Sequence[Tensor], jobs: list[tuple[int, Box]], names: Sequence[str] | None
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Patch logits (n, Q, h, w) of a window batch, and the padding (left, right, top, bottom) its input got."""
        with self.stage("prepare"):
            crops = torch.stack([images[i][:, top:bottom, left:right] for i, (top, left, bottom, right) in jobs])
            if self.window_batch and len(jobs) < self.window_batch:
                crops = torch.cat([crops, crops.new_zeros(self.window_batch - len(jobs), *crops.shape[1:])])
            batch, pad = self._pad(self.clip.normalise(crops.to(self.device, non_blocking=True)))
        with self.stage("backbone"), self._precision():
            logits = self.method.patch_logits(batch, self.text)[: len(jobs)].float()  # type: ignore[arg-type]
        finite = logits.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            index, box = jobs[int((~finite).nonzero()[0, 0])]
            name = names[index] if names else f"image {index} of the batch"
            raise RunError(
                f"NaN or infinity in the patch logits of {name}, window {box} (stage: backbone, {self.dtype}). "
                f"{'Try --dtype float32 or bfloat16.' if self.dtype == 'float16' else 'Check the weights file.'}"
            )
        return logits, pad

    def _pad(self, batch: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        pad = (0, 0, 0, 0)
        if self.protocol.patch_pad == "symmetric":
            pad = patch_padding(batch.shape[-2], batch.shape[-1], self.clip.patch)
        return (F.pad(batch, pad) if any(pad) else batch), pad

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])


def _accumulate(
    sums: list[Tensor], jobs: list[tuple[int, Box]], logits: Tensor, pad: tuple[int, int, int, int]
) -> None:
    """Add window logits (n, Q, h, w), upsampled to their windows, to their images' sums, words in chunks."""
    top, left, bottom, right = jobs[0][1]
    height, width = bottom - top, right - left
    full = (height + pad[2] + pad[3], width + pad[0] + pad[1])
    chunk = max(1, UPSAMPLED_BYTES // (4 * len(jobs) * full[0] * full[1]))
    for first in range(0, logits.shape[1], chunk):
        words = slice(first, first + chunk)
        up = F.interpolate(logits[:, words], size=full, mode="bilinear", align_corners=False)
        up = up[..., pad[2] : pad[2] + height, pad[0] : pad[0] + width]
        for row, (index, box) in enumerate(jobs):
            sums[index][words, box[0] : box[2], box[1] : box[3]] += up[row]


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"Images must be (B, 3, h, w) RGB; got shape {tuple(images.shape)}.")


def build_model(
    method: str,
    *,
    classes: Classes,
    weights: str = "openai",
    arch: str | None = None,
    protocol: Protocol | dict[str, Any] | str | None = None,
    benchmark: str | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    window_batch: int | None = None,
    activation: Any = "auto",
    seed: int = 0,
    method_options: dict[str, Any] | None = None,
    **overrides: Any,
) -> OpenVocabModel:
    """A ready :class:`OpenVocabModel` by names.

    Args:
        method: Method id, see ``ovbench list methods``.
        classes: K classes, each a word or a list of words.
        weights: See :func:`ovbench.backbones.clip_weights.load_clip`.
        arch: open_clip architecture, or None.
        protocol: A full protocol (also as a dict), a preset's name, or None for the method's own preset.
        benchmark: Benchmark whose preset values are meant; None leaves its thresholds away.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: Torch device.
        window_batch: Windows per forward; None takes up to 32.
        activation: ``auto``, ``gelu`` or ``quickgelu`` for weight files.
        seed: Seed of random weights.
        method_options: The method's own options.
        **overrides: Protocol fields such as ``mode``, ``crop``, ``stride``, ``logit_scale``, ``prob_thd``.

    Raises:
        UsageError: Unknown names or invalid values.
        WeightsError: The weights cannot be had or do not fit.
    """
    from ovbench.backbones.clip_weights import load_clip
    from ovbench.registry import method_class
    from ovbench.spec import protocol as preset

    words = class_words(classes)
    cls = method_class(method)
    config = cls.configure(method_options or {})
    chosen: Protocol
    if isinstance(protocol, dict):
        chosen = validated(Protocol, protocol)
    elif isinstance(protocol, Protocol):
        chosen = protocol
    else:
        chosen = preset(protocol or "paper", benchmark, method=method, **overrides)
        overrides = {}
    if overrides:
        raise UsageError(f"Give either a full protocol or the fields {', '.join(sorted(overrides))}, not both.")
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
    require_device(device)
    clip = load_clip(weights, arch, activation=activation, seed=seed, device=device)
    return OpenVocabModel(cls(clip, config), words, chosen, dtype=dtype, window_batch=window_batch)


def require_device(device: str) -> None:
    """Nothing, if torch can run on ``device``.

    Raises:
        UsageError: No such device on this machine.
    """
    kind = device.split(":")[0]
    if kind not in {"cpu", "cuda"}:
        raise UsageError(f"Unknown device '{device}'. Known: cpu, cuda, cuda:N.")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.split(":")[1]) if device[5:].isdigit() else 0
        if index >= count:
            raise UsageError(f"Device '{device}' is not there: torch sees {count} CUDA device(s). Use --device cpu.")
