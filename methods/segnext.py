"""SegNeXt's decode head for mmseg's ``MODELS``: mmseg's ``LightHamHead`` with a repeatable evaluation.

mmseg begins the head's matrix factorisation from random bases at every call, in evaluation too, where an image's result
then depends on what ran before it and on its place in the batch. ``SegNeXtHead`` has the same parameters under the same
names and draws one set of bases from a fixed seed in evaluation; training stays random.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.mm.compat import import_mmseg

SEED = 0


def fixed_bases(batch: int, groups: int, channels: int, rank: int) -> Tensor:
    """Bases (batch * groups, channels, rank), the same for every image, of unit columns."""
    drawn = torch.rand(groups, channels, rank, generator=torch.Generator().manual_seed(SEED))
    return F.normalize(drawn, dim=1).repeat(batch, 1, 1)


@lru_cache(maxsize=1)
def _classes() -> dict[str, type[nn.Module]]:
    """``SegNeXtHead``, registered in mmseg's ``MODELS``, and its part; the first call imports mmseg.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    mmseg = import_mmseg()
    from importlib import import_module

    ham: Any = import_module(f"{mmseg.__name__}.models.decode_heads.ham_head")

    class RepeatableNMF(ham.NMF2D):  # type: ignore[misc]
        """Non-negative matrix factorisation that starts from :func:`fixed_bases` in evaluation."""

        def _build_bases(self, B: int, S: int, D: int, R: int, device: Any = None) -> Tensor:
            if self.training:
                found: Tensor = super()._build_bases(B, S, D, R, device=device)
                return found
            return fixed_bases(B, S, D, R).to(device)

    class SegNeXtHead(ham.LightHamHead):  # type: ignore[misc]
        """mmseg's head with a repeatable evaluation; see the module."""

        def __init__(self, ham_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            super().__init__(ham_kwargs=ham_kwargs or {}, **kwargs)
            self.hamburger.ham = RepeatableNMF(ham_kwargs or {})

    mmseg.registry.MODELS.register_module(module=SegNeXtHead)
    found: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (RepeatableNMF, SegNeXtHead)}
    for name, cls in found.items():
        cls.__qualname__ = name  # found by __getattr__ below, so that whole heads can be pickled
    return found


def register() -> type[nn.Module]:
    """The class ``SegNeXtHead``, registered in mmseg's ``MODELS``.

    Raises:
        RunError: mmsegmentation is not installed or broken.
    """
    return _classes()["SegNeXtHead"]


def __getattr__(name: str) -> Any:
    if name in ("RepeatableNMF", "SegNeXtHead"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
