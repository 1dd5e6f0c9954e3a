"""How many attention heads the towers of a CLIP file have, which the shapes of its tensors do not tell.

A wrong number loads without any error and gives other features: ViT-H-14, of width 1280, has 16 heads of 80 and not 20 of 64.
Evidence, the strongest first: the architecture that a training of ours wrote into the file; an ``open_clip_config.json``
beside it; the extra keys of OpenAI's archives, whose rule is width / 64; open_clip's table of releases, by hash or name; the
architectures of open_clip with these shapes. Of other shapes, towers up to width 1024 have heads of 64, as all of open_clip's
have; of wider ones nothing is certain, and the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ovbench.errors import WeightsError
from ovbench.networks.activation import OPENAI_EXTRAS, config_beside, release_of

HEAD_WIDTH = 64  # of OpenAI's models, and of every text tower of open_clip
WIDEST = 1024  # of open_clip's ViTs with heads of 64; wider ones have 80 to 112
REMEDY = "name its open_clip architecture with --arch, or put its open_clip_config.json beside the file"
_HEADS = re.compile(r"openai-format-ViT-.*-(\d+)heads$")


class Shapes(NamedTuple):
    """What the tensors of an OpenAI-format file tell of its towers.

    Attributes:
        width: Of the image tower's tokens.
        layers: Its blocks.
        patch: Side of a patch in pixels.
        text_width: Of the text tower's tokens.
    """

    width: int
    layers: int
    patch: int
    text_width: int


class Heads(NamedTuple):
    """Attention heads of a block in each tower."""

    vision: int
    text: int


def heads_of(
    shapes: Shapes,
    state: Mapping[str, Any],
    name: str,
    *,
    path: Path | None = None,
    digest: str = "",
    known: str | None = None,
    remedy: str = REMEDY,
) -> Heads:
    """The heads of a file.

    Args:
        shapes: Of its towers.
        state: Its state dict.
        name: What messages call it.
        path: The file, where there is one.
        digest: Its SHA-256.
        known: Architecture that is known to be in it.
        remedy: What the user can do where nothing tells, for the message.

    Raises:
        WeightsError: Nothing tells, or two architectures with different heads fit.
    """
    import open_clip

    text = max(1, shapes.text_width // HEAD_WIDTH)
    written = _HEADS.match(known or "")
    if written:
        return _checked(Heads(int(written[1]), text), shapes, name, str(known))
    config = open_clip.get_model_config(known) if known else None
    if config is not None and "layers" in config["vision_cfg"]:
        return _checked(_of_config(config, shapes, name, str(known)), shapes, name, str(known))
    beside = config_beside(path) if path is not None else None
    if beside is not None and "vision_cfg" in beside:
        return _checked(
            _of_config(beside, shapes, name, "open_clip_config.json"), shapes, name, "open_clip_config.json"
        )
    if any(key in state for key in OPENAI_EXTRAS):
        return _checked(Heads(shapes.width // HEAD_WIDTH, text), shapes, name, "OpenAI's rule")
    released = release_of(path, digest) if path is not None else None
    if released is not None and _shapes(open_clip.get_model_config(released[0])) == shapes:
        return _of_config(open_clip.get_model_config(released[0]), shapes, name, released[0])
    fitting: dict[Heads, list[str]] = {}
    for arch in open_clip.list_models():
        config = open_clip.get_model_config(arch)
        if _shapes(config) == shapes:
            fitting.setdefault(_of_config(config, shapes, name, arch), []).append(arch)
    if len(fitting) == 1:
        return next(iter(fitting))
    if len(fitting) > 1:
        each = "; ".join(f"{own.vision} in {', '.join(archs[:3])}" for own, archs in fitting.items())
        raise WeightsError(
            f"'{name}' does not tell how many heads its attention has, and architectures with different numbers have its "
            f"shapes: {each}. Please {remedy}."
        )
    if shapes.width <= WIDEST and shapes.width % HEAD_WIDTH == 0:
        return Heads(shapes.width // HEAD_WIDTH, text)
    raise WeightsError(
        f"'{name}' does not tell how many heads its attention has: a ViT of width {shapes.width} with {shapes.layers} blocks "
        f"of patch {shapes.patch} and a text tower of width {shapes.text_width} is none that open_clip has"
        f"{_nearest(shapes)}. Please {remedy}."
    )


def _shapes(config: Mapping[str, Any] | None) -> Shapes | None:
    """Of an architecture of open_clip; None for one that is no ViT of its own with a text tower of its own."""
    if config is None:
        return None
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers"), int) or "width" not in text or "hf_model_name" in text:
        return None
    return Shapes(vision["width"], vision["layers"], vision.get("patch_size", 16), text["width"])


def _of_config(config: Mapping[str, Any], shapes: Shapes, name: str, source: str) -> Heads:
    try:
        vision, text = config["vision_cfg"], config.get("text_cfg", {"width": shapes.text_width})
        width, text_width = vision.get("width", 768), text.get("width", 512)  # open_clip's defaults
        if (width, text_width) != (shapes.width, shapes.text_width):
            raise WeightsError(
                f"{source} says towers of width {width} and {text_width}, but '{name}' has {shapes.width} and "
                f"{shapes.text_width}: it is of other weights."
            )
        return Heads(width // vision.get("head_width", HEAD_WIDTH), text.get("heads", text_width // HEAD_WIDTH))
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(f"{source} beside '{name}' does not describe a CLIP of open_clip: {error}.") from error


def _checked(heads: Heads, shapes: Shapes, name: str, source: str) -> Heads:
    for width, count in ((shapes.width, heads.vision), (shapes.text_width, heads.text)):
        if not isinstance(count, int) or count < 1 or width % count:
            raise WeightsError(f"{source} gives '{name}' {count} heads, which do not divide its width {width}.")
    return heads


def _nearest(shapes: Shapes) -> str:
    """Architectures with a ViT of the same width, in words."""
    import open_clip

    found = []
    for arch in open_clip.list_models():
        own = _shapes(open_clip.get_model_config(arch))
        if own is not None and own.width == shapes.width:
            found.append(arch)
    return f" (of this width it has {', '.join(found[:4])})" if found else ""
