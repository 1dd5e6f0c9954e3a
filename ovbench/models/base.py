"""What a model is to everyone who uses one: images to label maps (and segments), its inputs, its cost, its parts.

Whatever is inside, callers see :class:`Model` alone, and :func:`ovbench.models.build.build` is where one comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError
from ovbench.ops.panoptic import Segments
from ovbench.spec import Protocol as RunProtocol

Stage = Callable[[str], AbstractContextManager[Any]]  # times a named stage of an image
# Index of the class that thresholds leave pixels to, None for no such class, or "named": the one called "background".
Background = int | None | Literal["named"]


class ImageLogits(Protocol):
    """What the network said of one image, before labels are decided."""

    def at(self, size: tuple[int, int]) -> Tensor:
        """Logits, or scores, (Q, H, W), float32, at the size (H, W)."""
        ...


class Prediction(NamedTuple):
    """What a model says of one image.

    Attributes:
        labels: Class of each pixel (H, W), int64.
        segments: Instances and stuff; None from a model that gives none.
    """

    labels: Tensor
    segments: Segments | None = None


class CostForward(NamedTuple):
    """The computation whose operations stand for a model's cost.

    Attributes:
        run: Does it once.
        input: Its input in words, for the record.
        forwards: How often an image takes it; None where its forwards are not of one size.
    """

    run: Callable[[], object]
    input: str
    forwards: int | None


class Model(nn.Module):
    """Base of all models.

    Class attributes:
        takes_words: Any words can be its classes; else those it was trained on.
        gives_segments: :meth:`predict` can give segments, once :meth:`set_things` said which classes have instances.

    Attributes:
        protocol: Windows, scales and thresholds.
        stage: Times a named stage of an image; replaced by who measures.
        constants: For which backbone the method's constants were published, in words; None where none depends on it.
    """

    takes_words: ClassVar[bool] = True
    gives_segments: ClassVar[bool] = False
    query_words: list[str]  # what each of the Q logits stands for: words, or names of classes

    def __init__(self, protocol: RunProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.stage: Stage = lambda name: nullcontext()
        self.constants: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """K."""
        raise NotImplementedError

    @property
    def needs_truth(self) -> bool:
        """Whether an oracle looks at the labels: an upper bound, no result."""
        return False

    @property
    def resizes_images(self) -> bool:
        """Whether images come as their files have them, because the model wants them at several sizes."""
        return False

    def set_things(self, things: Collection[int] | None) -> None:
        """Indices of the classes that have instances; None: no segments are made."""
        if things is not None:
            raise UsageError("This model gives labels per pixel, no segments.")

    def patch_logits(self, images: Sequence[Tensor], names: Sequence[str] | None = None) -> Sequence[ImageLogits]:
        """What the network says of images (3, h, w), RGB 0..255; ``names`` are file names for error messages."""
        raise NotImplementedError

    def decide(self, logits: Any, size: tuple[int, int]) -> Tensor:
        """Label map (H, W), int64, of one image from what :meth:`patch_logits` gave of it."""
        raise NotImplementedError

    def seg_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (B, Q, H, W), float32, of images (B, 3, h, w), RGB 0..255, at ``size`` (H, W) or their own."""
        raise NotImplementedError

    def predict_labels(
        self, images: Tensor | Sequence[Tensor], sizes: Sequence[tuple[int, int]], names: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Label maps, one (H, W) int64 tensor per image, with values 0 .. K-1.

        Args:
            images: RGB images, uint8: (B, 3, h, w), or a list of (3, h, w) of any sizes.
            sizes: Output size (H, W) of each image, the size of its label.
            names: File names for error messages.
        """
        raise NotImplementedError

    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        names: Sequence[str] | None = None,
        truths: Sequence[Segments | None] | None = None,
    ) -> list[Prediction]:
        """Labels and, where the model gives them, segments of each image; arguments as of :meth:`predict_labels`.

        Args:
            images: RGB images.
            sizes: Output sizes.
            names: File names.
            truths: True segments, for a model that :attr:`needs_truth`.
        """
        return [Prediction(labels) for labels in self.predict_labels(images, sizes, names)]

    def dense_features(self, image: Tensor) -> Tensor:
        """Dense features (h, w, D), float32, of one whole RGB image (3, H, W).

        Raises:
            UsageError: The model has none.
        """
        raise UsageError("This model has no dense features.")

    def views(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes (h, w) of the network's inputs for one image of this size (h, w), before padding."""
        raise NotImplementedError

    def network_input(self, images: Tensor) -> Tensor:
        """One input of the network, on its device, of images (B, 3, h, w), RGB 0..255, of a size of :meth:`views`."""
        raise NotImplementedError

    def run_network(self, batch: Tensor) -> Any:
        """One forward of the network on what :meth:`network_input` gave."""
        raise NotImplementedError

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to the model's dtype, under which its networks run."""
        raise NotImplementedError

    def cost(self, image: Tensor) -> CostForward:
        """What to count for an image (3, h, w) as it reaches the model."""
        raise NotImplementedError

    def uncompiled(self) -> AbstractContextManager[None]:
        """Within it the network runs as it was before ``torch.compile``, so that every operation can be seen."""
        return nullcontext()

    def parts(self) -> dict[str, nn.Module]:
        """Parts by name, in the order in which a shared parameter is given to them."""
        raise NotImplementedError

    def as_trained(self) -> AbstractContextManager[None] | None:
        """Within it those parameters have gradients that the method's own recipe trains; None: it trains none of its own."""
        return None
