"""CAA, class-aware affinity (thesis ch. 3): an add-on between a decode head's features and its classifier.

With F (D x H x W) the host's feature, coarse (K x H x W) its own classifier's output and F' = ReLU(BN(conv1x1(F))):

* class centre: C = softmax(coarse) F'^T, one row of D' per class;
* affinity: M = sigmoid(a b^T) of two 1x1 convolutions of F; F_intra = M F' and F_inter = (1 - M) F' = sum(F') - M F',
  so one product gives both;
* association: softmax_classes(F_intra C^T) C, the same for F_inter;
* final = conv1x1(concat(F, intra, inter)) -> classifier.

Loss = CE(final) + BCE(M, ground truth) + 0.4 CE(coarse). :class:`CAA` is the add-on itself, in torch alone. ``CAAHead``
puts it on any host for mmseg: ``dict(type="CAAHead", host=dict(type="PSPHead", ...), **switches)`` after
:func:`register`; mmseg is imported only then. ISNet as a host is not here.

Beside Table 3.5: the widths below add 3.62 M parameters (published 3.60 to 3.61) and 14.81 GMACs of convolutions
(published 12.73 to 13.05). Both cannot be met: convolutions of F run on all 4096 positions, where 3.6 M parameters cost
14.7 GMACs. With the matrix products of the affinity and the centres it is 57.61 GMACs, near the least for these
parameters: a narrower D' needs wider a and b, which cost more. Training holds the whole of M and its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.compat import import_mmseg
from ovbench.errors import UsageError, unknown_name
from ovbench.methods import hosts  # type: ignore[import-not-found]

# Entries of the affinity that exist at a time in evaluation: one map of a 64 x 64 grid, 64 MiB in fp32.
MAP_ENTRIES = 64**4
# Least share of a row's mass that is divided by: below it, rounding of the difference sum(F') - M F' would be blown up.
MASS_FLOOR = 1e-4
_NORMS: dict[str, Callable[[int], nn.Module]] = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


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
        center_softmax: Axis of the centre's softmax: over positions it is a weighted mean; over classes it is divided by
            each class's mass to be one too (*inferred*: the axis is not stated).
        row_normalise: Rows of M and of 1 - M sum to one, so that F_intra and F_inter do not grow with HW (*inferred*).
        association_scale: Divide the association's logits by sqrt(D') (*inferred*: off, the equation has no scale).
        center_channels: D' (*inferred* from the parameters of Table 3.5).
        affinity_channels: Width of a and b (*inferred*, likewise).
        fusion_norm: Batch norm and ReLU after the last 1x1 convolution (*inferred*: without them it and the classifier
            would be one linear map).
    """

    center: bool = True
    affinity: bool = True
    intra: bool = True
    inter: bool = True
    aux_weight: float = 0.4
    affinity_weight: float = 1.0
    center_softmax: Literal["positions", "classes"] = "positions"
    row_normalise: bool = True
    association_scale: bool = False
    center_channels: int = 2048
    affinity_channels: int = 128
    fusion_norm: bool = True

    def __post_init__(self) -> None:
        if not self.center and not self.affinity:
            raise UsageError("CAA without class centre and without affinity is the host: use the host itself.")
        if self.affinity and not self.intra and not self.inter:
            raise UsageError("CAA's affinity has neither intra nor inter: switch one on, or set affinity to False.")
        if self.center_softmax not in ("positions", "classes"):
            raise UsageError(f"center_softmax {self.center_softmax!r}: give 'positions' or 'classes'.")
        least = {"center_channels": 1, "affinity_channels": 1, "aux_weight": 0, "affinity_weight": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} {getattr(self, name)}: give at least {bound}.")

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
        affinity: Logits of M (B, hw, hw); None without affinity.
    """

    seg_logits: Tensor
    coarse: Tensor | None
    affinity: Tensor | None


def class_centers(coarse: Tensor, features: Tensor, softmax: str = "positions") -> Tensor:
    """Class centres (B, K, D'), each a weighted mean of features.

    Args:
        coarse: Logits (B, K, N).
        features: F' as rows, (B, N, D').
        softmax: ``"positions"`` or ``"classes"``.
    """
    if softmax == "positions":
        return coarse.softmax(dim=2) @ features  # (B, K, D')
    weights = coarse.softmax(dim=1)
    return weights @ features / weights.sum(dim=2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def aggregate(affinity: Tensor, features: Tensor, row_normalise: bool = True) -> tuple[Tensor, Tensor]:
    """F_intra = M F' and F_inter = (1 - M) F', both (B, R, D'), from one product.

    Args:
        affinity: Rows of M in [0, 1], (B, R, N).
        features: F' as rows, (B, N, D').
        row_normalise: Divide by the sums of the rows of M and of 1 - M (of at least ``MASS_FLOOR`` of N).
    """
    intra = affinity @ features  # (B, R, D')
    inter = features.sum(dim=1, keepdim=True) - intra
    if not row_normalise:
        return intra, inter
    positions = features.shape[1]
    mass = affinity.sum(dim=2, keepdim=True)  # (B, R, 1)
    floor = MASS_FLOOR * positions
    return intra / mass.clamp_min(floor), inter / (positions - mass).clamp_min(floor)


def associate(features: Tensor, centers: Tensor, scale: bool = False) -> Tensor:
    """Every position as a mixture of class centres, (B, N, D').

    Args:
        features: (B, N, D').
        centers: (B, K, D').
        scale: Divide the logits by sqrt(D').
    """
    logits = features @ centers.transpose(1, 2)  # (B, N, K)
    if scale:
        logits = logits / features.shape[2] ** 0.5
    return logits.softmax(dim=2) @ centers


def labels_on_grid(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (B, h * w) on a coarser grid (h, w), by nearest neighbour, from (B, H, W) of integers."""
    # Class numbers up to 2^24 are exact in fp32, which interpolate wants.
    return F.interpolate(labels[:, None].float(), size=grid, mode="nearest")[:, 0].flatten(1).long()


def affinity_target(labels: Tensor, ignore_index: int = 255, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Ground truth G G^T of the affinity and which pairs count, both boolean (B, R, N).

    A pair of labels (B, N) is true where both have one class; it counts where neither is ``ignore_index``.
    """
    valid = labels != ignore_index
    counted = valid[:, rows, None] & valid[:, None, :]
    return (labels[:, rows, None] == labels[:, None, :]) & counted, counted


def affinity_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255, entries: int = MAP_ENTRIES) -> Tensor:
    """Binary cross-entropy of the affinity, the mean over the batch's counted pairs; 0 where there is none.

    Args:
        logits: Of M, (B, N, N).
        labels: (B, N).
        ignore_index: Label whose positions count on neither axis.
        entries: Pairs for which a ground truth exists at a time.
    """
    total, number = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
    for rows in _row_chunks(logits.shape[0], logits.shape[1], entries):
        target, counted = affinity_target(labels, ignore_index, rows)
        part = logits[:, rows].float()
        loss = F.binary_cross_entropy_with_logits(part, target.to(part.dtype), reduction="none")
        # torch.where and not a product: a logit of infinity at an ignored pair must not become NaN.
        total = total + torch.where(counted, loss, 0.0).sum()
        number = number + counted.sum()
    return total / number.clamp_min(1)


def _row_chunks(batch: int, positions: int, entries: int) -> list[slice]:
    """Slices of the map's rows of which no one has more than ``entries`` entries in the batch, but at least a row."""
    step = max(1, entries // max(1, batch * positions))
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it (the meta device has none)."""
    has = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has else nullcontext()


class CAA(nn.Module):
    """The add-on: features and coarse logits of a host to features of the same width.

    Args:
        channels: D of the host.
        config: Switches and widths.
        norm: Makes a batch norm for a number of channels.
    """

    def __init__(self, channels: int, config: CAAConfig, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.config = config
        width = config.center_channels
        self.transform = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU(inplace=True))
        if config.affinity:
            self.query = nn.Conv2d(channels, config.affinity_channels, 1)
            self.key = nn.Conv2d(channels, config.affinity_channels, 1)
        contexts = config.intra + config.inter if config.affinity else 1
        fused = nn.Conv2d(channels + contexts * width, channels, 1, bias=not config.fusion_norm)
        after = [norm(channels), nn.ReLU(inplace=True)] if config.fusion_norm else []
        self.fusion = nn.Sequential(fused, *after)

    def forward(self, features: Tensor, coarse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features for the classifier (B, D, h, w) and, in training, the logits of the affinity (B, hw, hw).

        Args:
            features: F, (B, D, h, w).
            coarse: The host's logits (B, K, h, w); only the class centre uses them.
        """
        grid = features.shape[2:]
        rows = self.transform(features)
        if self.config.affinity:
            query, key = self.query(features), self.key(features)
        # Sums over thousands of positions and their difference: half precision would overflow, or leave only rounding.
        with _full_precision(features.device.type):
            rows = rows.float().flatten(2).transpose(1, 2)  # (B, N, D')
            centers = None
            if self.config.center:
                assert coarse is not None  # the head makes them
                centers = class_centers(coarse.float().flatten(2), rows, self.config.center_softmax)
            logits = None
            if self.config.affinity:
                q, k = query.float().flatten(2).transpose(1, 2), key.float().flatten(2)
                contexts, logits = self._affinity_contexts(q, k, rows)
            else:
                contexts = [rows]
            if centers is not None:
                contexts = [associate(context, centers, self.config.association_scale) for context in contexts]
            maps = [context.transpose(1, 2).unflatten(2, grid).to(features.dtype) for context in contexts]
        return self.fusion(torch.cat([features, *maps], dim=1)), logits

    def _affinity_contexts(self, query: Tensor, key: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The wanted ones of F_intra and F_inter (B, N, D'), and the logits of M in training."""
        logits = None
        if self.training:
            logits = query @ key  # (B, N, N)
            both = aggregate(logits.sigmoid(), rows, self.config.row_normalise)
        else:  # the loss needs the whole map, the result only its rows
            chunks = _row_chunks(rows.shape[0], rows.shape[1], MAP_ENTRIES)
            pairs = [self._chunk(query[:, chunk], key, rows) for chunk in chunks]
            both = (torch.cat([pair[0] for pair in pairs], dim=1), torch.cat([pair[1] for pair in pairs], dim=1))
        wanted = (self.config.intra, self.config.inter)
        return [part for part, asked in zip(both, wanted, strict=True) if asked], logits

    def _chunk(self, query: Tensor, key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = query @ key
        # In place, so that only one map exists; autograd, should it be on, keeps the output of sigmoid_ and no input.
        return aggregate(logits.sigmoid_(), rows, self.config.row_normalise)


def _as_is(features: Tensor) -> Tensor:
    """Stands in for a host's classifier, so that the host's forward ends with its feature."""
    return features


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
            UsageError: An unknown switch, or a host with other norms than BN and SyncBN or one output for two classes.
        """

        def __init__(self, host: dict[str, Any], init_cfg: Any = None, **switches: Any) -> None:
            config = CAAConfig.of(**switches)
            built = mmseg.registry.MODELS.build(host)
            if built.out_channels != built.num_classes:
                raise UsageError("CAA needs one output of the host for each class: leave out its out_channels.")
            norm = (built.norm_cfg or {"type": "BN"})["type"]
            if norm not in _NORMS:
                raise unknown_name("norm of a host for CAA", norm, _NORMS)
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
            built.cls_seg = _as_is
            self.host = built
            self.caa = CAA(built.channels, config, _NORMS[norm])

        def forward(self, inputs: Any) -> Any:
            features = self.host(inputs)
            coarse = None
            if self.config.center or (self.training and self.config.aux_weight):
                coarse = base.cls_seg(self.host, features)
            final, affinity = self.caa(features, coarse)
            seg_logits = self.cls_seg(final)
            return CAAOutput(seg_logits, coarse, affinity) if self.training else seg_logits

        def loss_by_feat(self, seg_logits: CAAOutput, batch_data_samples: Any) -> dict[str, Tensor]:
            """Losses by name: ``loss_ce``, ``coarse.loss_ce``, ``loss_affinity``, and the accuracies ``acc_seg``."""
            losses: dict[str, Tensor] = super().loss_by_feat(seg_logits.seg_logits, batch_data_samples)
            if self.config.aux_weight and seg_logits.coarse is not None:
                for name, value in self.host.loss_by_feat(seg_logits.coarse, batch_data_samples).items():
                    weight = self.config.aux_weight if "loss" in name else 1.0
                    losses[f"coarse.{name}"] = weight * value
            if self.config.affinity_weight and seg_logits.affinity is not None:
                labels = self._stack_batch_gt(batch_data_samples)[:, 0]
                height, width = seg_logits.seg_logits.shape[2:]
                small = labels_on_grid(labels, (height, width))
                loss = affinity_loss(seg_logits.affinity, small, self.ignore_index)
                losses["loss_affinity"] = self.config.affinity_weight * loss
            return losses

    CAAHead.__qualname__ = "CAAHead"  # found by __getattr__ below, so that whole heads can be pickled
    mmseg.registry.MODELS.register_module(module=CAAHead)
    return CAAHead


def __getattr__(name: str) -> Any:
    if name == "CAAHead":
        return register()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def head_config(host: str, num_classes: int = hosts.NUM_CLASSES, **switches: Any) -> dict[str, Any]:
    """A host with CAA as a config for mmseg's ``MODELS`` (after :func:`register`), all switches written out.

    Raises:
        UsageError: Unknown host or switch.
    """
    return {"type": "CAAHead", "host": hosts.head_config(host, num_classes), **asdict(CAAConfig.of(**switches))}


def build_head(host: str, num_classes: int = hosts.NUM_CLASSES, **switches: Any) -> nn.Module:
    """A host's decode head with CAA, random weights, in evaluation mode; takes the list C1 .. C4 of feature maps.

    Args:
        host: See :func:`ovbench.methods.hosts.host_names`.
        num_classes: K.
        switches: Fields of :class:`CAAConfig`.

    Raises:
        UsageError: Unknown host or switch.
        RunError: mmsegmentation is not installed or broken.
    """
    config = head_config(host, num_classes, **switches)
    register()
    head: nn.Module = import_mmseg().registry.MODELS.build(config)
    return head.eval()
