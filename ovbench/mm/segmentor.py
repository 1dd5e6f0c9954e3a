"""The one mmseg adapter: any method of ovbench as a ``BaseSegmentor``.

Importing this module imports mmseg (seconds). Every method id is a type in mmseg's ``MODELS`` registry, so that a plain
config can say ``model=dict(type="sc-clip", weights="openai", classes=[...])`` with
``custom_imports=dict(imports=["ovbench.mm.segmentor"])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovbench.errors import RunError, UsageError
from ovbench.mm.compat import import_mmseg
from ovbench.models.base import Model
from ovbench.models.build import build_model
from ovbench.ops.panoptic import Segments, segments_of_labels
from ovbench.registry import method_names
from ovbench.words.class_list import Classes

import_mmseg()

from mmengine.model import BaseDataPreprocessor  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.models.segmentors import BaseSegmentor  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402


@MODELS.register_module()
class ImageListPreprocessor(BaseDataPreprocessor):  # type: ignore[misc]
    """Images as a list of uint8 tensors on the device, RGB: sizes may differ, normalisation comes per window."""

    def __init__(self, bgr_to_rgb: bool = True) -> None:
        super().__init__()
        self.bgr_to_rgb = bgr_to_rgb

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch on the device with its channels in RGB order."""
        data = self.cast_data(data)
        images = data["inputs"]
        if self.bgr_to_rgb:
            images = [image.flip(0) for image in images]
        return {"inputs": list(images), "data_samples": data.get("data_samples")}


@MODELS.register_module()
class OpenVocabSegmentor(BaseSegmentor):  # type: ignore[misc]
    """An mmseg segmentor around a :class:`~ovbench.models.base.Model`.

    Args:
        method: Method id.
        classes: K classes, each a word or a list of words.
        model: A ready model instead of the two above.
        data_preprocessor: Config; the default takes mmseg's BGR images.
        **options: As :func:`ovbench.models.build.build_model`.
    """

    method_id: str | None = None

    def __init__(
        self,
        method: str | None = None,
        classes: Classes | None = None,
        *,
        model: Model | None = None,
        data_preprocessor: Any = None,
        init_cfg: Any = None,
        **options: Any,
    ) -> None:
        # built here, because mmengine would look the type up in its own registry instead of mmseg's
        preprocessor = MODELS.build(data_preprocessor or {"type": "ImageListPreprocessor"})
        super().__init__(data_preprocessor=preprocessor, init_cfg=init_cfg)
        if model is None:
            name = method or self.method_id
            if name is None or classes is None:
                raise UsageError("A segmentor needs a method and classes (or a ready model).")
            model = build_model(name, classes=classes, **_plain(options))
        self.model = model
        # mmengine sends batches to this device; a module without own parameters would stay on the CPU
        self.data_preprocessor.to(model.device)
        self.eval()

    @property
    def with_auxiliary_head(self) -> bool:
        """False: there are no heads."""
        return False

    @property
    def with_decode_head(self) -> bool:
        """False: there are no heads."""
        return False

    def seg_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Cosine logits (B, Q, H, W), float32, of RGB images (B, 3, h, w); see :meth:`Model.seg_logits`."""
        logits: Tensor = self.model.seg_logits(images, size)
        return logits

    def predict_labels(self, images: Tensor | Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Label maps (H, W), int64, of RGB images; see :meth:`Model.predict_labels`."""
        labels: list[Tensor] = self.model.predict_labels(images, sizes)
        return labels

    def predict(self, inputs: Any, data_samples: Any = None) -> list[Any]:
        """Data samples with ``pred_sem_seg`` (1, H, W) at each image's original size (``ori_shape``).

        Segments, where the model gives them, become ``pred_panoptic``.
        """
        images = list(inputs)
        samples = data_samples if data_samples is not None else [SegDataSample() for _ in images]
        sizes = [
            tuple(sample.metainfo.get("ori_shape", image.shape[-2:])[:2])
            for sample, image in zip(samples, images, strict=True)
        ]
        names = [str(sample.metainfo.get("img_path", index)) for index, sample in enumerate(samples)]
        truths = [self.truth_of(sample) for sample in samples] if self.model.needs_truth else None
        predicted = self.model.predict(images, sizes, names, truths)
        for sample, (labels, segments) in zip(samples, predicted, strict=True):
            sample.set_data({"pred_sem_seg": PixelData(data=labels[None])})
            if segments is not None:
                sample.set_data({"pred_panoptic": segments})
        return list(samples)

    def truth_of(self, sample: Any) -> Segments | None:
        """The true segments of a data sample: ``gt_panoptic``, else one per class of ``gt_sem_seg``, else None."""
        given: Segments | None = sample.get("gt_panoptic")
        if given is None and "gt_sem_seg" in sample:
            return segments_of_labels(sample.gt_sem_seg.data[0], self.model.num_classes)
        return given

    def encode_decode(self, inputs: Any, batch_img_metas: Any) -> Tensor:
        """Cosine logits (B, Q, h, w) of images of one size."""
        return self.seg_logits(torch.stack(list(inputs)))

    def extract_feat(self, inputs: Any) -> list[Tensor]:
        """Dense features (h, w, D) of each whole image."""
        return [self.model.dense_features(image) for image in inputs]

    def _forward(self, inputs: Any, data_samples: Any = None) -> Tensor:
        return self.encode_decode(inputs, None)

    def loss(self, inputs: Any, data_samples: Any) -> dict[str, Any]:
        """Raises ``RunError``: these methods are training-free."""
        raise RunError(f"{self.method_id or type(self).__name__} is training-free: there is no loss to train with.")


for _name in method_names(None):
    MODELS.register_module(name=_name, module=type(f"Segmentor[{_name}]", (OpenVocabSegmentor,), {"method_id": _name}))


def build_segmentor(method: str, *, classes: Classes, weights: str = "openai", **options: Any) -> OpenVocabSegmentor:
    """An mmseg segmentor (an ``nn.Module``) for a method, weights and a class list.

    Args:
        method: Method id, see ``ovbench list methods``.
        classes: K classes, each a word or a list of words.
        weights: Tag, file, ``hf-hub:...``, ``random`` or ``builtin``.
        **options: As :func:`ovbench.models.build.build_model`: ``arch``, ``dtype``, ``device``, ``mode``, ``crop``, ...

    Example:
        >>> seg = build_segmentor("sc-clip", weights="builtin", classes=["road", "car", ["sky", "cloud"]])
        >>> labels = seg.predict_labels(images, sizes=[(375, 500)])
    """
    return OpenVocabSegmentor(model=build_model(method, classes=classes, weights=weights, **options))


def _plain(value: Any) -> Any:
    """Mmengine's ConfigDict as plain dicts and lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
