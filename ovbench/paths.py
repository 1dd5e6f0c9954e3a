"""Where ovbench keeps files: the cache of derived data and the data files inside the package."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

TRUST = "OVBENCH_TRUST"


def trusted() -> bool:
    """Whether the user said, by ``ovbench --trust`` or ``OVBENCH_TRUST=1``, that files may name places outside their folder."""
    return os.environ.get(TRUST, "") not in ("", "0")


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path with ``~`` as the home folder; of a user that is not known here, as a shell does, as it stands."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        return Path(given)


def cache_dir() -> Path:
    """The folder of derived files that can be deleted at any time: ``$OVBENCH_CACHE`` or ``~/.cache/ovbench``."""
    configured = os.environ.get("OVBENCH_CACHE")
    return user_path(configured) if configured else Path.home() / ".cache" / "ovbench"


def config_dir() -> Path:
    """The folder ``dataset_configs``: benchmark configs, word lists and protocol presets, in a checkout or a wheel."""
    return Path(str(resources.files("ovbench.dataset_configs")))


def methods_dir() -> Path:
    """The folder ``methods``: one module per method, in a checkout or a wheel."""
    return Path(str(resources.files("ovbench.methods")))
