"""What is trained: a method's network on its way from a spec to weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovbench.closed_set import ParameterGroup
from ovbench.closed_set_weights import TRAINING_ONLY, build_network, configured_method
from ovbench.errors import UsageError
from ovbench.hashing import sha256_of_file
from ovbench.registry import CLOSED_SET, closed_set_class, method_info
from ovbench.train.record import PartReport


@dataclass(frozen=True)
class Subject:
    """A network that can be trained.

    Attributes:
        network: Has ``losses(images, labels)`` and ``parameter_groups(policy)``; all of it on one device.
        options: All of the method's options.
        arch: Encoder or open_clip architecture.
        weights_sha256: Hash of the file that training starts from; None where that is random.
        exported: Which part of the state is needed to evaluate.
    """

    network: nn.Module
    options: dict[str, Any]
    arch: str
    weights_sha256: str | None
    exported: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def recipes(method: str) -> dict[str, dict[str, Any]]:
    """The recipes that a method declares, by benchmark.

    Raises:
        UsageError: It cannot be trained.
    """
    if method_info(method).track == CLOSED_SET:
        return closed_set_class(method).RECIPES
    raise UsageError(f"'{method}' is training-free: there is nothing to train. See 'ovbench list methods'.")


def trial_options(method: str) -> dict[str, Any]:
    """Options that make a method small enough for a demo."""
    return dict(closed_set_class(method).TRIAL_OPTIONS)


def needs_class_frequencies(method: str, options: dict[str, Any]) -> bool:
    """Whether a loss of the method wants to know how frequent each class is."""
    return configured_method(method, options).needs_class_frequencies()


def build_subject(
    method: str,
    options: dict[str, Any],
    arch: str | None,
    weights: str,
    num_classes: int,
    *,
    seed: int,
    device: str,
    class_frequencies: Sequence[int] | None = None,
) -> Subject:
    """The network of a method, ready to be trained.

    Args:
        method: Method id.
        options: Switches.
        arch: Encoder; None takes the method's default.
        weights: ``random``, or a file with the encoder's pretrained weights.
        num_classes: K.
        seed: Of random weights.
        device: Torch device.
        class_frequencies: Pixels of each class, where :func:`needs_class_frequencies`.
    """
    chosen = configured_method(method, options)
    arch = arch or chosen.DEFAULT_ARCH
    file = None if weights == "random" else str(Path(weights).expanduser())
    network = build_network(
        chosen,
        arch,
        num_classes,
        seed=seed,
        training=True,
        class_frequencies=class_frequencies,
        encoder_weights=file,
    )
    extra = tuple(f"segmentor.{part}" for part in TRAINING_ONLY)
    return Subject(
        network=network.to(device).train(),
        options=chosen.options(),
        arch=arch,
        weights_sha256=None if file is None else sha256_of_file(Path(file)),
        exported=lambda state: {key: value for key, value in state.items() if not key.startswith(extra)},
    )


def choose_parameters(network: Any, policy: str) -> tuple[list[ParameterGroup], tuple[PartReport, ...]]:
    """What a policy trains, all else frozen, and the report of it by part.

    Raises:
        UsageError: Unknown policy.
    """
    groups: list[ParameterGroup] = network.parameter_groups(policy)
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
