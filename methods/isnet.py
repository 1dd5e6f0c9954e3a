"""ISNet's decode head (Jin et al., ICCV 2021, arXiv 2108.12382), which mmsegmentation's package does not have.

With R (D x H x W) the encoder's C4 after a 3x3 convolution, and g(q, k) the attention of q's positions over k's:

* image level: R_il = conv3x3(concat(R, g(R, concat(GAP(R), R)))), every pixel over the whole image;
* semantic level: coarse logits of R split the image into one region per class; a region's pixels are averaged, weighted by
  the softmax of their class's logit over the region, and every pixel gets its region's mean, R_k. Then
  R_sl = conv3x3(concat(R_il, g(R, R_k))), which is classified.

Loss = CE(final) + 0.4 CE(coarse). The coarse logits reach the result through the weights; which pixel is in which region
has no gradient. :class:`ISNet` is plain torch; ``ISNetHead`` is it as an mmseg head, after :func:`register`.

At 64 x 64 x 2048 and 150 classes: 20.87 M parameters, 85.45 GMACs of convolutions, 102.95 with the matrix products. The
efficiency tables of the thesis do not have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.methods.norms import norm_layer  # type: ignore[import-not-found]
from ovbench.mm.compat import import_mmseg

Norm = Callable[[int], nn.Module]


def region_means(features: Tensor, coarse: Tensor) -> Tensor:
    """Every position's region mean, (B, D, h, w).

    Args:
        features: R, (B, D, h, w).
        coarse: Logits (B, K, h, w); a position belongs to the region of its best class.
    """
    logits = coarse.flatten(2).float()  # (B, K, N)
    region = logits.argmax(dim=1, keepdim=True)  # (B, 1, N)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, region, True)
    # The least finite number, not -inf: the row of a class without a region must not become NaN. Nobody gathers it.
    weights = logits.masked_fill(~inside, torch.finfo(logits.dtype).min).softmax(dim=2)
    means = weights.to(features.dtype) @ features.flatten(2).transpose(1, 2)  # (B, K, D)
    index = region.transpose(1, 2).expand(-1, -1, means.shape[2])  # (B, N, D)
    found: Tensor = means.gather(1, index).transpose(1, 2).unflatten(2, coarse.shape[2:])
    return found


def _block(inputs: int, outputs: int, norm: Norm, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm(outputs), nn.ReLU(inplace=True))


class Correlation(nn.Module):
    """g(q, k): attention of one map's positions over another's.

    Args:
        query_channels: Of q.
        key_channels: Of k.
        width: Channels in which positions are compared.
        channels: Of the result.
        norm: Channels to a norm.
    """

    def __init__(self, query_channels: int, key_channels: int, width: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.query = nn.Sequential(_block(query_channels, width, norm), _block(width, width, norm))
        self.key = nn.Sequential(_block(key_channels, width, norm), _block(width, width, norm))
        self.value = _block(key_channels, width, norm)
        self.out = _block(width, channels, norm)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, channels, h, w) on the grid of the queries."""
        q, k, v = (
            branch(source).flatten(2).transpose(1, 2)
            for branch, source in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        # scaled by 1 / sqrt(width), without a map of all pairs in memory
        found = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(found.transpose(1, 2).unflatten(2, queries.shape[2:]))
        return result


class ISNet(nn.Module):
    """C4 to the feature that is classified, and the coarse logits.

    Args:
        in_channels: Of C4.
        channels: D.
        num_classes: K.
        width: Channels in which positions are compared.
        norm: Channels to a norm.
        dropout: Before the coarse classifier.
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, width: int, norm: Norm, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.reduce = _block(in_channels, channels, norm, kernel=3)
        self.image = Correlation(channels, 2 * channels, width, channels, norm)
        self.image_fusion = _block(2 * channels, channels, norm, kernel=3)
        self.coarse = nn.Sequential(
            _block(channels, channels, norm), nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)
        )
        self.semantic = Correlation(channels, channels, width, channels, norm)
        self.semantic_fusion = _block(2 * channels, channels, norm, kernel=3)

    def forward(self, c4: Tensor) -> tuple[Tensor, Tensor]:
        """R_sl (B, D, h, w) and coarse logits (B, K, h, w) of C4 (B, C, h, w)."""
        reduced = self.reduce(c4)
        pooled = reduced.mean(dim=(2, 3), keepdim=True).expand_as(reduced)
        image = self.image(reduced, torch.cat([pooled, reduced], dim=1))
        image = self.image_fusion(torch.cat([reduced, image], dim=1))
        coarse = self.coarse(reduced)
        semantic = self.semantic(reduced, region_means(reduced, coarse))
        return self.semantic_fusion(torch.cat([image, semantic], dim=1)), coarse


@lru_cache(maxsize=1)
def register() -> type[nn.Module]:
    """The class ``ISNetHead``, registered in mmseg's ``MODELS``; the first call imports mmseg.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    mmseg = import_mmseg()
    base: Any = mmseg.models.decode_heads.decode_head.BaseDecodeHead

    class ISNetHead(base):  # type: ignore[misc]
        """ISNet on one encoder map; see the module.

        Args:
            transform_channels: Width in which positions are compared.
            coarse_weight: Weight of CE(coarse).
            **kwargs: As of any mmseg decode head.
        """

        def __init__(self, transform_channels: int = 256, coarse_weight: float = 0.4, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.coarse_weight = coarse_weight
            self.isnet = ISNet(
                self.in_channels,
                self.channels,
                self.num_classes,
                transform_channels,
                norm_layer(self.norm_cfg),
                self.dropout_ratio,
            )

        def features(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            """The feature before the classifier and the coarse logits; add-ons take both."""
            found: tuple[Tensor, Tensor] = self.isnet(self._transform_inputs(inputs))
            return found

        def forward(self, inputs: Sequence[Tensor]) -> Any:
            """Logits (B, K, h, w); in training a pair of them and the coarse ones."""
            features, coarse = self.features(inputs)
            logits = self.cls_seg(features)
            return (logits, coarse) if self.training else logits

        def loss_by_feat(self, seg_logits: tuple[Tensor, Tensor], batch_data_samples: Any) -> dict[str, Tensor]:
            """Losses by name, with ``loss_semantic`` of the coarse logits."""
            final, coarse = seg_logits
            losses: dict[str, Tensor] = super().loss_by_feat(final, batch_data_samples)
            return losses | self.feature_losses(coarse, batch_data_samples)

        def feature_losses(self, coarse: Tensor, batch_data_samples: Any) -> dict[str, Tensor]:
            """``loss_semantic``, for add-ons that classify the feature in another way."""
            found = super().loss_by_feat(coarse, batch_data_samples)
            return {"loss_semantic": self.coarse_weight * sum(v for k, v in found.items() if "loss" in k)}

    ISNetHead.__qualname__ = "ISNetHead"  # found by __getattr__ below, so that whole heads can be pickled
    mmseg.registry.MODELS.register_module(module=ISNetHead)
    return ISNetHead


def __getattr__(name: str) -> Any:
    if name == "ISNetHead":
        return register()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
