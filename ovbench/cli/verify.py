"""``ovbench verify``: a recorded run repeated and compared to the pixel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich, print_text, progress, say
from ovbench.cli.inputs import parse_options

if TYPE_CHECKING:
    from ovbench.evaluate.verify import Verification

DIFFERENT = 6
"""Exit code where areas differ."""
_SHOWN = 10


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Path of a record, a run id, or the beginning of one.")],
    data_root: o.DataRoot = None,
    limit: o.Limit = None,
    device: o.Device = None,
    weights: o.Weights = None,
    method: o.Method = None,
    dataset: o.Dataset = None,
    wording: o.Wording = None,
    templates: o.Prompts = None,
    option: o.MethodOptions = None,
    workers: o.Workers = None,
    results: o.Results = o.RUNS,
    json: o.Json = False,
) -> None:
    """Runs a record's spec again and says whether the areas of every image come out again.

    Compared are pixel counts per image and class, which no rounding hides; where they differ: which images, by how many
    pixels at least, and what that does to the mIoU. Besides, every field of machine, packages, code, data and spec that
    differs. The repeated run is not stored.

    All is as recorded. Files of your own are to be named again, from where they lie now: weights (whose sha256 must be the
    recorded one), --method PATH.py:Class, --dataset, --wording, --prompts; --option replaces a recorded one, --results is
    where RUN is an id.

    Exit codes: 0 all areas agree; 6 areas differ; others as everywhere. With the recorded window batch 'auto', another
    machine may move single pixels; 'ovbench run --window-batch N' does not leave that to memory.

    \b
    Examples:
    ovbench verify results/runs/sc-clip/voc21/20261121T071431Z-03ffc8b1-5f4f.json --data-root ~/data
    ovbench verify 20261121T0714 --limit 20 --data-root ~/data
    ovbench verify run.json --weights ViT-B-16.safetensors --data-root ~/data --json
    """
    from ovbench.results.compare import find

    loaded = find(run, results)
    from ovbench.evaluate.verify import Given
    from ovbench.evaluate.verify import verify as repeat

    given = Given(
        data_root=data_root, weights=Path(weights) if weights else None, method=method, dataset=dataset, wording=wording,
        templates=templates, options=parse_options(option), device=device, images=limit, workers=workers,
    )  # fmt: skip
    with progress("images") as on_images:
        found = repeat(loaded.record, loaded.path, given, on_images=on_images, on_message=say)
    if json:
        print_json(found.to_data())
    else:
        show(found)
    if not found.equal:
        raise typer.Exit(DIFFERENT)


def show(found: Verification) -> None:
    """Prints the verdict, the images that differ and the fields that differ."""
    from rich.table import Table
    from rich.text import Text

    print_text("\n".join(verdict(found)))
    if found.differing:
        grid = Table(title=Text("Images that differ", style="bold"), title_justify="left")
        grid.add_column("image", overflow="fold")
        for name in ("pixels, at least", "of labelled"):
            grid.add_column(name, justify="right")
        for entry in found.differing[:_SHOWN]:
            share = 100 * entry.pixels / entry.labelled if entry.labelled else 0.0
            grid.add_row(Text(entry.name), str(entry.pixels), f"{share:.4f} %")
        print_rich(grid)
        if len(found.differing) > _SHOWN:
            print_text(f"... and {len(found.differing) - _SHOWN} more (--json has all)")
    groups: dict[str, Mapping[str, tuple[Any, Any]]] = {
        "IoU of classes": {name: (_percent(one), _percent(two)) for name, (one, two) in found.classes.items()},
        "spec": found.spec,
        "data": found.data,
        "machine": found.environment,
        "packages": found.packages,
        "code": found.code,
    }
    same = [name for name, pairs in groups.items() if not pairs]
    if len(same) < len(groups):
        grid = Table(title=Text("What differs", style="bold"), title_justify="left")
        for name in ("", "", "recorded", "now"):
            grid.add_column(name, overflow="fold")
        for group, pairs in groups.items():
            for name, (one, two) in pairs.items():
                grid.add_row(*map(Text, (group, name, _text(one), _text(two))))
        print_rich(grid)
    print_text(f"The same as recorded: {', '.join(same) or 'none of ' + ', '.join(groups)}.")


def verdict(found: Verification) -> list[str]:
    """Whether the run came out again, in a few lines."""
    part = "" if found.images == found.of else f" (of {found.of} that were recorded)"
    what = f"{found.images} image{'s' if found.images > 1 else ''}{part}"
    if found.equal:
        how = "the areas of all classes in every image" if found.per_image else "the areas of all classes, summed"
        pq = "" if found.pq[0] is None else f", PQ {_percent(found.pq[0])}"
        return [f"EQUAL: {what}, {how} are the recorded ones.", f"mIoU {_percent(found.miou[0])}{pq}"]
    lines = [f"DIFFERENT: {what}."]
    if found.label_differs:
        names = ", ".join(found.label_differs[:3]) + (" ..." if len(found.label_differs) > 3 else "")
        lines.append(f"The labels of {len(found.label_differs)} images are not the recorded ones: {names}")
    share = 100 * found.pixels / found.labelled if found.labelled else 0.0
    where = f" in {len(found.differing)} images" if found.per_image else ""
    lines.append(f"At least {found.pixels} of {found.labelled} labelled pixels ({share:.4f} %){where}.")
    one, two = found.miou
    moved = "" if found.difference is None else f", {found.difference:+.4g} points"
    lines.append(f"mIoU {_percent(one)} recorded, {_percent(two)} now{moved}")
    if not found.panoptic_equal:
        lines.append(f"PQ {_percent(found.pq[0])} recorded, {_percent(found.pq[1])} now")
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    return "–" if value is None else str(value)
