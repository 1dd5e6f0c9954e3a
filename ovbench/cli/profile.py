"""``ovbench profile``: what a method costs, without data."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich, print_text, say
from ovbench.cli.inputs import choose, overrides_of, parse_options, parse_window_batch, read_classes
from ovbench.errors import UsageError

if TYPE_CHECKING:
    from ovbench.measure.profile.record import ProfileEfficiency, ProfileRecord, ProfileSpec
    from ovbench.results.record import Latency


def profile(
    method: o.Method = None,
    solver: o.Solver = None,
    base: o.Base = None,
    attention: o.Attention = None,
    attention_weights: o.AttentionWeights = None,
    part: Annotated[str | None, typer.Option(help="decode_head: a closed-set head alone, on features of its encoder (--arch; default resnet50-v1c).", rich_help_panel=o.WHAT)] = None,
    arch: o.Arch = None,
    weights: o.Weights = None,
    option: o.MethodOptions = None,
    dataset: o.Dataset = None,
    classes: o.Classes = None,
    num_classes: o.NumClasses = None,
    features: Annotated[str | None, typer.Option(metavar="HxW", help="Decode heads: grid of the stride-8 stages (default 64x64), or the four grids of C1 to C4 with commas.", rich_help_panel=o.WHAT)] = None,
    input: Annotated[str | None, typer.Option("--input", metavar="HxW", help="Whole image at the network's input size. Default: the protocol's short side at 4:3.", rich_help_panel=o.PROTOCOL)] = None,
    protocol: o.Preset = "paper",
    mode: o.Mode = None,
    crop: o.Crop = None,
    stride: o.Stride = None,
    square: o.Square = None,
    upsample: o.Upsample = None,
    pamr: o.Pamr = None,
    patch_pad: o.PatchPad = None,
    batch: o.Batch = None,
    window_batch: o.WindowBatch = "auto",
    device: o.Device = None,
    dtype: o.Dtype = "float32",
    compile_mode: o.Compile = "off",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: OMP_NUM_THREADS, else all cores.", rich_help_panel=o.WORK)] = None,
    count: Annotated[str, typer.Option(help="Convention of MACs and FLOPs: {conventions}; fvcore as detectron2-based papers print, modules (convolutions and linear layers) as mmcv- and thop-based papers print.", rich_help_panel=o.WORK)] = "torch",
    samples: Annotated[int, typer.Option(min=1, help="Timed passes of each latency.", rich_help_panel=o.WORK)] = 30,
    repeat: Annotated[int, typer.Option(min=1, help="Fresh processes one after another.", rich_help_panel=o.WORK)] = 1,
    throughput: Annotated[bool, typer.Option("--throughput/--no-throughput", help="Search the batch with the highest throughput.", rich_help_panel=o.WORK)] = True,
    params_only: Annotated[bool, typer.Option("--params-only", help="Parameters alone.", rich_help_panel=o.WORK)] = False,
    save: Annotated[bool, typer.Option("--save", help="Store the profile below --profiles.", rich_help_panel=o.WORK)] = False,
    profiles: o.Profiles = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Measures parameters, MACs, latency, throughput and memory of a method, in a fresh process with fixed threads.

    Needs no data and, with weights that are random unless --weights says otherwise, no download. A benchmark, by --dataset
    or --classes, brings its preset values and class words; without classes there are 21, of a decode head 150. Of a
    closed-set method the whole network is measured, with --part decode_head the head. Times of a --batch are shared out.

    \b
    Examples:
    ovbench profile -m sc-clip
    ovbench profile -m proxyclip --classes ade20k --input 448x596 --device cuda --dtype float16
    ovbench profile -m clip --count fvcore --json
    ovbench profile -m psp --part decode_head --features 64x64 --count modules
    """
    given = locals()
    options = parse_options(option)
    if part is None:
        method, options = choose(method, solver, base, attention, attention_weights, options)
    elif method is None or solver or base or attention or attention_weights:
        raise UsageError("--part decode_head needs --method, a decode head, and none of the options of a solver.")
    fields: dict[str, Any] = {
        "method": method, "method_options": options, "part": part, "arch": arch, "weights": weights or "random",
        "dataset": dataset, "batch": batch or 1, "window_batch": parse_window_batch(window_batch), "device": device,
        "dtype": dtype, "compile_mode": compile_mode, "threads": threads, "count": count, "samples": samples,
        "repeat": repeat, "throughput": throughput, "params_only": params_only, "seed": seed,
    }  # fmt: skip
    fields |= _class_fields(dataset, classes, num_classes)
    overrides = overrides_of(given)
    if part is None:
        spec = _method_spec(fields, input, features, protocol, overrides)
    else:
        spec = _head_spec(fields, input, features, overrides)
    from ovbench.measure.profile.launch import profile as measure
    from ovbench.measure.profile.record import DEFAULT_ROOT, write

    record = measure(spec, command=shlex.join(["ovbench", *sys.argv[1:]]), on_message=say)
    path = write(record, profiles or DEFAULT_ROOT) if save else None
    for line in _warnings(record):
        say(f"Warning: {line}")
    if json:
        print_json(record.flat())
    else:
        show(record)
    if path is not None:
        say(f"profile  {path}")


def _class_fields(dataset: str | None, classes: str | None, number: int | None) -> dict[str, Any]:
    """The fields of the spec that say which classes are meant."""
    if classes is None:
        return {"classes": number}
    if classes.isdecimal():
        raise UsageError(
            f"--classes {classes}: a number of classes is --num-classes {classes} now; --classes takes words, a file or a "
            "benchmark's name, as everywhere."
        )
    if number is not None:
        raise UsageError("--classes and --num-classes both say how many classes there are: give one of them.")
    found = read_classes(classes)
    if found.benchmark is None:
        return {"classes": len(found.entries), "words": sum(map(len, found.words))}
    if dataset is not None:
        raise UsageError("--dataset and --classes both name a benchmark: give one of them, or --num-classes N.")
    return {"dataset": found.benchmark}


def _method_spec(
    fields: dict[str, Any], input: str | None, features: str | None, preset: str, overrides: dict[str, Any]
) -> ProfileSpec:
    """The spec of an open-vocabulary method, its names checked before any process starts."""
    from ovbench import benchmarks
    from ovbench import spec as specs
    from ovbench.measure.profile.record import ProfileSpec
    from ovbench.registry import method_info

    if features is not None:
        raise UsageError("--features is the input of a decode head: say --part decode_head, or give --input HxW.")
    method_info(fields["method"])
    if fields["dataset"] is not None:
        benchmarks.get(fields["dataset"])
    protocol = specs.protocol(preset, fields["dataset"], method=fields["method"], templates="plain", **overrides)
    spec: ProfileSpec = specs.validated(ProfileSpec, {**fields, "input": input, "protocol": protocol})
    return spec


def _head_spec(
    fields: dict[str, Any], input: str | None, features: str | None, overrides: dict[str, Any]
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
        raise UsageError(f"{names}: a decode head works on features alone. Give --features HxW and --num-classes N.")
    hosts.head_config(hosts.addon_and_host(fields["method"])[1], encoder=fields["arch"])
    hosts.feature_grids(features or "64x64")
    if fields["dataset"] is not None and fields["classes"] is None:
        fields["classes"] = benchmarks.get(fields["dataset"]).num_classes
    fields["words"] = None
    spec: ProfileSpec = validated(ProfileSpec, {**fields, "features": features})
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
