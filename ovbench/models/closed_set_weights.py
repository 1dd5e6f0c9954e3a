"""Builds closed-set networks: random, from a training of ours, or from a public mmseg checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.mm.compat import import_mmseg, quiet_mmengine
from ovbench.models.closed_set import ClosedSetMethod, ClosedSetNetwork
from ovbench.models.public_file import tensors_below
from ovbench.models.resolve import Resolved
from ovbench.networks.encoder_weights import mmseg_keys
from ovbench.networks.encoders import encoder
from ovbench.networks.state_dict import read_state_dict, require_finite, require_fit
from ovbench.paths import user_path
from ovbench.registry import closed_set_class, method_info


class Loaded(NamedTuple):
    """A network and what is known of it.

    Attributes:
        network: On its device, in evaluation mode.
        method: With its switches.
        arch: Its encoder.
        weights_sha256: Hash of the file; None for random weights.
    """

    network: ClosedSetNetwork
    method: ClosedSetMethod
    arch: str
    weights_sha256: str | None


TRAINING_ONLY = ("auxiliary_head.", "decode_head.teacher.")  # in checkpoints, not in a network for evaluation


def configured_method(name: str, options: dict[str, Any]) -> ClosedSetMethod:
    """A closed-set method with its switches.

    Raises:
        UsageError: Unknown method or switch.
    """
    cls = closed_set_class(name)
    return cls(method_info(name).name, cls.configure(options))


def load_network(
    resolved: Resolved,
    *,
    arch: str | None,
    weights: str,
    class_names: Sequence[str],
    seed: int = 0,
    device: str = "cpu",
) -> Loaded:
    """A network for evaluation.

    Args:
        resolved: The method with its switches, and what a trained file says of itself.
        arch: Encoder; None takes what a trained file says, else the method's default.
        weights: ``random``, a file of ``ovbench train``, or a checkpoint of mmseg (``backbone.*``, ``decode_head.*``).
        class_names: Classes in label order.
        seed: Of random weights.
        device: Torch device.

    Raises:
        UsageError: Unknown encoder, or weights that no closed-set method has.
        WeightsError: A file that cannot be read, or does not fit method, encoder or classes.
    """
    name = resolved.info.name
    path = user_path(weights)
    if weights in {"openai", "builtin"}:
        raise UsageError(
            f"'{name}' is trained on the classes of a benchmark: give its trained weights with --weights FILE "
            "('ovbench train' makes them), or 'random' to try the path."
        )
    if weights != "random" and not path.is_file():
        raise WeightsError(f"No weights file '{weights}'. Give the model.safetensors of a training, or 'random'.")
    about = resolved.about
    method: ClosedSetMethod = resolved.cls(name, resolved.config)
    if about is not None:
        if arch is not None and arch != about.arch:
            raise WeightsError(f"The weights have the encoder '{about.arch}': leave '--arch {arch}' away.")
        if list(about.class_names) != list(class_names):
            raise WeightsError(
                f"The weights were trained on the {len(about.class_names)} classes of {about.dataset}, not on these "
                f"{len(class_names)}: a closed-set method is evaluated on the classes it was trained on."
            )
        arch = about.arch
    elif resolved.public is not None:
        resolved.public.require_classes(class_names)
        arch = resolved.public.encoder(arch)
    arch = arch or method.DEFAULT_ARCH
    network = build_network(method, arch, len(class_names), seed=seed)
    if weights != "random":
        state = read_state_dict(path)
        if about is None:
            state = segmentor_state(state)
        load_strictly(network, state, path.name, arch)
    digest = None if weights == "random" else sha256_of_file(path)
    return Loaded(network.eval().to(device), method, arch, digest)


def segmentor_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint of mmseg under the keys of :class:`ClosedSetNetwork`: the same modules without our wrapper."""
    backbone = {f"backbone.{key}": value for key, value in mmseg_keys(tensors_below(state, "backbone.")).items()}
    others = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    return {f"segmentor.{key}": value for key, value in (backbone | others).items()}


def build_network(
    method: ClosedSetMethod,
    arch: str,
    num_classes: int,
    *,
    seed: int = 0,
    training: bool = False,
    class_frequencies: Sequence[int] | None = None,
    encoder_weights: str | None = None,
) -> ClosedSetNetwork:
    """The network with random weights (the encoder's from a file where given), the same for the same seed.

    Raises:
        UsageError: Unknown encoder, or one that does not go with the method.
        WeightsError: The encoder's file cannot be read or does not fit.
    """
    facts = encoder(arch)
    config = method.model_config(
        arch, num_classes, training=training, class_frequencies=class_frequencies, weights=encoder_weights
    )
    mmseg = import_mmseg()
    import ovbench.mm.heads  # noqa: F401  (registers the heads)

    with torch.random.fork_rng(devices=[]), quiet_mmengine():
        torch.manual_seed(seed)
        segmentor = mmseg.registry.MODELS.build(config)
        with redirect_stdout(io.StringIO()):  # mmseg's MSCAN prints what it does
            segmentor.init_weights()
    return ClosedSetNetwork(segmentor, facts.mean, facts.std)


def load_strictly(network: ClosedSetNetwork, state: dict[str, Any], name: str, arch: str) -> None:
    """Fills the network; what only training needs may be there, all else must be there exactly.

    Raises:
        WeightsError: With the keys that are missing, not known or of another shape.
    """
    own = network.state_dict()
    extra = tuple(f"segmentor.{part}" for part in TRAINING_ONLY)
    given = {key: value for key, value in state.items() if key in own or not key.startswith(extra)}
    require_fit(
        f"'{name}' does not fit this network with the encoder {arch}",
        missing=[key for key in own if key not in given and not key.endswith("num_batches_tracked")],
        unknown=[key for key in given if key not in own],
        shapes=[key for key in given if key in own and given[key].shape != own[key].shape],
    )
    require_finite(given.items(), name)
    network.load_state_dict(given, strict=False)  # counters of batches, which nothing here reads, may be missing
