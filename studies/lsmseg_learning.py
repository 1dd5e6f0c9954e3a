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
import sys
from collections.abc import Sequence
from pathlib import Path

from learning import Row, command_line, evaluated, mean_of, report, seen_and_unseen, trained
from ovbench.benchmarks.synth.copies import synth
from ovbench.results.record import RunRecord
from ovbench.spec import protocol
from ovbench.train import record as records

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


def run_one(a: argparse.Namespace, row: str, seed: int, roots: dict[str, Path]) -> tuple[dict[str, RunRecord], Path]:
    """The evaluations' records by benchmark and the training's folder; taken from ``out`` where they are there."""
    method, prompts, options = {**ROWS, **WITH_VISUAL}[row]
    file = {} if a.visual_weights is None else {"visual_weights": a.visual_weights}
    training, folder = trained(
        a, method, TRAINED, roots[TRAINED], RECIPE, weights="builtin", method_options={**SMALL, **options, **file},
        sentences=prompts, seed=seed,
    )  # fmt: skip
    found = {}
    for name, root in roots.items():
        spec = {
            "method": method, "dataset": name, "weights": str(folder / records.WEIGHTS), "method_options": file,
            "protocol": protocol(
                "cat-seg", name, method=method, short_side=96, long_side=128, mode="whole", crop=128, stride=128,
                square=0, global_view=False, templates=prompts,
            ),
        }  # fmt: skip
        found[name] = evaluated(a, spec, root, lambda run: run.spec.weights_sha256 == training.weights_sha256)
    return found, folder


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli = command_line(__doc__, ROWS, iters=150, scenes=(160, 32, 48))
    cli.add_argument("--visual-weights", help="file of DINOv2-S, for the rows that fuse it")
    a = cli.parse_args(argv)
    training, known, new = a.scenes
    roots = {
        TRAINED: synth(TRAINED, a.out / TRAINED, known, 21, train_images=training, classes=24, size=(96, 128)),
        OTHER: synth(OTHER, a.out / OTHER, new, 22, size=(96, 128)),
    }
    seen, unseen = seen_and_unseen(TRAINED, roots[TRAINED], OTHER, "spaced")
    rows: list[Row] = []
    logs: dict[str, Path] = {}
    for seed in a.seeds:
        for row in a.rows:
            found, folder = run_one(a, row, seed, roots)
            logs.setdefault(row, folder / records.LOSSES)
            figures = {"seen": mean_of(found[TRAINED], seen), "unseen": mean_of(found[OTHER], unseen)}
            record = records.read(folder / records.RECORD)
            rows.append(
                {
                    "row": row, "seed": seed, **figures, "unseen_classes": len(unseen),
                    "seconds_per_iteration": record.seconds_per_iteration, "training": record.train_id,
                }
            )  # fmt: skip
            print(f"{row} seed {seed}: {figures}", file=sys.stderr)
    if not a.no_report:
        report(a, rows, ("seen", "unseen"), logs)


if __name__ == "__main__":
    main()
