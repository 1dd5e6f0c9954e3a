"""Evaluation: mmengine's Runner with our loop and metric, areas per image in a shard file, and the record."""

from ovbench.evaluate.run import RunOptions, run

__all__ = ["RunOptions", "run"]
