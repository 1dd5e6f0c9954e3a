"""Which host, on which encoder, a public checkpoint of mmsegmentation is of.

Host and widths are read off keys and shapes. What leaves no mark in the weights (strides and dilations, the rates of ASPP,
``align_corners``) is compared with the config that mmseg keeps as text in its files; of a file without it the published name
counts (``-d8``, ``769x769``), else that the file follows mmseg's base config of the host. Files that this network would
compute otherwise are refused with the setting that differs.

Looked at: mmsegmentation 1.2.2 (``configs``, their ``metafile.yaml``, ``tools/misc/publish_model.py``), 0.x' ``tools/train.py``,
mmengine's ``Runner.save_checkpoint``. SyncBN and BN have the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.methods import hosts  # type: ignore[import-not-found]
from ovbench.models.public_file import PublicFile, class_names_of, config_of, named_settings, tensors_below
from ovbench.networks import encoders
from ovbench.networks.encoder_of import difference, encoders_of, listed
from ovbench.networks.encoder_weights import mmseg_keys
from ovbench.networks.state_dict import read_content, state_of

# What only a host's own head has; the first that fits. FCN's convolutions are in others' heads as well.
_MARKS = {
    "lateral_convs.": "uper",
    "psp_modules.": "psp",
    "cca.": "ccnet",
    "c1_bottleneck.": "deeplabv3plus",
    "aspp_modules.": "deeplabv3",
    "hamburger.": "segnext",
}
_WRAPPED = ("decode_head.", "module.decode_head.")
_FCN = ("convs.", "conv_cat.", "conv_seg.")
# Settings of a head without a mark in its weights, and what mmseg's classes have where a config does not name them.
_UNSEEN: dict[str, Any] = {
    "align_corners": False,
    "dilation": 1,
    "dilations": None,
    "pool_scales": None,
    "recurrence": None,
    "in_index": None,
    "ham_kwargs": None,
}


def read_public(path: Path) -> PublicFile | None:
    """What a file is of; None for one that is no checkpoint of mmseg's, or of a head that stands around a host.

    Raises:
        WeightsError: It cannot be read, or it is of mmseg but of a network that is not here; says which setting differs.
    """
    seen = path.stat()
    return _read(path, seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int, _size: int) -> PublicFile | None:
    if path.suffix == ".safetensors":  # a file of another kind, perhaps of gigabytes, shows by its header
        with suppress(SafetensorError), safe_open(path, framework="pt") as file:  # a damaged one is told of below
            if not any(key.startswith(_WRAPPED) for key in file.keys()):  # noqa: SIM118
                return None
    content = read_content(path)
    meta = _part(content, "meta")
    state = state_of(content)
    head = tensors_below(state, "decode_head.")
    backbone = tensors_below(state, "backbone.")
    if not head or not backbone or any(key.startswith("host.") for key in head):
        return None
    host = _host(head, path.name)
    config = config_of(meta)
    classifier = head["conv_seg.weight"]
    arches = _arches(host, mmseg_keys(backbone), config, path)
    options = _options(host, arches[0], head)
    _require_head(host, arches[0], options, len(classifier), config, path)
    names, dataset = class_names_of(meta, config, len(classifier))
    return PublicFile(path.name, host, arches, options, len(classifier), names, dataset)


def _host(head: Mapping[str, Tensor], file: str) -> str:
    """Id of the host by the keys of its head."""
    for mark, host in _MARKS.items():
        if any(key.startswith(mark) for key in head):
            return host
    if "conv_seg.weight" in head and all(key.startswith(_FCN) for key in head):
        return "fcn"
    raise WeightsError(
        f"The decode head of '{file}' is none of the hosts here ({', '.join(hosts.host_names())}): it has "
        f"{', '.join(sorted({key.partition('.')[0] for key in head})[:4])}."
    )


def _arches(host: str, backbone: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Encoders that the weights can be of, the likeliest first."""
    found = encoders_of(backbone)
    if not found:
        stem = (
            " It begins with one 7x7 convolution; the encoders here are ResNetV1c."
            if "conv1.weight" in backbone
            else ""
        )
        raise WeightsError(f"The encoder of '{path.name}' is none of {', '.join(encoders.encoder_names())}.{stem}")
    given = _part(_part(config, "model"), "backbone")
    if given:
        fitting = [name for name in found if difference(name, given) is None]
        if not fitting:
            raise WeightsError(
                f"The encoder of '{path.name}' was trained with {difference(found[0], given)}: no encoder here has that. "
                f"{_INSTEAD}"
            )
        return (fitting[0],)
    stride = named_settings(path).get("stride")
    if stride is not None:
        found = [name for name in found if encoders.encoder(name).strides[3] == stride == 8]
        if not found:
            raise WeightsError(
                f"The encoder of '{path.name}' has an output stride of {stride} by its name, and the file lacks the config "
                f"that would tell the rest. {_INSTEAD}"
            )
    if len(found) == 1:
        return (found[0],)
    usual = 32 if host == "uper" else 8  # of mmseg's base configs
    found.sort(key=lambda name: encoders.encoder(name).strides[3] != usual)
    return tuple(found)


def _options(host: str, arch: str, head: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options that the shapes of the head ask for."""
    options: dict[str, Any] = {}
    width = head["conv_seg.weight"].shape[1]
    if width != hosts.head_config(host, encoder=arch)["channels"]:
        options["channels"] = width
    if host == "fcn" and "conv_cat.conv.weight" in head:
        options["concat_input"] = True
    return options


def _require_head(
    host: str, arch: str, options: Mapping[str, Any], classes: int, config: Mapping[str, Any], path: Path
) -> None:
    """Nothing, if nothing tells that the head computes otherwise than ours.

    Raises:
        WeightsError: It does.
    """
    given = _part(_part(config, "model"), "decode_head")
    own = {**_UNSEEN, **hosts.head_config(host, classes, encoder=arch, **options)}
    for key in _UNSEEN:
        ours, theirs = own[key], given.get(key, own[key])
        if isinstance(ours, dict) and isinstance(theirs, dict):
            theirs = {name: theirs.get(name, value) for name, value in ours.items()}
        if ours is not None and listed(theirs) != listed(ours):
            raise WeightsError(
                f"The decode head of '{path.name}' was trained with {key}={theirs}; '{host}' has {key}={ours}. {_INSTEAD}"
            )
    if not given and named_settings(path).get("side") == 769:
        raise WeightsError(
            f"'{path.name}': mmseg's files of 769x769 crops were trained with align_corners=True; '{host}' has False. {_INSTEAD}"
        )


_INSTEAD = "Give a file of the host's base config in mmseg: output stride 8 (UperNet 32), crops other than 769x769."


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
