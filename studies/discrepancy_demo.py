"""The discrepancy solvers on the built-in demo: mIoU of a base, and of each solver on its logits.

    python studies/discrepancy_demo.py --dataset voc21 --dataset ade20k --base clip --base sc-clip

Attention is the CLIP tower's own; every row has the protocol direct-seg (whole image, joint bilateral upsampling). The
demo is generated scenes and a CLIP trained on such: a check of the pipeline, no evidence about methods.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from ovbench.benchmarks import names
from ovbench.evaluate import run

BASES = ("clip", "kk", "sc-clip")
SOLVERS = ("kl", "propagate", "op", "mv")


def miou(method: str, dataset: str, results: Path, options: dict[str, Any], protocol: dict[str, Any]) -> float:
    """The demo's mIoU in percent."""
    spec = {
        "method": method,
        "dataset": dataset,
        "weights": "builtin",
        "demo": True,
        "method_options": options,
        "protocol": {"name": "direct-seg", **protocol},
    }
    metrics = run(spec, results=results, workers=0, gallery=0).metrics
    assert metrics is not None and metrics.miou is not None  # a run that did not finish has raised
    return metrics.miou


def main() -> None:
    """Runs every row and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=names(), action="append", help="default: all")
    parser.add_argument("--base", action="append", help=f"default: {', '.join(BASES)}")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the solvers")
    a = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in a.option)
    datasets = a.dataset or names()
    print(f"| base | solver | {' | '.join(datasets)} | mean |\n|---|---|{'---|' * (len(datasets) + 1)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for base in a.base or BASES:
            rows: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
                ("none, bilinear", base, {}, {"upsample": "bilinear"}),
                ("none", base, {}, {}),
            ]
            rows += [
                (solver, f"discrepancy-{solver}", {"base": base, "attention": "clip", **given}, {})
                for solver in SOLVERS
            ]
            for row, method, options, protocol in rows:
                found = [miou(method, dataset, Path(folder), options, protocol) for dataset in datasets]
                cells = " | ".join(f"{value:.2f}" for value in [*found, sum(found) / len(found)])
                print(f"| {base} | {row} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
