"""What the studies of training share: rows trained and evaluated alike on generated scenes, and their tables."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovbench import benchmarks
from ovbench.benchmarks.frequencies import class_pixels
from ovbench.evaluate import run as evaluate
from ovbench.results import store
from ovbench.results.record import RunRecord
from ovbench.train.curves import plot_losses
from ovbench.train.plan import TrainOptions, plan
from ovbench.train.record import TrainRecord
from ovbench.train.training import train
from study import comma, markdown, parser, write

Row = dict[str, Any]  # "row", "seed" and figures


def command_line(
    text: str | None, rows: Iterable[str], *, iters: int, scenes: Sequence[int]
) -> argparse.ArgumentParser:
    """The options of all; ``scenes`` are those to train on, then those of each evaluation."""
    found = parser(text)
    found.add_argument("--out", type=Path, required=True, help="folder for data, trainings, records and the report")
    found.add_argument("--rows", type=comma(str), default=list(rows), help="comma-separated")
    found.add_argument("--seeds", type=comma(int), default=[0, 1, 2], help="comma-separated, of what is trained")
    found.add_argument("--iters", type=int, default=iters)
    found.add_argument(
        "--scenes", type=comma(int), default=list(scenes), help="generated images to train on, to evaluate on"
    )
    found.add_argument("--no-report", action="store_true", help="train and evaluate only")
    return found


def trained(
    a: argparse.Namespace, method: str, dataset: str, root: Path, changes: Mapping[str, str], **how: Any
) -> tuple[TrainRecord, Path]:
    """The record and folder of a training, which may have ended already; ``how`` are arguments of ``plan``."""
    where = TrainOptions(
        data_root=root, results=a.out / f"trainings-{a.iters}", workers=0, resume=True, checkpoint_every=50
    )
    planned = plan(method, dataset, changes={**changes, "iters": str(a.iters)}, options=where, **how)
    return train(planned, where)


def evaluated(
    a: argparse.Namespace, spec: dict[str, Any], root: Path, same: Callable[[RunRecord], bool], gallery: int = 4
) -> RunRecord:
    """The record of a run below ``out`` that ended well, on the spec's benchmark and ``same``; else it is run now."""
    for record in store.load_all(a.out / "runs"):
        if record.status == "ok" and record.spec.dataset == spec["dataset"] and same(record):
            return record
    return evaluate(spec, data_root=root, results=a.out / "runs", workers=0, gallery=gallery)


def mean_of(record: RunRecord, names: Collection[str], what: str = "iou") -> float:
    """Mean IoU or PQ in percent over those of the classes that occur; NaN where none does."""
    assert record.metrics is not None  # a run that did not finish has raised
    panoptic = record.metrics.panoptic
    scores = record.metrics.classes if what == "iou" or panoptic is None else panoptic.classes
    found = [getattr(score, what) for score in scores if score.name in names]
    return statistics.fmean([value for value in found if value is not None] or [float("nan")])


def seen_and_unseen(trained_on: str, root: Path, other: str, wording: str) -> tuple[set[str], set[str]]:
    """Classes of training scenes, and classes of another benchmark that no training scene had by name or first word."""
    mine, theirs = benchmarks.get(trained_on), benchmarks.get(other)
    pixels = class_pixels(mine.for_split("train"), root)
    seen = {name for name, count in zip(mine.class_names, pixels, strict=True) if count}
    same = {words[0] for words, count in zip(mine.words(wording), pixels, strict=True) if count}
    named = zip(theirs.class_names, theirs.words(wording), strict=True)
    return seen, {name for name, words in named if name not in seen and words[0].strip() not in same}


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean over seeds, with the standard deviation where there are several; a dash where there is none (None, NaN)."""
    known = [value for value in values if value is not None and value == value]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}"


def figures_table(a: argparse.Namespace, rows: list[Row], columns: Sequence[str], more: Iterable[str] = ()) -> None:
    """Writes ``learning.csv`` (every figure) and ``learning.md`` (means over seeds), and prints it.

    Seconds per iteration, where the rows have them, are given as their median.
    """
    with (a.out / "learning.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    timed = "seconds_per_iteration" in rows[0]
    body = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        cells: list[object] = [name, *(mean_and_spread([row[column] for row in own]) for column in columns), len(own)]
        body.append([*cells, *([statistics.median(row["seconds_per_iteration"] for row in own)] if timed else [])])
    lines = [*markdown(["row", *columns, "seeds", *(["s/iteration"] if timed else [])], body), *more]
    write(lines, a.out / "learning.md")
    print("\n".join(lines))


def report(
    a: argparse.Namespace, rows: list[Row], columns: Sequence[str], logs: Mapping[str, Path], more: Iterable[str] = ()
) -> None:
    """Both of :func:`figures_table` and ``losses.png``."""
    figures_table(a, rows, columns, more)
    plot_losses(logs, a.out / "losses.png", f"{a.iters} iterations on generated scenes, seed {a.seeds[0]}")
