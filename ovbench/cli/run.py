"""``ovbench run``: one method on one benchmark, one record."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli.console import print_rich, print_text, progress, say
from ovbench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from rich.table import Table

    from ovbench.results.panoptic_quality import PanopticMetrics
    from ovbench.results.record import RunRecord
    from ovbench.spec import RunSpec

SOLVER = "discrepancy-"  # method ids of the solvers begin so
WHAT, PROTOCOL, WORK = "What to run", "Protocol (overrides the preset, all recorded)", "How to work"


def run(
    *,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Method ('ovbench list methods'), or a class in a file of your own: PATH.py:Class (runs the file).", rich_help_panel=WHAT)] = None,
    solver: Annotated[str | None, typer.Option(help="Discrepancy solver on the method's logits: op, mv, opmv, kl or propagate.", rich_help_panel=WHAT)] = None,
    base: Annotated[str | None, typer.Option(help="Method whose logits a solver works on, the same as --method beside --solver.", rich_help_panel=WHAT)] = None,
    attention: Annotated[str | None, typer.Option(help="Attention source of a solver or of proxyclip: clip, dino-b8, dinov2-s14, dinov2-b14, dinov2-b14-reg, sd2.", rich_help_panel=WHAT)] = None,
    attention_weights: Annotated[str | None, typer.Option(help="Its weights: a file (sd2: a folder) or 'random'. Default: the published ones, from the hub.", rich_help_panel=WHAT)] = None,
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Benchmark ('ovbench list datasets'), or your own: a folder, or a config PATH.py.", rich_help_panel=WHAT)],
    data_root: Annotated[Path | None, typer.Option(help="Folder of the dataset, or one above it: customary layouts are found.", rich_help_panel=WHAT)] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Built-in CLIP on generated scenes: needs no download and no data. Tries the tool, proves nothing about the method.", rich_help_panel=WHAT)] = False,
    arch: Annotated[str | None, typer.Option(help="open_clip architecture, e.g. ViT-B-16, ViT-L-14. Not needed for files in OpenAI's format.", rich_help_panel=WHAT)] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag (openai, laion2b_s34b_b88k, ...) or hf-hub:org/name.", rich_help_panel=WHAT)] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file (.safetensors, .pt), 'random' or 'builtin'. Default without --demo: --pretrained openai.", rich_help_panel=WHAT)] = None,
    activation: Annotated[str, typer.Option(help="auto, gelu or quickgelu; only for weight files that do not tell.", rich_help_panel=WHAT)] = "auto",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the method, e.g. -o beta=0.3; may be repeated.", rich_help_panel=WHAT)] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.", rich_help_panel=WHAT)] = 0,
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Preset ('ovbench list protocols'); 'paper' is the method's own.", rich_help_panel=PROTOCOL)] = "paper",
    short_side: Annotated[int | None, typer.Option(help="Short side of the input in pixels; 0 = as it is.", rich_help_panel=PROTOCOL)] = None,
    long_side: Annotated[int | None, typer.Option(help="Upper limit of the long side in pixels.", rich_help_panel=PROTOCOL)] = None,
    mode: Annotated[str | None, typer.Option(help="slide or whole.", rich_help_panel=PROTOCOL)] = None,
    crop: Annotated[int | None, typer.Option(help="Window side in pixels.", rich_help_panel=PROTOCOL)] = None,
    stride: Annotated[int | None, typer.Option(help="Window step in pixels.", rich_help_panel=PROTOCOL)] = None,
    square: Annotated[int | None, typer.Option(min=0, help="Side of the square that CAT-Seg cuts its windows from, or that CLIP sees of an image beside a mask generator; 0 = off.", rich_help_panel=PROTOCOL)] = None,
    logit_scale: Annotated[float | None, typer.Option(help="Factor on the cosine logits before the softmax.", rich_help_panel=PROTOCOL)] = None,
    prob_thd: Annotated[float | None, typer.Option(help="Below this probability: background.", rich_help_panel=PROTOCOL)] = None,
    area_thd: Annotated[float | None, typer.Option(help="Classes with at most this share of the foreground are dropped.", rich_help_panel=PROTOCOL)] = None,
    area_rule: Annotated[str | None, typer.Option(help="Where dropped pixels go: background or next-best.", rich_help_panel=PROTOCOL)] = None,
    upsample: Annotated[str | None, typer.Option(help="Patch logits to the input's size: bilinear or jbu.", rich_help_panel=PROTOCOL)] = None,
    pamr: Annotated[int | None, typer.Option(help="Iterations of PAMR; 0 = off.", rich_help_panel=PROTOCOL)] = None,
    wording: Annotated[str | None, typer.Option(help="Named word list of the benchmark, or a file: one class per line, synonyms after commas.", rich_help_panel=PROTOCOL)] = None,
    templates: Annotated[str | None, typer.Option("--prompts", "--templates", metavar="NAME", help="How words become sentences: imagenet80, plain (the word alone), lsmseg[:ATTRIBUTE+...] (descriptions, 'ovbench prompts --help'), or a file: one template per line, or .json descriptions.", rich_help_panel=PROTOCOL)] = None,
    scales: Annotated[str | None, typer.Option(metavar="A,B,...", help="Closed-set methods: factors on the size, whose probabilities are averaged, e.g. 0.5,1,1.5.", rich_help_panel=PROTOCOL)] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Closed-set methods: also the mirrored image.", rich_help_panel=PROTOCOL)] = None,
    patch_pad: Annotated[str | None, typer.Option(help="Input that is no multiple of the patch: none or symmetric.", rich_help_panel=PROTOCOL)] = None,
    pos_interp: Annotated[str | None, typer.Option(help="Position embeddings: offset, size or bilinear.", rich_help_panel=PROTOCOL)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.", rich_help_panel=WORK)] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=WORK)] = "float32",
    batch: Annotated[int | None, typer.Option(min=1, help="Images per step. Default: 1 on a CPU, 8 on a GPU.", rich_help_panel=WORK)] = None,
    window_batch: Annotated[str, typer.Option(metavar="auto|N", help="Windows per forward. auto: up to 32, halved when memory runs out. N: exactly N, the tail padded, so that results are equal to the bit for any --batch.", rich_help_panel=WORK)] = "auto",
    compile_mode: Annotated[str, typer.Option("--compile", metavar="MODE", help="torch.compile: off, default, reduce-overhead (CUDA graphs) or max-autotune. Pays off on long runs on a GPU only.", rich_help_panel=WORK)] = "off",
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read images.", rich_help_panel=WORK)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images; marks the run partial.", rich_help_panel=WORK)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest unfinished run of the same spec and data.", rich_help_panel=WORK)] = False,
    skip_recorded: Annotated[bool, typer.Option("--skip-recorded", help="Print the record instead where the results hold a whole one of the same spec and data.", rich_help_panel=WORK)] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Look at the first labels before the run.", rich_help_panel=WORK)] = True,
    on_error: Annotated[str, typer.Option("--on-error", metavar="stop|skip", help="An image that is missing or cannot be read stops the run with its name, or is skipped, listed in the record and marks the run partial.", rich_help_panel=WORK)] = "stop",
    launcher: Annotated[str, typer.Option(help="Several processes share the images: none, pytorch (torchrun) or slurm (srun).", rich_help_panel=WORK)] = "none",
    results: Annotated[Path, typer.Option(help="Root folder of the records.", rich_help_panel=WORK)] = Path("results/runs"),
    save_predictions: Annotated[bool, typer.Option("--save-predictions", help="Write a palette PNG per image beside the record.", rich_help_panel=WORK)] = False,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the overlay gallery; 0 = none.", rich_help_panel=WORK)] = 4,
    cache_masks: Annotated[float, typer.Option(metavar="GIB", min=0, help="Mask-based methods: keep the generator's proposals on disk, in at most so many GiB; 0 = off. Changes no number.", rich_help_panel=WORK)] = 0.0,
    track: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Send the record on to tensorboard, mlflow or wandb; may be repeated.", rich_help_panel=WORK)] = None,
    dump_config: Annotated[Path | None, typer.Option(help="Write the run as a plain mmengine config to this file and stop.", rich_help_panel=WORK)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record, alone on stdout.", rich_help_panel=WORK)] = False,
) -> None:  # fmt: skip
    """Evaluates a method on a benchmark and stores the record: mIoU, cost, provenance.

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
    app = typer.Typer()
    app.command("run")(run)
    try:
        context = typer.main.get_command(app).make_context("run", list(arguments))
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's copy of click has no public names for its errors
        if not callable(message):
            raise
        raise UsageError(" ".join(str(message()).split())) from None
    device = context.params["device"]  # the run's own business: this machine may have none, or be another
    named = None if device is None else device.partition(":")[0]
    return _spec({**context.params, "device": named, "launcher": "none"})


def _spec(given: Mapping[str, Any]) -> RunSpec:
    """The spec that the options of :func:`run` ask for."""
    method, options = choose(
        given["method"], given["solver"], given["base"], given["attention"], given["attention_weights"],
        parse_options(given["option"] or []),
    )  # fmt: skip
    weights, pretrained, demo, dataset = (given[name] for name in ("weights", "pretrained", "demo", "dataset"))
    if weights and pretrained:
        raise UsageError("--weights and --pretrained both say where the weights come from: give one of them.")
    source = weights or pretrained or ("builtin" if demo else "openai")
    if demo and source not in {"builtin", "random"}:
        raise UsageError("--demo runs on the built-in CLIP: leave --weights and --pretrained away.")
    if demo and given["data_root"] is not None:
        raise UsageError(
            "--demo makes its own scenes: leave --data-root away, or leave --demo away and say --weights builtin."
        )
    from ovbench import benchmarks
    from ovbench import spec as specs
    from ovbench.registry import method_info

    method_info(method)
    benchmarks.get(dataset)
    overrides = {name: given[name] for name in specs.Protocol.model_fields if name in given}
    overrides["scales"] = parse_scales(given["scales"])
    found: RunSpec = specs.validated(
        specs.RunSpec,
        {
            "method": method,
            "method_options": options,
            "dataset": dataset,
            "protocol": specs.protocol(given["protocol"], dataset, method=method, **overrides),
            "weights": source,
            "device": own_device(given["device"], given["launcher"]),
            "window_batch": parse_window_batch(given["window_batch"]),
            **{name: given[name] for name in ("arch", "activation", "dtype", "compile_mode", "limit", "seed", "demo")},
        },
    )
    return found


def choose(
    method: str | None,
    solver: str | None,
    base: str | None,
    attention: str | None,
    attention_weights: str | None,
    options: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The method id and its options from ``--method``, ``--solver`` and what goes with them.

    ``--method sc-clip --solver op`` and ``--base sc-clip --solver op`` are ``discrepancy-op`` with ``base=sc-clip``.

    Raises:
        UsageError: No method, or options that contradict each other.
    """
    from ovbench.registry import method_info, method_names

    options = dict(options)
    if solver is not None:
        solvers = [name.removeprefix(SOLVER) for name in method_names() if name.startswith(SOLVER)]
        if solver not in solvers:
            raise unknown_name("solver", solver, solvers)
        if method is not None and method.startswith(SOLVER):
            raise UsageError(
                f"--method {method} is a solver already: leave --solver away, or name its base with --base."
            )
        if method is not None and base is not None:
            raise UsageError("Beside --solver, --method and --base say the same: give one of them.")
        method, base = SOLVER + solver, base or method
    if method is None:
        raise UsageError("Which method? Give --method NAME ('ovbench list methods'), or --solver op --base NAME.")
    if base is not None:
        if not method.startswith(SOLVER):
            raise UsageError(f"--base is for a solver: add --solver op, or leave it away beside --method {method}.")
        method_info(base)
        options["base"] = base
    for name, value in (("attention", attention), ("attention_weights", attention_weights)):
        if value is not None:
            options[name] = value
    return method, options


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


def own_device(given: str | None, launcher: str) -> str:
    """The device as given or found; a GPU that is named, or this process' own among several, is torch's current one from now.

    Raises:
        UsageError: It is not there.
    """
    device = given or default_device()
    kind, _, index = device.partition(":")
    if kind != "cuda" or (launcher == "none" and not index):
        return device
    import torch

    from ovbench.models.build import require_device

    require_device(device)
    # slurm's own name: torchrun's is set when the processes are joined. With one visible GPU per task it is the first.
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    torch.cuda.set_device(int(index) if index else local % torch.cuda.device_count())
    return kind


def default_device() -> str:
    """``cuda`` where torch sees a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_window_batch(text: str) -> int | None:
    """``"auto"`` as None, a number as it is.

    Raises:
        UsageError: Neither.
    """
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--window-batch {text!r}: give auto or a number from 1 up.")
    return int(text)


def parse_scales(text: str | None) -> tuple[float, ...] | None:
    """``"0.5,1"`` as (0.5, 1.0).

    Raises:
        UsageError: Not numbers.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--scales {text!r}: give factors, e.g. --scales 0.5,1,1.5.") from None


def parse_options(pairs: list[str], flag: str = "--option") -> dict[str, Any]:
    """``["beta=0.3"]`` as ``{"beta": "0.3"}``; the method converts to its own types.

    Raises:
        UsageError: Not KEY=VALUE.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            example = "lr=0.01" if flag == "--set" else "beta=0.3"
            raise UsageError(f"{flag} {pair!r}: give KEY=VALUE, e.g. {flag} {example}.")
        options[key.strip()] = value.strip()
    return options


def show(record: RunRecord, results: Path) -> None:
    """Prints the main figures and where the files are."""
    from rich.table import Table

    from ovbench.results.store import record_path

    metrics, cost = record.metrics, record.efficiency
    assert metrics is not None and cost is not None  # a record without them is never "ok"
    spec = record.spec
    title = f"{spec.method} on {spec.dataset}, {spec.protocol.name} protocol"
    table = Table(title=f"{title} (demo)" if record.demo else title, title_justify="left")
    for head in ("mIoU %", "mAcc %", "aAcc %", "images", "images/s", "ms/image", "GMACs", "params M", "peak MiB"):
        table.add_column(head, justify="right")
    latency = cost.latency_ms
    table.add_row(
        *(_figure(value, 2) for value in (metrics.miou, metrics.macc, metrics.aacc)),
        str(metrics.images),
        _figure(cost.images_per_s, 2),
        f"{latency.median:.1f} (IQR {latency.iqr:.1f})" if latency else "-",
        _figure(cost.gmacs, 2),
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
