"""Mask generators by name. Importing this module loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ovbench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from ovbench.networks.mask_generators.generator import MaskGenerator

MASK2FORMERS = (
    "mask2former-r50", "mask2former-swin-t", "mask2former-swin-s", "mask2former-swin-b", "mask2former-swin-l"
)  # fmt: skip
CACHE_LIMIT = 20 * 2**30  # bytes; one image's masks of Mask2Former at 800 x 1333 are 27 MB


def generator_names() -> list[str]:
    """Ids of all generators."""
    return [*MASK2FORMERS, "files", "grid", "oracle", "noisy-oracle"]


def load_generator(
    name: str,
    weights: str | None = None,
    *,
    path: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    cache: Path | bool | None = None,
    cache_limit: int = CACHE_LIMIT,
) -> MaskGenerator:
    """A frozen generator on ``device``.

    Args:
        name: One of :func:`generator_names`.
        weights: Of Mask2Former: None (published), ``random``, a folder, or ``owner/name`` of the hub.
        path: Of ``files``: the folder or file with the masks; None for all others.
        seed: Of random weights, and of what noisy-oracle draws.
        device: Torch device.
        cache: Keep proposals on disk: a folder, or True for ``proposals`` in the user's cache; see
            :class:`ovbench.networks.mask_generators.cache.CachedGenerator`.
        cache_limit: Size of that folder in bytes.

    Raises:
        UsageError: Unknown name, weights or a path for a generator without any, or a missing library.
        DataError: There are no masks at the path.
        WeightsError: The download failed, or files are missing, unreadable or do not fit.
    """
    if name not in generator_names():
        raise unknown_name("mask generator", name, generator_names())
    generator = _build(name, weights, path, seed).to(device)
    if cache is None or cache is False:
        return generator
    from ovbench.networks.mask_generators.cache import CachedGenerator, proposals_dir

    return CachedGenerator(generator, proposals_dir() if cache is True else Path(cache), cache_limit)


def _build(name: str, weights: str | None, path: str | Path | None, seed: int) -> MaskGenerator:
    if path is not None and name != "files":
        raise UsageError(f"The mask generator '{name}' reads no masks from '{path}': give generator=files beside it.")
    if name in MASK2FORMERS:
        from ovbench.networks.mask_generators.mask2former_weights import load_mask2former

        return load_mask2former(name, weights, seed=seed)
    if weights not in (None, "none"):
        raise UsageError(f"The mask generator '{name}' has no weights; '{weights}' was given. Leave them away.")
    if name == "files":
        from ovbench.networks.mask_generators.files import Files

        if path is None:
            raise UsageError("The mask generator 'files' needs the place of the masks: -o generator_path=DIR.")
        return Files(path)
    if name == "grid":
        from ovbench.networks.mask_generators.grid import Grid

        return Grid()
    from ovbench.networks.mask_generators.oracle import NoisyOracle, Oracle

    return Oracle() if name == "oracle" else NoisyOracle(seed=seed)
