"""Where a CLIP comes from: an open_clip tag, the hub, a file, random numbers, or the built-in one.

The activation follows the weights: a tag knows its own, for files :mod:`ovbench.networks.activation` finds it out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError, WeightsError, unknown_name
from ovbench.hashing import sha256_of_file
from ovbench.networks.activation import OPENAI_EXTRAS, Activation, is_quick
from ovbench.networks.clip_heads import HEAD_WIDTH, REMEDY, Shapes, heads_of
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.eva_clip import is_eva, plain_vit
from ovbench.networks.published import fetching, random_digest
from ovbench.networks.state_dict import read_state_dict, require_finite
from ovbench.paths import user_path

# OpenAI's mean and deviation on RGB 0..255 as every public training-free configuration rounds them
OPENAI_MEAN = (122.771, 116.746, 104.094)
OPENAI_STD = (68.501, 66.632, 70.323)
DEFAULT_ARCH = "ViT-B-16"
INSTEAD = (  # of a download
    "Without a network, fetch them elsewhere into the hub's cache (HF_HOME) or give a file: --weights FILE.safetensors. "
    "'--weights random' needs no download (for timing), '--demo' runs on the built-in CLIP."
)


@dataclass(frozen=True)
class LoadedCLIP:
    """A model with its weights and what :class:`ovbench.networks.frozen_clip.FrozenCLIP` wants to know of it."""

    clip: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    arch: str
    weights: str
    weights_sha256: str
    activation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_clip(
    weights: str, arch: str | None = None, *, activation: Activation = "auto", seed: int = 0, device: str = "cpu"
) -> DenseCLIP:
    """A frozen :class:`DenseCLIP` in float32 and evaluation mode on ``device``.

    Args:
        weights: ``builtin``, ``random``, an open_clip tag (``openai``, ``laion2b_s34b_b88k``, ...),
            ``hf-hub:org/name``, or the path of a ``.safetensors`` / ``.pt`` / ``.bin`` state dict.
        arch: open_clip architecture: a CLIP ViT, EVA01-g-14 or EVA01-g-14-plus. For a file, None means OpenAI's layout,
            read from the shapes.
        activation: For a file: force GELU or QuickGELU.
        seed: Seed of random weights.
        device: Torch device.

    Raises:
        UsageError: Unknown architecture or tag.
        WeightsError: The tower is no such ViT, the file is missing, unreadable or does not fit, or the download failed.
    """
    if weights == "builtin":
        if arch is not None:
            raise UsageError("--weights builtin has an architecture of its own: leave --arch away.")
        from ovbench.networks.builtin.weights import load_state_dict, weights_path

        dense = from_openai_format(
            load_state_dict(), "builtin", sha256_of_file(weights_path()), arch="builtin-ViT-12x128"
        )
        return dense.to(device)
    if arch is None and _looks_like_path(weights) and not weights.startswith("hf-hub:"):
        found = _from_openai_file(user_path(weights), activation)
    else:
        found = load_any_clip(weights, arch or DEFAULT_ARCH, activation=activation, seed=seed)
    if is_eva(found.clip.visual):
        found.clip.visual = plain_vit(found.clip.visual, found.arch)
    return DenseCLIP(**vars(found)).to(device)


def load_any_clip(weights: str, arch: str, *, activation: Activation = "auto", seed: int = 0) -> LoadedCLIP:
    """An open_clip model with any image tower, on the CPU.

    Args:
        weights: As in :func:`load_clip`, without ``builtin``.
        arch: open_clip architecture; a model of the hub has its own.
        activation: As in :func:`load_clip`.
        seed: As in :func:`load_clip`.

    Raises:
        UsageError: Unknown architecture or tag.
        WeightsError: The file is missing, unreadable or does not fit, or the download failed.
    """
    if weights == "random":
        return _random(arch, seed, activation)
    if weights.startswith("hf-hub:"):
        return _from_hub(weights)
    if _looks_like_path(weights):
        return _from_file(user_path(weights), arch, activation)
    return _from_tag(arch, weights)


def _looks_like_path(weights: str) -> bool:
    return (
        Path(weights).suffix in {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
        or "/" in weights
        or Path(weights).is_file()
    )


def _from_openai_file(path: Path, activation: Activation) -> LoadedCLIP:
    state = read_state_dict(path)
    digest = sha256_of_file(path)
    config = openai_config(state, str(path), path=path, digest=digest)  # first: a wrong layout is the plainer error
    return _openai_format(state, str(path), digest, config, is_quick(path, digest, state, activation, None, None))


def _from_file(path: Path, arch: str, activation: Activation) -> LoadedCLIP:
    state = read_state_dict(path)
    digest = sha256_of_file(path)
    arch_quick = bool(_arch_config(arch).get("quick_gelu"))
    tensors = {key: value for key, value in state.items() if key not in OPENAI_EXTRAS}
    model = _filled(arch, tensors, str(path), quick=arch_quick)  # first: a wrong shape is the plainer error
    quick = is_quick(path, digest, state, activation, arch, arch_quick)
    if quick != arch_quick:
        model = _filled(arch, tensors, str(path), quick=quick)
    return _described(model, arch, str(path), digest, quick)


def _filled(arch: str, state: dict[str, Any], name: str, *, quick: bool) -> nn.Module:
    model = _create(arch, quick_gelu=quick)
    if not hasattr(model, "token_embedding"):
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    load_strictly(model, state, name, arch)
    return model


def from_openai_format(
    state: dict[str, Any],
    name: str,
    digest: str,
    *,
    arch: str | None = None,
    quick: bool = True,
    path: Path | None = None,
    known: str | None = None,
    remedy: str = REMEDY,
) -> DenseCLIP:
    """A CLIP from a state dict in OpenAI's format, its sizes read from the shapes.

    Args:
        state: The tensors.
        name: Where they come from, for records and messages.
        digest: SHA-256 of that.
        arch: Name of the architecture, for records.
        quick: QuickGELU, as all of OpenAI's are.
        path: The file, beside which a config may lie; see :func:`ovbench.networks.clip_heads.heads_of`, as for the next two.
        known: Architecture that is known to be in it.
        remedy: What the user can do where nothing tells the heads.

    Raises:
        WeightsError: Tensors are missing, surplus or of another shape, or nothing tells the heads.
    """
    config = openai_config(state, name, path=path, digest=digest, known=known or arch, remedy=remedy)
    return DenseCLIP(**vars(_openai_format(state, name, digest, config, quick, arch)))


def _openai_format(
    state: dict[str, Any], name: str, digest: str, config: dict[str, Any], quick: bool, arch: str | None = None
) -> LoadedCLIP:
    from open_clip.model import CLIP

    model = CLIP(**config, quick_gelu=quick)
    arch = arch or _arch_of(config)
    load_strictly(model, {key: value for key, value in state.items() if key not in OPENAI_EXTRAS}, name, arch)
    return _described(model, arch, name, digest, quick)


def openai_format_arch(state: Mapping[str, Any], name: str, **evidence: Any) -> str:
    """What records call the architecture of a state dict in OpenAI's format; as :func:`openai_config`."""
    return _arch_of(openai_config(state, name, **evidence))


def _arch_of(config: Mapping[str, Any]) -> str:
    vision = config["vision_cfg"]
    shapes = f"openai-format-ViT-{vision['layers']}x{vision['width']}-{vision['patch_size']}"
    # before heads were looked for, all were 64 wide: such a file's records must not be taken for those of before
    return shapes if vision["head_width"] == HEAD_WIDTH else f"{shapes}-{vision['width'] // vision['head_width']}heads"


def openai_config(state: Mapping[str, Any], name: str, **evidence: Any) -> dict[str, Any]:
    """Arguments of open_clip's ``CLIP`` read from the shapes of an OpenAI-format state dict.

    Args:
        state: The tensors.
        name: Where they come from, for messages.
        **evidence: Of the number of heads, which shapes do not tell: see :func:`ovbench.networks.clip_heads.heads_of`.

    Raises:
        WeightsError: Not a CLIP ViT in OpenAI's format (names what is missing), or nothing tells the heads.
    """
    needed = [
        "visual.conv1.weight", "visual.positional_embedding", "visual.proj", "text_projection",
        "positional_embedding", "token_embedding.weight", "ln_final.weight",
    ]  # fmt: skip
    missing = [key for key in needed if key not in state]
    if missing:
        raise WeightsError(
            f"'{name}' is not a CLIP ViT in OpenAI's format: it lacks {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}. For another layout name its open_clip architecture with --arch."
        )

    def layers(prefix: str) -> int:
        return len({key.split(".resblocks.")[1].split(".")[0] for key in state if key.startswith(prefix)})

    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text_width = int(state["ln_final.weight"].shape[0])
    depth = layers("visual.transformer.resblocks.")
    heads = heads_of(Shapes(int(width), depth, int(patch), text_width), state, name, **evidence)
    return {
        "embed_dim": int(state["text_projection"].shape[1]),
        "vision_cfg": {
            "layers": depth,
            "width": int(width),
            "head_width": int(width) // heads.vision,
            "patch_size": int(patch),
            "image_size": grid * int(patch),
        },
        "text_cfg": {
            "context_length": int(state["positional_embedding"].shape[0]),
            "vocab_size": int(state["token_embedding.weight"].shape[0]),
            "width": text_width,
            "heads": heads.text,
            "layers": layers("transformer.resblocks."),
        },
    }


def _random(arch: str, seed: int, activation: Activation) -> LoadedCLIP:
    config = _arch_config(arch)
    quick = activation == "quickgelu" or (activation == "auto" and bool(config.get("quick_gelu")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(arch, quick_gelu=quick)
    return _described(model, arch, "random", random_digest(arch, seed), quick)


def _from_tag(arch: str, tag: str) -> LoadedCLIP:
    import open_clip
    from open_clip.pretrained import download_pretrained

    config = _arch_config(arch)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    entry = open_clip.get_pretrained_cfg(arch, tag)
    if not entry:
        error = unknown_name(f"weights tag for {arch}", tag, [*tags, "random", "builtin"])
        raise UsageError(f"{error} A file needs its suffix or a path with '/'.")
    quick = bool(entry.get("quick_gelu", False))
    if config.get("quick_gelu") and not quick:
        raise UsageError(
            f"The weights '{tag}' were trained with GELU, but {arch} is a QuickGELU architecture: use --arch "
            f"{arch.removesuffix('-quickgelu')}."
        )
    with fetching(f"'{tag}' for {arch}", INSTEAD):
        path = Path(download_pretrained(entry))
        model = open_clip.create_model(arch, pretrained=tag, force_quick_gelu=quick, precision="fp32")
    return _described(model, arch, tag, sha256_of_file(path), quick)


def _from_hub(name: str) -> LoadedCLIP:
    import open_clip
    from open_clip.factory import _get_hf_config
    from open_clip.pretrained import download_pretrained_from_hf

    repository = name.removeprefix("hf-hub:")
    with fetching(f"'{name}'", INSTEAD):
        config = _get_hf_config(repository)
        path = Path(download_pretrained_from_hf(repository))
        model = open_clip.create_model(name, precision="fp32")
    tokenizer = open_clip.get_tokenizer(name)
    return _described(
        model, name, name, sha256_of_file(path), bool(config["model_cfg"].get("quick_gelu", False)), tokenizer
    )


def _arch_config(arch: str) -> dict[str, Any]:
    import open_clip

    config = open_clip.get_model_config(arch)
    if config is None:
        raise unknown_name("architecture", arch, open_clip.list_models())
    return dict(config)


def _create(arch: str, *, quick_gelu: bool) -> nn.Module:
    """An open_clip model with fresh weights and exactly the wanted activation."""
    import open_clip

    chosen = {"quick_gelu": False} if not quick_gelu else {"force_quick_gelu": True}
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, which is what is wanted here
    try:
        model: nn.Module = open_clip.create_model(arch, precision="fp32", pretrained_text=False, **chosen)
    finally:
        logging.disable(previous)
    return model


def load_strictly(model: nn.Module, state: dict[str, Any], name: str, arch: str) -> None:
    """Fills a model with a state dict.

    Raises:
        WeightsError: Tensors are missing, surplus, of another shape or not finite; names them.
    """
    expected = model.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    wrong = [
        f"{key} is {tuple(value.shape)}, needs {tuple(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    # buffers that some releases of open_clip saved and others derive
    derived = {"attn_mask", "text.attn_mask", "logit_bias"}
    missing = [key for key in expected if key not in tensors and key not in derived]
    surplus = [key for key in tensors if key not in expected and key not in derived]
    if wrong or missing or surplus:
        parts = []
        for label, items in (("shapes differ", wrong), ("missing", missing), ("unknown", surplus)):
            if items:
                parts.append(
                    f"{label}: {'; '.join(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}"
                )
        raise WeightsError(
            f"'{name}' does not fit {arch}: {'. '.join(parts)}. Name the architecture it was made for with --arch, or "
            "leave --arch away for a file in OpenAI's format."
        )
    model.load_state_dict({key: value.float() for key, value in tensors.items() if key in expected}, strict=False)
    require_finite(tensors.items(), name)


@lru_cache(maxsize=8)
def _tokenizer(arch: str) -> Any:
    """Of an architecture of open_clip, or OpenAI's for others; reading its vocabulary takes a tenth of a second."""
    import open_clip

    return (
        open_clip.get_tokenizer(arch) if open_clip.get_model_config(arch) is not None else open_clip.SimpleTokenizer()
    )


def _described(
    model: nn.Module,
    arch: str,
    weights: str,
    digest: str,
    quick: bool,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> LoadedCLIP:
    import open_clip

    if tokenizer is None:
        tokenizer = _tokenizer(arch)
    preprocess = getattr(model.visual, "preprocess_cfg", None) or {}
    mean, std = OPENAI_MEAN, OPENAI_STD
    given = (
        tuple(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
    )
    if given != (tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD)):
        mean, std = (tuple(255.0 * float(value) for value in part) for part in given)  # type: ignore[assignment]
    return LoadedCLIP(
        model,
        tokenizer=tokenizer,
        arch=arch,
        weights=weights,
        weights_sha256=digest,
        activation="quickgelu" if quick else "gelu",
        mean=mean,
        std=std,
    )
