"""Do the add-ons help? Host, host + CAA and host + ECAC trained alike on generated, long-tailed scenes, several seeds.

    python studies/closed_set_learning.py --out OUT                          # train what is missing, then report
    python studies/closed_set_learning.py --out OUT --rows fcn --no-report   # one of several processes

A small encoder from random weights, narrow heads, ADE20K's layout and label ids with 24 of its classes: the pipeline is the
real one, the data are not, and the iterations are few. mIoU is over the classes that occur; the tail is the third of them
with the fewest training pixels. Writes ``learning.csv`` (every figure), ``learning.md`` and ``losses.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from learning import Row, command_line, evaluated, mean_of, report, trained
from ovbench import benchmarks
from ovbench.benchmarks.frequencies import class_pixels, thirds
from ovbench.benchmarks.synth.copies import synth
from ovbench.registry import closed_set_class
from ovbench.results.record import RunRecord
from ovbench.spec import protocol
from ovbench.train import record as records

DATASET = "ade20k"
ROWS = ("fcn", "caa-fcn", "caa-fcn:association_scale=true", "ecac-fcn")  # ids, switches behind a colon
WIDTHS = {"channels": 64, "center_channels": 128, "affinity_channels": 32, "hidden": 96}
RECIPE = {
    "optimizer": "adamw", "lr": "0.002", "weight_decay": "0.01", "batch": "8", "crop": "64", "resize": "128,96",
    "ratio_range": "0.75,1.5", "photometric": "false", "grad_clip": "5",
}  # fmt: skip


def options_of(name: str, iters: int) -> tuple[str, dict[str, Any]]:
    """The method and its options: narrow widths, ECAC's memory loss after a tenth of the iterations, what the name says."""
    method, *switches = name.split(":")
    known = {field.name for field in fields(closed_set_class(method).Config)}
    wanted = {**WIDTHS, "memory_loss_start": iters // 10}
    given = dict(switch.split("=") for switch in switches)
    return method, {**{key: value for key, value in wanted.items() if key in known}, **given}


def run_one(a: argparse.Namespace, name: str, seed: int, root: Path) -> tuple[RunRecord, Path]:
    """The evaluation's record and the training's folder; both are taken from ``out`` where they are there."""
    method, options = options_of(name, a.iters)
    training, folder = trained(a, method, DATASET, root, RECIPE, arch="tiny", method_options=options, seed=seed)
    spec = {
        "method": method, "dataset": DATASET, "weights": str(folder / records.WEIGHTS),
        "protocol": protocol("closed-set", DATASET, method=method, short_side=96, long_side=128),
    }  # fmt: skip
    return evaluated(a, spec, root, lambda found: found.spec.weights_sha256 == training.weights_sha256, 6), folder


def gains(rows: list[Row]) -> list[str]:
    """By how much each add-on is above its host, seed by seed."""
    host = {row["seed"]: row for row in rows if "-" not in row["row"]}
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows if "-" in row["row"]):
        own = {row["seed"]: row for row in rows if row["row"] == name}
        for figure in ("mIoU", "tail"):
            shown = ", ".join(f"{own[seed][figure] - host[seed][figure]:+.2f}" for seed in own if seed in host)
            lines.append(f"\n{name} - host, {figure}, by seed: {shown}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    a = command_line(__doc__, ROWS, iters=600, scenes=(320, 96)).parse_args(argv)
    root = synth(
        DATASET, a.out / "data", a.scenes[1], 11, train_images=a.scenes[0], long_tail=1.2, classes=24, size=(96, 128)
    )
    benchmark = benchmarks.get(DATASET)
    parts = thirds(class_pixels(benchmark.for_split("train"), root))
    rows: list[Row] = []
    logs: dict[str, Path] = {}
    for seed in a.seeds:
        for name in a.rows:
            record, folder = run_one(a, name, seed, root)
            logs.setdefault(name, folder / records.LOSSES)
            assert record.metrics is not None and record.efficiency is not None  # a run that did not finish has raised
            third = {part: mean_of(record, [benchmark.class_names[index] for index in getattr(parts, part)])
                     for part in ("head", "middle", "tail")}  # fmt: skip
            training = records.read(folder / records.RECORD)
            rows.append(
                {
                    "row": name, "seed": seed, "mIoU": record.metrics.miou, **third, "aAcc": record.metrics.aacc,
                    "params M": record.efficiency.params_m, "seconds_per_iteration": training.seconds_per_iteration,
                    "training": training.train_id,
                }
            )  # fmt: skip
            print(f"{name} seed {seed}: mIoU {record.metrics.miou:.2f}, tail {third['tail']:.2f}", file=sys.stderr)
    if not a.no_report:
        report(a, rows, ("mIoU", "head", "middle", "tail", "aAcc", "params M"), logs, gains(rows))


if __name__ == "__main__":
    main()
