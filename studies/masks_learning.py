"""Do FISA's and SCN's parts help? Table 3a's rows, and SCN's, trained alike on generated scenes.

    python studies/masks_learning.py --out OUT                          # train what is missing, then report
    python studies/masks_learning.py --out OUT --rows base,+SEVE --no-report  # one of several processes

The built-in CLIP (which knows every name), true segments disturbed by noise as proposals (``noisy-oracle``), COCO panoptic's
layout with 24 classes in the training scenes, few iterations. Evaluated on other scenes with the same 24 classes (seen) and on
ADE20K's, of whose classes only those count that no training scene had by name (unseen by what is trained; the built-in CLIP
has seen all names). Writes ``learning.csv``, ``learning.md`` and ``losses.png``.
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

TRAINED, OTHER = "coco_panoptic", "ade20k_panoptic"
SIDE = 192  # of CLIP's input
RECIPE = {"lr": "0.001", "batch": "4", "crop": "96", "resize": "128,96", "ratio_range": "0.75,1.5", "grad_clip": "1"}
ROWS: dict[str, tuple[str, str | None, dict[str, str]]] = {  # method, policy (None: untrained), options
    "MaskCLIP": ("maskclip-ding", None, {}),
    "MaskCLIP + oracle masks": ("maskclip-ding", None, {"generator": "oracle"}),
    "MaskCLIP + oracle classes": ("maskclip-ding", None, {"classifier": "oracle"}),
    "+ SEVE": ("fisa", "seve", {}),
    "+ SEVE + fully adapt CLIP": ("fisa", "full", {}),
    "+ SEVE + SIMO (FISA)": ("fisa", "simo", {}),
    "SCN: base": ("fc-clip", None, {}),
    "SCN: + CD": ("scn", "heads", {"lf": "false"}),
    "SCN: + CD + LF": ("scn", "heads", {}),
}


def run_one(row: str, seed: int, iters: int, roots: dict[str, Path], out: Path) -> tuple[dict[str, Any], Path | None]:
    """The evaluations' records by benchmark and the training's folder; taken from ``out`` where they are there."""
    method, policy, options = ROWS[row]
    options = {"generator": "noisy-oracle", **options}
    weights, digest, folder = "builtin", None, None
    if policy is not None:
        where = TrainOptions(data_root=roots[TRAINED], results=out / "trainings", workers=0, resume=True)
        planned = plan(
            method, TRAINED, weights="builtin", seed=seed, options=where,
            method_options={**options, **({"training_side": str(SIDE)} if method == "fisa" else {})},
            changes={**RECIPE, "iters": str(iters), "policy": policy},
        )  # fmt: skip
        training, folder = train(planned, where)  # or the one that has ended already
        weights, digest = str(folder / records.WEIGHTS), training.weights_sha256
    found = {
        record.spec.dataset: record
        for record in store.load_all(out / "runs")
        if record.status == "ok" and record.spec.method == method
        and all(str(record.spec.method_options[key]).lower() == value for key, value in options.items())
        and record.spec.method_options["classifier"] == options.get("classifier", "own")
        and (record.spec.weights_sha256 == digest or (digest is None and record.spec.weights == "builtin"))
    }  # fmt: skip
    for name in (TRAINED, OTHER):
        if name not in found:
            sizes = {"square": SIDE} if method in ("maskclip-ding", "fisa") else {}
            spec = {
                "method": method, "dataset": name, "weights": weights, "method_options": options if policy is None else {},
                "protocol": protocol("paper", name, method=method, short_side=96, long_side=128, templates="plain", **sizes),
            }  # fmt: skip
            found[name] = evaluate(spec, data_root=roots[name], results=out / "runs", workers=0, gallery=4)
    return found, folder


def mean_of(record: Any, names: set[str], what: str) -> float:
    """Mean IoU or PQ in percent over those of the classes that occur."""
    scores = record.metrics.classes if what == "iou" else record.metrics.panoptic.classes
    found = [getattr(score, what) for score in scores if score.name in names and getattr(score, what) is not None]
    return statistics.fmean(found)


def report(rows: list[dict[str, Any]], logs: dict[str, Path], iters: int, out: Path) -> None:
    """Writes the table, its figures and the losses."""
    with (out / "learning.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    columns = ("seen_pq", "unseen_pq", "seen_miou", "unseen_miou")
    lines = ["| row | seen PQ | unseen PQ | seen mIoU | unseen mIoU | seeds |", "|---|---|---|---|---|---|"]
    for row in dict.fromkeys(each["row"] for each in rows):
        own = [each for each in rows if each["row"] == row]
        cells = []
        for name in columns:
            values = [each[name] for each in own]
            spread = f" ± {statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {row} | {' | '.join(cells)} | {len(own)} |")
    (out / "learning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_losses(logs, out / "losses.png", f"{iters} iterations on generated scenes")
    print("\n".join(lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, trainings, records and the report")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument(
        "--seeds", default="0,1,2", help="comma-separated; of what is trained (untrained rows have one)"
    )
    parser.add_argument("--iters", type=int, default=120)
    parser.add_argument("--no-report", action="store_true", help="train and evaluate only")
    given = parser.parse_args()
    data: dict[str, dict[str, Any]] = {
        TRAINED: {"images": 32, "train_images": 160, "seed": 31, "classes": 24, "size": (96, 128)},
        OTHER: {"images": 48, "seed": 32, "size": (96, 128)},
    }
    roots = {name: synth(name, given.out / name, **arguments) for name, arguments in data.items()}
    trained = benchmarks.get(TRAINED)
    pixels = class_pixels(trained.for_split("train"), roots[TRAINED])
    seen = {name for name, count in zip(trained.class_names, pixels, strict=True) if count}
    same = {words[0] for words, count in zip(trained.words(trained.wordings[0]), pixels, strict=True) if count}
    other = benchmarks.get(OTHER)
    unseen = {
        name
        for name, words in zip(other.class_names, other.words(other.wordings[0]), strict=True)
        if name not in seen and words[0].strip() not in same
    }
    rows, logs = [], {}
    for seed in map(int, given.seeds.split(",")):
        for row in given.rows.split(","):
            if ROWS[row][1] is None and any(each["row"] == row for each in rows):
                continue
            found, folder = run_one(row, seed, given.iters, roots, given.out)
            if folder is not None:
                logs.setdefault(row, folder / records.LOSSES)
            figures = {
                f"{kind}_{name}": mean_of(found[dataset], names, field)
                for kind, dataset, names in (("seen", TRAINED, seen), ("unseen", OTHER, unseen))
                for name, field in (("pq", "pq"), ("miou", "iou"))
            }
            rows.append({"row": row, "seed": seed, **figures, "unseen_classes": len(unseen)})
            print(row, seed, {name: round(value, 2) for name, value in figures.items()}, file=sys.stderr)
    if not given.no_report:
        report(rows, logs, given.iters, given.out)


if __name__ == "__main__":
    main()
