"""The efficiency tables of the papers, ours beside the printed figures: profiles first, then the tables.

    make paper-efficiency
    python studies/paper_efficiency.py --only thesis-caa --device cuda --samples 30
    python studies/paper_efficiency.py --tables-only

What is profiled are the commands of 'ovbench table --paper X --table N --commands'. Profiles go to results/profiles, tables as
Markdown to results/tables. Weights are random: they change neither parameters nor MACs, and the tables say so. A row that is
measured already is not measured again; --again does. --tables-only writes the tables of what is stored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ovbench.evaluate.sweep.plan import flags
from ovbench.results.profiles import load_all
from ovbench.tables.commands import recorded_by, table_commands

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "direct-seg": ("complexity", "complexity-stages"),
    "thesis-caa": ("3.5",),
    "thesis-ecac": ("4.6",),
    "thesis-lsmseg": ("5.8",),
    "fisa": ("2",),
}


def ovbench(*arguments: str) -> None:
    """Runs one command of ovbench; its messages go through."""
    print("ovbench", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "ovbench", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def measure(paper: str, table: str, device: str, samples: str, again: bool) -> None:
    """Profiles the rows of a table that no stored profile stands beside."""
    for row in table_commands(paper, table):
        for command in row.commands:
            stored = [] if again else load_all(ROOT / "results" / "profiles")
            if command.verb != "profile" or recorded_by(command, stored) is not None:
                continue
            settings = dict(command.settings)
            if device == "cpu":
                settings.pop("dtype", None)  # a CPU is slow in half precision; the table says what was measured
            if all(entry.metric != "throughput" for entry in command.entries):
                settings["throughput"] = "false"
            words = ("profile", "--method", command.method, "--dataset", command.dataset, *flags(settings.items()))
            ovbench(*words, "--device", device, "--samples", samples, "--save")


def main() -> None:
    """Profiles and writes every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, action="append", help="default: every paper")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", default="3", help="timed passes of each profile")
    parser.add_argument("--again", action="store_true", help="measure what is stored already once more")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    a = parser.parse_args()
    for paper in a.only or TABLES:
        for table in TABLES[paper]:
            if not a.tables_only:
                measure(paper, table, a.device, a.samples, a.again)
            out = ROOT / "results" / "tables" / f"{paper}-{table}.md"
            out.parent.mkdir(parents=True, exist_ok=True)
            ovbench("table", "--paper", paper, "--table", table, "--format", "markdown", "--out", str(out))


if __name__ == "__main__":
    main()
