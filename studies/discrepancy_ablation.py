"""What each discrepancy solver recovers from damaged logits, over the grid of its open choices.

    python studies/discrepancy_ablation.py --data voc21 DATA_ROOT 48 --data coco_object DATA_ROOT 24 \
        --attention dinov2-s14 --attention-weights FILE --out OUT

Images, labels and attention are real; the logits are the truth at patch resolution, damaged by a stated noise model
(:class:`Noise`), three strengths. Every third image is held back: the grid is measured on the others, what was chosen on
the held-back ones, with fresh seeds. mIoU is that of a dataset: areas at the label's resolution, summed over images;
mean over the classes that occur in the labels used. Writes ``grid.csv``, with every single figure, and ``grid.md``.

Damaged labels are not CLIP's logits. With weights and data at hand, another source of logits is a function in
``SOURCES``; everything else stays.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.benchmarks import get
from ovbench.networks.attention import AttentionSource, load_source, source_names
from ovbench.networks.clip_weights import load_clip
from ovbench.ops.areas import areas
from ovbench.ops.discrepancy import (
    REJECTED,
    SolverConfig,
    class_posterior,
    discrepancy_maps,
    early_rejection,
)
from ovbench.ops.jbu import jbu
from ovbench.pictures import read_rgb
from study import parser, write

HOLD_BACK = 3  # every third image
BLUR = 5  # side in patches of the noise model's box blur
FIELD_CELL = 6  # patches per cell of its smooth random fields


@dataclass(frozen=True)
class Noise:
    """Damage to one-hot logits, in this order: flips, blur 5 x 5, patch noise, smooth fields.

    Attributes:
        flips: Part of the patches that get the one-hot vector of a class drawn from all.
        patch: Standard deviation of Gaussian noise, independent per patch and class.
        smooth: Standard deviation of Gaussian noise on a grid of cells of 6 patches, per class, upsampled bicubically.
    """

    flips: float
    patch: float
    smooth: float


STRENGTHS = {"weak": Noise(0.1, 0.15, 0.2), "medium": Noise(0.15, 0.25, 0.3), "strong": Noise(0.2, 0.3, 0.45)}


@dataclass(frozen=True)
class Picture:
    """An image with what does not change over the grid.

    Attributes:
        dataset: Benchmark.
        index: Number within the run; seeds the noise.
        classes: K.
        image: RGB in [0, 1] (3, H, W).
        label: Training ids (H, W).
        attention: Row-stochastic (N, N).
        grid: Its grid (h, w).
    """

    dataset: str
    index: int
    classes: int
    image: Tensor
    label: Tensor
    attention: Tensor
    grid: tuple[int, int]
    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def held_back(self) -> bool:
        """Not looked at while choosing."""
        return self.index % HOLD_BACK == HOLD_BACK - 1


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: Which question it answers.
        name: What it changes.
        options: Fields of the solver's config; None is the argmax of the posterior.
        joint: JBU, else bilinear upsampling.
        scale: Factor on the logits; None is the run's.
    """

    group: str
    name: str
    options: tuple[tuple[str, Any], ...] | None
    joint: bool = True
    scale: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows that compute the same."""
        config = None if self.options is None else SolverConfig(**dict(self.options))
        return config, self.joint, self.scale


# --- data


def load(
    names: Iterable[tuple[str, str, int]], source: AttentionSource, short_side: int, shrink: int
) -> Iterator[Picture]:
    """The pictures of all datasets, evenly spread over each, with their attention.

    Args:
        names: Benchmark, data root and number of images of each.
        source: Attention source.
        short_side: Of its input, in pixels.
        shrink: Every which pixel of the label is asked; the image that guides JBU is averaged to the same size.
    """
    index = 0
    for name, root, count in names:
        benchmark = get(name)
        pairs = benchmark.pairs(root)
        for place in np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)):
            image = torch.from_numpy(read_rgb(pairs[place].image)).permute(2, 0, 1).float()
            factor = short_side / min(image.shape[-2:])
            size = [round(side * factor) for side in image.shape[-2:]]
            resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)
            with torch.inference_mode():
                attention, grid = source.attention(resized)
            label = torch.from_numpy(benchmark.load_label(pairs[place].label)).long()[::shrink, ::shrink]
            guide = F.avg_pool2d(image[None] / 255, shrink, ceil_mode=True)[0]
            yield Picture(name, index, benchmark.num_classes, guide, label, attention[0].clone(), grid)
            index += 1


def damaged_labels(picture: Picture, strength: str, seed: int) -> Tensor:
    """Logits (K, N): the part of each patch that a class covers, damaged."""
    noise, (h, w), classes = STRENGTHS[strength], picture.grid, picture.classes
    g = torch.Generator().manual_seed(1_000_003 * seed + 1009 * picture.index + list(STRENGTHS).index(strength))
    known = torch.where(picture.label == 255, classes, picture.label)
    x = F.adaptive_avg_pool2d(F.one_hot(known, classes + 1).permute(2, 0, 1).float(), (h, w))[:classes]
    wrong = F.one_hot(torch.randint(classes, (h, w), generator=g), classes).permute(2, 0, 1).float()
    x = torch.where(torch.rand(h, w, generator=g) < noise.flips, wrong, x)
    x = F.avg_pool2d(F.pad(x[None], [BLUR // 2] * 4, mode="replicate"), BLUR, 1)[0]
    x += noise.patch * torch.randn(classes, h, w, generator=g)
    cells = torch.randn(1, classes, max(2, h // FIELD_CELL), max(2, w // FIELD_CELL), generator=g)
    x += noise.smooth * F.interpolate(cells, size=(h, w), mode="bicubic", align_corners=True)[0]
    return x.flatten(1)


LogitsOf = Callable[[Picture, str, int], Tensor]
SOURCES: dict[str, LogitsOf] = {"damaged-labels": damaged_labels}


# --- one figure


def predict(row: Row, picture: Picture, logits: Tensor, scale: float) -> Tensor:
    """Label map (H, W); only classes that are in the race are upsampled."""
    posterior = class_posterior(logits, torch.arange(picture.classes), row.scale or scale, picture.classes)
    if row.options is None:
        scores, alive = posterior, early_rejection(posterior)
    else:
        scores = discrepancy_maps(posterior, picture.attention, SolverConfig(**dict(row.options)))
        alive = scores.amax(1) > REJECTED
    index = alive.nonzero()[:, 0]
    low = scores[index].unflatten(1, picture.grid)
    if row.joint:
        full = jbu(low, picture.image)
    else:
        full = F.interpolate(low[None], size=picture.label.shape, mode="bilinear", align_corners=False)[0]
    return index[full.argmax(0)]


class Grid:
    """Measures rows; figures that two rows share are measured once.

    Args:
        pictures: All pictures.
        logits_of: Source of the logits.
        scale: Logit scale.
    """

    def __init__(self, pictures: list[Picture], logits_of: LogitsOf, scale: float) -> None:
        self.pictures, self.logits_of, self.scale = pictures, logits_of, scale
        self.known: dict[tuple[Any, ...], dict[str, float]] = {}
        self.figures: list[dict[str, Any]] = []

    def miou(self, row: Row, strength: str, seed: int, held_back: bool) -> dict[str, float]:
        """The mIoU of every dataset in percent."""
        key = (row.key, strength, seed, held_back)
        if key not in self.known:
            self.known[key] = self._measure(row, strength, seed, held_back)
        for dataset, value in self.known[key].items():
            part = "held back" if held_back else "choosing"
            options = "argmax" if row.options is None else json.dumps(dict(row.options))
            self.figures.append(
                {
                    **{"part": part, "group": row.group, "row": row.name, "options": options, "jbu": row.joint},
                    **{"scale": row.scale or self.scale, "dataset": dataset, "strength": strength, "seed": seed},
                    "miou": value,
                }
            )
        return self.known[key]

    def _measure(self, row: Row, strength: str, seed: int, held_back: bool) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for picture in self.pictures:
            if picture.held_back != held_back:
                continue
            if (strength, seed) not in picture.logits:
                picture.logits[strength, seed] = self.logits_of(picture, strength, seed)
            pred = predict(row, picture, picture.logits[strength, seed], self.scale)
            found = areas(pred, picture.label, picture.classes)
            counts = torch.stack([found.intersect, found.union, found.label])
            sums[picture.dataset] = counts + sums.get(picture.dataset, 0)
        return {
            name: float((100 * inter.double() / union)[label > 0].mean())
            for name, (inter, union, label) in ((name, tuple(total)) for name, total in sums.items())
        }


# --- the grid


def rows() -> list[Row]:
    """One factor at a time around each solver's default, and the crosses that belong together."""
    found: list[Row] = []

    def add(group: str, name: str, joint: bool = True, scale: float | None = None, **options: Any) -> None:
        found.append(Row(group, name, tuple(sorted(options.items())), joint, scale))

    found.append(Row("baselines", "argmax", None))
    for hops in (1, 2, 4):
        add("baselines", f"posterior x T^{hops}", solver="propagate", hops=hops, nms_threshold=0.0)
    for solver in ("propagate", "kl", "op", "mv"):
        add("baselines", f"{solver}, defaults", solver=solver)
    for cost in ("one_minus", "attention", "neg_log"):
        for side in ("target", "source"):
            for value in ("gain", "cost"):
                add("op: cost, read-out", f"{cost}, {side}, {value}", ot_cost=cost, ot_readout=side, ot_value=value)
    for eps in (0.02, 0.05, 0.1, 0.2, 0.5):
        add("op: eps", f"one_minus gain, {eps:g}", eps=eps)
    for eps in (0.02, 0.5):
        add("op: eps", f"attention cost, {eps:g}", eps=eps, ot_cost="attention", ot_value="cost")
        add("op: eps", f"neg_log gain, {eps:g}", eps=eps, ot_cost="neg_log")
    add("op: attention", "row-stochastic A", ot_attention="row")
    for start in (1, 0):
        for tau in (0.1, 0.3, 0.6, 0.8):
            add("mv: rule, tau", f"markov, {tau:g}, from step {start}", solver="mv", tau=tau, mv_start=start)
    for tau in (0.1, 0.3, 0.5):
        add("mv: rule, tau", f"literal, {tau:g}", solver="mv", mv_rule="literal", tau=tau)
    add("mv: rule, tau", "markov, 0.6, weight: mass", solver="mv", mv_weight="mass")
    add("mv: rule, tau", "markov, 0.3, weight: mass, from step 0", solver="mv", mv_weight="mass", mv_start=0, tau=0.3)
    for solver in ("propagate", "op", "mv"):
        for threshold in (0.0, 0.3, 0.5, 0.7, 0.9):
            add("NMS", f"{solver}, {threshold:g} of the maximum", solver=solver, nms_threshold=threshold)
        add("NMS", f"{solver}, 0.5 absolute", solver=solver, nms_rule="absolute")
        add("mass", f"{solver}, dropped", solver=solver, class_mass="drop")
        add("mass", f"{solver}, what NMS leaves", solver=solver, mass_of="map")
        add("normalisation", f"{solver}, over classes first", solver=solver, norm_axis="classes")
        add("normalisation", f"{solver}, softmax", solver=solver, norm_rule="softmax")
        add("early rejection", f"{solver}, off", solver=solver, early_rejection=False)
        add("early rejection", f"{solver}, off, mass dropped", solver=solver, early_rejection=False, class_mass="drop")
        add("upsampling", f"{solver}, bilinear", joint=False, solver=solver)
        for scale in (4.0, 16.0):
            add("logit scale", f"{solver}, {scale:g}", scale=scale, solver=solver)
    found.append(Row("upsampling", "argmax, bilinear", None, joint=False))
    order = list(dict.fromkeys(row.group for row in found))
    return sorted(found, key=lambda row: order.index(row.group))


def final_rows() -> list[Row]:
    """What the held-back images are asked: the defaults, what came near them, and the mass dropped as in the paper."""
    others: dict[str, dict[str, Any]] = {
        "op, eps 0.5": {"solver": "op", "eps": 0.5},
        "mv, tau 0.6": {"solver": "mv", "tau": 0.6},
        "mv, tau 0.6, NMS 0.3": {"solver": "mv", "tau": 0.6, "nms_threshold": 0.3},
        "op, mass dropped": {"solver": "op", "class_mass": "drop"},
        "mv, mass dropped": {"solver": "mv", "class_mass": "drop"},
        "kl, mass dropped": {"solver": "kl", "class_mass": "drop"},
    }
    return [row for row in rows() if row.group == "baselines"] + [
        Row("others", name, tuple(sorted(options.items()))) for name, options in others.items()
    ]


# --- tables


def table(grid: Grid, chosen: list[Row], seeds: Iterable[int], held_back: bool, on_row: Callable[[str], None]) -> str:
    """Markdown: mIoU per dataset and strength, their mean, and how far it is from one hop at its defaults."""
    datasets = list(dict.fromkeys(picture.dataset for picture in grid.pictures))
    seeds = list(seeds)
    hop = Row("", "", (("solver", "propagate"),))

    def figures(row: Row) -> dict[tuple[str, str], list[float]]:
        found: dict[tuple[str, str], list[float]] = {}
        for strength in STRENGTHS:
            for seed in seeds:
                for dataset, value in grid.miou(row, strength, seed, held_back).items():
                    found.setdefault((dataset, strength), []).append(value)
        return found

    count = len(grid.figures)
    base = figures(hop)
    del grid.figures[count:]
    columns = [(dataset, strength) for dataset in datasets for strength in STRENGTHS]
    lines = [
        "| | " + " | ".join(f"{dataset} {strength}" for dataset, strength in columns) + " | mean | against one hop |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    group = ""
    for row in chosen:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** |" + " |" * (len(columns) + 2))
        found = figures(row)
        cells = [f"{np.mean(found[column]):.1f}" for column in columns]
        means = np.mean([found[column] for column in columns], axis=0)  # of each seed
        gains = means - np.mean([base[column] for column in columns], axis=0)
        gain = f"{gains.mean():+.1f}" + (f" ({gains.min():+.1f} .. {gains.max():+.1f})" if len(seeds) > 1 else "")
        lines.append(f"| {row.name} | " + " | ".join(cells) + f" | {means.mean():.1f} | {gain} |")
        on_row(lines[-1])
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the grid and the held-back images, and writes the tables."""
    cli = parser(__doc__)
    cli.add_argument("--data", nargs=3, action="append", required=True, metavar=("NAME", "ROOT", "IMAGES"))
    cli.add_argument("--attention", choices=source_names(), default="dinov2-s14", help="attention source")
    cli.add_argument("--attention-weights", help="a file, or random; default: the published ones")
    cli.add_argument(
        "--weights", default="openai", help="of CLIP, for --attention clip: a tag, a file, builtin, random"
    )
    cli.add_argument("--source", choices=sorted(SOURCES), default="damaged-labels", help="where logits come from")
    cli.add_argument("--short-side", type=int, default=378, help="of the attention's input, in pixels")
    cli.add_argument("--shrink", type=int, default=1, help="compare every n-th pixel of the labels' rows and columns")
    cli.add_argument("--scale", type=float, default=8.0, help="logit scale; a class that fills a patch has logit 1")
    cli.add_argument("--seeds", type=int, default=3, help="of the held-back images; the grid has one, 0")
    cli.add_argument(
        "--groups", help="only these groups of the grid: comma-separated beginnings of their names, or none"
    )
    cli.add_argument("--out", type=Path, required=True, help="folder for grid.md and grid.csv")
    args = cli.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    start = time.monotonic()
    clip = load_clip(args.weights) if args.attention == "clip" else None
    source = load_source(args.attention, args.attention_weights, clip=clip)
    pictures = list(
        load([(name, root, int(count)) for name, root, count in args.data], source, args.short_side, args.shrink)
    )
    held = sum(picture.held_back for picture in pictures)
    say(f"{len(pictures)} images, {held} held back; attention took {time.monotonic() - start:.0f} s")
    grid = Grid(pictures, SOURCES[args.source], args.scale)
    wanted = tuple(args.groups.split(",")) if args.groups else ("",)
    asked = [row for row in rows() if row.group.startswith(wanted)]
    choosing = table(grid, asked, [0], False, say)
    final = table(grid, final_rows(), range(1, 1 + args.seeds), True, say)
    heading = f"labels at 1/{args.shrink}, attention {source.name} ({source.weights}), logits {args.source}, scale {args.scale:g}"
    parts = [heading]
    if asked:
        parts.append(f"### Choosing: {len(pictures) - held} images, one seed\n\n{choosing}")
    parts.append(f"### Held back: {held} images, {args.seeds} other seeds\n\n{final}")
    write(["\n\n".join(parts)], args.out / "grid.md")
    with (args.out / "grid.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(grid.figures[0]))
        writer.writeheader()
        writer.writerows(grid.figures)
    say(f"done in {time.monotonic() - start:.0f} s: {args.out / 'grid.md'}")


if __name__ == "__main__":
    main()
