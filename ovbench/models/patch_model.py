"""The one open-vocabulary segmenter in plain torch: images to cosine logits over words, and to label maps.

How images go through the network in windows is in :mod:`ovbench.models.windowed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError
from ovbench.models.base import Background, CostForward
from ovbench.models.method import Method, Solver, Vocabulary
from ovbench.models.windowed import AUTO_WINDOWS, DTYPES, WindowedModel
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.assemble import Weights, linear_weights
from ovbench.ops.jbu import jbu
from ovbench.ops.labels import decide
from ovbench.ops.pamr import pamr
from ovbench.ops.patch_logits import PatchLogits
from ovbench.spec import DType, Protocol
from ovbench.words.class_list import Classes, background_in, class_words
from ovbench.words.embeddings import embed_words, prompts


class OpenVocabModel(WindowedModel):
    """A method, a vocabulary and a protocol.

    Args:
        method: Built method on its CLIP.
        classes: K classes, each a word or a list of words.
        protocol: Windows, scale and thresholds.
        dtype: Precision of the network; logits, softmax and sums stay float32.
        window_batch: Windows per forward, the tail padded; None takes up to 32, pads nothing, and goes on with half of
            them when memory runs out.
        compile_mode: ``off``, or a mode of ``torch.compile`` (``default``; ``reduce-overhead`` uses CUDA graphs). Fixes
            the window batch, so that one shape is compiled.
        background: Index of the class that thresholds leave pixels to, None for no such class, or ``"named"``: the class
            called "background", if there is one.

    Raises:
        NoBackgroundError: Thresholds without a background class.
    """

    takes_views: ClassVar[bool] = False  # a square and a global view in the protocol

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
        if (protocol.square or protocol.global_view) and not self.takes_views:
            raise UsageError(
                f"The protocol '{protocol.name}' averages probabilities of views, which is for cat-seg and its kin: choose "
                "another one, or leave square and global_view away."
            )
        window_batch = window_batch or (AUTO_WINDOWS if compile_mode != "off" else None)
        super().__init__(protocol, patch=method.clip.patch, dtype=dtype, window_batch=window_batch)
        self.method = method
        self.constants = method.constants
        self.asked_background = background
        method.clip.pos_interp = protocol.pos_interp
        self.set_classes(classes)
        method.use_precision(DTYPES[dtype])
        self.solver = method if isinstance(method, Solver) else None
        if self.solver and protocol.has_thresholds:
            raise UsageError(
                "A solver's scores are no probabilities: prob_thd and area_thd have no meaning. Use --protocol direct-seg."
            )
        protocol.require_background(self.background, "the class list")
        if self.solver:
            self.network_stage = "logits"
        self.network = method.patch_logits
        if self.solver and protocol.mode == "whole":
            self.network = self.solver.patch_logits_and_attention
        if compile_mode != "off":
            self.network = torch.compile(self.network, mode=compile_mode, dynamic=False)
        self.eval()

    def set_classes(self, classes: Classes) -> None:
        """Replace the vocabulary; embeddings are looked up by content, so nothing stale can stay."""
        self.words = class_words(classes)
        self.query_words = [word for entry in self.words for word in entry]
        owner = [index for index, entry in enumerate(self.words) for _ in entry]
        text = embed_words(self.clip, self.query_words, prompts(self.protocol.templates))
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

    @property
    def background(self) -> int | None:
        """Index of the class that thresholds leave pixels to; None where there is none."""
        asked = self.asked_background
        if isinstance(asked, str):
            return background_in(self.words)
        if asked is not None and not 0 <= asked < self.num_classes:
            raise UsageError(f"The background is class {asked}, but classes are 0..{self.num_classes - 1}.")
        return asked

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255 on the device, with CLIP's mean and deviation."""
        return self.clip.normalise(images)

    def run_network(self, batch: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Cosine logits (B, Q, h, w) of a network input (B, 3, H, W), of a solver also its attention."""
        return self.network(batch, self.text)  # type: ignore[no-any-return]

    def cost(self, image: Tensor) -> CostForward:
        """As of :class:`WindowedModel`; of a solver, the whole image."""
        if not self.solver:
            return super().cost(image)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        shape = f"1x3x{size[0]}x{size[1]}, one whole image: networks, solver and upsampling"
        return CostForward(lambda: self.predict_labels([image], [size]), shape, 1)

    def as_trained(self) -> AbstractContextManager[None] | None:
        """Within it those parameters have gradients that the first of the method's policies trains."""
        return self._under_policy() if self.method.POLICIES else None

    @contextmanager
    def _under_policy(self) -> Iterator[None]:
        names = {name for group in self.method.parameter_groups() for name in group["params"]}
        for name, parameter in self.method.named_parameters():
            parameter.requires_grad_(name in names)
        try:
            yield
        finally:
            self.method.requires_grad_(False)
            if isinstance(self.clip, DenseCLIP):
                self.clip.join_projections()

    def parts(self) -> dict[str, nn.Module]:
        """The method's networks, CLIP as its two towers; what both towers share or none holds is in neither."""
        parts: dict[str, nn.Module] = {}
        for name, child in self.method.named_children():
            if isinstance(child, DenseCLIP):
                parts[f"{name}.visual"] = child.visual
                parts[f"{name}.text"] = child.clip  # the vision tower is counted already
            else:
                parts[name] = child
        return parts

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
        return torch.stack([found.at(size) for found in self.patch_logits(list(images))])

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
        found = self.patch_logits(batch, names)
        if self.solver:  # has stages of its own
            return [self.solve(logits, size) for logits, size in zip(found, sizes, strict=True)]
        with self.stage("decide"):
            return [self.decide(logits, size) for logits, size in zip(found, sizes, strict=True)]

    @torch.inference_mode()
    def decide(self, logits: PatchLogits, size: tuple[int, int]) -> Tensor:
        """Label map (H, W), int64, of one image under the protocol's scale and thresholds."""
        if self.solver:
            return self.solve(logits, size)
        p, background = self.protocol, None
        if p.has_thresholds:  # the class list may be another one than at the beginning
            background = self.background
            p.require_background(background, "the class list")
        weights: Weights | None = None
        if p.pamr or p.upsample != "bilinear":
            values = self.refine(logits, size).permute(1, 2, 0)
        else:
            values, weights = logits.values, logits.weights(size)
        return decide(
            values,
            weights,
            self.word_class,  # type: ignore[arg-type]
            logit_scale=p.logit_scale,
            prob_thd=p.prob_thd,
            area_thd=p.area_thd,
            area_rule=p.area_rule,
            background=background or 0,
        )

    @torch.inference_mode()
    def solve(self, logits: PatchLogits, size: tuple[int, int]) -> Tensor:
        """Label map (H, W), int64, of one image from the method's own scores per class."""
        p = self.protocol
        assert self.solver is not None
        vocabulary = Vocabulary(self.word_class, self.num_classes, p.logit_scale)  # type: ignore[arg-type]
        scores = self.solver.class_scores(logits, vocabulary, self.stage)
        with self.stage(p.upsample):
            alive = (scores.flatten(1).amax(dim=1) > 0).nonzero()[:, 0]  # only these are brought to the image's size
            if not len(alive):
                return torch.zeros(size, dtype=torch.int64, device=scores.device)
            scores = scores[alive]
            if p.pamr or p.upsample == "jbu":
                values, weights = self._refined(scores, logits, size).permute(1, 2, 0), None
            else:
                values = scores.permute(1, 2, 0)
                weights = (linear_weights(scores.shape[1], size[0]), linear_weights(scores.shape[2], size[1]))
            return decide(values, weights, alive)

    @torch.inference_mode()
    def refine(self, logits: PatchLogits, size: tuple[int, int]) -> Tensor:
        """Window-averaged logits (Q, H, W) under the protocol's upsampling and PAMR, guided by the image.

        Both work at the output size, on the network input resized to it, as NACLIP's code does with PAMR.
        """
        (h, w), patch = logits.plan.size, self.clip.patch
        if self.protocol.upsample == "jbu":
            size_of_patches = (max(1, round(h / patch)), max(1, round(w / patch)))
            return self._refined(logits.at(size_of_patches), logits, size)
        return self._refined(logits.at(size), logits, size)

    def _refined(self, values: Tensor, logits: PatchLogits, size: tuple[int, int]) -> Tensor:
        """Values (K, h, w) at the size (K, H, W) under the protocol's upsampling and PAMR."""
        p = self.protocol
        image = logits.image.to(self.device).float() / 255
        guide = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        if p.upsample == "jbu":
            values = jbu(values, guide)
        elif tuple(values.shape[-2:]) != size:
            values = F.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]
        return pamr(values, guide, iterations=p.pamr, dilations=p.pamr_dilations) if p.pamr else values

    @torch.inference_mode()
    def dense_features(self, image: Tensor) -> Tensor:
        """Dense features (h, w, D), float32, not normalised, of one whole RGB image (3, H, W)."""
        _check_images(image[None])
        with self.precision():
            return self.method.features(self.network_input(image[None]))[0].float()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"Images must be (B, 3, h, w) RGB; got shape {tuple(images.shape)}.")
