"""Do FISA's and SCN's parts help? Table 3a's rows, and SCN's, trained alike on generated scenes.

    python studies/masks_learning.py --out OUT                          # train what is missing, then report
    python studies/masks_learning.py --out OUT --rows "+ SEVE,SCN: base" --no-report  # one of several processes

The built-in CLIP (which knows every name), true segments disturbed by noise as proposals (``noisy-oracle``), COCO panoptic's
layout with 24 classes in the training scenes, few iterations. Evaluated on other scenes with the same 24 classes (seen) and on
ADE20K's, of whose classes only those count that no training scene had by name (unseen by what is trained; the built-in CLIP
has seen all names). Writes ``learning.csv``, ``learning.md`` and ``losses.png``.
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


def run_one(
    a: argparse.Namespace, row: str, seed: int, roots: dict[str, Path]
) -> tuple[dict[str, RunRecord], Path | None]:
    """The evaluations' records by benchmark and the training's folder; taken from ``out`` where they are there."""
    method, policy, options = ROWS[row]
    options = {"generator": "noisy-oracle", **options}
    weights, digest, folder = "builtin", None, None
    if policy is not None:
        training, folder = trained(
            a, method, TRAINED, roots[TRAINED], {**RECIPE, "policy": policy}, weights="builtin", seed=seed,
            method_options={**options, **({"training_side": str(SIDE)} if method == "fisa" else {})},
        )  # fmt: skip
        weights, digest = str(folder / records.WEIGHTS), training.weights_sha256

    def same(record: RunRecord) -> bool:
        own, theirs = {"classifier": "own", **options}, record.spec.method_options
        return (
            record.spec.method == method
            and all(str(theirs.get(key)).lower() == value for key, value in own.items())
            and (record.spec.weights_sha256 == digest or (digest is None and record.spec.weights == "builtin"))
        )

    found = {}
    for name, root in roots.items():
        sizes = {"square": SIDE} if method in ("maskclip-ding", "fisa") else {}
        spec = {
            "method": method, "dataset": name, "weights": weights, "method_options": options if policy is None else {},
            "protocol": protocol("paper", name, method=method, short_side=96, long_side=128, templates="plain", **sizes),
        }  # fmt: skip
        found[name] = evaluated(a, spec, root, same)
    return found, folder


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    a = command_line(__doc__, ROWS, iters=120, scenes=(160, 32, 48)).parse_args(argv)
    training, known, new = a.scenes
    roots = {
        TRAINED: synth(TRAINED, a.out / TRAINED, known, 31, train_images=training, classes=24, size=(96, 128)),
        OTHER: synth(OTHER, a.out / OTHER, new, 32, size=(96, 128)),
    }
    names = dict(zip((TRAINED, OTHER), seen_and_unseen(TRAINED, roots[TRAINED], OTHER, "plain"), strict=True))
    rows: list[Row] = []
    logs: dict[str, Path] = {}
    for seed in a.seeds:
        for row in a.rows:
            if ROWS[row][1] is None and seed != a.seeds[0]:
                continue  # untrained rows have no seed
            found, folder = run_one(a, row, seed, roots)
            if folder is not None:
                logs.setdefault(row, folder / records.LOSSES)
            figures = {
                f"{kind} {shown}": mean_of(found[dataset], names[dataset], what)
                for shown, what in (("PQ", "pq"), ("mIoU", "iou"))
                for kind, dataset in (("seen", TRAINED), ("unseen", OTHER))
            }
            rows.append({"row": row, "seed": seed, **figures, "unseen_classes": len(names[OTHER])})
            print(row, seed, {name: round(value, 2) for name, value in figures.items()}, file=sys.stderr)
    if not a.no_report:
        report(a, rows, [name for name in rows[0] if name.endswith(("PQ", "mIoU"))], logs)


if __name__ == "__main__":
    main()
