"""Evaluation: a spec to a record."""

from ovbench.evaluate.run import run
from ovbench.evaluate.state import RunOptions

__all__ = ["RunOptions", "run"]
