"""From what people download to the layout that a benchmark's reader expects: see :func:`prepare`."""

from __future__ import annotations

from ovbench.benchmarks.prepare.preparation import Prepared, prepare

__all__ = ["Prepared", "prepare"]
