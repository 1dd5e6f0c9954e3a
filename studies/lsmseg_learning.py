"""Do LSMSeg's parts help? CAT-Seg, with its filter, with described classes, with both: trained alike on generated scenes.

    python studies/lsmseg_learning.py --out OUT                         # train what is missing, then report
    python studies/lsmseg_learning.py --out OUT --rows cat-seg --no-report  # one of several processes
    python studies/lsmseg_learning.py --out OUT --rows "costs of E,costs of CLIP" --visual-weights dinov2_vits14.safetensors

The built-in CLIP (which knows every name and no description), a narrow aggregator on few patches, COCO-Stuff's layout with
24 of its classes in the training scenes, few iterations. Evaluated on other scenes with the same 24 classes (seen) and on
ADE20K's, of whose classes only those count that no training scene had by name (unseen by the aggregator; the built-in CLIP
has seen all names). Without SAM, whose weights need a download; the rows "costs of" fuse DINOv2-S from a
file. Writes ``learning.csv``, ``learning.md`` and ``losses.png``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

from ovbench import benchmarks
from ovbench.benchmarks.frequencies import class_pixels
from ovbench.benchmarks.synth.copies import synth
from ovbench.evaluate import run as evaluate
from ovbench.results import store
from ovbench.spec import protocol
from ovbench.train import record as records
from ovbench.train.curves import plot_losses
from ovbench.train.plan import TrainOptions, plan
from ovbench.train.training import train

TRAINED, OTHER = "coco_stuff", "ade20k"
SMALL = {"hidden": "32", "layers": "1", "grid": "6", "window": "3"}
LSMSEG = {"visual": "none", "pad_len": "256"}
RECIPE = {
    "lr": "0.002", "batch": "2", "crop": "96", "resize": "128,96", "photometric": "false", "grad_clip": "1", "min_lr": "0",
}  # fmt: skip
ROWS: dict[str, tuple[str, str, dict[str, str]]] = {  # method, prompts, options
    "cat-seg": ("cat-seg", "cat-seg", {}),
    "filter": ("lsmseg", "cat-seg", {**LSMSEG, "filter_k": "32"}),
    "prompts": ("lsmseg", "lsmseg", {**LSMSEG, "filter_k": "0"}),
    "filter + prompts": ("lsmseg", "lsmseg", {**LSMSEG, "filter_k": "32"}),
}
FUSED = {**LSMSEG, "filter_k": "32", "visual": "dinov2-s", "visual_size": "112"}
WITH_VISUAL: dict[str, tuple[str, str, dict[str, str]]] = {
    "costs of E": ("lsmseg", "cat-seg", {**FUSED, "cost_from": "fused"}),
    "costs of CLIP": ("lsmseg", "cat-seg", {**FUSED, "cost_from": "clip"}),
}


def run_one(
    row: str, seed: int, iters: int, roots: dict[str, Path], out: Path, visual: str | None
) -> tuple[dict[str, Any], Path]:
    """The evaluations' records by benchmark and the training's folder; taken from ``out`` where they are there."""
    method, prompts, options = {**ROWS, **WITH_VISUAL}[row]
    file = {} if visual is None else {"visual_weights": visual}
    where = TrainOptions(
        data_root=roots[TRAINED], results=out / "trainings", workers=0, resume=True, checkpoint_every=50
    )
    planned = plan(
        method, TRAINED, weights="builtin", method_options={**SMALL, **options, **file}, sentences=prompts,
        changes={**RECIPE, "iters": str(iters)}, seed=seed, options=where,
    )  # fmt: skip
    training, folder = train(planned, where)  # or the one that has ended already
    found = {
        record.spec.dataset: record
        for record in store.load_all(out / "runs")
        if record.spec.weights_sha256 == training.weights_sha256 and record.status == "ok"
    }
    for name in (TRAINED, OTHER):
        if name not in found:
            spec = {
                "method": method, "dataset": name, "weights": str(folder / records.WEIGHTS), "method_options": file,
                "protocol": protocol(
                    "cat-seg", name, method=method, short_side=96, long_side=128, mode="whole", crop=128, stride=128,
                    square=0, global_view=False, templates=prompts,
                ),
            }  # fmt: skip
            found[name] = evaluate(spec, data_root=roots[name], results=out / "runs", workers=0, gallery=4)
    return found, folder


def mean_iou(record: Any, names: set[str]) -> float:
    """Mean IoU in percent over those of the classes that occur."""
    found = [score.iou for score in record.metrics.classes if score.name in names and score.iou is not None]
    return statistics.fmean(found)


def report(rows: list[dict[str, Any]], logs: dict[str, Path], iters: int, out: Path) -> None:
    """Writes the table, its figures and the losses."""
    with (out / "learning.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| row | seen classes | unseen classes | seeds | s/iteration |", "|---|---|---|---|---|"]
    for row in dict.fromkeys(each["row"] for each in rows):
        own = [each for each in rows if each["row"] == row]
        cells = []
        for name in ("seen", "unseen"):
            values = [each[name] for each in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.2f} ± {spread:.2f}")
        seconds = statistics.median(each["seconds_per_iteration"] for each in own)
        lines.append(f"| {row} | {' | '.join(cells)} | {len(own)} | {seconds:.2f} |")
    (out / "learning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_losses(logs, out / "losses.png", f"{iters} iterations on generated scenes")
    print("\n".join(lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, trainings, records and the report")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--visual-weights", help="file of DINOv2-S, for the rows that fuse it")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--iters", type=int, default=150)
    parser.add_argument("--no-report", action="store_true", help="train and evaluate only")
    given = parser.parse_args()
    data: dict[str, dict[str, Any]] = {
        TRAINED: {"images": 32, "train_images": 160, "seed": 21, "classes": 24, "size": (96, 128)},
        OTHER: {"images": 48, "seed": 22, "size": (96, 128)},
    }
    roots = {name: synth(name, given.out / name, **arguments) for name, arguments in data.items()}
    trained = benchmarks.get(TRAINED)
    pixels = class_pixels(trained.for_split("train"), roots[TRAINED])
    seen = {name for name, count in zip(trained.class_names, pixels, strict=True) if count}
    same = {words[0] for words, count in zip(trained.words("spaced"), pixels, strict=True) if count}
    other = benchmarks.get(OTHER)
    unseen = {
        name
        for name, words in zip(other.class_names, other.words("spaced"), strict=True)
        if name not in seen and words[0].strip() not in same
    }
    rows, logs = [], {}
    for seed in map(int, given.seeds.split(",")):
        for row in given.rows.split(","):
            found, folder = run_one(row, seed, given.iters, roots, given.out, given.visual_weights)
            training = records.read(folder / records.RECORD)
            logs.setdefault(row, folder / records.LOSSES)
            rows.append(
                {
                    "row": row, "seed": seed, "seen": mean_iou(found[TRAINED], seen),
                    "unseen": mean_iou(found[OTHER], unseen), "unseen_classes": len(unseen),
                    "seconds_per_iteration": training.seconds_per_iteration, "training": training.train_id,
                }
            )  # fmt: skip
            print(f"{row} seed {seed}: seen {rows[-1]['seen']:.2f}, unseen {rows[-1]['unseen']:.2f}", file=sys.stderr)
    if not given.no_report:
        report(rows, logs, given.iters, given.out)


if __name__ == "__main__":
    main()
