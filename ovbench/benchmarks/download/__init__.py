"""The files that a benchmark is prepared from, from their public addresses: see :func:`download`."""

from __future__ import annotations

from ovbench.benchmarks.download.downloads import Downloaded, download

__all__ = ["Downloaded", "download"]
