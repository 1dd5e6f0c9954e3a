"""Importing this module registers the closed-set networks' parts in mmseg's ``MODELS`` (and imports mmseg: seconds).

For plain mmseg configs: ``custom_imports = dict(imports=["ovbench.mm.heads"])``. Then ``CAAHead``, ``ECACHead``,
``ISNetHead``, ``SegNeXtHead`` and ``PretrainedEncoder`` are types like any other.
"""

from __future__ import annotations

from ovbench.methods.closed_set import register  # type: ignore[import-not-found]

register()
