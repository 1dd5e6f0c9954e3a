"""The one open-vocabulary segmenter in plain torch: images to cosine logits over words, and to label maps.

How images go through the network in windows is in :mod:`ovbench.models.windowed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.models.method import Method, Solver, Vocabulary
from ovbench.models.windowed import AUTO_WINDOWS, DTYPES, WindowedModel
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.assemble import Weights, linear_weights
from ovbench.ops.jbu import jbu
from ovbench.ops.labels import decide
from ovbench.ops.pamr import pamr
from ovbench.ops.patch_logits import PatchLogits
from ovbench.spec import DEVICES, DType, Protocol, long_dtype, validated
from ovbench.words.class_list import Classes, class_words
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
    """

    takes_words = True
    takes_views = False  # a square and a global view in the protocol

    def __init__(
        self,
        method: Method,
        classes: Classes,
        protocol: Protocol,
        *,
        dtype: DType = "float32",
        window_batch: int | None = None,
        compile_mode: str = "off",
    ) -> None:
        if (protocol.square or protocol.global_view) and not self.takes_views:
            raise UsageError(
                f"The protocol '{protocol.name}' averages probabilities of views, which is for cat-seg and its kin: choose "
                "another one, or leave square and global_view away."
            )
        window_batch = window_batch or (AUTO_WINDOWS if compile_mode != "off" else None)
        super().__init__(protocol, patch=method.clip.patch, dtype=dtype, window_batch=window_batch)
        self.method = method
        method.clip.pos_interp = protocol.pos_interp
        self.set_classes(classes)
        method.use_precision(DTYPES[dtype])
        self.solver = method if isinstance(method, Solver) else None
        if self.solver and (protocol.prob_thd > 0 or protocol.area_thd is not None):
            raise UsageError(
                "A solver's scores are no probabilities: prob_thd and area_thd have no meaning. Use --protocol direct-seg."
            )
        if self.solver:
            self.network_stage = "logits"
        self.network: Callable[[Tensor, Any], Any] = method.patch_logits
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

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255 on the device, with CLIP's mean and deviation."""
        return self.clip.normalise(images)

    def run_network(self, batch: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Cosine logits (B, Q, h, w) of a network input (B, 3, H, W), of a solver also its attention."""
        return self.network(batch, self.text)  # type: ignore[no-any-return]

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
        p = self.protocol
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
    compile_mode: str = "off",
    activation: Any = "auto",
    seed: int = 0,
    method_options: dict[str, Any] | None = None,
    **overrides: Any,
) -> OpenVocabModel:
    """A ready :class:`OpenVocabModel` by names.

    Args:
        method: Method id, see ``ovbench list methods``.
        classes: K classes, each a word or a list of words.
        weights: See :func:`ovbench.networks.clip_weights.load_clip`.
        arch: open_clip architecture, or None.
        protocol: A full protocol (also as a dict), a preset's name, or None for the method's own preset.
        benchmark: Benchmark whose preset values are meant; None leaves its thresholds away.
        dtype: ``float32``, ``bfloat16`` or ``float16``, or as people shorten them (``bf16``).
        device: Torch device.
        window_batch: Windows per forward; None takes up to 32.
        compile_mode: ``off`` or a mode of ``torch.compile``.
        activation: ``auto``, ``gelu`` or ``quickgelu`` for weight files.
        seed: Seed of random weights.
        method_options: The method's own options.
        **overrides: Protocol fields such as ``mode``, ``crop``, ``stride``, ``logit_scale``, ``prob_thd``.

    Raises:
        UsageError: Unknown names or invalid values.
        WeightsError: The weights cannot be had or do not fit.
    """
    from ovbench.registry import method_class
    from ovbench.spec import protocol as preset

    words = class_words(classes)
    cls = method_class(method)
    config = cls.configure_for(method_options or {}, weights=weights)
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
    dtype = long_dtype(dtype)
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
    require_device(device)
    built = cls.load(weights, arch, config, activation=activation, seed=seed, device=device)
    model: OpenVocabModel = cls.model_class()(
        built, words, chosen, dtype=dtype, window_batch=window_batch, compile_mode=compile_mode
    )
    return model


def require_device(device: str) -> None:
    """Nothing, if torch can run on ``device``.

    Raises:
        UsageError: No such device on this machine.
    """
    kind = device.split(":")[0]
    if kind not in {"cpu", "cuda"}:
        raise UsageError(f"Unknown device '{device}'. Known: {', '.join(DEVICES)}.")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.split(":")[1]) if device[5:].isdigit() else 0
        if index >= count:
            raise UsageError(f"Device '{device}' is not there: torch sees {count} CUDA device(s). Use --device cpu.")
