"""The discrepancy solvers on the built-in demo: mIoU of a base, and of each solver on its logits.

    python studies/discrepancy_demo.py --dataset voc21 --dataset ade20k --base clip --base sc-clip

Attention is the CLIP tower's own; every row has the protocol direct-seg (whole image, joint bilateral upsampling). The
demo is generated scenes and a CLIP trained on such: a check of the pipeline, no evidence about methods.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovbench.benchmarks import names
from ovbench.evaluate import run
from study import markdown, parser

BASES = ("clip", "kk", "sc-clip")
SOLVERS = ("kl", "propagate", "op", "mv")


def miou(spec: dict[str, Any], results: Path) -> float:
    """The demo's mIoU in percent."""
    metrics = run({"weights": "builtin", "demo": True, **spec}, results=results, workers=0, gallery=0).metrics
    assert metrics is not None and metrics.miou is not None  # a run that did not finish has raised
    return metrics.miou


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every row and prints a Markdown table."""
    cli = parser(__doc__)
    cli.add_argument("--dataset", choices=names(), action="append", help="default: all")
    cli.add_argument("--base", action="append", help=f"default: {', '.join(BASES)}")
    cli.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the solvers")
    cli.add_argument("--limit", type=int, help="only the first N images")
    a = cli.parse_args(argv)
    given = dict(pair.split("=", 1) for pair in a.option)
    datasets = a.dataset or names()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for base in a.base or BASES:
            own = {"base": base, "attention": "clip", **given}
            settings: dict[str, dict[str, Any]] = {
                "none, bilinear": {"method": base, "protocol": {"name": "direct-seg", "upsample": "bilinear"}},
                "none": {"method": base, "protocol": {"name": "direct-seg"}},
                **{solver: {"method": f"discrepancy-{solver}", "method_options": own,
                            "protocol": {"name": "direct-seg"}} for solver in SOLVERS},
            }  # fmt: skip
            for solver, spec in settings.items():
                found = [miou({"dataset": name, "limit": a.limit, **spec}, Path(folder)) for name in datasets]
                rows.append([base, solver, *found, statistics.fmean(found)])
                print(*rows[-1], file=sys.stderr, flush=True)
    print("\n".join(markdown(["base", "solver", *datasets, "mean"], rows)))


if __name__ == "__main__":
    main()
