"""Builds closed-set networks: random, from a training of ours, or from a public mmseg checkpoint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch

from ovbench.errors import UsageError, WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.mm.compat import import_mmseg, quiet_mmengine
from ovbench.models import trained_file
from ovbench.models.closed_set import ClosedSetMethod, ClosedSetModel, ClosedSetNetwork
from ovbench.models.patch_model import require_device
from ovbench.models.trained_file import About
from ovbench.networks.encoders import encoder
from ovbench.networks.state_dict import read_state_dict
from ovbench.paths import user_path
from ovbench.registry import closed_set_class, method_info
from ovbench.spec import DType, Protocol, validated
from ovbench.spec import protocol as preset


class Loaded(NamedTuple):
    """A network and what is known of it.

    Attributes:
        network: On its device, in evaluation mode.
        method: With its switches.
        arch: Its encoder.
        weights_sha256: Hash of the file; None for random weights.
        about: What the file says of itself; None where it says nothing.
    """

    network: ClosedSetNetwork
    method: ClosedSetMethod
    arch: str
    weights_sha256: str | None
    about: About | None


TRAINING_ONLY = ("auxiliary_head.", "decode_head.teacher.")  # in checkpoints, not in a network for evaluation


def configured_method(name: str, options: dict[str, Any], about: About | None = None) -> ClosedSetMethod:
    """A closed-set method with its switches; where a trained file says them, those.

    Raises:
        UsageError: Unknown method or switch.
        WeightsError: The file is of another method, or was trained with other values than those in ``options``.
    """
    info = method_info(name)
    cls = closed_set_class(name)
    if about is None:
        return cls(info.name, cls.configure(options))
    trained_file.require_method(about, info.name)
    told = trained_file.options_again(about.method_options, cls)
    method = cls(info.name, cls.configure({**told, **options}))
    trained = cls(info.name, cls.configure(told)).options()
    for key, value in method.options().items():
        if value != trained[key]:
            raise WeightsError(f"The weights were trained with {key}={trained[key]}: leave '-o {key}={value}' away.")
    return method


def load_network(
    name: str,
    *,
    options: dict[str, Any],
    arch: str | None,
    weights: str,
    class_names: Sequence[str],
    seed: int = 0,
    device: str = "cpu",
) -> Loaded:
    """A network for evaluation.

    Args:
        name: Method id.
        options: Switches.
        arch: Encoder; None takes what a trained file says, else the method's default.
        weights: ``random``, a file of ``ovbench train``, or a checkpoint of mmseg (``backbone.*``, ``decode_head.*``).
        class_names: Classes in label order.
        seed: Of random weights.
        device: Torch device.

    Raises:
        UsageError: Unknown names.
        WeightsError: A file that cannot be read, or does not fit method, encoder or classes.
    """
    path = user_path(weights)
    if weights in {"openai", "builtin"}:
        raise UsageError(
            f"'{name}' is trained on the classes of a benchmark: give its trained weights with --weights FILE "
            "('ovbench train' makes them), or 'random' to try the path."
        )
    if weights != "random" and not path.is_file():
        raise WeightsError(f"No weights file '{weights}'. Give the model.safetensors of a training, or 'random'.")
    about = None if weights == "random" else trained_file.read_about(path)
    method = configured_method(name, options, about)
    if about is not None:
        if arch is not None and arch != about.arch:
            raise WeightsError(f"The weights have the encoder '{about.arch}': leave '--arch {arch}' away.")
        if list(about.class_names) != list(class_names):
            raise WeightsError(
                f"The weights were trained on the {len(about.class_names)} classes of {about.dataset}, not on these "
                f"{len(class_names)}: a closed-set method is evaluated on the classes it was trained on."
            )
        arch = about.arch
    arch = arch or method.DEFAULT_ARCH
    network = build_network(method, arch, len(class_names), seed=seed)
    if weights != "random":
        state = read_state_dict(path)
        if about is None:  # a checkpoint of mmseg: the same modules without our wrapper
            state = {f"segmentor.{key}": value for key, value in state.items()}
        load_strictly(network, state, path.name, arch)
    digest = None if weights == "random" else sha256_of_file(path)
    return Loaded(network.eval().to(device), method, arch, digest, about)


def build_closed_set_model(
    method: str,
    *,
    classes: Sequence[str],
    weights: str,
    arch: str | None = None,
    protocol: Protocol | dict[str, Any] | str | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    window_batch: int | None = None,
    compile_mode: str = "off",
    seed: int = 0,
    method_options: dict[str, Any] | None = None,
) -> tuple[ClosedSetModel, Loaded]:
    """A ready :class:`ClosedSetModel` by names, and what was found out on the way; see :func:`load_network`.

    Raises:
        UsageError: Unknown names or invalid values.
        WeightsError: The weights cannot be read or do not fit.
    """
    require_device(device)
    if isinstance(protocol, dict):
        chosen: Protocol = validated(Protocol, protocol)
    else:
        chosen = protocol if isinstance(protocol, Protocol) else preset(protocol or "paper", method=method)
    loaded = load_network(
        method, options=method_options or {}, arch=arch, weights=weights, class_names=classes, seed=seed, device=device
    )
    model = ClosedSetModel(
        loaded.network, len(classes), chosen, dtype=dtype, window_batch=window_batch, compile_mode=compile_mode
    )
    return model, loaded


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
    faults = []
    for what, keys in (
        ("missing", [key for key in own if key not in given]),
        ("not known", [key for key in given if key not in own]),
        ("of another shape", [key for key in given if key in own and given[key].shape != own[key].shape]),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            shown = ", ".join(key.removeprefix("segmentor.") for key in keys[:3])
            faults.append(f"{what}: {shown}{more}")
    if faults:
        raise WeightsError(f"'{name}' does not fit this network with the encoder {arch}: {'; '.join(faults)}.")
    network.load_state_dict(given)
