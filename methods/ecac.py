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

EPS = 1e-6
Reduce = Callable[[Tensor], Tensor]


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
        activation: Between xi's two layers, *inferred*.
        momentum: mu, *inferred*.
        rho: Exponent of the class weights, *inferred*.
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


def class_sums(
    features: Tensor, labels: Tensor, num_classes: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums (K, d) of rows (P, d) per label (P,), and the total weight (K,) of each; float32, labels beyond K left out."""
    valid = (labels >= 0) & (labels < num_classes)
    rows, index = features[valid].float(), labels[valid]
    weight = rows.new_ones(len(rows)) if weights is None else weights[valid].float()
    sums = rows.new_zeros(num_classes, rows.shape[1]).index_add(0, index, rows * weight[:, None])
    return sums, rows.new_zeros(num_classes).index_add(0, index, weight)


def class_centres(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature (B, K, d) of each class in each image; zero where absent.

    Features are (B, d, h, w), labels (B, h, w) on the same grid; ids outside 0 .. K - 1 are ignored.
    """
    batch = len(features)
    known = (labels >= 0) & (labels < num_classes)
    offsets = num_classes * torch.arange(batch, device=labels.device)[:, None, None]
    index = torch.where(known, labels + offsets, -1)
    sums, totals = class_sums(_rows(features), index.flatten(), batch * num_classes)
    return (sums / totals.clamp_min(1)[:, None]).view(batch, num_classes, -1)


def soft_centres(features: Tensor, coarse: Tensor) -> Tensor:
    """Means (B, K, d) of features (B, d, h, w) weighted by the softmax over classes of coarse logits (B, K, h, w)."""
    # The softmax over pixels of log-probabilities divides each class by its sum, however small that is.
    share = coarse.flatten(2).float().log_softmax(dim=1).softmax(dim=2)  # B, K, N
    return share.to(features.dtype) @ features.flatten(2).transpose(1, 2)


def classify(classifiers: Tensor, features: Tensor) -> Tensor:
    """Logits (B, K, h, w) of features (B, d, h, w) under classifiers (B, K, d)."""
    return (classifiers @ features.flatten(2)).view(len(features), -1, *features.shape[2:])


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
    rows, index, weights = _rows(features), labels.flatten(), None
    if config.memory_update == "cosine":
        own = index.clamp(0, len(memory) - 1)
        cosine = F.cosine_similarity(rows.float(), memory[own], dim=1)
        weights = torch.where(seen[own], 1 - cosine, 1.0).clamp_min(EPS)
    sums, totals = (reduce(part) for part in class_sums(rows, index, len(memory), weights))
    present = totals > 0
    means = sums / torch.where(present, totals, 1.0)[:, None]
    rate = torch.where(seen, config.momentum, 1.0)[:, None]
    return torch.where(present[:, None], (1 - rate) * memory + rate * means, memory), seen | present


def class_weights(frequencies: Tensor, rho: float) -> Tensor:
    """w_c = f_c^-rho / sum_k f_k^-rho, float32 (K,); 0 for a class that never occurs."""
    occurs = frequencies > 0
    raw = torch.where(occurs, torch.where(occurs, frequencies, 1.0).double() ** -rho, 0.0)
    return (raw / raw.sum()).float()


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of the cross-entropy over labelled pixels; 0 where there are none.

    Logits are (B, K, ...), labels (B, ...); ids outside 0 .. K - 1 are ignored. Weights (K,) are divided by their sum over
    pixels (*inferred*), so that their scale does not matter.
    """
    num_classes = logits.shape[1]
    valid = (labels >= 0) & (labels < num_classes)
    loss = F.cross_entropy(logits.float(), torch.where(valid, labels, 0), reduction="none")
    scale = valid.float() if weights is None else weights[torch.where(valid, labels, 0)] * valid
    return (loss * scale).sum() / scale.sum().clamp_min(torch.finfo(torch.float32).tiny)


def kl_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student), weighted by teacher entropy within each class, averaged over classes present (Eq. 4.12).

    Logits are (B, K, h, w), labels (B, h, w) on the same grid; the teacher gets no gradient.
    """
    num_classes = student.shape[1]
    log_t = teacher.detach().float().log_softmax(dim=1)
    log_s = student.float().log_softmax(dim=1)
    entropy = -(log_t.exp() * log_t).sum(dim=1).flatten()
    divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1).flatten()
    sums, totals = class_sums(divergence[:, None], labels.flatten(), num_classes, entropy + EPS)
    present = totals > 0
    per_class = sums[:, 0] / torch.where(present, totals, 1.0)
    return per_class.sum() / present.sum().clamp_min(1)


def iv_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference of the two cosine maps of logits (B, K, h, w) to their own class centres; teacher fixed."""
    valid = (labels >= 0) & (labels < student.shape[1])
    difference = cosine_map(student, labels) - cosine_map(teacher.detach(), labels)
    return (difference.square() * valid).sum() / valid.sum().clamp_min(1)


def cosine_map(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cosine (B, h, w) of each pixel's logits (B, K, h, w) to the mean of its class in its image."""
    num_classes = outputs.shape[1]
    centres = class_centres(outputs, labels, num_classes)  # B, K, K
    index = torch.where((labels >= 0) & (labels < num_classes), labels, 0).flatten(1)
    own = centres.gather(1, index[..., None].expand(-1, -1, num_classes))  # B, N, K
    cosine = F.cosine_similarity(outputs.flatten(2).transpose(1, 2).float(), own, dim=2, eps=EPS)
    return cosine.view(labels.shape)


def memory_loss(logits: Tensor, seen: Tensor) -> Tensor:
    """Cross-entropy of the coarse classifier's logits (K, K) on the memory rows, each its own class; seen rows only."""
    own = torch.arange(len(seen), device=seen.device)
    return cross_entropy(logits, torch.where(seen, own, -1))


def _rows(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).flatten(0, 2)  # B*h*w, d


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


def _raw_features(features: Tensor) -> Tensor:
    """Stands in for a host's ``cls_seg``, so that every host's ``forward`` returns F, whatever it is made of."""
    return features


@functools.cache
def head_class() -> type[nn.Module]:
    """The class ``ECACHead`` on mmseg's base, registered in its ``MODELS``; made on the first call.

    Raises ``RunError`` where mmsegmentation is not installed or broken.
    """
    from ovbench.compat import import_mmseg

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
            built.cls_seg = _raw_features
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
            features = self.host(inputs)
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
            return self.losses(inputs, self._stack_batch_gt(batch_data_samples).squeeze(1))

        def losses(self, inputs: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
            """Weighted losses by name under labels (B, H, W).

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
            features = self.host(inputs)
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

    models.register_module(name="ECACHead", force=True, module=ECACHead)
    return ECACHead


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


def head_config(host: str, num_classes: int = hosts.NUM_CLASSES, **switches: Any) -> dict[str, Any]:
    """A host with ECAC as a config for mmseg's ``MODELS``, every switch written out; see :func:`head_class`.

    Raises ``UsageError`` for an unknown host or switch.
    """
    own: dict[str, Any] = {key: switches.pop(key) for key in ("class_frequencies", "teacher") if key in switches}
    return {"type": "ECACHead", "host": hosts.head_config(host, num_classes), **asdict(_config(switches)), **own}


def build_head(host: str, num_classes: int = hosts.NUM_CLASSES, **switches: Any) -> nn.Module:
    """A host with ECAC and random weights, in evaluation mode and for inference only unless ``teacher=True``.

    Args:
        host: See :func:`ovbench.methods.hosts.host_names`.
        num_classes: K.
        **switches: Fields of :class:`ECACConfig`, ``class_frequencies`` and ``teacher``.

    Raises:
        UsageError: Unknown host or switch.
        RunError: mmsegmentation is not installed or broken.
    """
    config = head_config(host, num_classes, **{"teacher": False, **switches})
    del config["type"]
    return head_class()(**config).eval()
