"""What is trained: a method's network on its way from a spec to weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import UsageError
from ovbench.hashing import sha256_of_file
from ovbench.models.closed_set_start import arch_of, start_from
from ovbench.models.closed_set_weights import TRAINING_ONLY, build_network, configured_method
from ovbench.models.resolve import resolve
from ovbench.models.trainable import ParameterGroup, Trainable, norms_and_biases
from ovbench.paths import user_path
from ovbench.registry import class_of, method_info
from ovbench.spec import protocol
from ovbench.train.record import PartReport
from ovbench.words.embeddings import prompts


@dataclass(frozen=True)
class Subject:
    """A network that can be trained.

    Attributes:
        network: Has ``losses(images, labels)`` and ``parameter_groups(policy)``; all of it on one device.
        takes_segments: Its losses are taken on true segments where the data has them.
        options: All of the method's options.
        arch: Encoder or open_clip architecture.
        text: How classes become sentences, for the spec; empty where there are none.
        weights_sha256: Hash of the file that training starts from; None where that is random.
        exported: Which part of the state is needed to evaluate.
        start: What was taken of a whole network's file, in words; None without one.
    """

    network: Trainable
    takes_segments: bool
    options: dict[str, Any]
    arch: str
    text: dict[str, str | None]
    weights_sha256: str | None
    exported: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    start: str | None = None


def recipes(method: str) -> dict[str, dict[str, Any]]:
    """The recipes that a method declares, by benchmark.

    Raises:
        UsageError: It cannot be trained.
    """
    declared: dict[str, dict[str, Any]] = class_of(method).RECIPES
    if not declared:
        raise UsageError(f"'{method}' is training-free: there is nothing to train. See 'ovbench list methods'.")
    return declared


def trial_options(method: str) -> dict[str, Any]:
    """Options that make a method small enough for a demo."""
    cls = class_of(method)
    return dict(cls.OFFLINE_OPTIONS if method_info(method).takes_words else cls.TRIAL_OPTIONS)


def needs_class_frequencies(method: str, options: dict[str, Any]) -> bool:
    """Whether a loss of the method wants to know how frequent each class is."""
    return not method_info(method).takes_words and configured_method(method, options).needs_class_frequencies()


def open_vocabulary_subject(
    method: str,
    options: dict[str, Any],
    arch: str | None,
    weights: str,
    benchmark: Benchmark,
    *,
    sentences: str | None,
    seed: int,
    device: str,
) -> Subject:
    """The network of a method that reads classes as words, ready to be trained.

    Args:
        method: Method id.
        options: Switches.
        arch: open_clip architecture, where the weights do not tell.
        weights: Of CLIP: tag, file, ``builtin`` or ``random``; or a checkpoint of the method.
        benchmark: Whose classes are trained, each by the first of its words under the wording of the method's protocol.
        sentences: How words become sentences; None: as the method's protocol has it.
        seed: Of random weights.
        device: Torch device.
    """
    resolved = resolve(method, weights, options)
    preset = protocol("paper", benchmark.name, method=method)
    wording = preset.wording if preset.wording in benchmark.wordings else benchmark.wordings[0]
    words = trained_words(benchmark, wording)
    chosen = prompts(sentences or preset.templates)
    built = resolved.cls.load(weights, arch, resolved.config, seed=seed, device=device, training=True)
    built.set_training_classes(words, chosen)

    def exported(state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {key: value.clone() for key, value in built.state_dict().items()}  # a running mean is not what is trained
        built.load_state_dict(state)
        tensors = {key: value.clone() for key, value in built.public_state().items()}
        built.load_state_dict(own)
        return tensors

    return Subject(
        network=built.train(),
        takes_segments=built.takes_segments,
        options={**built.options(), **resolved.info.recorded()},
        arch=built.clip.arch,
        text={"wording": wording, "templates": sentences or preset.templates, "templates_sha256": chosen.sha256(words)},
        weights_sha256=built.clip.weights_sha256,
        exported=exported,
    )


def trained_words(benchmark: Any, wording: str) -> list[str]:
    """The word that each class of a benchmark is trained by: the first one under a wording."""
    return [entry[0] for entry in benchmark.words(wording)]


def closed_set_subject(
    method: str,
    options: dict[str, Any],
    arch: str | None,
    weights: str,
    num_classes: int,
    *,
    seed: int,
    device: str,
    class_frequencies: Sequence[int] | None = None,
    init: str | None = None,
    class_names: Sequence[str] = (),
    new_classes: bool = False,
) -> Subject:
    """The network of a closed-set method, ready to be trained.

    Args:
        method: Method id.
        options: Switches.
        arch: Encoder; None takes the method's default.
        weights: ``random``, or a file with the encoder's pretrained weights.
        num_classes: K.
        seed: Of random weights.
        device: Torch device.
        class_frequencies: Pixels of each class, where :func:`needs_class_frequencies`.
        init: File with a whole network to start from.
        class_names: Classes in label order, for ``init``.
        new_classes: Those of ``init`` may be others.

    Raises:
        UsageError: Two files to start from.
        WeightsError: One that cannot be read or does not fit.
    """
    chosen = configured_method(method, options)
    arch = arch or (None if init is None else arch_of(init, chosen)) or chosen.DEFAULT_ARCH
    file = None if weights == "random" else str(user_path(weights))
    if init is not None and file is not None:
        raise UsageError("--init brings the encoder along: leave --weights away.")
    network = build_network(
        chosen,
        arch,
        num_classes,
        seed=seed,
        training=True,
        class_frequencies=class_frequencies,
        encoder_weights=file,
    )
    start = None
    if init is not None:
        start = start_from(init, network, chosen, arch, class_names, new_classes=new_classes)
        network.load_state_dict(start.state, strict=False)
    extra = tuple(f"segmentor.{part}" for part in TRAINING_ONLY)
    return Subject(
        network=network.to(device).train(),
        takes_segments=False,
        options=chosen.options(),
        arch=arch,
        text={},
        weights_sha256=None if file is None else sha256_of_file(Path(file)),
        exported=lambda state: {key: value for key, value in state.items() if not key.startswith(extra)},
        start=None if start is None else start.told(),
    )


def _group(network: nn.Module, group: Any) -> ParameterGroup:
    """A group of parameters, which plain methods give by name."""
    if isinstance(group, ParameterGroup):
        return group
    named = dict(network.named_parameters())
    parameters = tuple(named[name] for name in group["params"])
    undecayed = tuple(named[name] for name in group.get("undecayed", ()))
    return ParameterGroup(group["name"], parameters, group["lr_mult"], group["weight_decay_mult"], undecayed)


def choose_parameters(
    network: Any, policy: str, *, head_lr_mult: float = 1.0, norm_decay: bool = True
) -> tuple[list[ParameterGroup], tuple[PartReport, ...]]:
    """What a policy trains, all else frozen, and the report of it by part.

    Args:
        network: What is trained.
        policy: Which of its parameters.
        head_lr_mult: Factor on the learning rate of heads.
        norm_decay: False leaves norms and biases undecayed.

    Raises:
        UsageError: Unknown policy; a factor for heads of a network without any.
    """
    groups = [_group(network, group) for group in network.parameter_groups(policy)]
    if head_lr_mult != 1 and not any(group.head for group in groups):
        raise UsageError("head_lr_mult is for closed-set methods: no part of this network is a decode head.")
    still = set() if norm_decay else norms_and_biases(network)
    groups = [
        group._replace(
            lr_mult=group.lr_mult * (head_lr_mult if group.head else 1.0),
            undecayed=tuple(
                parameter
                for parameter in group.parameters
                if id(parameter) in still or any(parameter is one for one in group.undecayed)
            ),
        )
        for group in groups
    ]
    chosen = {id(parameter) for group in groups for parameter in group.parameters}
    frozen = 0
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        frozen += 0 if id(parameter) in chosen else parameter.numel()
    rows = []
    for group in groups:
        size = sum(parameter.numel() for parameter in group.parameters)
        rows.append(PartReport(part=group.name, params=size, trainable=size, lr_mult=group.lr_mult))
    if frozen:
        rows.append(PartReport(part="frozen", params=frozen, trainable=0, lr_mult=None))
    return groups, tuple(rows)
