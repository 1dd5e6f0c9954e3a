"""One definition per option of the command line: its names, its type and what its help says, for every verb that has it.

A verb's parameter is annotated with one of these and adds nothing but its default. ``{names}`` in a help text are looked up
where they are defined when help is asked for, see :mod:`ovbench.cli.known`. An option that a single verb has may stand there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT, PROTOCOL, WORK = "What", "Protocol (overrides the preset, all recorded)", "How to work"

# fmt: off
# What

_METHOD = typer.Option("--method", "-m", help="Method ('ovbench list methods'), or a class in a file of your own: PATH.py:Class (runs the file).", rich_help_panel=WHAT)
Method = Annotated[str | None, _METHOD]
NeededMethod = Annotated[str, _METHOD]
Methods = Annotated[str | None, typer.Option("--methods", "-m", metavar="A,B,...", help="Methods; 'all' are those of the open-vocabulary track, 'closed-set' those of the other.", rich_help_panel=WHAT)]
Solver = Annotated[str | None, typer.Option("--solver", help="Discrepancy solver on the method's logits: {solvers}.", rich_help_panel=WHAT)]
Base = Annotated[str | None, typer.Option("--base", help="Method whose logits a solver works on, the same as --method beside --solver.", rich_help_panel=WHAT)]
Attention = Annotated[str | None, typer.Option("--attention", help="Attention source of a solver or of proxyclip: {sources}.", rich_help_panel=WHAT)]
AttentionWeights = Annotated[str | None, typer.Option("--attention-weights", help="Its weights: a file (sd2: a folder) or 'random'. Left out: the published ones from the hub, in 'profile' as --weights.", rich_help_panel=WHAT)]
_DATASET = typer.Option("--dataset", "-d", help="Benchmark ('ovbench list datasets'), or your own: a folder, or a config PATH.py.", rich_help_panel=WHAT)
Dataset = Annotated[str | None, _DATASET]
NeededDataset = Annotated[str, _DATASET]
SeveralDatasets = Annotated[list[str] | None, _DATASET]
Datasets = Annotated[str | None, typer.Option("--datasets", "-d", metavar="A,B,...", help="Benchmarks; 'eight' are the customary eight, 'all' all.", rich_help_panel=WHAT)]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder of the dataset, or one above it: customary layouts are found. Not needed for a folder of your own.", rich_help_panel=WHAT)]
Demo = Annotated[bool, typer.Option("--demo", help="Generated scenes and a small network: needs no download and no data. Tries the tool, proves nothing about the method.", rich_help_panel=WHAT)]
_CLASSES = typer.Option("--classes", metavar="WORDS|FILE|BENCHMARK", help="Words with commas between them, a file (one class per line, 'name: synonym, synonym'), or the name of a benchmark. An existing file comes first, then a benchmark.", rich_help_panel=WHAT)
Classes = Annotated[str | None, _CLASSES]
NumClasses = Annotated[int | None, typer.Option("--num-classes", min=1, help="Number of classes: as many made-up ones, or when scenes are drawn the first that can be.", rich_help_panel=WHAT)]
Arch = Annotated[str | None, typer.Option("--arch", help="open_clip architecture, e.g. ViT-B-16, ViT-L-14, or the encoder of a closed-set method, e.g. resnet50-v1c, swin-b. Not needed where a weights file tells.", rich_help_panel=WHAT)]
Pretrained = Annotated[str | None, typer.Option("--pretrained", help="open_clip tag (openai, laion2b_s34b_b88k, ...) or hf-hub:org/name.", rich_help_panel=WHAT)]
Weights = Annotated[str | None, typer.Option("--weights", help="Weights file (.safetensors, .pt, .pth), 'random', 'builtin', or a tag as of --pretrained.", rich_help_panel=WHAT)]
Activation = Annotated[str, typer.Option("--activation", help="{activation}; only for weight files that do not tell.", rich_help_panel=WHAT)]
MethodOptions = Annotated[list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the method, e.g. -o beta=0.3; may be repeated.", rich_help_panel=WHAT)]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In 'train' a field of the recipe, e.g. --set lr=0.005; in 'sweep' an option of 'ovbench run' for all runs, e.g. --set dtype=bfloat16 --set option.beta=0.3. May be repeated.", rich_help_panel=WHAT)]
Split = Annotated[str, typer.Option("--split", help="{splits} (train where the benchmark has it; all where more than one split can be taken at a time).", rich_help_panel=WHAT)]
Attributes = Annotated[str | None, typer.Option("--attributes", metavar="A+B|all", help="Attributes of a description, of {attributes}, in this order. Left out: {default_attributes}, of 'generate' all.", rich_help_panel=WHAT)]
Paper = Annotated[str | None, typer.Option("--paper", help="A paper's table: {papers}; another printer, e.g. naclip-repo; or a method, e.g. sc-clip: what each prints of it. In 'sweep' its runs and profiles, in place of a grid.", rich_help_panel=WHAT)]
PaperTable = Annotated[str | None, typer.Option("--table", help="Which table of --paper, e.g. 1, 3a, 5.8 or complexity; left out: lists them.", rich_help_panel=WHAT)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is drawn at random: weights, order, scenes, samples.", rich_help_panel=WHAT)]

# Protocol

Preset = Annotated[str, typer.Option("--protocol", "-p", help="Preset ('ovbench list protocols'); 'paper' is the method's own.", rich_help_panel=PROTOCOL)]
ShortSide = Annotated[int | None, typer.Option("--short-side", min=0, help="Short side of the input in pixels; 0 = as it is.", rich_help_panel=PROTOCOL)]
LongSide = Annotated[int | None, typer.Option("--long-side", help="Upper limit of the long side in pixels.", rich_help_panel=PROTOCOL)]
Mode = Annotated[str | None, typer.Option("--mode", help="{mode}.", rich_help_panel=PROTOCOL)]
Crop = Annotated[int | None, typer.Option("--crop", help="Window side in pixels.", rich_help_panel=PROTOCOL)]
Stride = Annotated[int | None, typer.Option("--stride", help="Window step in pixels.", rich_help_panel=PROTOCOL)]
Square = Annotated[int | None, typer.Option("--square", min=0, help="Side of the square that CAT-Seg cuts its windows from, or that CLIP sees of an image beside a mask generator; 0 = off.", rich_help_panel=PROTOCOL)]
Pad = Annotated[int | None, typer.Option("--pad", min=0, help="Mask-based methods: pad the image to multiples of this before CLIP sees it; 0 = resize to whole patches.", rich_help_panel=PROTOCOL)]
ClipResize = Annotated[str | None, typer.Option("--clip-resize", help="Mask-based methods: how the image is resized for CLIP: {clip_resize}.", rich_help_panel=PROTOCOL)]
ObjectThd = Annotated[float | None, typer.Option("--object-thd", help="Mask-based methods, segments: a mask whose best class is not more probable is left out.", rich_help_panel=PROTOCOL)]
OverlapThd = Annotated[float | None, typer.Option("--overlap-thd", help="Mask-based methods, segments: a mask that keeps less of its area is dropped.", rich_help_panel=PROTOCOL)]
LogitScale = Annotated[float | None, typer.Option("--logit-scale", help="Factor on the cosine logits before the softmax.", rich_help_panel=PROTOCOL)]
ProbThd = Annotated[float | None, typer.Option("--prob-thd", help="Below this probability: the background.", rich_help_panel=PROTOCOL)]
AreaThd = Annotated[float | None, typer.Option("--area-thd", help="Classes with at most this share of the foreground are dropped to the background, see --area-rule.", rich_help_panel=PROTOCOL)]
Background = Annotated[str | None, typer.Option("--background", help="Class that thresholds leave pixels to. Left out: the one called 'background'.", rich_help_panel=PROTOCOL)]
AreaRule = Annotated[str | None, typer.Option("--area-rule", help="Where dropped pixels go: {area_rule}.", rich_help_panel=PROTOCOL)]
Upsample = Annotated[str | None, typer.Option("--upsample", help="Patch logits to the image's size: {upsample}.", rich_help_panel=PROTOCOL)]
Pamr = Annotated[int | None, typer.Option("--pamr", help="Iterations of PAMR; 0 = off.", rich_help_panel=PROTOCOL)]
Wording = Annotated[str | None, typer.Option("--wording", help="Named word list of the benchmark, or a file: one class per line, synonyms after commas.", rich_help_panel=PROTOCOL)]
Prompts = Annotated[str | None, typer.Option("--prompts", "--templates", metavar="NAME", help="How words become sentences: imagenet80, plain (the word alone) or fc-clip; lsmseg[:ATTRIBUTE+...] (descriptions, 'ovbench prompts --help'), or a file: one template per line, or .json descriptions.", rich_help_panel=PROTOCOL)]
Scales = Annotated[str | None, typer.Option("--scales", metavar="A,B,...", help="Closed-set methods: factors on the size, whose probabilities are averaged, e.g. 0.5,1,1.5.", rich_help_panel=PROTOCOL)]
Flip = Annotated[bool | None, typer.Option("--flip/--no-flip", help="Closed-set methods: also the mirrored image.", rich_help_panel=PROTOCOL)]
PatchPad = Annotated[str | None, typer.Option("--patch-pad", help="Input that is no multiple of the patch: {patch_pad}.", rich_help_panel=PROTOCOL)]
PosInterp = Annotated[str | None, typer.Option("--pos-interp", help="Position embeddings: {pos_interp}.", rich_help_panel=PROTOCOL)]

# How to work

Device = Annotated[str | None, typer.Option("--device", help="{devices}. Left out: a GPU where there is one, in 'verify' the record's.", rich_help_panel=WORK)]
Dtype = Annotated[str, typer.Option("--dtype", help="Precision of the network: {dtypes}.", rich_help_panel=WORK)]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Images per step. Left out: 1, in a run on a GPU 8.", rich_help_panel=WORK)]
WindowBatch = Annotated[str, typer.Option("--window-batch", metavar="auto|N", help="Windows per forward. auto: up to 32, halved when memory runs out. N: exactly N, the tail padded, so that results are equal to the bit for any --batch.", rich_help_panel=WORK)]
Compile = Annotated[str, typer.Option("--compile", metavar="MODE", help="torch.compile: {compile_mode}; reduce-overhead uses CUDA graphs. Pays off on long runs on a GPU only.", rich_help_panel=WORK)]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Processes or threads that read files beside this one; 0: this one reads. Left out: as many as suit.", rich_help_panel=WORK)]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N images; what comes out is marked partial.", rich_help_panel=WORK)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the newest unfinished one of the same settings stopped.", rich_help_panel=WORK)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.", rich_help_panel=WORK)]
Launcher = Annotated[str, typer.Option("--launcher", help="What started several processes that share the work: {launchers} (torchrun, srun).", rich_help_panel=WORK)]
Results = Annotated[Path, typer.Option("--results", help="Root folder of the records of runs.", rich_help_panel=WORK)]
Profiles = Annotated[Path | None, typer.Option("--profiles", help="Root folder of the profiles. Left out: results/profiles, or 'profiles' beside --results.", rich_help_panel=WORK)]
_OUT = typer.Option("--out", help="Where what the command makes is written: a file, of benchmarks a folder.", rich_help_panel=WORK)
Out = Annotated[Path | None, _OUT]
DefaultOut = Annotated[Path, _OUT]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, alone on stdout.", rich_help_panel=WORK)]
# fmt: on

RUNS = Path("results/runs")  # --results, as :data:`ovbench.results.store.DEFAULT_ROOT`, which needs pydantic
