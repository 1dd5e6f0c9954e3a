"""ECAC, the extended context-aware classifier: an add-on to any closed-set decode head (thesis ch. 4).

A host's 1x1 classifier, behind a convolution of its own, is the coarse classifier. Around the features F (B, d, h, w):

* memory M (K, d): momentum means of F under the ground truth, for the classes of a batch only;
* student: C_s = means of F weighted by the coarse softmax, S = xi_s(C_s (+) M), logits S F; all that inference needs;
* teacher, in training only: C_t = means of F under the ground truth, T = xi_t(C_t (+) M), logits T F;
* calibration of both: gamma_c O + delta_c;
* total loss: rce_S + rce_T + rce_coarse + L_M + alpha KL (Eq. 4.12) + beta L_iv. KL and L_iv do not reach the teacher.

(+) joins channels, xi is two linear layers 2d -> d' -> d. The thesis leaves much open. It comes from CAC (tianzhuotao/CAC) and
shares its toolbox with MCIBI, and a public fork of that toolbox has the two put together: MCIBI's memory, updated by masked means,
in the place of CAC's fixed classifier, MCIBI's two-layer coarse classifier, CAC's projectors, and L_iv times 50 (there computed
and logged, but not added to the loss). What it and CAC do settles what the thesis does not say.

Beside Table 4.6: that layout has +1.0511 M parameters, both projectors counted as the table does (PSPNet's printed +1.05, FCN's
+1.03, DeepLabV3+'s +1.02), and +1.133 GMACs of convolutions and linear layers (PSPNet's +1.13; with S F counted as the
convolution that it is in that code, 1.447: FCN's +1.45). Without the teacher, which evaluation does not need, +.657 M.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovbench.errors import UsageError, unknown_name
from ovbench.methods import hosts  # type: ignore[import-not-found]
from ovbench.methods.norms import norm_layer  # type: ignore[import-not-found]
from ovbench.ops.class_context import (
    EPS,
    class_centres,
    class_sums,
    class_weights,
    classify,
    cross_entropy,
    feature_rows,
    iv_loss,
    kl_loss,
    memory_loss,
    soft_centres,
)

Reduce = Callable[[Tensor], Tensor]


# Looked at for what is inferred: thesis ch. 4 (equations, Tables 4.2 to 4.6), CAC (tianzhuotao/CAC, mmseg/models/decode_heads),
# MCIBI (SegmentationBLWX/sssegmentation) and the fork of it that the module names, mmseg's recipes of the hosts. Measured:
# docs/closed-set.md.
@dataclass(frozen=True)
class ECACConfig:
    """Switches of ECAC; the rows of thesis Tables 4.2 to 4.5 are settings of these.

    Attributes:
        ecac: False leaves the host's own classifier and one cross-entropy (Table 4.2, first two rows).
        reweight: Cross-entropy weighted by class frequency (Table 4.2).
        coarse_conv: A 1x1 convolution d -> d with norm and ReLU in front of the coarse classifier, as in MCIBI (it completes
            the parameters and MACs of Table 4.6).
        coarse_weight: Weight of the coarse classifier's cross-entropy; CAC has 1, MCIBI .4 (*inferred*: Eq. 4.20 sums over
            pixels against the label map, no weight is printed).
        memory_loss: L_M (Table 4.2).
        kl_weight: alpha (Tables 4.2, 4.3); 0 is off.
        kl_hard: Share of the label itself in KL's target; CAC has .5 (*inferred*: Eq. 4.12 has the teacher alone).
        iv_weight: beta, of the intra-class variance loss (Tables 4.2, 4.3); 0 is off.
        memory_update: Masked class mean, or pixels weighted by 1 - cosine to the memory row, as MCIBI does (Table 4.4).
        calibration: gamma_c, delta_c (Table 4.5).
        cosine_scale: Student and teacher classify by cosines times this, 15 in CAC and the fork; 0 by products, as the
            equations have it.
        teacher_centres: C_t of the classes in the whole batch, as in CAC, or in each image.
        absent_centre: What C_t is of a class that is not there: its row of the memory (the fork), of the coarse classifier
            (CAC), or zero.
        hidden: d'; 0 is half of d, as in CAC.
        activation: Between xi's two layers; CAC has ReLU.
        momentum: mu, *inferred*: no value is printed (MCIBI's configs: .1 or .9, falling with the learning rate).
        rho: Exponent of the class weights, *inferred*: no value is printed.
        memory_loss_start: Iterations before L_M sets in.
        iv_start: Iterations before L_iv sets in (*inferred*, by measurement: at the start a class's logits hardly differ,
            their cosines are noise, and 50 times it explodes).
    """

    ecac: bool = True
    reweight: bool = True
    coarse_conv: bool = True
    coarse_weight: float = 1.0
    memory_loss: bool = True
    kl_weight: float = 1.0
    kl_hard: float = 0.0
    iv_weight: float = 50.0
    memory_update: Literal["masked", "cosine"] = "masked"
    calibration: bool = True
    cosine_scale: float = 0.0
    teacher_centres: Literal["batch", "image"] = "batch"
    absent_centre: Literal["memory", "classifier", "zero"] = "memory"
    hidden: int = 0
    activation: Literal["relu", "none"] = "relu"
    momentum: float = 0.1
    rho: float = 0.5
    memory_loss_start: int = 1000
    iv_start: int = 1000

    def __post_init__(self) -> None:
        choices = {
            "memory_update": ("masked", "cosine"), "activation": ("relu", "none"), "teacher_centres": ("batch", "image"),
            "absent_centre": ("memory", "classifier", "zero"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name.replace("_", " "), getattr(self, name), known)
        if not 0 < self.momentum <= 1:
            raise UsageError(f"ECAC: momentum {self.momentum}: give more than 0 and at most 1.")
        if not 0 <= self.kl_hard <= 1:
            raise UsageError(f"ECAC: kl_hard {self.kl_hard}: give a share in 0 to 1.")
        for name in ("hidden", "kl_weight", "iv_weight", "coarse_weight", "cosine_scale"):
            if getattr(self, name) < 0:
                raise UsageError(f"ECAC: {name} {getattr(self, name)}: give at least 0.")


def all_reduce(value: Tensor) -> Tensor:
    """The sum over all processes of a distributed training; the value itself elsewhere."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        value = value.clone()
        distributed.all_reduce(value)
    return value


@torch.no_grad()
def updated_memory(
    memory: Tensor,
    seen: Tensor,
    features: Tensor,
    labels: Tensor,
    config: ECACConfig,
    reduce: Reduce = all_reduce,
) -> tuple[Tensor, Tensor]:
    """The memory (K, d) and which classes it knows (K,) after a batch; rows of classes not in it stay as they are.

    A class seen (K, bool) for the first time sets its row. Features are (B, d, h, w), labels (B, h, w); ``reduce`` sums
    over processes.
    """
    rows, index, weights = feature_rows(features), labels.flatten(), None
    if config.memory_update == "cosine":
        own = index.clamp(0, len(memory) - 1)
        cosine = F.cosine_similarity(rows.float(), memory[own], dim=1)
        weights = torch.where(seen[own], 1 - cosine, 1.0).clamp_min(EPS)
    sums, totals = (reduce(part) for part in class_sums(rows, index, len(memory), weights))
    present = totals > 0
    means = sums / torch.where(present, totals, 1.0)[:, None]
    rate = torch.where(seen, config.momentum, 1.0)[:, None]
    return torch.where(present[:, None], (1 - rate) * memory + rate * means, memory), seen | present


class Classifier(nn.Module):
    """xi and calibration of one network: class centres and memory to classifiers, and these to logits."""

    def __init__(self, channels: int, num_classes: int, config: ECACConfig) -> None:
        super().__init__()
        between = nn.ReLU(inplace=True) if config.activation == "relu" else nn.Identity()
        hidden = config.hidden or max(1, channels // 2)
        self.xi = nn.Sequential(nn.Linear(2 * channels, hidden), between, nn.Linear(hidden, channels))
        self.gamma = nn.Parameter(torch.ones(num_classes)) if config.calibration else None
        self.delta = nn.Parameter(torch.zeros(num_classes)) if config.calibration else None
        self.cosine_scale = config.cosine_scale

    def forward(self, centres: Tensor, memory: Tensor, features: Tensor) -> Tensor:
        """Logits (B, K, h, w) from centres (B, K, d), memory (K, d) and features (B, d, h, w)."""
        joined = torch.cat([centres, memory.to(centres.dtype).expand_as(centres)], dim=2)
        logits = classify(self.xi(joined), features, self.cosine_scale)
        if self.gamma is None or self.delta is None:
            return logits
        return self.gamma[:, None, None] * logits + self.delta[:, None, None]


@functools.cache
def register() -> type[nn.Module]:
    """The class ``ECACHead`` on mmseg's base, registered in its ``MODELS``; made on the first call.

    Raises ``RunError`` where mmsegmentation is not installed or broken.
    """
    from ovbench.mm.compat import import_mmseg

    mmseg = import_mmseg()
    models = mmseg.registry.MODELS
    base: Any = mmseg.models.decode_heads.decode_head.BaseDecodeHead

    class ECACHead(base):  # type: ignore[misc]
        """A host decode head with ECAC; see the module.

        Args:
            host: Config of any mmseg decode head with a 1x1 classifier ``conv_seg``.
            class_frequencies: (K,) pixels or shares of each class in the training set; needed for losses if ``reweight``.
            teacher: False builds for inference; a teacher's weights in a state dict are then passed over.
            **switches: Fields of :class:`ECACConfig`.
        """

        def __init__(
            self,
            host: dict[str, Any],
            class_frequencies: Sequence[float] | None = None,
            teacher: bool = True,
            **switches: Any,
        ) -> None:
            config = _config(switches)
            built = models.build(dict(host))
            super().__init__(
                in_channels=host["in_channels"],
                channels=built.channels,
                num_classes=built.num_classes,
                in_index=built.in_index,
                input_transform=built.input_transform,
                dropout_ratio=0,
                ignore_index=built.ignore_index,
                align_corners=built.align_corners,
                init_cfg=None,
            )
            del self.conv_seg  # the host's is the coarse classifier
            built.cls_seg = hosts.as_is
            self.host = built
            self.config = config
            classes, width = built.num_classes, built.channels
            conv = [nn.Conv2d(width, width, 1, bias=False), norm_layer(built.norm_cfg)(width), nn.ReLU(inplace=True)]
            self.coarse_conv = nn.Sequential(*(conv if config.ecac and config.coarse_conv else []))
            self.student = Classifier(width, classes, config) if config.ecac else None
            self.teacher = Classifier(width, classes, config) if config.ecac and teacher else None
            self.register_buffer("memory", torch.zeros(classes, width))
            self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("weights", _weights(class_frequencies, classes, config.rho), persistent=False)
            self.register_load_state_dict_pre_hook(_drop_teacher)

        def forward(self, inputs: Sequence[Tensor]) -> Tensor:
            """Logits (B, K, h, w) of the student, in training as in evaluation."""
            features, _ = hosts.features(self.host, inputs)
            return self._student(features, self._coarse(features))

        def coarse_logits(self, inputs: Sequence[Tensor]) -> Tensor:
            """Logits (B, K, h, w) of the coarse classifier alone."""
            return self._coarse(hosts.features(self.host, inputs)[0])

        def _coarse(self, features: Tensor) -> Tensor:
            read = self.coarse_conv(features)
            found: Tensor = self.host.conv_seg(read if self.host.dropout is None else self.host.dropout(read))
            return found

        def _student(self, features: Tensor, coarse: Tensor) -> Tensor:
            if self.student is None:
                return coarse
            return self.student(soft_centres(features, coarse), self.memory, features)  # type: ignore[no-any-return]

        def _teachers_logits(self, features: Tensor, labels: Tensor) -> Tensor:
            """Logits (B, K, h, w) of features under centres by labels (B, h, w)."""
            whole = self.config.teacher_centres == "batch"
            # The images of a batch below each other are one image.
            pixels = features.transpose(0, 1).flatten(1, 2)[None] if whole else features
            centres, present = class_centres(pixels, labels.flatten(0, 1)[None] if whole else labels, self.num_classes)
            fallback = {
                "memory": self.memory,
                "classifier": self.host.conv_seg.weight.detach().flatten(1),
                "zero": None,
            }
            row = fallback[self.config.absent_centre]
            if row is not None:
                centres = torch.where(present[..., None], centres, row.to(centres.dtype))
            centres = centres.to(features.dtype).expand(len(features), -1, -1)
            assert self.teacher is not None  # ``losses`` has seen to it
            return self.teacher(centres, self.memory, features)  # type: ignore[no-any-return]

        def loss(self, inputs: Sequence[Tensor], batch_data_samples: Any, train_cfg: Any = None) -> dict[str, Tensor]:
            """Losses by name; in training mode the memory then takes in the batch."""
            features, extra = hosts.features(self.host, inputs)
            found: dict[str, Tensor] = self.losses(features, self._stack_batch_gt(batch_data_samples).squeeze(1))
            found.update(hosts.feature_losses(self.host, extra, batch_data_samples))
            return found

        def losses(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            """Weighted losses by name of the host's features (B, d, h, w) under labels (B, H, W).

            Raises:
                UsageError: Re-weighting without class frequencies, or a head that was built for inference.
            """
            config = self.config
            if config.reweight and self.weights is None:
                raise UsageError("ECAC: give class_frequencies (of the training set), or set reweight=False.")
            if config.ecac and self.teacher is None:
                raise UsageError("ECAC: this head has no teacher; build it with teacher=True to train it.")
            labels = torch.where(labels == self.ignore_index, -1, labels.long())
            weights = self.weights if config.reweight else None
            small = F.interpolate(labels[:, None].float(), size=features.shape[2:], mode="nearest")[:, 0].long()
            coarse = self._coarse(features)
            student = self._student(features, coarse)
            found = {"loss_rce_student": cross_entropy(self._enlarged(student, labels), labels, weights)}
            if self.teacher is None:
                return found
            teacher = self._teachers_logits(features, small)
            found["loss_rce_teacher"] = cross_entropy(self._enlarged(teacher, labels), labels, weights)
            if config.coarse_weight:
                own = cross_entropy(self._enlarged(coarse, labels), labels, weights)
                found["loss_rce_coarse"] = config.coarse_weight * own
            if config.kl_weight:
                found["loss_kl"] = config.kl_weight * kl_loss(student, teacher, small, config.kl_hard)
            # Before one of these sets in it is 0 with a gradient of 0, so that distributed training finds no unused part.
            if config.iv_weight:
                found["loss_iv"] = config.iv_weight * iv_loss(student, teacher, small) * (self.steps >= config.iv_start)
            if config.memory_loss:
                rows = self.host.conv_seg(self._of_rows(self.memory.clone()))[:, :, 0, 0]
                found["loss_memory"] = memory_loss(rows, self.seen) * (self.steps >= config.memory_loss_start)
            if self.training:
                memory, seen = updated_memory(self.memory, self.seen, features.detach(), small, config)
                self.memory.copy_(memory)
                self.seen.copy_(seen)
                self.steps += 1
            return found

        def _of_rows(self, rows: Tensor) -> Tensor:
            """What the coarse classifier reads of rows (K, d), as (K, d, 1, 1); its norm as in evaluation, these are no pixels."""
            training = self.coarse_conv.training
            try:
                read: Tensor = self.coarse_conv.eval()(rows[:, :, None, None])
            finally:
                self.coarse_conv.train(training)
            return read

        def _enlarged(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=self.align_corners)

    ECACHead.__qualname__ = "ECACHead"  # found by __getattr__ below, so that whole heads can be pickled
    models.register_module(module=ECACHead)
    return ECACHead


def __getattr__(name: str) -> Any:
    if name == "ECACHead":
        return register()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _config(switches: dict[str, Any]) -> ECACConfig:
    known = [field.name for field in fields(ECACConfig)]
    for name in switches:
        if name not in known:
            raise unknown_name("ECAC switch", name, known)
    return ECACConfig(**switches)


def _weights(frequencies: Sequence[float] | None, num_classes: int, rho: float) -> Tensor | None:
    if frequencies is None:
        return None
    given = torch.as_tensor(frequencies, dtype=torch.float64)
    if given.shape != (num_classes,) or not bool((given >= 0).all()) or not bool((given > 0).any()):
        raise UsageError(f"ECAC: class_frequencies must be {num_classes} numbers, none negative, not all zero.")
    return class_weights(given, rho)


def _drop_teacher(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.teacher is None:
        for key in [key for key in state if key.startswith(prefix + "teacher.")]:
            del state[key]


def head_config(host: dict[str, Any], **switches: Any) -> dict[str, Any]:
    """A host's config with ECAC around it for mmseg's ``MODELS``, every switch written out; see :func:`register`.

    Args:
        host: See :func:`ovbench.methods.hosts.head_config`.
        switches: Fields of :class:`ECACConfig`, ``class_frequencies`` and ``teacher``.

    Raises:
        UsageError: Unknown switch.
    """
    own: dict[str, Any] = {key: switches.pop(key) for key in ("class_frequencies", "teacher") if key in switches}
    return {"type": "ECACHead", "host": host, **asdict(_config(switches)), **own}
