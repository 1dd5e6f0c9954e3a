"""The efficiency tables of the papers, ours beside the printed figures: profiles first, then the tables.

    make paper-efficiency
    python studies/paper_efficiency.py --only thesis-caa --device cuda --samples 30

Profiles go to results/profiles, tables as Markdown to results/tables. Weights are random: they change neither parameters
nor MACs, and the tables say so. Rows whose method is not built stay in the table and say that. A profile that is stored
already is not measured again; --again does.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ovbench.cli.app import run_command
from study import parser, write

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "direct-seg": ("complexity", "complexity-stages"),
    "thesis-caa": ("3.5",),
    "thesis-ecac": ("4.6",),
    "thesis-lsmseg": ("5.8",),
    "fisa": ("2",),
}
HEAD = ("--count", "modules", "--part", "decode_head", "--features")  # the thesis counts convolutions and linear layers
ALL_64 = "64x64,64x64,64x64,64x64"
WHOLE = ("--dataset", "voc21", "--mode", "whole", "--input", "336x448")
PROFILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "direct-seg": (
        ("-m", "clip", "--protocol", "direct-seg", *WHOLE),
        ("-m", "proxyclip", "--protocol", "direct-seg", *WHOLE),
        ("-m", "discrepancy-op", *WHOLE),
        ("-m", "discrepancy-mv", *WHOLE),
    ),
    "thesis-caa": tuple(
        ("-m", addon + host, *HEAD, grid)
        for addon in ("", "caa-")
        # Of the grids that a dilated ResNet may have, UperNet's figure is nearest with C1 at stride 8: -17 %.
        for host, grid in (("psp", "64x64"), ("ccnet", "64x64"), ("deeplabv3", "64x64"), ("uper", ALL_64))
    ),
    "thesis-ecac": tuple(
        ("-m", addon + host, *HEAD, grid)
        for addon in ("", "ecac-")
        # DeepLabV3+'s figure is met only with C1 at stride 8 like the rest.
        for host, grid in (("fcn", "64x64"), ("psp", "64x64"), ("deeplabv3plus", ALL_64))
    ),
}


def ovbench(*arguments: str) -> None:
    """Runs one command of ovbench; its messages go through, what it prints does not."""
    print("ovbench", *arguments, file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        status = run_command(list(arguments))
    if status:
        sys.exit(status)


def main(argv: Sequence[str] | None = None) -> None:
    """Profiles and writes every table."""
    cli = parser(__doc__)
    cli.add_argument("--only", choices=TABLES, action="append", help="default: every paper")
    cli.add_argument("--device", default="cpu")
    cli.add_argument("--samples", default="3", help="timed passes of each profile")
    cli.add_argument("--first", type=int, help="only the first N profiles of each paper")
    cli.add_argument("--again", action="store_true", help="measure what is stored already once more")
    cli.add_argument("--results", type=Path, default=ROOT / "results", help="folder of profiles and tables")
    a = cli.parse_args(argv)
    profiles, tables = a.results / "profiles", a.results / "tables"
    done_list = profiles / "paper-efficiency.json"
    done = json.loads(done_list.read_text(encoding="utf-8")) if done_list.is_file() and not a.again else []
    for paper in a.only or TABLES:
        for arguments in PROFILES.get(paper, ())[: a.first]:
            key = [a.device, a.samples, *arguments]
            if key in done:
                continue
            how = (
                "--device",
                a.device,
                "--samples",
                a.samples,
                "--no-throughput",
                "--save",
                "--results",
                str(profiles),
            )
            ovbench("profile", *arguments, *how)
            done.append(key)
            write([json.dumps(done, indent=1)], done_list)
        for table in TABLES[paper]:
            tables.mkdir(parents=True, exist_ok=True)
            out = str(tables / f"{paper}-{table}.md")
            where = ("--results", str(a.results / "runs"), "--format", "markdown", "--out", out)
            ovbench("table", "--paper", paper, "--table", table, *where)


if __name__ == "__main__":
    main()
