"""The efficiency tables of the papers, ours beside the printed figures: profiles first, then the tables.

    make paper-efficiency
    python studies/paper_efficiency.py --only thesis-caa --device cuda --samples 30
    python studies/paper_efficiency.py --tables-only

What is profiled are the commands of 'ovbench table --paper X --table N --commands'. Profiles go to results/profiles, tables as
Markdown to results/tables. Weights are random: they change neither parameters nor MACs, and the tables say so. A row that is
measured already is not measured again; --again does. --tables-only writes the tables of what is stored.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from ovbench.cli.app import run_command
from ovbench.results.profiles import load_all
from ovbench.spec import flags
from ovbench.tables.commands import recorded_by, table_commands
from study import parser

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "direct-seg": ("complexity", "complexity-stages"),
    "thesis-caa": ("3.5",),
    "thesis-ecac": ("4.6",),
    "thesis-lsmseg": ("5.8",),
    "fisa": ("2",),
}


def ovbench(*arguments: str) -> None:
    """Runs one command of ovbench; its messages go through, what it prints does not."""
    print("ovbench", *arguments, file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        status = run_command(list(arguments))
    if status:
        sys.exit(status)


def measure(
    paper: str, table: str, profiles: Path, device: str, samples: str, *, again: bool, first: int | None
) -> None:
    """Profiles the rows of a table that no stored profile stands beside."""
    wanted = [command for row in table_commands(paper, table) for command in row.commands if command.verb == "profile"]
    for command in wanted[:first]:
        stored = [] if again else load_all(profiles)
        if recorded_by(command, stored) is not None:
            continue
        settings = dict(command.settings)
        if device == "cpu":
            settings.pop("dtype", None)  # a CPU is slow in half precision; the table says what was measured
        if all(entry.metric != "throughput" for entry in command.entries):
            settings["throughput"] = "false"
        words = ("profile", "--method", command.method, "--dataset", command.dataset, *flags(settings.items()))
        ovbench(*words, "--device", device, "--samples", samples, "--save", "--profiles", str(profiles))


def main(argv: Sequence[str] | None = None) -> None:
    """Profiles and writes every table."""
    cli = parser(__doc__)
    cli.add_argument("--only", choices=TABLES, action="append", help="default: every paper")
    cli.add_argument("--device", default="cpu")
    cli.add_argument("--samples", default="3", help="timed passes of each profile")
    cli.add_argument("--first", type=int, help="only the first N profiles of each table")
    cli.add_argument("--again", action="store_true", help="measure what is stored already once more")
    cli.add_argument("--tables-only", action="store_true", help="measure nothing")
    cli.add_argument("--results", type=Path, default=ROOT / "results", help="folder of profiles and tables")
    a = cli.parse_args(argv)
    for paper in a.only or TABLES:
        for table in TABLES[paper]:
            if not a.tables_only:
                measure(paper, table, a.results / "profiles", a.device, a.samples, again=a.again, first=a.first)
            out = a.results / "tables" / f"{paper}-{table}.md"
            out.parent.mkdir(parents=True, exist_ok=True)
            where = ("--results", str(a.results / "runs"), "--format", "markdown", "--out", str(out))
            ovbench("table", "--paper", paper, "--table", table, *where)


if __name__ == "__main__":
    main()
