"""Closed-set methods, for classes that are fixed when they are trained: an encoder and a decode head of mmseg's kind.

:class:`ClosedSetMethod` says what the network is, :class:`ClosedSetNetwork` is the network, :class:`ClosedSetModel` puts it
under a protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, runtime_checkable
from typing import Protocol as Interface

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError, unknown_name
from ovbench.models.base import CostForward
from ovbench.models.method import NoOptions, configured
from ovbench.models.public_file import PublicFile
from ovbench.models.trainable import ParameterGroup, Trainable
from ovbench.models.windowed import WindowedModel
from ovbench.ops.assemble import Weights
from ovbench.ops.labels import decide, decide_views
from ovbench.ops.patch_logits import PatchLogits
from ovbench.spec import DType, Protocol

POLICIES = ("all", "frozen-encoder")


class ClosedSetMethod:
    """Base of closed-set methods: override :meth:`model_config`.

    Class attributes:
        Config: Frozen dataclass of the method's switches, each with its source beside it.
        RECIPES: Training recipes, benchmark id to fields of ``ovbench.train.recipe.Recipe``; ``"*"`` for all others.
        DEFAULT_ARCH: Encoder that is meant where none is named.
        TRIAL_OPTIONS: Options that make it small, for ``ovbench train --demo``.
        BEFORE: What options that came later stand at in records and trained files that do not have them.
        FIXED_BY_TRAINING: A trained network has the options that it was trained with, and no others.

    Args:
        name: Method id, which one class may have several of.
        config: Values of ``Config``; None takes the defaults.
    """

    Config: ClassVar[type[Any]] = NoOptions
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {}
    DEFAULT_ARCH: ClassVar[str] = "resnet50-v1c"
    TRIAL_OPTIONS: ClassVar[dict[str, Any]] = {}
    BEFORE: ClassVar[dict[str, Any]] = {}
    FIXED_BY_TRAINING: ClassVar[bool] = True

    def __init__(self, name: str, config: Any = None) -> None:
        self.name = name
        self.config = self.Config() if config is None else config

    @classmethod
    def configure(cls, options: dict[str, Any]) -> Any:
        """The config with ``options`` over its defaults (strings are converted to the default's type).

        Raises:
            UsageError: An option that the method does not have, or of the wrong type.
        """
        return configured(cls, options)

    @classmethod
    def configure_for(cls, options: dict[str, Any], *, weights: str, demo: bool = False) -> Any:
        """As :meth:`configure`: no switch depends on weights."""
        return cls.configure(options)

    @classmethod
    def public_file(cls, path: Path) -> PublicFile | None:
        """What a file of others' making, e.g. a public checkpoint, is of; None where that is not known.

        Raises:
            WeightsError: It is of a network that the method cannot be.
        """
        return None

    def options(self) -> dict[str, Any]:
        """The switches in force, for the record; those that came later only where they are not what was done before them."""
        defaults = asdict(self.Config())
        unmoved = {name for name, value in self.BEFORE.items() if value == defaults[name]}
        return {
            name: value for name, value in asdict(self.config).items() if name not in unmoved or value != defaults[name]
        }

    def model_config(
        self,
        arch: str,
        num_classes: int,
        *,
        training: bool = False,
        class_frequencies: Sequence[int] | None = None,
        weights: str | None = None,
    ) -> dict[str, Any]:
        """The whole network as a plain config for mmseg's ``MODELS``, ``type="EncoderDecoder"``.

        Args:
            arch: Encoder, see :func:`ovbench.networks.encoders.encoder_names`.
            num_classes: K.
            training: Also what only training needs: auxiliary heads, teachers, losses' constants.
            class_frequencies: Pixels of each class in the training set (K,), where a loss wants them.
            weights: File with the encoder's pretrained weights; None leaves them random.

        Raises:
            UsageError: Unknown encoder, or one that does not go with the method.
        """
        raise NotImplementedError

    def needs_class_frequencies(self) -> bool:
        """Whether training must count the pixels of each class first."""
        return False


@runtime_checkable
class CoarseHead(Interface):
    """A decode head with a second classifier that does not decide, as CAA's and ECAC's."""

    def coarse_logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, h, w) of that classifier, from the encoder's maps."""
        ...


class ClosedSetNetwork(Trainable):
    """An mmseg ``EncoderDecoder`` behind the normalisation of its encoder, for evaluation and for training.

    Args:
        segmentor: Built from :meth:`ClosedSetMethod.model_config`.
        mean: RGB means (0..255) of the encoder's training images.
        std: Deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, segmentor: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.segmentor = segmentor
        self.frozen_encoder = False
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255, as the encoder wants them, float32."""
        return (images.float() - self.mean) / self.std

    def forward(self, batch: Tensor) -> Tensor:
        """Logits (B, K, h, w) on the head's own grid of normalised images (B, 3, H, W)."""
        logits: Tensor = self.segmentor.decode_head(self.segmentor.extract_feat(batch))
        return logits

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses by name, those that are optimised with "loss" in it, in training mode.

        Args:
            images: (B, 3, H, W), RGB 0..255.
            labels: (B, H, W), int64, 255 ignored.
        """
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
        found: dict[str, Tensor] = self.segmentor.loss(self.normalise(images), samples)
        return found

    def branches(self) -> tuple[str, ...]:
        """``auxiliary`` (with a number where there are several) and ``coarse``, as far as the network has them."""
        count = 0
        if self.segmentor.with_auxiliary_head:
            heads = self.segmentor.auxiliary_head
            count = len(heads) if isinstance(heads, nn.ModuleList) else 1
        names = ["auxiliary"] if count == 1 else [f"auxiliary_{number}" for number in range(count)]
        return (*names, "coarse") if isinstance(self.segmentor.decode_head, CoarseHead) else tuple(names)

    def branch_logits(self, batch: Tensor) -> dict[str, Tensor]:
        """See :meth:`ovbench.models.trainable.Trainable.branch_logits`."""
        maps = self.segmentor.extract_feat(batch)
        found = {}
        for name in self.branches():
            if name == "coarse":
                found[name] = self.segmentor.decode_head.coarse_logits(maps)
                continue
            heads = self.segmentor.auxiliary_head
            head = heads[int(name.split("_")[1])] if isinstance(heads, nn.ModuleList) and len(heads) > 1 else heads
            found[name] = (head[0] if isinstance(head, nn.ModuleList) else head)(maps)
        return found

    def train(self, mode: bool = True) -> ClosedSetNetwork:
        """Training mode, in which a frozen encoder's batch statistics stay as they are, or evaluation."""
        super().train(mode)
        if self.frozen_encoder:
            self.segmentor.backbone.eval()
        return self

    def parameter_groups(self, policy: str) -> list[ParameterGroup]:
        """What is trained, under the policies ``all`` and ``frozen-encoder``.

        Norms and biases decay as everything does, as in the configs of mmseg that the recipes follow, unless a recipe says
        otherwise (``norm_decay``).

        Raises:
            UsageError: Unknown policy.
        """
        if policy not in POLICIES:
            raise unknown_name("trainable-parameter policy", policy, POLICIES)
        parts = {"encoder": self.segmentor.backbone}
        if getattr(self.segmentor, "neck", None) is not None:
            parts["neck"] = self.segmentor.neck
        parts["decode_head"] = self.segmentor.decode_head
        if self.segmentor.with_auxiliary_head:
            parts["auxiliary_head"] = self.segmentor.auxiliary_head
        self.frozen_encoder = policy == "frozen-encoder"
        if self.frozen_encoder:
            del parts["encoder"]
        return [
            ParameterGroup(name, tuple(part.parameters()), head=name.endswith("_head")) for name, part in parts.items()
        ]


class ClosedSetModel(WindowedModel):
    """A closed-set network under a protocol: images to label maps, one scale or several, with or without mirroring.

    Args:
        network: The network.
        classes: Names of the K classes that it was trained on.
        protocol: Windows and scales. Of several views of an image (scales, mirrored), the probabilities at the output's
            size are averaged, as mmseg's test-time augmentation does.
        dtype: Precision of the network; logits and sums stay float32.
        window_batch: See :class:`WindowedModel`.
        compile_mode: ``off``, or a mode of ``torch.compile``.
    """

    takes_words = False

    def __init__(
        self,
        network: ClosedSetNetwork,
        classes: Sequence[str],
        protocol: Protocol,
        *,
        dtype: DType = "float32",
        window_batch: int | None = None,
        compile_mode: str = "off",
    ) -> None:
        super().__init__(protocol, patch=1, dtype=dtype, window_batch=window_batch)
        for name, off in (("prob_thd", 0.0), ("area_thd", None), ("upsample", "bilinear"), ("pamr", 0)):
            if getattr(protocol, name) != off:
                raise UsageError(f"{name} is for open-vocabulary methods: use --protocol closed-set.")
        self.trunk = network
        self.query_words = list(classes)
        self.network: Callable[[Tensor], Tensor] = network
        if compile_mode != "off":
            self.network = torch.compile(network, mode=compile_mode, dynamic=False)
        self.register_buffer("class_ids", torch.arange(len(classes), device=self.device), persistent=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.trunk.mean.device

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.query_words)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255 on the device, with the encoder's mean and deviation."""
        return self.trunk.normalise(images)

    def run_network(self, batch: Tensor) -> Tensor:
        """Logits (B, K, h, w) on the head's grid of a network input (B, 3, H, W)."""
        return self.network(batch)

    def parts(self) -> dict[str, nn.Module]:
        """Mmseg's parts: backbone, neck, heads."""
        return dict(self.trunk.segmentor.named_children())

    def cost(self, image: Tensor) -> CostForward:
        """As of :class:`WindowedModel`, of one view of the image at scale 1."""
        p = self.protocol
        if not self.resizes_images:
            return super().cost(image)
        found = super().cost(self.resized(image, 1.0))
        several = len(p.scales) * (1 + p.flip)
        return CostForward(found.run, f"{found.input} at scale 1; it has {several} views", None)

    @torch.inference_mode()
    def dense_features(self, image: Tensor) -> Tensor:
        """The encoder's last features (h, w, C), float32, of one whole RGB image (3, H, W)."""
        with self.precision():
            features: Tensor = self.trunk.segmentor.extract_feat(self.network_input(image[None]))[-1]
        return features[0].permute(1, 2, 0).float()

    @torch.inference_mode()
    def seg_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (B, K, H, W), float32, of one view of images (B, 3, h, w), RGB 0..255, at ``size`` (H, W)."""
        size = size or (images.shape[-2], images.shape[-1])
        return torch.stack([found.at(size) for found in self.patch_logits(list(images))])

    @torch.inference_mode()
    def predict_labels(
        self, images: Tensor | Sequence[Tensor], sizes: Sequence[tuple[int, int]], names: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Label maps (H, W), int64; see :meth:`WindowedModel.predict_labels`.

        Where the protocol has several views, the images are those of the files, else they have the network input's size.
        """
        batch = list(images)
        if len(sizes) != len(batch):
            raise ValueError(f"{len(batch)} images but {len(sizes)} sizes")
        if not self.resizes_images:
            found = self.patch_logits(batch, names)
            with self.stage("decide"):
                return [self.decide(logits, size) for logits, size in zip(found, sizes, strict=True)]
        views = [self._views(batch, sizes, scale, mirrored, names) for scale, mirrored in self._kinds()]
        with self.stage("decide"):
            return [decide_views([view[index] for view in views]) for index in range(len(batch))]

    def decide(self, logits: PatchLogits, size: tuple[int, int]) -> Tensor:
        """Label map (H, W), int64, of one view of one image."""
        return decide(logits.values, logits.weights(size), self.class_ids)  # type: ignore[arg-type]

    @property
    def resizes_images(self) -> bool:
        """Whether the protocol has several views of an image."""
        return views_inside(self.protocol)

    def _kinds(self) -> list[tuple[float, bool]]:
        return [
            (scale, mirrored)
            for scale in self.protocol.scales
            for mirrored in ((False, True) if self.protocol.flip else (False,))
        ]

    def _views(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        scale: float,
        mirrored: bool,
        names: Sequence[str] | None,
    ) -> list[tuple[Tensor, Weights]]:
        """Logits of one view of each image and the weights that bring them to its output size, mirrored back."""
        with self.stage("prepare"):
            resized = [self.resized(image, scale) for image in images]
            if mirrored:
                resized = [image.flip(-1) for image in resized]
        views = []
        for found, size in zip(self.patch_logits(resized, names), sizes, strict=True):
            rows, columns = found.weights(size)
            views.append((found.values, (rows, columns.flip(0) if mirrored else columns)))
        return views

    def resized(self, image: Tensor, scale: float) -> Tensor:
        """The image (3, h, w) at the protocol's sides times ``scale``, its proportions kept; float, as values are not rounded."""
        p = self.protocol
        height, width = image.shape[-2:]
        short, long = (
            (p.short_side or min(height, width)) * scale,
            (p.long_side if p.short_side else max(height, width)) * scale,
        )
        factor = min(short / min(height, width), long / max(height, width))
        size = (int(height * factor + 0.5), int(width * factor + 0.5))
        moved = image.to(self.device).float()[None]
        return F.interpolate(moved, size=size, mode="bilinear", align_corners=False)[0]


def views_inside(protocol: Protocol) -> bool:
    """Whether the model itself resizes images, because it wants them at several sizes or mirrored."""
    return protocol.scales != (1.0,) or protocol.flip
