"""``ovbench compare``: runs held against the first one, and the Pareto plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich, say
from ovbench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from ovbench.results.compare import Comparison, Loaded


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...", help="Run ids, the beginning of run ids, or paths of records; the first is the base."
        ),
    ] = None,
    results: o.Results = o.RUNS,
    show_classes: Annotated[
        int, typer.Option("--show-classes", min=0, help="Classes shown at each end of the list; 0 shows all.")
    ] = 10,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")] = 10_000,
    confidence: Annotated[float, typer.Option(help="Percent of the resamples inside the interval.")] = 95.0,
    seed: o.Seed = 0,
    pareto: Annotated[str | None, typer.Option(help="What mIoU is plotted over: {costs}. Left out: latency.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the Pareto plot of the runs to FILE.png or FILE.svg.")
    ] = None,
    dataset: o.Dataset = None,
    json: o.Json = False,
) -> None:
    """Compares runs with the first one: IoU of each class, the difference of mIoU with its interval, and cost.

    The interval is a paired bootstrap over images: images are drawn with replacement, and the mIoU of both runs is
    computed anew from the summed areas of the images drawn. It needs the areas beside the records, and the same images in
    both runs. Times and memory are compared only where the machines agree. With --plot and no RUN, --dataset chooses the
    newest run of every setting on that benchmark.

    \b
    Examples:
    ovbench compare 20260102T0310 20260102T0325
    ovbench compare a.json b.json c.json --json
    ovbench compare --dataset voc21 --pareto gmacs --plot voc21.svg
    """
    from ovbench.results import compare as module

    if plot is None and (pareto is not None or dataset is not None):
        raise UsageError(f"{'--pareto' if pareto is not None else '--dataset'} belongs to a plot: add --plot FILE.png.")
    if runs and dataset is not None:
        raise UsageError("--dataset chooses the runs of a plot: leave it out where runs are named.")
    if plot is not None and not runs:
        _plot(_newest(results, dataset), pareto, plot)
        return
    if not runs or (len(runs) < 2 and plot is None):
        raise UsageError(
            "Name at least two runs, e.g. 'ovbench compare RUN RUN'. Their ids are in 'ovbench table --json'."
        )
    found = [module.find(name, results) for name in runs]
    if plot is not None:
        _plot([item.record for item in found], pareto, plot)
    comparisons = [
        module.compare(found[0], other, resamples=resamples, seed=seed, confidence=confidence) for other in found[1:]
    ]
    if json:
        print_json({"comparisons": [comparison.to_data() for comparison in comparisons]})
        return
    for comparison, other in zip(comparisons, found[1:], strict=True):
        _show(comparison, found[0], other, show_classes)


def _newest(results: Path, dataset: str | None) -> list[Any]:
    """The newest finished run of every setting that is a result."""
    from ovbench.results import store
    from ovbench.tables.runs import table

    records = store.load_all(results, on_problem=say)
    if dataset is not None:
        known = {record.spec.dataset for record in records}
        if dataset not in known:
            raise unknown_name("dataset", dataset, known) if known else UsageError(f"No run in '{results}'.")
        records = [record for record in records if record.spec.dataset == dataset]
    sections = [section for section in table(records).sections if section.kind == "results"]
    shown = {cell.run_id for section in sections for row in section.rows for cell in row.cells}
    chosen = [record for record in records if record.run_id in shown]
    if not chosen:
        raise UsageError(
            f"No run in '{results}' is a result (finished, all images, trained weights, no demo). Name the runs to plot."
        )
    return chosen


def _plot(records: list[Any], pareto: str | None, path: Path) -> None:
    from ovbench.tables import pareto as module

    cost = pareto or "latency"
    if cost not in module.COSTS:
        raise unknown_name("cost", cost, module.COSTS)
    chosen = module.points(records, cost)  # type: ignore[arg-type]
    module.plot(chosen, module.headline(records, cost), cost, path)  # type: ignore[arg-type]
    say(f"Plot of {len(chosen)} run{'s' if len(chosen) > 1 else ''}: {path}")


def _show(comparison: Comparison, first: Loaded, second: Loaded, ends: int) -> None:
    from rich.table import Table
    from rich.text import Text

    names = [f"{item.record.spec.method} {item.record.run_id}" for item in (first, second)]
    lines = [Text(f"{names[1]}\ncompared with {names[0]}\non {first.record.spec.dataset}", style="bold")]
    lines += [Text(f"Note: {warning}", style="yellow") for warning in comparison.warnings]
    for group in ("settings", "machine"):
        pairs = getattr(comparison, group)
        if pairs:
            lines.append(
                Text(f"{group} that differ: " + ", ".join(f"{key} {a} / {b}" for key, (a, b) in pairs.items()))
            )
    print_rich(*lines)
    print_rich(Text("\n".join(_verdict(comparison))))
    grid = Table(title=Text("IoU of each class (%)", style="bold"))
    grid.add_column("class", overflow="fold")
    for name in ("first", "second", "difference"):
        grid.add_column(name, justify="right", no_wrap=True)
    entries = list(comparison.classes)
    hidden = max(0, len(entries) - 2 * ends) if ends else 0
    for index, entry in enumerate(entries):
        if hidden and ends <= index < len(entries) - ends:
            if index == ends:
                grid.add_row(Text(f"... {hidden} more (--show-classes 0 shows all)"), "", "", "")
            continue
        values = (_number(entry.first), _number(entry.second), _number(entry.difference, "+"))
        grid.add_row(*map(Text, (entry.name, *values)))
    print_rich(grid, _costs(comparison))


def _verdict(comparison: Comparison) -> list[str]:
    """The difference of mIoU and how sure it is, in words."""
    one, two = comparison.miou
    lines = [f"mIoU {_number(one)} -> {_number(two)}: {_number(comparison.difference, '+')} points"]
    sure = comparison.interval
    if sure is None:
        lines.append(f"No interval: {comparison.interval_reason}")
        return lines
    lines.append(
        f"{sure.confidence:g} % interval [{_number(sure.low, '+')}, {_number(sure.high, '+')}] (paired bootstrap over "
        f"{sure.images} images, {sure.resamples} resamples, seed {sure.seed}); better in {100 * sure.above_zero:.1f} % "
        "of the resamples"
    )
    if sure.low <= 0 <= sure.high:
        lines.append("The interval holds 0: the images do not tell the two apart.")
    return lines


def _costs(comparison: Comparison) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ovbench.results.quantities import FIGURES

    grid = Table(title=Text("Cost", style="bold"))
    grid.add_column("")
    for name in ("first", "second", "second / first"):
        grid.add_column(name, justify="right", overflow="fold")
    for ratio in comparison.ratios:
        figure = FIGURES[ratio.figure]
        values = [
            "–" if value is None else f"{value:.{figure.digits}f} {figure.unit}"
            for value in (ratio.first, ratio.second)
        ]
        shown = ratio.reason if ratio.ratio is None else f"{ratio.ratio:.3f}"
        grid.add_row(*map(Text, (figure.label, *values, shown)))
    return grid


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.2f}".replace("-", "−")
