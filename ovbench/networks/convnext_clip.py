"""CLIP with a ConvNeXt (open_clip, LAION): dense features of the trunk, and its head on pooled ones, as FC-CLIP uses it.

A convolutional CLIP keeps its feature map meaningful at any image size, so masks can be classified by pooling the map and
giving the pooled vector to the head that CLIP trained on the globally pooled one (Yu et al., NeurIPS 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError, WeightsError
from ovbench.networks.activation import Activation
from ovbench.networks.clip_weights import load_any_clip
from ovbench.networks.dense_clip import Grid
from ovbench.networks.frozen_clip import FrozenCLIP

DEFAULT_ARCH = "convnext_large_d_320"  # of FC-CLIP's main results
STRIDE = 32


def load_convnext_clip(
    weights: str, arch: str = DEFAULT_ARCH, *, activation: Activation = "auto", seed: int = 0, device: str = "cpu"
) -> ConvNextCLIP:
    """A frozen :class:`ConvNextCLIP` in float32 and evaluation mode on ``device``.

    Args:
        weights: ``random``, an open_clip tag (of ``convnext_large_d_320``: ``laion2b_s29b_b131k_ft_soup``),
            ``hf-hub:org/name``, or the path of a state dict.
        arch: open_clip architecture, ``convnext_*``.
        activation: For a file: force GELU or QuickGELU (of the text tower).
        seed: Seed of random weights.
        device: Torch device.

    Raises:
        UsageError: Unknown architecture or tag.
        WeightsError: Not a ConvNeXt, or the file is missing, unreadable or does not fit, or the download failed.
    """
    if weights == "builtin":
        raise WeightsError(
            "The built-in CLIP has a ViT, no ConvNeXt: give 'random', a tag of open_clip such as "
            "laion2b_s29b_b131k_ft_soup (for convnext_large_d_320), or a file."
        )
    return ConvNextCLIP(**vars(load_any_clip(weights, arch, activation=activation, seed=seed))).to(device)


class ConvNextCLIP(FrozenCLIP):
    """A frozen CLIP with dense access to its ConvNeXt.

    Args:
        clip: open_clip model whose ``visual`` is a timm ConvNeXt that averages over the image.
        about: See :class:`FrozenCLIP`.

    Raises:
        WeightsError: The tower is something else.
    """

    def __init__(self, clip: nn.Module, **about: Any) -> None:
        _require_convnext(clip, about["arch"])
        super().__init__(clip, **about)
        with torch.no_grad():
            self._embed_dim = int(self.project(torch.zeros(1, 1, self.width)).shape[-1])

    @property
    def visual(self) -> Any:
        """open_clip's ``TimmModel``: timm's ConvNeXt as ``trunk``, the projection as ``head``."""
        return self.clip.visual

    @property
    def width(self) -> int:
        """Channels C of :meth:`dense`."""
        return int(self.visual.trunk.num_features)

    @property
    def embed_dim(self) -> int:
        """Width D of the joint image-text space."""
        return self._embed_dim

    @property
    def patch(self) -> int:
        """Stride of :meth:`dense` in pixels."""
        return STRIDE

    @property
    def image_size(self) -> Grid:
        """Image size (h, w) in pixels of the training."""
        height, width = self.visual.image_size
        return int(height), int(width)

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the matrices and convolutions of the stages in ``dtype``, so that autocast need not convert them.

        Stem, norms, head and the text tower stay float32. Going back to float32 does not restore lost digits.
        """
        for module in self.visual.trunk.stages.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def dense(self, images: Tensor) -> Tensor:
        """Features (B, C, h / 32, w / 32), float32, of normalised images (B, 3, h, w) before the head.

        Pixels beyond the last whole 32 (right, bottom) are seen in part or not at all, as strided convolutions do.

        Raises:
            UsageError: The image is smaller than one stride.
        """
        if min(images.shape[-2:]) < STRIDE:
            raise UsageError(
                f"An input of {images.shape[-2]} x {images.shape[-1]} pixels is smaller than the stride of {self.arch}, "
                f"{STRIDE} pixels: raise --short-side or --crop."
            )
        trunk = self.visual.trunk
        with torch.autocast(images.device.type, enabled=False):  # a rounding here is amplified by every block
            x = trunk.stem(images.float())
        features: Tensor = trunk.norm_pre(trunk.stages(x))
        return features.float()

    def project(self, pooled: Tensor) -> Tensor:
        """Vectors (..., C) pooled over :meth:`dense` in the joint image-text space (..., D), not normalised.

        The head's norm and projection as the model applies them to the mean over the whole image: each vector goes in as
        a map of one cell, over which the head's own pooling does nothing.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            cells = pooled.float().reshape(-1, self.width, 1, 1)
            projected: Tensor = self.visual.head(self.visual.trunk.forward_head(cells))
        return projected.view(*pooled.shape[:-1], projected.shape[-1])


def _require_convnext(clip: nn.Module, arch: str) -> None:
    from open_clip.timm_model import TimmModel
    from timm.models.convnext import ConvNeXt

    visual: Any = getattr(clip, "visual", None)
    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    if not isinstance(trunk, ConvNeXt):
        problem = f"its image tower is a {type(visual if trunk is None else trunk).__name__}"
    elif trunk.head.global_pool.pool_type != "avg":
        problem = "its image tower does not average over the image"
    else:
        return
    raise WeightsError(
        f"{arch} is no CLIP with a ConvNeXt: {problem}. Use an architecture of open_clip such as {DEFAULT_ARCH}, "
        "convnext_base_w or convnext_xxlarge."
    )
