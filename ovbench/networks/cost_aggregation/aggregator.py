"""The whole aggregator: similarities of dense image features and class texts to one fine logit map per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.networks.cost_aggregation.class_attention import ClassTransformer
from ovbench.networks.cost_aggregation.decoder import Up
from ovbench.networks.cost_aggregation.filtering import rescaled
from ovbench.networks.cost_aggregation.guidance import over_classes
from ovbench.networks.cost_aggregation.swin import SwinPair, WindowAttention
from ovbench.networks.recompute import recomputed

DROPPED = -100.0  # logit of a class that the filter dropped, as in the public code


@dataclass(frozen=True)
class AggregatorConfig:
    """Sizes of the network; the defaults are the public configs' for ViT-B/16 (``vitb_384.yaml``)."""

    text_dim: int = 512  # TEXT_GUIDANCE_DIM: width of the joint space; ViT-L/14: 768
    image_dim: int = 512  # APPEARANCE_GUIDANCE_DIM: dense CLIP features; ViT-L/14: 768
    text_proj: int = 128  # TEXT_GUIDANCE_PROJ_DIM
    image_proj: int = 128  # APPEARANCE_GUIDANCE_PROJ_DIM
    decoder_dims: tuple[int, int] = (64, 32)  # DECODER_DIMS
    decoder_guidance: tuple[int, int] = (256, 128)  # DECODER_GUIDANCE_DIMS
    decoder_proj: tuple[int, int] = (32, 16)  # DECODER_GUIDANCE_PROJ_DIMS
    hidden: int = 128  # HIDDEN_DIMS
    layers: int = 2  # NUM_LAYERS
    heads: int = 4  # NUM_HEADS
    window: int = 12  # WINDOW_SIZES
    prompts: int = 1  # prompt_channel: templates whose similarities are kept apart
    pad_len: int = 256  # constant in the public code: shorter class lists are filled up to it
    keep: int = 256  # the same constant: of longer ones, this many classes per image go on; 0: all

    @classmethod
    def of(cls, dim: int, hidden: int, *, keep: int, **sizes: int) -> AggregatorConfig:
        """Sizes on a CLIP whose joint space has ``dim`` dimensions, all widths in the proportions of the public configs."""
        return cls(
            text_dim=dim,
            image_dim=dim,
            text_proj=hidden,
            image_proj=hidden,
            decoder_dims=(hidden // 2, hidden // 4),
            decoder_guidance=(2 * hidden, hidden),
            decoder_proj=(hidden // 4, hidden // 8),
            hidden=hidden,
            pad_len=keep,
            keep=keep,
            **sizes,
        )


class Aggregated(NamedTuple):
    """What comes out of the aggregator.

    Attributes:
        logits: (B, k, H, W) of the classes that were kept.
        kept: Their indices (B, k), ascending, int64; None: all classes.
    """

    logits: Tensor
    kept: Tensor | None

    def dense(self, classes: int) -> Tensor:
        """Logits (B, classes, H, W), -100 for a class that was dropped."""
        if self.kept is None:
            return self.logits
        batch, _, height, width = self.logits.shape
        full = self.logits.new_full((batch, classes, height, width), DROPPED)
        return full.scatter(1, self.kept[:, :, None, None].expand_as(self.logits), self.logits)


def cosine_cost(image: Tensor, text: Tensor) -> Tensor:
    """Cosine similarities (B, P, T, h, w), float32, of features (B, D, h, w) with texts (B or 1, T, P, D)."""
    with torch.autocast(image.device.type, enabled=False):  # decides which classes go on
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=-1)
        _, classes, prompts, _ = text.shape
        flat = text.transpose(1, 2).flatten(1, 2)  # (B or 1, P*T, D)
        return (flat @ image.flatten(2)).view(image.shape[0], prompts, classes, *image.shape[2:])


def most_similar(cost: Tensor, keep: int) -> Tensor | None:
    """Indices (B, keep), ascending, of the classes whose largest similarity in an image is highest; None: all are kept.

    Args:
        cost: (B, P, T, h, w).
        keep: Number k; 0 keeps all.
    """
    if not keep or cost.shape[2] <= keep:
        return None
    found: Tensor = cost.amax(dim=(1, 3, 4)).topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
    return found


class AggregatorLayer(nn.Module):
    """Aggregation in space, then across classes.

    Args:
        config: Sizes.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        self.swin_block = SwinPair(config.hidden, config.image_proj, config.heads, config.window)
        self.attention = ClassTransformer(config.hidden, config.text_proj, config.heads, config.pad_len)

    def forward(self, x: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Tokens (B, T, h, w, C) of tokens, guidance (B, h, w, G) of the image and (B, T, G) of the text."""
        out: Tensor = self.attention(self.swin_block(x, image), text)
        return out


class Aggregator(nn.Module):
    """Cost aggregation of CAT-Seg.

    Args:
        config: Sizes.
    """

    def __init__(self, config: AggregatorConfig | None = None) -> None:
        super().__init__()
        self.config = c = AggregatorConfig() if config is None else config
        self.keep = c.keep
        self.rescale = False  # the costs that the filter kept
        self.recompute = False  # activations, in the backward pass
        self.conv1 = nn.Conv2d(c.prompts, c.hidden, kernel_size=7, padding=3)
        self.guidance_projection = _projection(c.image_dim, c.image_proj)
        self.text_guidance_projection = nn.Sequential(nn.Linear(c.text_dim, c.text_proj), nn.ReLU())
        self.decoder_guidance_projection = nn.ModuleList(
            _projection(dim, out) for dim, out in zip(c.decoder_guidance, c.decoder_proj, strict=True)
        )
        self.layers = nn.ModuleList(AggregatorLayer(c) for _ in range(c.layers))
        self.decoder1 = Up(c.hidden, c.decoder_dims[0], c.decoder_proj[0])
        self.decoder2 = Up(c.decoder_dims[0], c.decoder_dims[1], c.decoder_proj[1])
        self.head = nn.Conv2d(c.decoder_dims[1], 1, kernel_size=3, padding=1)

    def as_published(self, repeat: bool = True) -> None:
        """Compute in the public code's own steps: guidance repeated per class, padding as tokens, plain attention.

        The result is equal to rounding; operations are counted as those of the public code.
        """
        for module in self.modules():
            if isinstance(module, WindowAttention | ClassTransformer | Up):
                module.repeat = repeat

    def set_pooling(self, pooling: int) -> None:
        """Pool positions by this factor before the attention across classes."""
        for layer in self.layers:
            layer.attention.pooling = pooling  # type: ignore[union-attr]

    def set_pad_len(self, pad_len: int) -> None:
        """Fill shorter class lists up to this number; 0: not at all."""
        for layer in self.layers:
            layer.attention.pad_len = pad_len  # type: ignore[union-attr]

    def forward(self, image: Tensor, text: Tensor, guidance: Tensor, finer: Sequence[Tensor]) -> Aggregated:
        """Logits of the classes of each image on the decoder's grid, four times as fine as the features'.

        Args:
            image: Dense features (B, D, h, w).
            text: Text embeddings (B or 1, T, P, D).
            guidance: Features that guide the aggregation (B, G, h, w).
            finer: Features that guide the decoder (B, G1, 2h, 2w) and (B, G2, 4h, 4w).
        """
        text = text.expand(image.shape[0], -1, -1, -1)
        cost = cosine_cost(image, text)
        kept = most_similar(cost, self.keep)
        if kept is not None:
            text = text.gather(1, kept[:, :, None, None].expand(-1, -1, *text.shape[2:]))
            index = kept[:, None, :, None, None].expand(-1, cost.shape[1], -1, *cost.shape[3:])
            cost = rescaled(cost.gather(2, index)) if self.rescale else cost.gather(2, index)
        return Aggregated(self.aggregate(cost, text, guidance, finer), kept)

    def aggregate(self, cost: Tensor, text: Tensor, guidance: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """Logits (B, T, 4h, 4w) of costs (B, P, T, h, w); other arguments as in :meth:`forward`."""
        batch = cost.shape[0]
        image_guide = self.guidance_projection(guidance).permute(0, 2, 3, 1)  # (B, h, w, G)
        text_guide = self.text_guidance_projection(F.normalize(text.mean(dim=2), dim=-1))  # (B, T, G)
        x = self.conv1(cost.transpose(1, 2).flatten(0, 1))  # (B*T, C, h, w)
        x = x.permute(0, 2, 3, 1).unflatten(0, (batch, -1)).contiguous()
        for layer in self.layers:
            x = recomputed(self.recompute, layer, x, image_guide, text_guide)
        guides = [project(part) for project, part in zip(self.decoder_guidance_projection, finer, strict=True)]
        return over_classes(lambda part: recomputed(self.recompute, self._decoded, part, *guides), x)

    def _decoded(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        maps = x.permute(0, 1, 4, 2, 3)  # (B, T, C, h, w)
        maps = self.decoder2(self.decoder1(maps, first), second)
        logits: Tensor = self.head(maps.flatten(0, 1)).unflatten(0, x.shape[:2])[:, :, 0]
        return logits


def _projection(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, out, kernel_size=3, padding=1), nn.ReLU())
