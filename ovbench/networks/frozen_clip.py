"""What every CLIP here is, whatever its image tower: a frozen open_clip model, its tokenizer, its preprocessing, its record."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FrozenCLIP(nn.Module):
    """A frozen CLIP in evaluation mode.

    Args:
        clip: open_clip model.
        tokenizer: Callable list[str] -> (n, context) integer tokens.
        arch: Name of the architecture, for records.
        weights: What the user asked for (tag, file name, ``random`` ...), for records.
        weights_sha256: Content hash of the weights.
        activation: ``quickgelu`` or ``gelu``, for records.
        mean: Channel means on RGB 0..255.
        std: Channel standard deviations on RGB 0..255.
    """

    def __init__(
        self,
        clip: nn.Module,
        *,
        tokenizer: Callable[[list[str]], Tensor],
        arch: str,
        weights: str,
        weights_sha256: str,
        activation: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.arch, self.weights, self.weights_sha256, self.activation = arch, weights, weights_sha256, activation
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def embed_dim(self) -> int:
        """Width D of the joint image-text space."""
        raise NotImplementedError

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255 of any dtype, as float32 with the weights' own mean and deviation."""
        return (images.float() - self.mean) / self.std  # type: ignore[operator]

    def denormalise(self, images: Tensor) -> Tensor:
        """RGB 0..255, float32, of normalised images (B, 3, h, w)."""
        return images.float() * self.std + self.mean  # type: ignore[operator]
