"""A closed-set training that starts from a whole trained network: its own kind, its host, or a public checkpoint of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.methods.hosts import addon_and_host  # type: ignore[import-not-found]
from ovbench.models.closed_set import ClosedSetMethod, ClosedSetNetwork
from ovbench.models.closed_set_weights import segmentor_state
from ovbench.models.public_file import require_names
from ovbench.models.trained_file import options_again, read_about
from ovbench.networks.encoder_of import encoders_of
from ovbench.networks.state_dict import read_state_dict, require_fit
from ovbench.paths import user_path

_HEAD, _HOST = "segmentor.decode_head.", "segmentor.decode_head.host."
_COUNTER = "num_batches_tracked"


class Start(NamedTuple):
    """What a network starts from.

    Attributes:
        state: For the network's ``load_state_dict(state, strict=False)``.
        method: Which method the file is of.
        taken: Parts of the network that come from the file, with their numbers of tensors.
        left: Parts of the file that the network has no use for.
        fresh: Parts of the network that the file does not have; they begin as they are.
    """

    state: dict[str, Tensor]
    method: str
    taken: dict[str, int]
    left: dict[str, int]
    fresh: dict[str, int]

    def told(self) -> str:
        """The report in one line."""
        parts = [f"taken {_listed(self.taken)}"]
        if self.left:
            parts.append(f"left out {_listed(self.left)}")
        if self.fresh:
            parts.append(f"new {_listed(self.fresh)}")
        return f"start from '{self.method}': {'; '.join(parts)} (tensors)"


def start_from(
    weights: str | Path, network: ClosedSetNetwork, method: ClosedSetMethod, arch: str, class_names: Sequence[str]
) -> Start:
    """The part of a network's state that a file of a whole network gives it.

    A host takes a file of itself. A host with an add-on takes one of itself, or one of the host: then encoder, host and its
    classifier, which the add-on's own classifier (CAA's) begins from as well. The auxiliary head is taken where both have it.

    Args:
        weights: A file of ``ovbench train``, or a public checkpoint of mmseg.
        network: To be started, built for training.
        method: What it is of.
        arch: Its encoder.
        class_names: Classes to train, in label order.

    Raises:
        WeightsError: The file cannot be read, or is of another host, encoder, width or class list; says which would fit.
    """
    path = user_path(weights)
    if not path.is_file():
        raise WeightsError(f"No file '{weights}' to start from. Give a trained network's weights.")
    about = read_about(path)
    public = method.public_file(path) if about is None else None
    state = read_state_dict(path)
    if about is not None:
        theirs = about.method
        options = options_again(about.method_options, type(method))
        require_names(path.name, about.class_names, class_names, about.dataset)
    elif public is not None:
        theirs, options = public.method, dict(public.options)
        public.require_classes(class_names)
        state = segmentor_state(state)
    else:
        theirs, options, state = method.name, {}, segmentor_state(state)
    _require_kin(path.name, theirs, options, method, arch, state)
    return _start(path.name, theirs, state, network, arch)


def _require_kin(
    file: str, theirs: str, options: dict[str, object], method: ClosedSetMethod, arch: str, state: dict[str, Tensor]
) -> None:
    """Nothing, if the file is of the method or of its host, with its widths, on its encoder."""
    host = addon_and_host(method.name)[1]
    if theirs not in (method.name, host):
        other = addon_and_host(theirs)[1]
        fitting = other if theirs == other else theirs
        raise WeightsError(
            f"'{file}' is of '{theirs}', which '{method.name}' cannot start from: it fits --method {fitting}."
        )
    own = asdict(method.config)
    for name in ("channels", "concat_input"):
        if name in own and name in options and options[name] != own[name]:
            raise WeightsError(f"'{file}' has a host with {name}={options[name]}: give -o {name}={options[name]}.")
    backbone = {key.removeprefix("segmentor.backbone."): value for key, value in state.items() if ".backbone." in key}
    found = encoders_of(backbone)
    if found and arch not in found:
        raise WeightsError(f"'{file}' has the encoder {found[0]}, not {arch}: give --arch {' or '.join(found)}.")


def _start(file: str, theirs: str, given: dict[str, Tensor], network: ClosedSetNetwork, arch: str) -> Start:
    own = network.state_dict()
    nested = any(key.startswith(_HOST) for key in own) and not any(key.startswith(_HOST) for key in given)
    state: dict[str, Tensor] = {}
    left: list[str] = []
    for key, value in given.items():
        place = key.replace(_HEAD, _HOST, 1) if nested else key
        optional = place.startswith("segmentor.auxiliary_head.")
        if place in own and (own[place].shape == value.shape or not optional):
            state[place] = value
        else:
            left.append(key)
    if nested:
        for part in ("weight", "bias"):
            place = f"{_HEAD}conv_seg.{part}"
            value = given.get(place)
            if place in own and value is not None and own[place].shape == value.shape:
                state[place] = value
    fresh = [key for key in own if key not in state and not key.endswith(_COUNTER)]
    must = ("segmentor.backbone.", "segmentor.neck.", _HOST if nested else _HEAD)
    missing = [key for key in fresh if key.startswith(must) and ".teacher." not in key]
    strange = [key for key in left if key.startswith(("segmentor.backbone.", _HEAD))]
    wrong = [key for key in state if state[key].shape != own[key].shape]
    require_fit(
        f"'{file}' does not fit this network with the encoder {arch}", missing=missing, unknown=strange, shapes=wrong
    )
    return Start(state, theirs, _parts(state), _parts(left), _parts(fresh))


# Parts of a network's state by the beginnings of their keys, without ``segmentor.``; the first that fits.
_NAMES = {
    "backbone.": "encoder", "neck.": "neck", "decode_head.host.": "host", "decode_head.teacher.": "teacher",
    "decode_head.": "decode head", "auxiliary_head.": "auxiliary head",
}  # fmt: skip


def _parts(keys: Iterable[str]) -> dict[str, int]:
    """Tensors by part of the network, counters left out."""
    found: dict[str, int] = {}
    for key in keys:
        if not key.endswith(_COUNTER):
            plain = key.removeprefix("segmentor.")
            name = next((name for prefix, name in _NAMES.items() if plain.startswith(prefix)), plain)
            found[name] = found.get(name, 0) + 1
    return found


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in parts.items())
