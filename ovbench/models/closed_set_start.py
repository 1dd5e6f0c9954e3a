"""A closed-set training that starts from a whole trained network: its own kind, its host, or a public checkpoint of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.methods.hosts import addon_and_host  # type: ignore[import-not-found]
from ovbench.models.closed_set import ClosedSetMethod, ClosedSetNetwork
from ovbench.models.closed_set_weights import segmentor_state
from ovbench.models.public_file import PublicFile, require_names
from ovbench.models.trained_file import About, options_again, read_about
from ovbench.networks.encoder_of import encoders_of
from ovbench.networks.state_dict import read_state_dict, require_finite, require_fit
from ovbench.paths import user_path

_HEAD, _HOST = "segmentor.decode_head.", "segmentor.decode_head.host."
_AUXILIARY = "segmentor.auxiliary_head."
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
    weights: str | Path,
    network: ClosedSetNetwork,
    method: ClosedSetMethod,
    arch: str,
    class_names: Sequence[str],
    *,
    new_classes: bool = False,
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
        new_classes: Where the file has other classes, all that depends on them begins anew.

    Raises:
        WeightsError: The file cannot be read, or is of another host, encoder or width, or of other classes without
            ``new_classes``; says which would fit.
    """
    path = user_path(weights)
    if not path.is_file():
        raise WeightsError(f"No file '{weights}' to start from. Give a trained network's weights.")
    about, public = _facts(path, method)
    state, theirs, others = read_state_dict(path), method.name, False
    options: Mapping[str, Any] | None = None
    if about is None:
        state = segmentor_state(state)
    try:
        if about is not None:
            theirs, options = about.method, options_again(about.method_options, type(method))
            require_names(path.name, about.class_names, class_names, about.dataset)
        elif public is not None:
            theirs, options = public.method, dict(public.options)
            public.require_classes(class_names)
    except WeightsError as error:
        if not new_classes:
            raise WeightsError(
                f"{error} With --new-classes what depends on them begins anew, the rest is taken."
            ) from None
        others = True
    _require_kin(path.name, theirs, options, method, arch, state)
    return _start(path.name, theirs, state, network, arch, len(class_names) if others else None)


def arch_of(weights: str | Path, method: ClosedSetMethod) -> str | None:
    """The encoder that a file of a whole network has; None where it does not tell.

    Raises:
        WeightsError: The file cannot be read, or has an encoder that is none of ours.
    """
    path = user_path(weights)
    if not path.is_file():
        return None
    about, public = _facts(path, method)
    return about.arch if about is not None else None if public is None else public.encoder(None)


def _facts(path: Path, method: ClosedSetMethod) -> tuple[About | None, PublicFile | None]:
    about = read_about(path)
    return about, method.public_file(path) if about is None else None


def _require_kin(
    file: str,
    theirs: str,
    options: Mapping[str, Any] | None,
    method: ClosedSetMethod,
    arch: str,
    state: Mapping[str, Tensor],
) -> None:
    """Nothing, if the file is of the method or of its host, with its widths, on its encoder."""
    if theirs not in (method.name, addon_and_host(method.name)[1]):
        raise WeightsError(
            f"'{file}' is of '{theirs}', which '{method.name}' cannot start from: it fits --method {theirs}."
        )
    own = asdict(method.config)
    for name in ("channels", "concat_input"):
        if name in own and options is not None and options.get(name, 0) != own[name]:
            given = options.get(name, 0)
            raise WeightsError(f"'{file}' has a host with {name}={given}: give -o {name}={given}.")
    prefix = "segmentor.backbone."
    found = encoders_of({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    if found and arch not in found:
        raise WeightsError(f"'{file}' has the encoder {found[0]}, not {arch}: give --arch {' or '.join(found)}.")


def _start(
    file: str, theirs: str, given: Mapping[str, Tensor], network: ClosedSetNetwork, arch: str, classes: int | None
) -> Start:
    """The state by keys; where ``classes`` (K) are others, what has a row for each of them begins anew."""
    own = network.state_dict()
    nested = any(key.startswith(_HOST) for key in own) and not any(key.startswith(_HOST) for key in given)
    moved = {key.replace(_HEAD, _HOST, 1) if nested else key: value for key, value in given.items()}
    for part in ("weight", "bias") if nested else ():  # CAA's classifier begins as its host's
        place = f"{_HEAD}conv_seg.{part}"
        if place in own and place in given:
            moved[place] = given[place]
    anew = {
        key for key in moved
        if key in own and "_head." in key and (
            (classes is not None and own[key].dim() and own[key].shape[0] == classes)
            or (key.startswith(_AUXILIARY) and own[key].shape != moved[key].shape)
        )
    }  # fmt: skip
    state = {key: value for key, value in moved.items() if key in own and key not in anew}
    left = [key for key in moved if key not in state]
    fresh = [key for key in own if key not in state and not key.endswith(_COUNTER)]
    inside = ("segmentor.backbone.", "segmentor.neck.", _HOST if nested else _HEAD)
    require_fit(
        f"'{file}' does not fit this network with the encoder {arch}",
        missing=[key for key in fresh if key.startswith(inside) and key not in anew and ".teacher." not in key],
        unknown=[key for key in left if key.startswith(inside) and key not in anew],
        shapes=[key for key in state if state[key].shape != own[key].shape],
    )
    require_finite(state.items(), file)
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
