"""``ovbench data``: benchmarks from downloads or generated, checks and class frequencies of what lies on disk.

What there is, downloads and fingerprints are in ``data_files``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import bar, print_json, print_rich, print_text
from ovbench.cli.data_files import data_download, data_fingerprint, data_list
from ovbench.cli.inputs import require_split, root_of, thread_count
from ovbench.cli.known import Verb
from ovbench.errors import DataError, UsageError

if TYPE_CHECKING:
    from ovbench.benchmarks.benchmark import Benchmark
    from ovbench.benchmarks.check.outcome import CheckReport
    from ovbench.benchmarks.frequencies import Frequencies
    from ovbench.benchmarks.prepare import Prepared

app = typer.Typer(
    name="data",
    help="Fetch and prepare benchmarks, make small generated data, check your own, or count its classes.",
    no_args_is_help=True,
)

TRAIN_IMAGES = 64


app.command("list", cls=Verb)(data_list)
app.command("download", cls=Verb)(data_download)
app.command("fingerprint", cls=Verb)(data_fingerprint)


@app.command(cls=Verb)
def synth(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Benchmarks ('ovbench list datasets'), or all.")
    ],
    out: o.DefaultOut = Path("data/synth"),
    split: o.Split = "val",
    images: Annotated[int, typer.Option(help="Validation images per benchmark.")] = 16,
    train_images: Annotated[int, typer.Option(help="Training images per benchmark.")] = TRAIN_IMAGES,
    long_tail: Annotated[
        float,
        typer.Option(
            metavar="EXPONENT",
            help="Class number r is in training images in proportion to r^-EXPONENT; validation shows all evenly.",
        ),
    ] = 0.0,
    num_classes: o.NumClasses = None,
    size: Annotated[
        str | None, typer.Option(metavar="SHORTxLONG", help="Size in pixels, e.g. 128x160; by default the benchmark's.")
    ] = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Write a small generated copy of benchmarks in their true layout, file names and label encoding.

    The pictures are drawn, not photographs: they are for trying the tool and say nothing about a method. Each benchmark goes into
    OUT/NAME; of 'all' those that have the split. Every --seed is held out from the built-in CLIP's training.

    \b
    Examples:
    ovbench data synth voc21
    ovbench data synth all --images 24 --out scenes
    ovbench data synth ade20k --split all --train-images 400 --long-tail 1 --size 128x160
    ovbench run --method sc-clip --weights builtin --dataset voc21 --data-root scenes
    """
    from ovbench.benchmarks import get, with_split
    from ovbench.benchmarks import names as known
    from ovbench.benchmarks.synth.copies import synth as write

    counts = _counts(split, images, train_images)
    chosen = list(dict.fromkeys(names))
    if "all" in names:
        chosen = with_split("train") if counts["train_images"] else known()
    for name in chosen:
        benchmark = get(name)  # an unknown name must not leave half of the copies behind
        if counts["train_images"]:
            benchmark.for_split("train")
    options: dict[str, Any] = {
        **counts,
        "seed": seed,
        "long_tail": long_tail,
        "classes": num_classes,
        "size": _size(size),
    }
    written = []
    for name in chosen:
        with bar(name) as progress:
            root = write(name, out / get(name).name, progress=progress, **options)
        written.append({"benchmark": name, "root": str(root), **options})
        if not json:
            made = {"images": counts["images"], "training images": counts["train_images"]}
            text = " and ".join(f"{count} {what}" for what, count in made.items() if count)
            print_text(f"{name}: {text} in {root}")
    if json:
        print_json(written)


def _counts(split: str, images: int, train_images: int) -> dict[str, int]:
    """How many images of each split are asked for."""
    require_split(split)
    if split == "val" and train_images != TRAIN_IMAGES:
        raise UsageError("--train-images goes with --split train or --split all; the default is val alone.")
    return {
        "images": 0 if split == "train" else images,
        "train_images": 0 if split == "val" else train_images,
    }


def _size(text: str | None) -> tuple[int, int] | None:
    """Short and long side of "128x160"."""
    if text is None:
        return None
    short, cross, long = text.lower().partition("x")
    if not (cross and short.isdecimal() and long.isdecimal()):
        raise UsageError(f"The size is '{text}'; give short and long side in pixels, e.g. --size 128x160.")
    return int(short), int(long)


@app.command(cls=Verb)
def check(
    name: Annotated[str, typer.Argument(help="Benchmark ('ovbench list datasets'), or the path of your own.")],
    data_root: o.DataRoot = None,
    workers: o.Workers = None,
    split: o.Split = "val",
    limit: o.Limit = None,
    json: o.Json = False,
) -> None:
    """Look for missing, damaged, mismatched or wrongly numbered files, each with examples and the fix.

    Exit code 3 where something would spoil a score; warnings alone exit 0.

    \b
    Examples:
    ovbench data check voc21 --data-root ~/data
    ovbench data check cityscapes --data-root /data/cityscapes --json
    ovbench data check ade20k --data-root ~/data --split train
    ovbench data check ./mydata
    """
    from ovbench.benchmarks import get, own_root
    from ovbench.benchmarks.check.checking import check as examine

    benchmark = get(name)
    root = root_of(name, data_root, own_root(benchmark))
    splits = list(benchmark.splits) if split == "all" else [benchmark.for_split(split).split]
    reports = []
    for one in splits:
        with bar(f"check {name} {one}") as progress:
            reports.append(
                examine(name, root, split=one, workers=thread_count(workers), limit=limit, progress=progress)
            )
        if not json:
            _print_report(reports[-1])
    if json:
        print_json([report.to_json() for report in reports] if split == "all" else reports[0].to_json())
    if not all(report.ok for report in reports):
        raise typer.Exit(DataError.exit_code)


def _print_report(report: CheckReport) -> None:
    """Problems, then one line that sums up."""
    from ovbench.benchmarks.check.outcome import describe

    for problem in report.problems:
        print_text(describe(problem))
    found = f"{report.checked} of {report.listed} pairs opened, {report.classes_present} classes"
    ignored = "" if report.ignore_share is None else f", {100 * report.ignore_share:.1f} % of pixels ignored"
    state = "ok" if report.ok else "not usable"
    made = " (generated)" if report.synthetic else ""
    which = report.benchmark if report.split == "val" else f"{report.benchmark} {report.split}"
    print_text(f"{which}: {state}: {report.root}{made}: {found}{ignored}")


@app.command(cls=Verb)
def prepare(
    name: Annotated[str, typer.Argument(help="Benchmark ('ovbench list datasets').")],
    source: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR|ARCHIVE", help="What you downloaded: folder, zip, tar, json; may be given several times."
        ),
    ],
    out: o.Out = None,
    split: o.Split = "all",
    workers: o.Workers = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:
    """Turn what you downloaded into the files that a benchmark reads, then check them.

    Archives are read, not unpacked. What is done stays done: after an interruption give the same command again.
    Nothing is written outside the data root, and no file that something else made is replaced. The data root is --out;
    left out, the folder given as --source, in place. Split 'all' is those of which there are images.

    \b
    Examples:
    ovbench data prepare cityscapes --source ~/data/cityscapes
    ovbench data prepare coco_stuff --source val2017.zip --source stuffthingmaps_trainval2017.zip --out ~/data/coco
    ovbench data prepare context60 --source VOCtrainval_03-May-2010.tar --source trainval_merged.json --out ~/data/VOC2010
    ovbench data prepare voc21 --source ~/data/VOCdevkit/VOC2012 --dry-run
    """
    from ovbench.benchmarks.check.checking import check as examine
    from ovbench.benchmarks.prepare import prepare as make

    with bar(f"prepare {name}") as progress:
        made = make(name, source, out, split=split, workers=thread_count(workers), dry_run=dry_run, progress=progress)
    if not json:
        _print_prepared(made)
    reports = []
    for one in () if dry_run else made.splits:
        with bar(f"check {name} {one.split}") as progress:
            reports.append(examine(name, made.root, split=one.split, workers=thread_count(workers), progress=progress))
        if not json:
            _print_report(reports[-1])
    if json:
        print_json({**made.to_json(), "check": [report.to_json() for report in reports]})
    if not all(report.ok for report in reports):
        raise typer.Exit(DataError.exit_code)


def _print_prepared(made: Prepared) -> None:
    """A line for each split, one for the files."""
    for split in made.splits:
        short = "" if split.images == split.expected else f" (the official split has {split.expected})"
        print_text(f"{made.benchmark} {split.split}: {split.images} images, {split.labels} with labels{short}")
        if split.without_label:
            print_text(f"  without a label: {split.images - split.labels}, e.g. {', '.join(split.without_label)}")
        if split.unused:
            print_text(f"  labels without an image, left out: {split.unused}")
    for missing in made.missing:
        print_text(f"{made.benchmark} {missing}: no images in the sources, left out")
    counts = f"{made.converted} converted, {made.copied} copied, {made.done} there already"
    if made.converted + made.copied + made.done == 0:
        counts = "nothing to convert: the files are as the benchmark reads them"
    print_text(f"{'would be: ' if made.dry_run else ''}{counts}; data root {made.root}")


@app.command(cls=Verb)
def frequencies(
    name: Annotated[str, typer.Argument(help="Benchmark ('ovbench list datasets'), or the path of your own.")],
    data_root: o.DataRoot = None,
    split: o.Split = "train",
    workers: o.Workers = None,
    json: o.Json = False,
) -> None:
    """Count how often each class occurs in the labels: pixels, their share, and images.

    Counted once and kept in ovbench's cache folder for as long as names and sizes of the files stay the same.

    \b
    Examples:
    ovbench data frequencies ade20k --data-root ~/data
    ovbench data frequencies coco_stuff --data-root ~/data --workers 8 --json
    """
    from ovbench.benchmarks import get, own_root
    from ovbench.benchmarks.frequencies import frequencies as count

    benchmark = get(name)
    root = root_of(name, data_root, own_root(benchmark))
    benchmark = benchmark.for_split(split)
    with bar(f"count {name} {split}") as progress:
        found = count(benchmark, root, workers=workers or 0, progress=progress)
    rows = _class_rows(benchmark, found)
    if json:
        head = {"benchmark": benchmark.name, "split": split, "files": found.files, "ignored": found.ignored}
        print_json({**head, "classes": rows})
    else:
        _print_frequencies(benchmark, found, rows)


def _class_rows(benchmark: Benchmark, found: Frequencies) -> list[dict[str, Any]]:
    """One entry per class in label order; shares are of the counted pixels."""
    from ovbench.benchmarks.frequencies import thirds

    third_of = {index: third for third, part in thirds(found.pixels)._asdict().items() for index in part}
    total = int(found.pixels.sum())
    return [
        {
            "index": index,
            "name": name,
            "pixels": int(found.pixels[index]),
            "share": int(found.pixels[index]) / total if total else None,
            "images": int(found.images[index]),
            "third": third_of.get(index),
        }
        for index, name in enumerate(benchmark.class_names)
    ]


def _print_frequencies(benchmark: Benchmark, found: Frequencies, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(f"{benchmark.name} {benchmark.split}: {found.files} images", style="bold"))
    for heading in ("class", "pixels", "share", "images", "third"):
        grid.add_column(heading, justify="left" if heading in ("class", "third") else "right")
    for row in sorted(rows, key=lambda row: -int(row["pixels"])):
        share = "" if row["share"] is None else f"{100 * row['share']:.3f} %"
        cells = (row["name"], f"{row['pixels']:,}", share, str(row["images"]), row["third"] or "never")
        grid.add_row(*(Text(cell) for cell in cells))
    print_rich(grid)
    every = found.ignored + int(found.pixels.sum())
    if every:
        print_text(f"{100 * found.ignored / every:.2f} % of all pixels are ignored; shares are of the others.")
