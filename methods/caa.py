"""CAA, class-aware affinity (thesis ch. 3): an add-on between a decode head's features and its classifier.

With F (D x H x W) the host's feature, coarse (K x H x W) its own classifier's output and F' = ReLU(BN(conv1x1(F))):

* class centre: C = softmax(coarse) F'^T, one row of D' per class;
* affinity: M = sigmoid(a b^T) of two 1x1 convolutions of F; F_intra = M F' and F_inter = (1 - M) F' = sum(F') - M F',
  so one product gives both;
* association: softmax_classes(F_intra C^T) C, the same for F_inter, each with projections as in mmseg's object attention;
* fusion: F + BN(conv1x1(concat(F, intra, inter))), whose batch norm starts at 0 -> classifier.

Loss = CE(final) + BCE(M, ground truth) + 0.4 CE(coarse). :class:`CAA` is the add-on itself, in torch alone. ``CAAHead``
puts it on any host for mmseg: ``dict(type="CAAHead", host=dict(type="PSPHead", ...), **switches)`` after
:func:`register`; mmseg is imported only then. Tensors and the map's rows are in :mod:`ovbench.ops.affinity`.

Beside Table 3.5 (PSPNet, CCNet, DeepLabV3): +3.570 M parameters (published 3.60 to 3.61) and +12.99 GMACs of convolutions
(13.04 to 13.05; UperNet's 12.73 is less by what a classifier costs). Convolutions that all ran on the 4096 positions would
cost 14.7, so some .43 M act on the K centres: ``studies/caa_layouts.py`` lists the arrangements that give both numbers within
1 %. With one width D' < D for all projections it is 448 in all of them; this one has OCR's parts. Neither training nor
evaluation keeps a map: on a 64 x 64 grid, both losses and the backward pass hold 80 MiB of maps for one image and no more for
a batch, where keeping them took 384 MiB each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError, unknown_name
from ovbench.methods import hosts  # type: ignore[import-not-found]
from ovbench.methods.norms import norm_layer  # type: ignore[import-not-found]
from ovbench.mm.compat import import_mmseg
from ovbench.ops.affinity import (
    MAP_ENTRIES,
    affinity_loss,
    associate,
    class_centers,
    class_mass,
    intra_and_inter,
    labels_on_grid,
)
from ovbench.ops.full_precision import full_precision


# Looked at for what is inferred: thesis ch. 3 (equations, Tables 3.1 to 3.5), mmseg's heads and recipes of the hosts,
# OCR's object attention, CPNet; no public code of the method was found. Measured: docs/closed-set.md.
@dataclass(frozen=True)
class CAAConfig:
    """Switches and widths of CAA; the defaults are the full method.

    Attributes:
        center: The class centre, "CC" of Table 3.2. Without it F_intra and F_inter are concatenated as they are
            (*inferred*).
        affinity: The self-affinity, "SA" of Table 3.2. Without it F' itself is associated with the centres (*inferred*).
        intra: Concatenate the intra-class part (Table 3.3).
        inter: Concatenate the inter-class part (Table 3.3).
        aux_weight: Weight of CE(coarse); 0 leaves the loss out (Table 3.4).
        affinity_weight: Weight of BCE(M, ground truth); 0 leaves the loss out (Table 3.4).
        affinity_rows: Add CPNet's terms of a row as a whole (precision, recall, specificity) to that loss (*inferred*: off,
            the equation has the BCE alone).
        affinity_detached: a and b read F without sending their gradient into it (*inferred*, by measurement).
        contexts_detached: All of the add-on reads F and the coarse logits so; what reaches F is the sum alone (*inferred*: off).
        center_softmax: Axis of the centre's softmax: over positions it is a weighted mean; over classes it is divided by
            each class's mass to be one too (*inferred*: the axis is not stated).
        center_mass: A class's part in the association is multiplied by its share of the image, so that centres of absent
            classes stay out (*inferred*: the equation has no such factor).
        row_normalise: Rows of M and of 1 - M sum to one, so that F_intra and F_inter do not grow with HW (*inferred*).
        projections: The association's projections as in mmseg's object attention: two convolutions of each context, one of
            the centres, one back, one of that beside F (*inferred* from both numbers of Table 3.5).
        association_scale: Divide the association's logits by the root of their width (*inferred*: as OCR does, the equation
            has no scale).
        center_channels: D', also of the projections; 0 is 7/8 of D: 448 of 512 (*inferred* from Table 3.5).
        affinity_channels: Width of a and b; 0 is 1/8 of D: 64 of 512 (*inferred*, likewise).
        fusion_norm: Batch norm and ReLU after the last 1x1 convolution (*inferred*: without them it and the classifier
            would be one linear map).
        fusion_residual: F is added before that ReLU, and the batch norm's weight starts at 0, so that training starts with
            the host itself (*inferred*, by measurement).
    """

    center: bool = True
    affinity: bool = True
    intra: bool = True
    inter: bool = True
    aux_weight: float = 0.4
    affinity_weight: float = 1.0
    affinity_rows: bool = False
    affinity_detached: bool = True
    contexts_detached: bool = False
    center_softmax: Literal["positions", "classes"] = "positions"
    center_mass: bool = True
    row_normalise: bool = True
    projections: bool = True
    association_scale: bool = True
    center_channels: int = 0
    affinity_channels: int = 0
    fusion_norm: bool = True
    fusion_residual: bool = True

    def __post_init__(self) -> None:
        if not self.center and not self.affinity:
            raise UsageError("CAA without class centre and without affinity is the host: use the host itself.")
        if self.affinity and not self.intra and not self.inter:
            raise UsageError("CAA's affinity has neither intra nor inter: switch one on, or set affinity to False.")
        if self.center_softmax not in ("positions", "classes"):
            raise UsageError(f"center_softmax {self.center_softmax!r}: give 'positions' or 'classes'.")
        if self.fusion_residual and not self.fusion_norm:
            raise UsageError("fusion_residual starts with a batch norm of weight 0: leave fusion_norm on, or both off.")
        for name in ("center_channels", "affinity_channels", "aux_weight", "affinity_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)}: give at least 0.")

    @classmethod
    def of(cls, **switches: Any) -> CAAConfig:
        """The config with these switches.

        Raises:
            UsageError: An unknown switch, or values that do not go together.
        """
        known = [field.name for field in fields(cls)]
        for name in switches:
            if name not in known:
                raise unknown_name("switch of CAA", name, known)
        return cls(**switches)


class CAAOutput(NamedTuple):
    """What the losses need in training.

    Attributes:
        seg_logits: Final logits (B, K, h, w).
        coarse: The host's own logits (B, K, h, w); None where neither the centre nor a loss needs them.
        affinity: Rows a (B, hw, C) and columns b (B, C, hw) of M = sigmoid(a b); None without affinity.
        extra: What the host's own losses on its way to the feature need; None for most hosts.
    """

    seg_logits: Tensor
    coarse: Tensor | None
    affinity: tuple[Tensor, Tensor] | None
    extra: Any = None


Norm = Callable[[int], nn.Module]


def _conv(channels: int, width: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU(inplace=True))


class Association(nn.Module):
    """A context as a mixture of class centres, with the projections of mmseg's object attention.

    Args:
        width: D'.
        channels: D of the host.
        norm: Makes a batch norm for a number of channels.
        scale: See :class:`CAAConfig`.
    """

    def __init__(self, width: int, channels: int, norm: Norm, scale: bool) -> None:
        super().__init__()
        self.scale = scale
        self.query = nn.Sequential(_conv(width, width, norm), _conv(width, width, norm))
        self.key = _conv(width, width, norm)
        self.out = _conv(width, width, norm)
        self.bottleneck = _conv(width + channels, width, norm)

    def forward(self, context: Tensor, centers: Tensor, mass: Tensor | None, features: Tensor) -> Tensor:
        """(B, D', h, w) of a context (B, D', h, w), centres (B, K, D'), the classes' shares and F (B, D, h, w)."""
        query = self.query(context)
        keys = self.key(centers.to(query.dtype).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        with full_precision(features.device.type):
            rows = query.float().flatten(2).transpose(1, 2)
            mixed = associate(rows, centers, self.scale, keys=keys.float(), mass=mass)
        mixed = mixed.transpose(1, 2).unflatten(2, features.shape[2:]).to(features.dtype)
        found: Tensor = self.bottleneck(torch.cat([self.out(mixed), features], dim=1))
        return found


class CAA(nn.Module):
    """The add-on: features and coarse logits of a host to features of the same width.

    Args:
        channels: D of the host.
        config: Switches and widths.
        norm: Makes a batch norm for a number of channels.
    """

    def __init__(self, channels: int, config: CAAConfig, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.config = config
        width = config.center_channels or max(1, channels * 7 // 8)
        self.transform = _conv(channels, width, norm)
        if config.affinity:
            narrow = config.affinity_channels or max(1, channels // 8)
            self.query = nn.Conv2d(channels, narrow, 1)
            self.key = nn.Conv2d(channels, narrow, 1)
        names = [name for name in ("intra", "inter") if getattr(config, name)] if config.affinity else ["own"]
        self.associations = nn.ModuleDict()
        if config.center and config.projections:
            parts = {name: Association(width, channels, norm, config.association_scale) for name in names}
            self.associations.update(parts)
        fused = nn.Conv2d(channels + len(names) * width, channels, 1, bias=not config.fusion_norm)
        self.fusion = nn.Sequential(fused, *([norm(channels)] if config.fusion_norm else []))
        if config.fusion_residual:
            nn.init.zeros_(self.fusion[1].weight)  # type: ignore[arg-type]

    def forward(self, features: Tensor, coarse: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Features for the classifier (B, D, h, w), and the rows and columns whose product is the affinity's logits.

        Args:
            features: F, (B, D, h, w).
            coarse: The host's logits (B, K, h, w); only the class centre uses them.
        """
        config, grid, host = self.config, features.shape[2:], features
        if config.contexts_detached:
            features, coarse = features.detach(), None if coarse is None else coarse.detach()
        rows = self.transform(features)
        if config.affinity:
            read = features.detach() if config.affinity_detached else features
            query, key = self.query(read), self.key(read)
        # Sums over thousands of positions and their difference: half precision would overflow, or leave only rounding.
        with full_precision(features.device.type):
            rows = rows.float().flatten(2).transpose(1, 2)  # (B, N, D')
            centers = mass = None
            if config.center:
                assert coarse is not None  # the head makes them
                logits = coarse.float().flatten(2)
                centers = class_centers(logits, rows, config.center_softmax)
                mass = class_mass(logits) if config.center_mass else None
            factors, contexts = None, {"own": rows}
            if config.affinity:
                factors = query.float().flatten(2).transpose(1, 2), key.float().flatten(2)
                both = intra_and_inter(*factors, rows, config.row_normalise, MAP_ENTRIES)
                contexts = {
                    name: part for name, part in zip(("intra", "inter"), both, strict=True) if getattr(config, name)
                }
            if centers is not None and not config.projections:
                contexts = {
                    name: associate(part, centers, config.association_scale, mass=mass)
                    for name, part in contexts.items()
                }
        maps = {name: part.transpose(1, 2).unflatten(2, grid).to(features.dtype) for name, part in contexts.items()}
        if centers is not None and config.projections:
            maps = {name: self.associations[name](part, centers, mass, features) for name, part in maps.items()}
        fused = self.fusion(torch.cat([features, *maps.values()], dim=1))
        if config.fusion_residual:
            fused = host + fused
        return fused.relu() if config.fusion_norm else fused, factors


@lru_cache(maxsize=1)
def register() -> type[nn.Module]:
    """The class ``CAAHead``, registered in mmseg's ``MODELS``; the first call imports mmseg.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    mmseg = import_mmseg()
    base: Any = mmseg.models.decode_heads.decode_head.BaseDecodeHead

    class CAAHead(base):  # type: ignore[misc]
        """A host decode head with CAA between its features and a new classifier.

        In training ``forward`` gives a :class:`CAAOutput`, in evaluation logits (B, K, h, w).

        Args:
            host: The host's config for ``MODELS``; classes, losses, sampler and the like are taken from it.
            init_cfg: As of any mmseg decode head.
            switches: Fields of :class:`CAAConfig`.

        Raises:
            UsageError: An unknown switch, or a host with a norm that is unknown here or one output for two classes.
        """

        def __init__(self, host: dict[str, Any], init_cfg: Any = None, **switches: Any) -> None:
            config = CAAConfig.of(**switches)
            built = mmseg.registry.MODELS.build(host)
            if built.out_channels != built.num_classes:
                raise UsageError("CAA needs one output of the host for each class: leave out its out_channels.")
            taken = {key: host[key] for key in ("loss_decode", "sampler") if key in host}
            super().__init__(
                host["in_channels"],
                built.channels,
                num_classes=built.num_classes,
                dropout_ratio=built.dropout_ratio,
                norm_cfg=built.norm_cfg,
                in_index=built.in_index,
                input_transform=built.input_transform,
                ignore_index=built.ignore_index,
                align_corners=built.align_corners,
                init_cfg=init_cfg or {"type": "Normal", "std": 0.01, "override": {"name": "conv_seg"}},
                **taken,
            )
            self.config = config
            built.cls_seg = hosts.as_is
            self.host = built
            self.caa = CAA(built.channels, config, norm_layer(built.norm_cfg))

        def forward(self, inputs: Any) -> Any:
            features, extra = hosts.features(self.host, inputs)
            coarse = None
            if self.config.center or (self.training and self.config.aux_weight):
                coarse = base.cls_seg(self.host, features)
            final, affinity = self.caa(features, coarse)
            seg_logits = self.cls_seg(final)
            return CAAOutput(seg_logits, coarse, affinity, extra) if self.training else seg_logits

        def coarse_logits(self, inputs: Any) -> Tensor:
            """Logits (B, K, h, w) of the coarse classifier alone."""
            found: Tensor = base.cls_seg(self.host, hosts.features(self.host, inputs)[0])
            return found

        def loss_by_feat(self, seg_logits: CAAOutput, batch_data_samples: Any) -> dict[str, Tensor]:
            """Losses by name: ``loss_ce``, ``coarse.loss_ce``, ``loss_affinity``, and the accuracies ``acc_seg``."""
            losses: dict[str, Tensor] = super().loss_by_feat(seg_logits.seg_logits, batch_data_samples)
            if self.config.aux_weight and seg_logits.coarse is not None:
                for name, value in base.loss_by_feat(self.host, seg_logits.coarse, batch_data_samples).items():
                    weight = self.config.aux_weight if "loss" in name else 1.0
                    losses[f"coarse.{name}"] = weight * value
            losses |= hosts.feature_losses(self.host, seg_logits.extra, batch_data_samples)
            if self.config.affinity_weight and seg_logits.affinity is not None:
                labels = self._stack_batch_gt(batch_data_samples)[:, 0]
                height, width = seg_logits.seg_logits.shape[2:]
                small = labels_on_grid(labels, (height, width))
                loss = affinity_loss(*seg_logits.affinity, small, self.ignore_index, rows_too=self.config.affinity_rows)
                losses["loss_affinity"] = self.config.affinity_weight * loss
            return losses

    CAAHead.__qualname__ = "CAAHead"  # found by __getattr__ below, so that whole heads can be pickled
    mmseg.registry.MODELS.register_module(module=CAAHead)
    return CAAHead


def __getattr__(name: str) -> Any:
    if name == "CAAHead":
        return register()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def head_config(host: dict[str, Any], **switches: Any) -> dict[str, Any]:
    """A host's config with CAA around it for mmseg's ``MODELS`` (after :func:`register`), all switches written out.

    Args:
        host: See :func:`ovbench.methods.hosts.head_config`.
        switches: Fields of :class:`CAAConfig`.

    Raises:
        UsageError: Unknown switch.
    """
    return {"type": "CAAHead", "host": host, **asdict(CAAConfig.of(**switches))}
