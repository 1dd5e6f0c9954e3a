"""``python -m ovbench``: the same as the command ``ovbench``."""

from __future__ import annotations

from ovbench.cli import main

if __name__ == "__main__":
    main()
