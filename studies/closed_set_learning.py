"""Do the add-ons help? Host, host + CAA and host + ECAC trained alike on generated, long-tailed scenes, several seeds.

    python studies/closed_set_learning.py --out OUT                          # train what is missing, then report
    python studies/closed_set_learning.py --out OUT --methods fcn --no-report   # one of several processes

A small encoder from random weights, narrow heads, ADE20K's layout and label ids with 24 of its classes: the pipeline is the
real one, the data are not, and the iterations are few. mIoU is over the classes that occur; the tail is the third of them
with the fewest training pixels. Writes ``learning.csv`` (every figure), ``learning.md`` and ``losses.png``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ovbench import benchmarks
from ovbench.benchmarks.frequencies import class_pixels, thirds
from ovbench.benchmarks.synth.copies import synth
from ovbench.evaluate import run as evaluate
from ovbench.registry import closed_set_class
from ovbench.results import store
from ovbench.spec import protocol
from ovbench.train import record as records
from ovbench.train.curves import plot_losses
from ovbench.train.plan import TrainOptions, plan
from ovbench.train.training import train

DATASET = "ade20k"
DATA = {"images": 96, "train_images": 320, "seed": 11, "long_tail": 1.2, "classes": 24, "size": (96, 128)}
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


def run_one(name: str, seed: int, iters: int, root: Path, out: Path) -> tuple[Any, Path]:
    """The evaluation's record and the training's folder; both are taken from ``out`` where they are there."""
    where = TrainOptions(data_root=root, results=out / "trainings", workers=0, resume=True, checkpoint_every=100)
    method, options = options_of(name, iters)
    planned = plan(
        method, DATASET, arch="tiny", method_options=options, changes={**RECIPE, "iters": str(iters)},
        seed=seed, options=where,
    )  # fmt: skip
    training, folder = train(planned, where)  # or the one that has ended already
    for record in store.load_all(out / "runs"):
        if record.spec.weights_sha256 == training.weights_sha256 and record.status == "ok":
            return record, folder
    spec = {
        "method": method, "dataset": DATASET, "weights": str(folder / records.WEIGHTS),
        "protocol": protocol("closed-set", DATASET, method=method, short_side=96, long_side=128),
    }  # fmt: skip
    return evaluate(spec, data_root=root, results=out / "runs", workers=0, gallery=6), folder


def mean_iou(record: Any, classes: tuple[int, ...]) -> float:
    """Mean IoU in percent over those of the classes that occur."""
    found = [record.metrics.classes[index].iou for index in classes]
    return statistics.fmean(iou for iou in found if iou is not None)


def report(rows: list[dict[str, Any]], logs: dict[str, Path], iters: int, out: Path) -> None:
    """Writes the table, its figures and the losses."""
    with (out / "learning.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = ("mIoU", "head", "middle", "tail", "aAcc")
    lines = ["| method | " + " | ".join(names) + " | seeds | params M | s/iteration |", "|---" * (len(names) + 4) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = []
        for name in names:
            values = [row[name] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.2f} ± {spread:.2f}")
        seconds = statistics.median(row["seconds_per_iteration"] for row in own)
        lines.append(
            f"| {method} | " + " | ".join(cells) + f" | {len(own)} | {own[0]['params_m']:.3f} | {seconds:.2f} |"
        )
    seeds = sorted({row["seed"] for row in rows})
    host = {row["seed"]: row for row in rows if "-" not in row["method"]}
    for method in dict.fromkeys(row["method"] for row in rows if "-" in row["method"]):
        own = {row["seed"]: row for row in rows if row["method"] == method}
        both = [seed for seed in seeds if seed in own and seed in host]
        for name in ("mIoU", "tail"):
            gains = [own[seed][name] - host[seed][name] for seed in both]
            shown = ", ".join(f"{gain:+.2f}" for gain in gains)
            lines.append(f"\n{method} - host, {name}, by seed: {shown}")
    (out / "learning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_losses(logs, out / "losses.png", f"{iters} iterations on generated scenes, seed {seeds[0]}")
    print("\n".join(lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, trainings, records and the report")
    parser.add_argument(
        "--methods",
        default="fcn,caa-fcn,caa-fcn:association_scale=true,ecac-fcn",
        help="comma-separated ids, switches behind a colon",
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--no-report", action="store_true", help="train and evaluate only")
    given = parser.parse_args()
    root = synth(DATASET, given.out / "data", **DATA)
    parts = thirds(class_pixels(benchmarks.get(DATASET).for_split("train"), root))
    rows, logs = [], {}
    for seed in map(int, given.seeds.split(",")):
        for method in given.methods.split(","):
            record, folder = run_one(method, seed, given.iters, root, given.out)
            training = records.read(folder / records.RECORD)
            if seed == int(given.seeds.split(",")[0]):
                logs[method] = folder / records.LOSSES
            rows.append(
                {
                    "method": method, "seed": seed, "mIoU": record.metrics.miou, "head": mean_iou(record, parts.head),
                    "middle": mean_iou(record, parts.middle), "tail": mean_iou(record, parts.tail),
                    "aAcc": record.metrics.aacc, "params_m": record.efficiency.params_m,
                    "seconds_per_iteration": training.seconds_per_iteration, "training": training.train_id,
                }
            )  # fmt: skip
            print(f"{method} seed {seed}: mIoU {record.metrics.miou:.2f}, tail {rows[-1]['tail']:.2f}", file=sys.stderr)
    if not given.no_report:
        report(rows, logs, given.iters, given.out)


if __name__ == "__main__":
    main()
