"""``ovbench train``: one method on a benchmark's training images, then its evaluation."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich, print_text, progress, say
from ovbench.cli.inputs import own_device, parse_options, require_own_scenes
from ovbench.cli.run import show as show_run
from ovbench.cli.train_progress import bars

if TYPE_CHECKING:
    from ovbench.train.plan import Plan
    from ovbench.train.record import TrainRecord

HOW = "Recipe (all recorded)"


def train(
    *,
    method: o.NeededMethod,
    dataset: o.NeededDataset,
    data_root: o.DataRoot = None,
    demo: o.Demo = False,
    arch: o.Arch = None,
    weights: o.Weights = None,
    init: Annotated[str | None, typer.Option(metavar="FILE", help="Start from a whole closed-set network: a training's model.safetensors, of the method or of its host, or a checkpoint of mmseg.", rich_help_panel=HOW)] = None,
    new_classes: Annotated[bool, typer.Option("--new-classes", help="With --init: its classes are others, so what depends on them begins anew.", rich_help_panel=HOW)] = False,
    templates: o.Prompts = None,
    option: o.MethodOptions = None,
    recipe: Annotated[Path | None, typer.Option(help="JSON or YAML file with fields of the recipe; those it lacks are the method's.", rich_help_panel=HOW)] = None,
    changes: o.Settings = None,
    limit_iters: Annotated[int | None, typer.Option(min=1, help="Stop after N iterations of the schedule: a trial, whose results stay out of tables.", rich_help_panel=HOW)] = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    workers: o.Workers = None,
    resume: o.Resume = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, metavar="N", help="Iterations between checkpoints.", rich_help_panel=o.WORK)] = 1000,
    val_every: Annotated[int | None, typer.Option("--val-every", min=1, metavar="N", help="Evaluate on the validation split every N iterations and keep the best weights; moves no weight of the training.", rich_help_panel=o.WORK)] = None,
    launcher: o.Launcher = "none",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write the losses for TensorBoard.", rich_help_panel=o.WORK)] = False,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Evaluate the weights on the validation split afterwards.", rich_help_panel=o.WORK)] = True,
    trainings: Annotated[Path, typer.Option("--trainings", help="Root folder of the trainings.", rich_help_panel=o.WORK)] = Path("results/trainings"),
    runs: Annotated[Path, typer.Option("--runs", help="Root folder of the evaluation's record.", rich_help_panel=o.WORK)] = o.RUNS,
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Trains a method with its recipe, keeps losses, checkpoints and provenance, and evaluates the result.

    --weights is what is started from. Closed-set methods: pretrained weights of the encoder, random where left out. Others:
    CLIP's, OpenAI's where left out. With --dry-run recipe and trainable parameters are printed, with --json the spec. A
    training that is resumed ends in the same weights.

    \b
    Examples:
    ovbench train --demo -m caa-fcn -d ade20k
    ovbench train -m caa-psp -d ade20k --data-root ~/data --weights resnet50_v1c.pth --device cuda --set amp=float16
    ovbench train -m ecac-fcn -d context59 --data-root ~/data --dry-run
    ovbench train -m psp -d ade20k --data-root ~/data --limit-iters 200 --no-eval
    ovbench train -m caa-psp -d ade20k --data-root ~/data --val-every 8000
    ovbench train -m ecac-psp -d context59 --data-root ~/data --init psp.safetensors --new-classes --set head_lr_mult=10
    torchrun --nproc-per-node 4 -m ovbench train -m psp -d ade20k --data-root ~/data --launcher pytorch
    ovbench run -m caa-psp -d ade20k --data-root ~/data --weights results/trainings/.../model.safetensors -p closed-set-ms
    """
    require_own_scenes(demo, data_root)
    from ovbench.evaluate.ranks import require_launcher

    require_launcher(launcher)
    from ovbench.train import processes
    from ovbench.train.plan import TrainOptions, plan
    from ovbench.train.training import train as start

    with bars(launcher) as (on_iteration, on_count):
        where = TrainOptions(
            data_root=data_root, results=trainings, resume=resume, workers=workers, checkpoint_every=checkpoint_every,
            val_every=val_every, tensorboard=tensorboard, launcher=launcher, command=shlex.join(["ovbench", *sys.argv[1:]]),
            on_iteration=on_iteration, on_count=on_count, on_message=say,
        )  # fmt: skip
        planned = plan(
            method, dataset, arch=arch, weights=weights, method_options=parse_options(option), recipe_file=recipe,
            changes=parse_options(changes, "--set"), limit_iters=limit_iters, sentences=templates, seed=seed,
            device=own_device(device, launcher), demo=demo, init=init, new_classes=new_classes,
            options=where,
        )  # fmt: skip
        if dry_run:
            print_json(planned.spec.model_dump(mode="json")) if json else show_plan(planned)
            return
        record, folder = start(planned, where)
    if not processes.part(launcher):
        return
    if json:
        print_json(record.model_dump(mode="json"))
    else:
        show(record, folder)
    if evaluate:
        from ovbench.evaluate import run as evaluation
        from ovbench.train.validation import evaluation_of

        with progress("images") as on_images:
            found = evaluation(
                evaluation_of(record.spec, folder / "model.safetensors"),
                data_root=planned.root,
                results=runs,
                workers=workers,
                skip_recorded=resume,
                command=shlex.join(["ovbench", *sys.argv[1:]]),
                on_images=on_images,
                on_message=say,
            )
        if not json:
            show_run(found, runs)


def show_plan(planned: Plan) -> None:
    """Prints what would be trained, and how."""
    from rich.table import Table

    spec = planned.spec
    print_text(
        f"{spec.method} on {spec.dataset}: {spec.arch}, {spec.images} images, {spec.stop} of {spec.planned} iterations"
    )
    table = Table(title="parameters", title_justify="left")
    for head in ("part", "params M", "trainable M", "lr x"):
        table.add_column(head, justify="left" if head == "part" else "right")
    for row in planned.parts:
        lr = "-" if row.lr_mult is None else f"{row.lr_mult:g}"
        table.add_row(row.part, f"{row.params / 1e6:.3f}", f"{row.trainable / 1e6:.3f}", lr)
    trained, total = sum(row.trainable for row in planned.parts), sum(row.params for row in planned.parts)
    table.add_row("all", f"{total / 1e6:.3f}", f"{trained / 1e6:.3f}", "", style="bold")
    print_rich(table)
    fields = Table(title="recipe", title_justify="left")
    fields.add_column("field")
    fields.add_column("value")
    for name, value in spec.recipe.model_dump(mode="json").items():
        mark = "  (set by you)" if name in spec.overrides else ""
        fields.add_row(name, f"{value}{mark}")
    print_rich(fields)


def show(record: TrainRecord, folder: Path) -> None:
    """Prints the main figures and where the files are."""
    spec = record.spec
    speed = (
        "" if record.seconds_per_iteration is None else f", {record.seconds_per_iteration:.3g} s per iteration (median)"
    )
    memory = (
        "" if record.peak_memory_mib is None else f", peak {record.peak_memory_mib:.0f} MiB ({record.peak_memory_kind})"
    )
    print_text(f"{spec.method} on {spec.dataset}: {record.iterations} of {spec.planned} iterations{speed}{memory}")
    if spec.demo:
        print_text("demo: generated scenes. A check of the pipeline, no evidence about the method.")
    if record.iterations < spec.planned:
        print_text("trial: not the whole schedule. Kept out of tables of results.")
    if record.validation:
        best, last = max(record.validation, key=lambda point: point.miou), record.validation[-1]
        print_text(
            f"validation: best mIoU {best.miou:.2f} after {best.iteration}, last {last.miou:.2f} after {last.iteration}"
        )
        print_text(f"best     {folder / 'best.safetensors'}")
    for name, file in (("weights", "model.safetensors"), ("record", "training.json"), ("picture", "losses.png")):
        print_text(f"{name:8s} {folder / file}")
