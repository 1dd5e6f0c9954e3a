"""``ovbench profile``: what a method costs, without data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli.console import print_json, print_rich, print_text, say
from ovbench.cli.run import choose, parse_options, parse_window_batch
from ovbench.errors import UsageError

if TYPE_CHECKING:
    from ovbench.measure.profile.record import ProfileEfficiency, ProfileRecord, ProfileSpec
    from ovbench.results.record import Latency

WHAT, PROTOCOL, WORK = "What to profile", "Whole image", "How to measure"


def profile(
    method: Annotated[str | None, typer.Option("--method", "-m", help="Method ('ovbench list methods'), or PATH.py:Class. Of closed-set methods the whole network, or with --part decode_head the head.", rich_help_panel=WHAT)] = None,
    solver: Annotated[str | None, typer.Option(help="Discrepancy solver, as in 'ovbench run'.", rich_help_panel=WHAT)] = None,
    base: Annotated[str | None, typer.Option(help="Method whose logits a solver works on.", rich_help_panel=WHAT)] = None,
    attention: Annotated[str | None, typer.Option(help="Attention source of a solver or of proxyclip.", rich_help_panel=WHAT)] = None,
    attention_weights: Annotated[str | None, typer.Option(help="Its weights. Default: random where --weights is random or builtin.", rich_help_panel=WHAT)] = None,
    part: Annotated[str | None, typer.Option(help="decode_head: a closed-set head alone, on features of its encoder (--arch; default resnet50-v1c).", rich_help_panel=WHAT)] = None,
    arch: Annotated[str | None, typer.Option(help="open_clip architecture (default ViT-B-16), or a closed-set method's encoder.", rich_help_panel=WHAT)] = None,
    weights: Annotated[str, typer.Option(help="random (nothing is downloaded, the cost is the same), builtin, a tag or a file.", rich_help_panel=WHAT)] = "random",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the method; may be repeated.", rich_help_panel=WHAT)] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Benchmark whose preset values and class words are meant; no data is read.", rich_help_panel=WHAT)] = None,
    classes: Annotated[str | None, typer.Option(metavar="N|DATASET", help="Number of classes, or a benchmark that has them. Default: the dataset's, else 21 (heads: 150).", rich_help_panel=WHAT)] = None,
    features: Annotated[str | None, typer.Option(metavar="HxW", help="Decode heads: grid of the stride-8 stages (default 64x64), or the four grids of C1 to C4 with commas.", rich_help_panel=WHAT)] = None,
    input: Annotated[str | None, typer.Option("--input", metavar="HxW", help="Whole image at the network's input size. Default: the protocol's short side at 4:3.", rich_help_panel=PROTOCOL)] = None,
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Preset; 'paper' is the method's own.", rich_help_panel=PROTOCOL)] = "paper",
    mode: Annotated[str | None, typer.Option(help="slide or whole.", rich_help_panel=PROTOCOL)] = None,
    crop: Annotated[int | None, typer.Option(help="Window side in pixels.", rich_help_panel=PROTOCOL)] = None,
    stride: Annotated[int | None, typer.Option(help="Window step in pixels.", rich_help_panel=PROTOCOL)] = None,
    square: Annotated[int | None, typer.Option(min=0, help="Side of the square that is resized to; 0 = off.", rich_help_panel=PROTOCOL)] = None,
    upsample: Annotated[str | None, typer.Option(help="bilinear or jbu.", rich_help_panel=PROTOCOL)] = None,
    pamr: Annotated[int | None, typer.Option(help="Iterations of PAMR; 0 = off.", rich_help_panel=PROTOCOL)] = None,
    patch_pad: Annotated[str | None, typer.Option(help="none or symmetric.", rich_help_panel=PROTOCOL)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images (or inputs of a forward) per step; times are shared out.", rich_help_panel=WORK)] = 1,
    window_batch: Annotated[str, typer.Option(metavar="auto|N", help="Windows per forward of a whole image.", rich_help_panel=WORK)] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.", rich_help_panel=WORK)] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=WORK)] = "float32",
    compile_mode: Annotated[str, typer.Option("--compile", metavar="MODE", help="torch.compile: off, default, reduce-overhead or max-autotune.", rich_help_panel=WORK)] = "off",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: OMP_NUM_THREADS, else all cores.", rich_help_panel=WORK)] = None,
    count: Annotated[str, typer.Option(help="Convention of MACs and FLOPs: torch; fvcore (as detectron2-based papers print); modules (convolutions and linear layers, as mmcv- and thop-based papers print).", rich_help_panel=WORK)] = "torch",
    samples: Annotated[int, typer.Option(min=1, help="Timed passes of each latency.", rich_help_panel=WORK)] = 30,
    repeat: Annotated[int, typer.Option(min=1, help="Fresh processes one after another.", rich_help_panel=WORK)] = 1,
    throughput: Annotated[bool, typer.Option("--throughput/--no-throughput", help="Search the batch with the highest throughput.", rich_help_panel=WORK)] = True,
    params_only: Annotated[bool, typer.Option("--params-only", help="Parameters alone.", rich_help_panel=WORK)] = False,
    save: Annotated[bool, typer.Option("--save", help="Store the profile below --results.", rich_help_panel=WORK)] = False,
    results: Annotated[Path, typer.Option(help="Root folder of stored profiles.", rich_help_panel=WORK)] = Path("results/profiles"),
    seed: Annotated[int, typer.Option(help="Seed of random weights and of the input.", rich_help_panel=WORK)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON with the keys of a record's efficiency.", rich_help_panel=WORK)] = False,
) -> None:  # fmt: skip
    """Measures parameters, MACs, latency, throughput and memory of a method, in a fresh process with fixed threads.

    \b
    Examples:
    ovbench profile -m sc-clip
    ovbench profile -m proxyclip --classes ade20k --input 448x596 --device cuda --dtype float16
    ovbench profile -m clip --count fvcore --json
    ovbench profile -m psp --part decode_head --features 64x64 --count modules
    """
    options = parse_options(option or [])
    if part is None:
        method, options = choose(method, solver, base, attention, attention_weights, options)
    elif method is None or solver or base or attention or attention_weights:
        raise UsageError("--part decode_head needs --method, a decode head, and none of the options of a solver.")
    fields: dict[str, Any] = {
        "method": method, "method_options": options, "part": part, "arch": arch, "weights": weights,
        "dataset": dataset, "batch": batch, "window_batch": parse_window_batch(window_batch), "device": device,
        "dtype": dtype, "compile_mode": compile_mode, "threads": threads, "count": count, "samples": samples,
        "repeat": repeat, "throughput": throughput, "params_only": params_only, "seed": seed,
    }  # fmt: skip
    overrides = {
        "mode": mode, "crop": crop, "stride": stride, "square": square, "upsample": upsample, "pamr": pamr,
        "patch_pad": patch_pad,
    }  # fmt: skip
    if part is None:
        spec = _method_spec(fields, classes, input, features, protocol, overrides)
    else:
        spec = _head_spec(fields, classes, input, features, overrides)
    from ovbench.measure.profile.launch import profile as measure
    from ovbench.measure.profile.record import write

    record = measure(spec, command=shlex.join(["ovbench", *sys.argv[1:]]), on_message=say)
    path = write(record, results) if save else None
    for line in _warnings(record):
        say(f"Warning: {line}")
    if json:
        print_json(record.flat())
    else:
        show(record)
    if path is not None:
        say(f"profile  {path}")


def _method_spec(
    fields: dict[str, Any],
    classes: str | None,
    input: str | None,
    features: str | None,
    preset: str,
    overrides: dict[str, Any],
) -> ProfileSpec:
    """The spec of an open-vocabulary method, its names checked before any process starts."""
    from ovbench import benchmarks
    from ovbench import spec as specs
    from ovbench.measure.profile.record import ProfileSpec
    from ovbench.registry import method_info

    if features is not None:
        raise UsageError("--features is the input of a decode head: say --part decode_head, or give --input HxW.")
    method_info(fields["method"])
    number = None
    if classes is not None and classes.isdigit() and int(classes) > 0:
        number = int(classes)
    elif classes is not None:
        if fields["dataset"] is not None:
            raise UsageError("--dataset and --classes both name a benchmark: give --classes a number, or one of them.")
        if classes.isdigit():
            raise UsageError("--classes 0: at least one class is needed.")
        fields["dataset"] = classes
    if fields["dataset"] is not None:
        benchmarks.get(fields["dataset"])
    protocol = specs.protocol(preset, fields["dataset"], method=fields["method"], templates="plain", **overrides)
    spec: ProfileSpec = specs.validated(
        ProfileSpec, {**fields, "classes": number, "input": input, "protocol": protocol}
    )
    return spec


def _head_spec(
    fields: dict[str, Any], classes: str | None, input: str | None, features: str | None, overrides: dict[str, Any]
) -> ProfileSpec:
    """The spec of a closed-set decode head."""
    from ovbench import benchmarks
    from ovbench.measure.profile.record import ProfileSpec
    from ovbench.methods import hosts  # type: ignore[import-not-found]
    from ovbench.spec import validated

    if fields["part"] != "decode_head":
        raise UsageError(f"--part {fields['part']!r}: the only part is decode_head.")
    given = [name for name, value in {"input": input, **overrides}.items() if value is not None]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{names}: a decode head works on features alone. Give --features HxW and --classes N.")
    hosts.head_config(hosts.addon_and_host(fields["method"])[1], encoder=fields["arch"])
    hosts.feature_grids(features or "64x64")
    chosen = classes or fields["dataset"]
    number = None
    if chosen is not None:
        number = int(chosen) if chosen.isdigit() else benchmarks.get(chosen).num_classes
    spec: ProfileSpec = validated(ProfileSpec, {**fields, "classes": number, "features": features})
    return spec


def _warnings(record: ProfileRecord) -> list[str]:
    from ovbench.measure.samples import NOISE_WARNING

    figures = record.efficiency
    lines = [f"{name} is unstable: {reason}." for name, reason in figures.unstable.items()]
    lines += [
        f"{name} is noisy: IQR is {value:.0%} of the median."
        for name, value in figures.noise.items()
        if value > NOISE_WARNING and name not in figures.unstable
    ]
    lines += [f"{name} had not settled after {figures.warm_up[name]} warm-up passes." for name in figures.unsettled]
    samples = record.spec.samples
    if samples < 30 and not record.spec.params_only:
        lines.append(f"{samples} samples are few; 30 are the rule.")
    return lines


def show(record: ProfileRecord) -> None:
    """Prints the figures as a table, each with what it means."""
    from rich.table import Table

    spec, env = record.spec, record.environment
    what = f"{spec.method} {spec.part}" if spec.part else f"{spec.method}, {spec.arch}"
    machine = env.gpu or f"{env.cpu}, {env.threads} thread{'s' if env.threads > 1 else ''}"
    title = f"{what}, {spec.classes} classes, {spec.dtype}, batch {spec.batch}, {machine}"
    table = Table(title=title, title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("of what", overflow="fold")
    for row in _rows(record.efficiency, spec.input):
        table.add_row(*row)
    print_rich(table)
    figures = record.efficiency
    if figures.gmacs is not None:
        print_text(f"counted ({figures.convention}): {figures.counted}")
        print_text(f"not counted: {figures.not_counted}")
    if figures.unstable:
        print_text("~ unstable, not to be relied on")


def _rows(figures: ProfileEfficiency, size: str | None) -> list[tuple[str, str, str]]:
    whole = f"image {size}" if size else "one input"
    rows = [("params M", _number(figures.params_m, 3), f"trainable {_number(figures.trainable_params_m, 3)}")]
    rows += [(f"  {name}", _number(part.params_m, 3), "") for name, part in figures.parts.items()]
    if figures.gmacs is None:
        return rows
    convention = f"count {figures.convention}"
    rows.append(("GMACs of forward", _number(figures.gmacs, 3), f"{figures.input}; {convention}"))
    rows.append(("GFLOPs of forward", _number(figures.gflops, 3), "2 per MAC"))
    if figures.image_gmacs is not None:
        rows.append(("GMACs of image", _number(figures.image_gmacs, 3), f"{whole}; {convention}"))
    if figures.forward_ms is not None:
        rows.append(_timing("forward ms", figures.forward_ms, "one forward", "forward_ms" in figures.unstable))
    if figures.latency_ms is not None:
        rows.append(_timing("latency ms", figures.latency_ms, whole, "latency_ms" in figures.unstable))
    rows += [_timing(f"  {name}", stage, "stage", False) for name, stage in figures.stages_ms.items()]
    if figures.throughput is not None:
        found = figures.throughput
        rows.append(("images/s", _number(found.images_per_s, 2), f"at batch {found.batch}; larger: {found.stopped}"))
    if figures.peak_memory_mib is not None:
        kind = str(figures.peak_memory_kind)
        rows.append(("peak MiB", _number(figures.peak_memory_mib, 0), f"{whole}; {kind}"))
    if figures.forward_peak_memory_mib is not None:
        rows.append(("  of forward", _number(figures.forward_peak_memory_mib, 0), "one forward"))
    if figures.peak_reserved_mib is not None:
        rows.append(("  reserved", _number(figures.peak_reserved_mib, 0), f"{whole}; cuda-reserved"))
    return rows


def _timing(name: str, latency: Latency, what: str, unstable: bool) -> tuple[str, str, str]:
    value = f"{'~' if unstable else ''}{latency.median:.2f}"
    return name, value, f"{what}; IQR {latency.iqr:.2f}, p95 {latency.p95:.2f}, n {latency.n}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
