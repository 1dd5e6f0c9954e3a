"""The methods of the closed-set track: eight hosts, and each with CAA and with ECAC.

A host is an mmseg decode head on an encoder with four maps (:mod:`ovbench.methods.hosts`); CAA (:mod:`ovbench.methods.caa`,
thesis ch. 3) and ECAC (:mod:`ovbench.methods.ecac`, ch. 4) are put around it. Every row of the thesis' ablation tables is a
setting of a method's ``Config``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ovbench.errors import unknown_name
from ovbench.methods import caa, ecac, hosts  # type: ignore[import-not-found]
from ovbench.methods.caa import CAAConfig  # type: ignore[import-not-found]
from ovbench.methods.ecac import ECACConfig  # type: ignore[import-not-found]
from ovbench.methods.public import read_public  # type: ignore[import-not-found]
from ovbench.mm.compat import import_mmseg
from ovbench.models.closed_set import ClosedSetMethod
from ovbench.models.public_file import PublicFile
from ovbench.networks.encoders import encoder, encoder_config

METHODS = {
    "fcn": {"cls": "FCN", "track": "closed-set", "protocol": "closed-set", "paper": "Long et al., CVPR 2015",
        "summary": "FCN"},
    "psp": {"cls": "Host", "track": "closed-set", "protocol": "closed-set", "paper": "Zhao et al., CVPR 2017",
        "summary": "PSPNet"},
    "ccnet": {"cls": "Host", "track": "closed-set", "protocol": "closed-set", "paper": "Huang et al., ICCV 2019",
        "summary": "CCNet"},
    "deeplabv3": {"cls": "Host", "track": "closed-set", "protocol": "closed-set", "paper": "Chen et al., arXiv 1706.05587",
        "summary": "DeepLabV3"},
    "deeplabv3plus": {"cls": "Host", "track": "closed-set", "protocol": "closed-set", "paper": "Chen et al., ECCV 2018",
        "summary": "DeepLabV3+"},
    "uper": {"cls": "Host", "track": "closed-set", "protocol": "closed-set", "paper": "Xiao et al., ECCV 2018",
        "summary": "UperNet"},
    "isnet": {"cls": "Host", "track": "closed-set", "protocol": "closed-set", "paper": "Jin et al., ICCV 2021",
        "summary": "ISNet"},
    "segnext": {"cls": "SegNeXt", "track": "closed-set", "protocol": "closed-set", "paper": "Guo et al., NeurIPS 2022",
        "summary": "SegNeXt"},
    "caa-fcn": {"cls": "CAAFCN", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "FCN with class-aware affinity"},
    "caa-psp": {"cls": "CAAMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "PSPNet with class-aware affinity"},
    "caa-ccnet": {"cls": "CAAMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "CCNet with class-aware affinity"},
    "caa-deeplabv3": {"cls": "CAAMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "DeepLabV3 with class-aware affinity"},
    "caa-deeplabv3plus": {"cls": "CAAMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "DeepLabV3+ with class-aware affinity"},
    "caa-uper": {"cls": "CAAMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "UperNet with class-aware affinity"},
    "caa-isnet": {"cls": "CAAMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "ISNet with class-aware affinity"},
    "caa-segnext": {"cls": "CAASegNeXt", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 3",
        "summary": "SegNeXt with class-aware affinity"},
    "ecac-fcn": {"cls": "ECACFCN", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "FCN with extended context-aware classifier"},
    "ecac-psp": {"cls": "ECACMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "PSPNet with extended context-aware classifier"},
    "ecac-ccnet": {"cls": "ECACMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "CCNet with extended context-aware classifier"},
    "ecac-deeplabv3": {"cls": "ECACMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "DeepLabV3 with extended context-aware classifier"},
    "ecac-deeplabv3plus": {"cls": "ECACMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "DeepLabV3+ with extended context-aware classifier"},
    "ecac-uper": {"cls": "ECACMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "UperNet with extended context-aware classifier"},
    "ecac-isnet": {"cls": "ECACMethod", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "ISNet with extended context-aware classifier"},
    "ecac-segnext": {"cls": "ECACSegNeXt", "track": "closed-set", "protocol": "closed-set", "paper": "thesis ch. 4",
        "summary": "SegNeXt with extended context-aware classifier"},
}  # fmt: skip

# Both chapters: SGD with momentum .9, poly schedule of power .9, batch 16, ratios .5 to 1.75 (text), mirroring. Photometric
# distortion is *inferred*: the thesis does not say, mmseg's recipes for these hosts have it. So is ADE20K's recipe for
# benchmarks that the thesis does not train on. Looked at for what is inferred: chapters 3 and 4 of the thesis (settings of their
# experiments), mmseg's configs of the hosts.
_SGD: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "schedule": "poly",
    "power": 0.9,
    "batch": 16,
    "ratio_range": (0.5, 1.75),
    "flip": 0.5,
    "photometric": True,
}
_CAA: dict[str, dict[str, Any]] = {
    "*": {**_SGD, "lr": 0.02, "weight_decay": 5e-4, "iters": 160_000, "crop": 512},
    "ade20k": {**_SGD, "lr": 0.02, "weight_decay": 5e-4, "iters": 160_000, "crop": 512},
    "coco_stuff10k": {**_SGD, "lr": 0.001, "weight_decay": 1e-4, "iters": 60_000, "crop": 512},
    "context59": {**_SGD, "lr": 0.001, "weight_decay": 1e-4, "iters": 60_000, "crop": 512},
}
_ECAC: dict[str, dict[str, Any]] = {
    "*": {**_SGD, "lr": 0.01, "weight_decay": 5e-4, "epochs": 130, "crop": 512},
    "ade20k": {**_SGD, "lr": 0.01, "weight_decay": 5e-4, "epochs": 130, "crop": 512},
    "coco_stuff10k": {**_SGD, "lr": 0.001, "weight_decay": 1e-4, "epochs": 110, "crop": 512},
    "context59": {**_SGD, "lr": 0.001, "weight_decay": 1e-4, "epochs": 110, "crop": 480},
}


@dataclass(frozen=True)
class HostConfig:
    """Switches of a host.

    Attributes:
        auxiliary_head: In training, a small FCN on C3 with loss weight .4, as in mmseg's configs of all hosts but SegNeXt
            (*inferred* for the add-ons: neither chapter says whether it stays).
        channels: Width of the feature before the classifier; 0 is the published one. Smaller ones are for trials.
    """

    auxiliary_head: bool = True
    channels: int = 0


@dataclass(frozen=True)
class CAAHostConfig(CAAConfig, HostConfig):  # type: ignore[misc]
    """Switches of a host with CAA; see :class:`HostConfig` and :class:`ovbench.methods.caa.CAAConfig`."""


@dataclass(frozen=True)
class ECACHostConfig(ECACConfig, HostConfig):  # type: ignore[misc]
    """Switches of a host with ECAC; see :class:`HostConfig` and :class:`ovbench.methods.ecac.ECACConfig`."""


class Host(ClosedSetMethod):
    """A host with its own classifier; trained by the recipe of thesis ch. 3 unless told otherwise."""

    Config: ClassVar[type[Any]] = HostConfig
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = _CAA
    TRIAL_OPTIONS: ClassVar[dict[str, Any]] = {"channels": 64}

    def head_config(
        self,
        arch: str,
        num_classes: int,
        *,
        training: bool = False,
        class_frequencies: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """The decode head alone; arguments as of :meth:`model_config`."""
        host: dict[str, Any] = hosts.head_config(
            hosts.addon_and_host(self.name)[1],
            num_classes,
            encoder=arch,
            channels=self.config.channels,
            concat_input=getattr(self.config, "concat_input", None),
        )
        return self.around(host, training, class_frequencies)

    def around(self, host: dict[str, Any], training: bool, class_frequencies: Sequence[int] | None) -> dict[str, Any]:
        """The config of what is put around a host's."""
        return host

    @classmethod
    def public_file(cls, path: Path) -> PublicFile | None:
        """See :func:`ovbench.methods.public.read_public`."""
        return read_public(path)  # type: ignore[no-any-return]

    def model_config(
        self,
        arch: str,
        num_classes: int,
        *,
        training: bool = False,
        class_frequencies: Sequence[int] | None = None,
        weights: str | None = None,
    ) -> dict[str, Any]:
        """See :meth:`ovbench.models.closed_set.ClosedSetMethod.model_config`; build it after :func:`register`."""
        head = self.head_config(arch, num_classes, training=training, class_frequencies=class_frequencies)
        network: dict[str, Any] = {
            "type": "EncoderDecoder",
            **encoder_config(arch, weights),
            "decode_head": head,
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
        }
        if training and self.config.auxiliary_head:
            width = min(256, self.config.channels or 256)
            network["auxiliary_head"] = _auxiliary_head(encoder(arch).channels[2], width, num_classes)
        return network


class CAAMethod(Host):
    """A host with class-aware affinity (thesis ch. 3)."""

    Config: ClassVar[type[Any]] = CAAHostConfig
    BEFORE: ClassVar[dict[str, Any]] = {
        "affinity_rows": False,
        "affinity_detached": False,
        "center_mass": False,
        "projections": False,
        "fusion_residual": False,
    }

    def around(self, host: dict[str, Any], training: bool, class_frequencies: Sequence[int] | None) -> dict[str, Any]:
        """``CAAHead`` around the host, all switches written out."""
        found: dict[str, Any] = caa.head_config(host, **_switches(self.config, CAAConfig))
        return found


class ECACMethod(Host):
    """A host with the extended context-aware classifier (thesis ch. 4)."""

    Config: ClassVar[type[Any]] = ECACHostConfig
    TRIAL_OPTIONS: ClassVar[dict[str, Any]] = {"channels": 64, "memory_loss_start": 100, "iv_start": 100}
    BEFORE: ClassVar[dict[str, Any]] = {
        "coarse_conv": False,
        "coarse_weight": 0.0,
        "kl_hard": 0.0,
        "cosine_scale": 0.0,
        "teacher_centres": "image",
        "absent_centre": "zero",
        "iv_start": 0,
    }
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = _ECAC

    def around(self, host: dict[str, Any], training: bool, class_frequencies: Sequence[int] | None) -> dict[str, Any]:
        """``ECACHead`` around the host, all switches written out; the teacher is there for training only."""
        switches = {**_switches(self.config, ECACConfig), "teacher": training}
        if class_frequencies is not None:
            switches["class_frequencies"] = list(class_frequencies)
        found: dict[str, Any] = ecac.head_config(host, **switches)
        return found

    def needs_class_frequencies(self) -> bool:
        """Where the cross-entropy is weighted by them."""
        return bool(self.config.reweight)


@dataclass(frozen=True)
class FCNConfig(HostConfig):
    """Switches of FCN.

    Attributes:
        concat_input: A third convolution over C4 beside the result of the two, as in mmseg's config and its public
            checkpoints; without it the head has the parameters that the thesis prints (Table 4.6).
    """

    concat_input: bool = False


@dataclass(frozen=True)
class CAAFCNConfig(CAAHostConfig, FCNConfig):
    """Switches of FCN with CAA."""


@dataclass(frozen=True)
class ECACFCNConfig(ECACHostConfig, FCNConfig):
    """Switches of FCN with ECAC."""


class FCN(Host):
    """FCN, of which there are two heads; see :class:`FCNConfig`."""

    Config: ClassVar[type[Any]] = FCNConfig
    BEFORE: ClassVar[dict[str, Any]] = {"concat_input": False}


class CAAFCN(CAAMethod):
    """FCN with class-aware affinity."""

    Config: ClassVar[type[Any]] = CAAFCNConfig
    BEFORE: ClassVar[dict[str, Any]] = {**CAAMethod.BEFORE, "concat_input": False}


class ECACFCN(ECACMethod):
    """FCN with the extended context-aware classifier."""

    Config: ClassVar[type[Any]] = ECACFCNConfig
    BEFORE: ClassVar[dict[str, Any]] = {**ECACMethod.BEFORE, "concat_input": False}


@dataclass(frozen=True)
class SegNeXtConfig(HostConfig):
    """Switches of SegNeXt, which mmseg trains without auxiliary head."""

    auxiliary_head: bool = False


@dataclass(frozen=True)
class CAASegNeXtConfig(CAAHostConfig):
    """Switches of SegNeXt with CAA."""

    auxiliary_head: bool = False


@dataclass(frozen=True)
class ECACSegNeXtConfig(ECACHostConfig):
    """Switches of SegNeXt with ECAC."""

    auxiliary_head: bool = False


class SegNeXt(Host):
    """SegNeXt, whose head is made for its own encoder."""

    Config: ClassVar[type[Any]] = SegNeXtConfig
    DEFAULT_ARCH: ClassVar[str] = hosts.default_encoder("segnext")


class CAASegNeXt(CAAMethod):
    """SegNeXt with class-aware affinity."""

    Config: ClassVar[type[Any]] = CAASegNeXtConfig
    DEFAULT_ARCH: ClassVar[str] = hosts.default_encoder("segnext")


class ECACSegNeXt(ECACMethod):
    """SegNeXt with the extended context-aware classifier."""

    Config: ClassVar[type[Any]] = ECACSegNeXtConfig
    DEFAULT_ARCH: ClassVar[str] = hosts.default_encoder("segnext")


def _switches(config: Any, addon: type[Any]) -> dict[str, Any]:
    """The values of the fields that are an add-on's."""
    return {field.name: getattr(config, field.name) for field in fields(addon)}


def _auxiliary_head(in_channels: int, channels: int, num_classes: int) -> dict[str, Any]:
    return {
        "type": "FCNHead",
        "in_channels": in_channels,
        "in_index": 2,
        "channels": channels,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.1,
        "num_classes": num_classes,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.4},
    }


def build_head(name: str, num_classes: int = hosts.NUM_CLASSES, arch: str | None = None, **options: Any) -> nn.Module:
    """A method's decode head with random weights, in evaluation mode; takes the list C1 .. C4 of feature maps.

    ECAC's teacher is there, though no evaluation runs it: the thesis' parameter counts have it.

    Args:
        name: Method id.
        num_classes: K.
        arch: Encoder whose maps it takes; None is the method's default.
        options: Fields of the method's ``Config``.

    Raises:
        UsageError: Unknown name or option.
        RunError: mmsegmentation is not installed or broken.
    """
    if name not in METHODS:
        raise unknown_name("decode head", name, METHODS)
    cls: type[Host] = globals()[METHODS[name]["cls"]]
    method = cls(name, cls.configure(options))
    config = method.head_config(arch or method.DEFAULT_ARCH, num_classes, training=True)
    models = import_mmseg().registry.MODELS
    register()
    head: nn.Module = models.build(config)
    return head.eval()


def register() -> None:
    """Registers all that these configs name in mmseg's ``MODELS``; the first call imports mmseg.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    from ovbench.networks import encoder_weights

    for module in (encoder_weights, hosts, caa, ecac):
        module.register()
