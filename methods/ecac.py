"""ECAC, the extended context-aware classifier: an add-on to any closed-set decode head (thesis ch. 4).

A host's 1x1 classifier is kept as the coarse classifier. Around the features F (B, d, h, w) in front of it:

* memory M (K, d): momentum means of F under the ground truth, for the classes of a batch only;
* student: C_s = means of F weighted by the coarse softmax, S = xi_s(C_s (+) M), logits S F; all that inference needs;
* teacher, in training only: C_t = means of F under the ground truth, T = xi_t(C_t (+) M), logits T F;
* calibration of both: gamma_c O + delta_c;
* total loss: rce_S + rce_T + L_M + alpha KL (Eq. 4.12) + beta L_iv. KL and L_iv do not reach the teacher.

(+) joins channels, xi is two linear layers 2d -> d' -> d. Where the thesis is silent, the choice is marked *inferred*. Also
inferred: centres are per image, a class that is absent has a zero centre, the host's dropout acts on the features that are
classified and not on those that are averaged, and the memory is updated after the losses of its batch.

Beside Table 4.6: +1.034 M parameters (published +1.02 to +1.05) and +.784 GMACs: C_s and the logits are a product of
150 x 4096 x 512 each, xi is 150 x 1536 x 672. Published are +1.13 (PSPNet), +1.25 (DeepLabV3+) and +1.45 (FCN), although
what is added is the same on each, so no reading meets all. PSPNet's +1.05 M and +1.13 G are those of a 1x1 convolution
512 -> 512 of F with two xi of d' = 256, of which one runs, when convolutions and linear layers alone are counted; the
equations have no such convolution, and it is not here.
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


# Looked at for what is inferred: thesis ch. 4 (equations, Tables 4.2 to 4.6), the public CAC (tianzhuotao/CAC), from
# which it comes, mmseg's recipes of the hosts; no public code of the method was found.
@dataclass(frozen=True)
class ECACConfig:
    """Switches of ECAC; the rows of thesis Tables 4.2 to 4.5 are settings of these.

    Attributes:
        ecac: False leaves the host's own classifier and one cross-entropy (Table 4.2, first two rows).
        reweight: Cross-entropy weighted by class frequency (Table 4.2).
        memory_loss: L_M (Table 4.2).
        kl_weight: alpha (Tables 4.2, 4.3); 0 is off.
        iv_weight: beta, of the intra-class variance loss (Tables 4.2, 4.3); 0 is off.
        memory_update: Masked class mean, or pixels weighted by 1 - cosine to the memory row (Table 4.4). What the thesis'
            cosine update weighs by is *inferred*.
        calibration: gamma_c, delta_c (Table 4.5).
        hidden: d', *inferred* from the +1.03 M parameters of Table 4.6 at d = 512.
        activation: Between xi's two layers, *inferred*: none is named.
        momentum: mu, *inferred*: no value is printed.
        rho: Exponent of the class weights, *inferred*: no value is printed.
        memory_loss_start: Iterations before L_M sets in.
    """

    ecac: bool = True
    reweight: bool = True
    memory_loss: bool = True
    kl_weight: float = 1.0
    iv_weight: float = 50.0
    memory_update: Literal["masked", "cosine"] = "masked"
    calibration: bool = True
    hidden: int = 672
    activation: Literal["relu", "none"] = "relu"
    momentum: float = 0.1
    rho: float = 0.5
    memory_loss_start: int = 1000

    def __post_init__(self) -> None:
        if self.memory_update not in ("masked", "cosine"):
            raise unknown_name("memory update", self.memory_update, ("masked", "cosine"))
        if self.activation not in ("relu", "none"):
            raise unknown_name("activation", self.activation, ("relu", "none"))
        if not 0 < self.momentum <= 1 or self.hidden < 1 or self.kl_weight < 0 or self.iv_weight < 0:
            raise UsageError("ECAC: momentum must be in (0, 1], hidden at least 1, kl_weight and iv_weight at least 0.")


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
        self.xi = nn.Sequential(nn.Linear(2 * channels, config.hidden), between, nn.Linear(config.hidden, channels))
        self.gamma = nn.Parameter(torch.ones(num_classes)) if config.calibration else None
        self.delta = nn.Parameter(torch.zeros(num_classes)) if config.calibration else None

    def forward(self, centres: Tensor, memory: Tensor, features: Tensor) -> Tensor:
        """Logits (B, K, h, w) from centres (B, K, d), memory (K, d) and features (B, d, h, w)."""
        joined = torch.cat([centres, memory.to(centres.dtype).expand_as(centres)], dim=2)
        logits = classify(self.xi(joined), features)
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
            return self._student(features, *self._coarse(features))

        def _coarse(self, features: Tensor) -> tuple[Tensor, Tensor]:
            classified = features if self.host.dropout is None else self.host.dropout(features)
            return classified, self.host.conv_seg(classified)

        def _student(self, features: Tensor, classified: Tensor, coarse: Tensor) -> Tensor:
            if self.student is None:
                return coarse
            centres = soft_centres(features, coarse)
            return self.student(centres, self.memory, classified)  # type: ignore[no-any-return]

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
            classified, coarse = self._coarse(features)
            student = self._student(features, classified, coarse)
            found = {"loss_rce_student": cross_entropy(self._enlarged(student, labels), labels, weights)}
            if self.teacher is None:
                return found
            centres = class_centres(features, small, self.num_classes).to(features.dtype)
            teacher = self.teacher(centres, self.memory, classified)
            found["loss_rce_teacher"] = cross_entropy(self._enlarged(teacher, labels), labels, weights)
            if config.kl_weight:
                found["loss_kl"] = config.kl_weight * kl_loss(student, teacher, small)
            if config.iv_weight:
                found["loss_iv"] = config.iv_weight * iv_loss(student, teacher, small)
            if config.memory_loss:
                rows = self.host.conv_seg(self.memory.clone()[:, :, None, None])[:, :, 0, 0]
                # Before it sets in it is 0 with a gradient of 0, so that distributed training finds no unused part.
                found["loss_memory"] = memory_loss(rows, self.seen) * (self.steps >= config.memory_loss_start)
            if self.training:
                memory, seen = updated_memory(self.memory, self.seen, features.detach(), small, config)
                self.memory.copy_(memory)
                self.seen.copy_(seen)
                self.steps += 1
            return found

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
