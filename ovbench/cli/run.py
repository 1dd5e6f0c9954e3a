"""``ovbench run``: one method on one benchmark, one record."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_rich, print_text, progress, say
from ovbench.cli.inputs import (
    choose,
    overrides_of,
    own_device,
    parse_options,
    parse_window_batch,
    require_own_scenes,
    weights_of,
)
from ovbench.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from ovbench.results.panoptic_quality import PanopticMetrics
    from ovbench.results.record import RunRecord
    from ovbench.spec import RunSpec


def run(
    *,
    method: o.Method = None,
    solver: o.Solver = None,
    base: o.Base = None,
    attention: o.Attention = None,
    attention_weights: o.AttentionWeights = None,
    dataset: o.NeededDataset,
    data_root: o.DataRoot = None,
    demo: o.Demo = False,
    arch: o.Arch = None,
    pretrained: o.Pretrained = None,
    weights: o.Weights = None,
    activation: o.Activation = "auto",
    option: o.MethodOptions = None,
    seed: o.Seed = 0,
    protocol: o.Preset = "paper",
    short_side: o.ShortSide = None,
    long_side: o.LongSide = None,
    mode: o.Mode = None,
    crop: o.Crop = None,
    stride: o.Stride = None,
    square: o.Square = None,
    pad: o.Pad = None,
    clip_resize: o.ClipResize = None,
    object_thd: o.ObjectThd = None,
    overlap_thd: o.OverlapThd = None,
    logit_scale: o.LogitScale = None,
    prob_thd: o.ProbThd = None,
    area_thd: o.AreaThd = None,
    area_rule: o.AreaRule = None,
    upsample: o.Upsample = None,
    pamr: o.Pamr = None,
    wording: o.Wording = None,
    templates: o.Prompts = None,
    scales: o.Scales = None,
    flip: o.Flip = None,
    patch_pad: o.PatchPad = None,
    pos_interp: o.PosInterp = None,
    device: o.Device = None,
    dtype: o.Dtype = "float32",
    batch: o.Batch = None,
    window_batch: o.WindowBatch = "auto",
    compile_mode: o.Compile = "off",
    workers: o.Workers = None,
    limit: o.Limit = None,
    resume: o.Resume = False,
    skip_recorded: Annotated[bool, typer.Option("--skip-recorded", help="Print the record instead where the results hold a whole one of the same spec and data.", rich_help_panel=o.WORK)] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Look at the first labels before the run.", rich_help_panel=o.WORK)] = True,
    on_error: Annotated[str, typer.Option("--on-error", metavar="stop|skip", help="An image that is missing or cannot be read stops the run with its name, or is skipped, listed in the record and marks the run partial.", rich_help_panel=o.WORK)] = "stop",
    launcher: o.Launcher = "none",
    results: o.Results = o.RUNS,
    save_predictions: Annotated[bool, typer.Option("--save-predictions", help="Write a palette PNG per image beside the record.", rich_help_panel=o.WORK)] = False,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the overlay gallery; 0 = none.", rich_help_panel=o.WORK)] = 4,
    cache_masks: Annotated[float, typer.Option(metavar="GIB", min=0, help="Mask-based methods: keep the generator's proposals on disk, in at most so many GiB; 0 = off. Changes no number.", rich_help_panel=o.WORK)] = 0.0,
    track: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Send the record on to {trackers}; may be repeated.", rich_help_panel=o.WORK)] = None,
    dump_config: Annotated[Path | None, typer.Option(help="Write the run as a plain mmengine config to this file and stop.", rich_help_panel=o.WORK)] = None,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Evaluates a method on a benchmark and stores the record: mIoU, cost, provenance.

    Without --weights and --pretrained the weights are OpenAI's CLIP, with --demo the built-in one.

    \b
    Examples:
    ovbench run --demo --method sc-clip --dataset voc21
    ovbench run -m sc-clip -d voc21 --data-root ~/data/VOCdevkit --device cuda
    ovbench run -m clip -d ade20k --data-root ~/data --arch ViT-L-14 --protocol common --limit 50
    ovbench run -m sc-clip -d voc20 --data-root ~/data --weights ViT-B-16.safetensors --resume
    ovbench run --solver op --base sc-clip --attention dinov2-b14 -d voc20 --data-root ~/data
    torchrun --nproc-per-node 4 -m ovbench run -m sc-clip -d ade20k --data-root ~/data --launcher pytorch
    """
    spec = _spec(locals())
    from ovbench.evaluate import RunOptions, ranks
    from ovbench.evaluate import run as evaluate
    from ovbench.evaluate import track as trackers

    lead = ranks.is_first(launcher)
    chosen = trackers.require(track or [])  # before the run: nothing is found missing after it

    how: dict[str, Any] = {
        "data_root": data_root, "results": results, "batch": batch, "workers": workers, "resume": resume,
        "skip_recorded": skip_recorded, "on_error": on_error, "launcher": launcher, "save_predictions": save_predictions,
        "gallery": gallery, "check": check, "cache_masks": cache_masks, "on_message": say,
        "command": shlex.join(["ovbench", *sys.argv[1:]]),
    }  # fmt: skip
    if dump_config is not None:
        from ovbench.evaluate.config import dump_config as dump

        print_text(str(dump(spec, RunOptions(**how), dump_config)))
        return
    with terminable(), progress("images") if lead else nullcontext(lambda done, total: None) as on_images:
        record = evaluate(spec, **how, on_images=on_images)
    if not lead:  # one speaks for all
        return
    for name in chosen:
        where = trackers.send(record, name, results)
        if where is not None:
            say(f"{name}: {where}")
    if json:
        print_text(record.to_json())
    else:
        show(record, results)


def spec_of(arguments: Sequence[str]) -> RunSpec:
    """What ``ovbench run ARGUMENTS`` would run, without running it.

    Raises:
        UsageError: As ``ovbench run`` would.
    """
    try:
        context = _parser().make_context("run", list(arguments))
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's copy of click has no public names for its errors
        if not callable(message):
            raise
        raise UsageError(" ".join(str(message()).split())) from None
    device = context.params["device"]  # the run's own business: this machine may have none, or be another
    named = None if device is None else device.partition(":")[0]
    return _spec({**context.params, "device": named, "launcher": "none"})


@cache
def _parser() -> Any:
    """What reads the options of :func:`run`; made once, since a sweep asks it for every job."""
    app = typer.Typer()
    app.command("run")(run)
    return typer.main.get_command(app)


def _spec(given: Mapping[str, Any]) -> RunSpec:
    """The spec that the options of :func:`run` ask for."""
    method, options = choose(
        given["method"], given["solver"], given["base"], given["attention"], given["attention_weights"],
        parse_options(given["option"]),
    )  # fmt: skip
    demo, dataset = given["demo"], given["dataset"]
    source = weights_of(given["weights"], given["pretrained"], "builtin" if demo else "openai")
    if demo and source not in {"builtin", "random"}:
        raise UsageError("--demo runs on the built-in CLIP: leave --weights and --pretrained away.")
    require_own_scenes(demo, given["data_root"])
    from ovbench import benchmarks
    from ovbench import spec as specs
    from ovbench.registry import method_info

    method_info(method)
    benchmarks.get(dataset)
    found: RunSpec = specs.validated(
        specs.RunSpec,
        {
            "method": method,
            "method_options": options,
            "dataset": dataset,
            "protocol": specs.protocol(given["protocol"], dataset, method=method, **overrides_of(given)),
            "weights": source,
            "device": own_device(given["device"], given["launcher"]),
            "window_batch": parse_window_batch(given["window_batch"]),
            **{name: given[name] for name in ("arch", "activation", "dtype", "compile_mode", "limit", "seed", "demo")},
        },
    )
    return found


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM (a scheduler that wants the machine back) is as Ctrl-C: what is done is recorded, and resumable."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def show(record: RunRecord, results: Path) -> None:
    """Prints the main figures and where the files are."""
    from rich.table import Table

    from ovbench.results.store import record_path

    metrics, cost = record.metrics, record.efficiency
    assert metrics is not None and cost is not None  # a record without them is never "ok"
    spec = record.spec
    title = f"{spec.method} on {spec.dataset}, {spec.protocol.name} protocol"
    table = Table(title=f"{title} (demo)" if record.demo else title, title_justify="left")
    for head in ("mIoU %", "mAcc %", "aAcc %", "images", "images/s", "ms/image", "GMACs/image", "params M", "peak MiB"):
        table.add_column(head, justify="right")
    latency = cost.latency_ms
    table.add_row(
        *(_figure(value, 2) for value in (metrics.miou, metrics.macc, metrics.aacc)),
        str(metrics.images),
        _figure(cost.images_per_s, 2),
        f"{latency.median:.1f} (IQR {latency.iqr:.1f})" if latency else "-",
        _figure(cost.image_gmacs, 2),
        _figure(cost.params_m, 1),
        _figure(cost.peak_memory_mib, 0),
    )
    print_rich(table)
    if metrics.panoptic is not None:
        print_rich(_panoptic_table(metrics.panoptic))
    elif metrics.panoptic_reason:
        print_text(f"no panoptic quality: {metrics.panoptic_reason}")
    if record.demo:
        print_text("demo: built-in CLIP or generated scenes. A check of the pipeline, no evidence about the method.")
    for failure in record.failures:
        print_text(f"skipped  {failure.name}: {failure.reason}")
    if record.reason:
        print_text(f"partial: {record.reason}. Kept out of tables of results.")
    path = record_path(record, results)
    print_text(f"record   {path}")
    for name, file in (("picture", "gallery.png"), ("labels", "predictions")):
        if (path.with_suffix("") / file).exists():
            print_text(f"{name:8s} {path.with_suffix('') / file}")


def _panoptic_table(found: PanopticMetrics) -> Table:
    from rich.table import Table

    table = Table()
    for head in ("", "PQ %", "SQ %", "RQ %", "classes"):
        table.add_column(head, justify="right" if head else "left")
    count = found.things.classes + found.stuff.classes
    for kind, mean, classes in (
        ("all", found, count),
        ("things", found.things, found.things.classes),
        ("stuff", found.stuff, found.stuff.classes),
    ):
        table.add_row(kind, *(_figure(value, 2) for value in (mean.pq, mean.sq, mean.rq)), str(classes))
    return table


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
