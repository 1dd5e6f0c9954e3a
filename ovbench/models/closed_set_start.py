"""A closed-set training that starts from a whole trained network: its own kind, or its host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.models.closed_set import ClosedSetMethod, ClosedSetNetwork
from ovbench.models.trained_file import read_about
from ovbench.networks.state_dict import read_state_dict
from ovbench.paths import user_path

_HEAD, _HOST = "segmentor.decode_head.", "segmentor.decode_head.host."


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

    Args:
        weights: A file of ``ovbench train``, or a checkpoint of mmseg.
        network: To be started, built for training.
        method: What it is of.
        arch: Its encoder.
        class_names: Classes to train, in label order.
        new_classes: Where the file has other classes, all that depends on them begins anew.

    Raises:
        WeightsError: The file cannot be read, is of another encoder, or of other classes without ``new_classes``.
    """
    path = user_path(weights)
    if not path.is_file():
        raise WeightsError(f"No file '{weights}' to start from. Give a trained network's weights.")
    about = read_about(path)
    given = read_state_dict(path)
    if about is None:
        given = {f"segmentor.{key}": value for key, value in given.items()}
    elif about.arch != arch:
        raise WeightsError(f"'{path.name}' has the encoder {about.arch}, not {arch}: give --arch {about.arch}.")
    others = about is not None and list(about.class_names) != list(class_names)
    own = network.state_dict()
    if any(key.startswith(_HOST) for key in own) and not any(key.startswith(_HOST) for key in given):
        given = {key.replace(_HEAD, _HOST, 1): value for key, value in given.items()}
    known = {key: value for key, value in given.items() if key in own}
    shapes = [key for key, value in known.items() if value.shape != own[key].shape]
    missing = [key for key in own if key.startswith("segmentor.backbone.") and (key not in known or key in shapes)]
    if missing:
        raise WeightsError(
            f"'{path.name}' does not fit the encoder {arch}: {len(missing)} of its tensors are missing or of another shape, "
            f"{missing[0].removeprefix('segmentor.')} among them."
        )
    if (others or shapes) and not new_classes:
        what = (
            f"of the {len(about.class_names)} classes of {about.dataset}"
            if about is not None and others
            else (f"of another shape in {shapes[0].removeprefix('segmentor.')}")
        )
        raise WeightsError(
            f"'{path.name}' is {what}, not of the {len(class_names)} classes here. With --new-classes whatever depends on "
            "them (classifiers, centres) begins anew, and the rest is taken."
        )
    dropped = {*shapes, *(key for key in known if others and _of_classes(own[key], key, len(class_names)))}
    state = {key: value for key, value in known.items() if key not in dropped}
    left = [key for key in given if key not in state]
    fresh = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    return Start(state, method.name if about is None else about.method, _parts(state), _parts(left), _parts(fresh))


def _of_classes(tensor: Tensor, key: str, classes: int) -> bool:
    """Whether a tensor of a head has a row for each class."""
    return "_head." in key and tensor.dim() > 0 and tensor.shape[0] == classes


def _parts(keys: Iterable[str]) -> dict[str, int]:
    """Tensors by part of the network."""
    found: dict[str, int] = {}
    for key in keys:
        plain = key.removeprefix("segmentor.")
        part = "host" if plain.startswith("decode_head.host.") else plain.split(".")[0]
        found[part] = found.get(part, 0) + 1
    return found


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in parts.items())
