"""Do CAA and ECAC help? Heads trained alike on the features of a frozen trunk: generated long-tailed scenes, photographs.

    python studies/closed_set_learning.py --out OUT --trunk-weights dinov2_vits14.safetensors               # scenes
    python studies/closed_set_learning.py --out OUT --data voc21 --data-root VOCdevkit --trunk-weights ...  # three folds
    python studies/closed_set_learning.py --out OUT --rows fcn,caa-fcn --no-report                          # one of several

The trunk is DINOv2-S, whose last features of every image and of its mirror image are made once and reduced to 128 principal
components; heads are 64 wide, see 12 x 12 patches of 14 pixels, and are trained by AdamW under a poly schedule without
clipping. ``scenes`` are 24 of Context's classes, frequent in training as rank^-1.2 and evenly in validation; of a benchmark's
photographs, seed S leaves out every third from the S-th on and is evaluated on those. mIoU is over the classes that occur in
the evaluated labels. Writes a file for each training, ``learning.csv``, ``learning.md`` and ``curves.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learning import Row, command_line, figures_table
from ovbench import benchmarks
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.frequencies import thirds
from ovbench.benchmarks.synth.copies import synth
from ovbench.hashing import sha256_of, sha256_of_file
from ovbench.methods import closed_set, hosts  # type: ignore[import-not-found]
from ovbench.mm.compat import import_mmseg, quiet_mmengine
from ovbench.networks.visual import load_visual
from ovbench.ops.areas import areas
from ovbench.pictures import read_rgb
from ovbench.registry import closed_set_class

SCENES = "scenes"
PATCH, CROP, CELL = 14, 12, 2  # pixels; patches of a crop; label cells of a patch in training
COMPONENTS = 128  # of the trunk's 384 channels, so that a 3x3 convolution costs a third
WIDTH, BATCH, LR, DECAY = 64, 8, 2e-3, 0.01
# Rows of the thesis' tables and what is beside them; switches behind a colon.
ROWS = {
    "fcn": "baseline of 3.2, 4.2",
    "caa-fcn": "CC + SA of 3.2, intra + inter of 3.3, both losses of 3.4",
    "ecac-fcn:ecac=false": "L_rce of 4.2",
    "ecac-fcn": "all of 4.2",
    "caa-fcn:affinity=false": "CC of 3.2",
    "caa-fcn:center=false": "SA of 3.2",
    "caa-fcn:inter=false": "intra of 3.3",
    "caa-fcn:intra=false": "inter of 3.3",
    "caa-fcn:aux_weight=0:affinity_weight=0": "no losses of 3.4",
    "caa-fcn:affinity_weight=0": "aux of 3.4",
    "caa-fcn:aux_weight=0": "aff of 3.4",
    "ecac-fcn:memory_loss=false:kl_weight=0:iv_weight=0": "+ ECAC of 4.2",
    "ecac-fcn:kl_weight=0:iv_weight=0": "+ L_mem of 4.2",
    "ecac-fcn:iv_weight=0": "+ L_KL of 4.2, alpha 1 beta 0 of 4.3",
    "ecac-fcn:kl_weight=10:iv_weight=0": "alpha 10 beta 0 of 4.3",
    "ecac-fcn:iv_weight=10": "alpha 1 beta 10 of 4.3",
    "ecac-fcn:memory_update=cosine": "cosine of 4.4",
    "ecac-fcn:calibration=false": "without calibration (4.5)",
    "deeplabv3plus": "baseline of 4.5",
    "ecac-deeplabv3plus:calibration=false": "+ ECAC of 4.5",
    "ecac-deeplabv3plus": "+ calibration of 4.5",
}


class Picture(NamedTuple):
    """An image as a head sees it.

    Attributes:
        features: Of the image and of its mirror image, (2, C, h, w), float16.
        cells: Train ids (2, h * CELL, w * CELL), uint8.
        label: Train ids (H, W), int64, of the whole label.
    """

    features: Tensor
    cells: Tensor
    label: Tensor


def pictures(a: argparse.Namespace, benchmark: Benchmark, root: Path) -> list[Picture]:
    """The images of a split with the features of the trunk, made once and kept below ``out``."""
    pairs = benchmark.pairs(root) if a.data == SCENES else benchmark.pairs(root)[: sum(a.scenes)]
    made = sha256_of([benchmark.fingerprint(root), len(pairs), a.side, trunk_of(a)])[:12]
    kept = a.out / f"features-{benchmark.name}-{made}.pt"
    if kept.is_file():
        return [Picture(*content) for content in torch.load(kept, weights_only=True)]
    found, trunk = [], load_visual("dinov2-s", a.trunk_weights)
    assert trunk is not None
    for pair in pairs:
        image = torch.from_numpy(read_rgb(pair.image)).permute(2, 0, 1)[None].float()
        label = torch.from_numpy(benchmark.load_label(pair.label).astype(np.int64))
        factor = a.side / min(image.shape[2:])
        grid = [max(CROP, round(side * factor / PATCH)) for side in image.shape[2:]]
        sized = F.interpolate(image, [PATCH * side for side in grid], mode="bilinear", antialias=True)
        with torch.inference_mode():
            maps = trunk.maps(torch.cat([sized, sized.flip(3)]))[-1]
            maps = F.layer_norm(maps.permute(0, 2, 3, 1), maps.shape[1:2]).permute(0, 3, 1, 2)
        cells = F.interpolate(label[None, None].float(), [CELL * side for side in grid], mode="nearest")[0].byte()
        found.append(Picture(maps.half().clone(), torch.cat([cells, cells.flip(2)]), label))
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save([tuple(picture) for picture in found], kept)
    return found


def trunk_of(a: argparse.Namespace) -> str:
    """What tells one trunk from another: its file's hash, or ``random``."""
    path = Path(a.trunk_weights)
    return sha256_of_file(path) if path.is_file() else a.trunk_weights


def reduced(train: list[Picture], *splits: list[Picture]) -> list[list[Picture]]:
    """Splits with features (2, COMPONENTS, h, w) of unit variance on average: principal components of the training images'."""
    rows = torch.cat([picture.features.permute(0, 2, 3, 1).flatten(0, 2)[::7].float() for picture in train])
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    basis = vectors[:, -COMPONENTS:] / values[-COMPONENTS:].mean().sqrt()
    return [
        [
            picture._replace(
                features=((picture.features.float().permute(0, 2, 3, 1) - mean) @ basis).permute(0, 3, 1, 2)
            )
            for picture in images
        ]
        for images in splits
    ]


def split(a: argparse.Namespace, seed: int, known: dict[str, list[Picture]]) -> tuple[Any, ...]:
    """The benchmark, images to train on and images to evaluate on."""
    if a.data == SCENES:
        benchmark = benchmarks.get("context59")
        root = synth(
            benchmark.name,
            a.out / "data",
            a.scenes[1],
            11,
            train_images=a.scenes[0],
            long_tail=1.2,
            classes=24,
            size=(96, 128),
        )
        if not known:
            both = pictures(a, benchmark.for_split("train"), root), pictures(a, benchmark, root)
            known["train"], known["val"] = reduced(both[0], *both)
        return benchmark, known["train"], known["val"]
    benchmark = benchmarks.get(a.data)
    if not known:
        known["all"] = pictures(a, benchmark, benchmark.resolve_root(a.data_root))
    fold = [index % 3 == seed % 3 for index in range(len(known["all"]))]
    train = [picture for picture, out in zip(known["all"], fold, strict=True) if not out]
    return benchmark, *reduced(train, train, [picture for picture, out in zip(known["all"], fold, strict=True) if out])


def pixels_of(images: list[Picture], classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Labelled pixels per class (K,)."""
    counts = sum(torch.bincount(picture.label.flatten(), minlength=256)[:classes] for picture in images)
    assert isinstance(counts, Tensor)
    return counts.numpy()


def batch_of(images: list[Picture], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (B, C, CROP, CROP) and labels (B, CROP * CELL, CROP * CELL) of random crops, mirrored or not."""
    features, labels = [], []
    for index in torch.randint(len(images), (BATCH,), generator=generator).tolist():
        picture = images[index]
        mirrored, *corner = (
            int(torch.randint(size, (1,), generator=generator))
            for size in (2, *(side - CROP + 1 for side in picture.features.shape[2:]))
        )
        y, x = corner
        features.append(picture.features[mirrored, :, y : y + CROP, x : x + CROP])
        rows, columns = (slice(CELL * at, CELL * (at + CROP)) for at in (y, x))
        labels.append(picture.cells[mirrored, rows, columns].long())
    return torch.stack(features), torch.stack(labels)


def head_of(name: str, channels: int, classes: int, iters: int, frequencies: Any) -> nn.Module:
    """The decode head of a row with random weights; ECAC's later losses set in after a tenth of the iterations."""
    method, *switches = name.split(":")
    cls: Any = closed_set_class(method)
    later = {"memory_loss_start": iters // 10, "iv_start": iters // 10} if method.startswith("ecac") else {}
    configured = cls(method, cls.configure({**later, **dict(switch.split("=") for switch in switches)}))
    host = hosts.head_config(
        hosts.addon_and_host(method)[1], classes, in_channels=(channels,) * 4, channels=WIDTH, encoder="resnet50-v1c"
    )
    models = import_mmseg().registry.MODELS
    closed_set.register()
    head: nn.Module = models.build(configured.around(host, True, frequencies.tolist()))
    with quiet_mmengine():
        head.init_weights()  # type: ignore[operator]
    return head


def scores(head: Any, images: list[Picture], classes: int) -> dict[str, Any]:
    """IoU in percent by class of the final logits, None where a class does not occur, and mIoU of both branches."""
    head.eval()
    total = torch.zeros(2, 3, classes, dtype=torch.int64)
    with torch.inference_mode():
        for picture in images:
            maps = [picture.features[:1]] * 4
            found = [head(maps)]
            if hasattr(head, "coarse_logits"):
                found.append(head.coarse_logits(maps))
            for index, logits in enumerate(found):
                size = picture.label.shape
                labels = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].argmax(0)
                part = areas(labels, picture.label, classes)
                total[index] += torch.stack([part.intersect, part.pred, part.label])
    head.train()
    intersect, union, occurs = total[:, 0], total[:, 1] + total[:, 2] - total[:, 0], total[0, 2] > 0
    iou = 100 * intersect.double() / union.double()
    means = [float(values[occurs].mean()) for values in iou]
    several = bool(total[1].any())
    by_class = [float(value) if known else None for value, known in zip(iou[0], occurs, strict=True)]
    return {"mIoU": means[0], "coarse": means[1] if several else None, "classes": by_class}


def trained(a: argparse.Namespace, name: str, seed: int, data: tuple[Any, ...]) -> dict[str, Any]:
    """The record of one training, from its file where it is there."""
    how = sha256_of([a.data, a.scenes, a.side, a.lr, trunk_of(a), str(a.data_root)])[:8]
    file = a.out / "heads" / f"{name.replace(':', '_')}-{seed}-{a.iters}-{how}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    benchmark, train, val = data
    classes = benchmark.num_classes
    torch.manual_seed(seed)
    frequencies = pixels_of(train, classes)
    head = head_of(name, train[0].features.shape[1], classes, a.iters, frequencies).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=a.lr, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    mmseg = import_mmseg()
    from mmengine.structures import PixelData

    curve, start = [], time.perf_counter()
    for iteration in range(a.iters):
        for group in optimizer.param_groups:
            group["lr"] = a.lr * (1 - iteration / a.iters) ** 0.9
        features, labels = batch_of(train, generator)
        samples = [mmseg.structures.SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
        losses: dict[str, Tensor] = head.loss([features] * 4, samples, {})  # type: ignore[operator]
        loss = torch.stack([value for key, value in losses.items() if "loss" in key]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (iteration + 1) % max(1, a.iters // 5) == 0 or iteration + 1 == a.iters:
            at = {key: value for key, value in scores(head, val, classes).items() if key != "classes"}
            curve.append({"iteration": iteration + 1, "loss": float(loss.detach()), **at})
    found = scores(head, val, classes)
    parts = thirds(frequencies)
    for part in ("head", "middle", "tail"):
        own = [found["classes"][index] for index in getattr(parts, part)]
        known = [value for value in own if value is not None]
        found[part] = sum(known) / len(known) if known else float("nan")
    found |= {"row": name, "seed": seed, "curve": curve, "seconds": time.perf_counter() - start}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def gains(rows: list[Row]) -> list[str]:
    """By how much each row is above its host, seed by seed."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows if "-" in row["row"]):
        own = {row["seed"]: row["mIoU"] for row in rows if row["row"] == name}
        host = {row["seed"]: row["mIoU"] for row in rows if row["row"] == hosts.addon_and_host(name.split(":")[0])[1]}
        shown = ", ".join(f"{own[seed] - host[seed]:+.2f}" for seed in own if seed in host)
        lines.append(f"\n{name} - host, mIoU, by seed: {shown}")
    return lines


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Final mIoU and, dashed, of the coarse classifier over the iterations."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for record in records:
        at = [point["iteration"] for point in record["curve"]]
        (line,) = axes.plot(at, [point["mIoU"] for point in record["curve"]], label=record["row"])
        if record["coarse"] is not None:
            axes.plot(at, [point["coarse"] for point in record["curve"]], "--", color=line.get_color())
    axes.set(xlabel="iteration", ylabel="mIoU (dashed: coarse classifier)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line(__doc__, list(ROWS), iters=1500, scenes=(320, 96))
    options.add_argument("--data", default=SCENES, help="scenes, or a benchmark id")
    options.add_argument("--data-root", type=Path, help="of the benchmark")
    options.add_argument("--trunk-weights", default="random", help="file of DINOv2-S, or random")
    options.add_argument("--side", type=int, default=224, help="short side in pixels")
    options.add_argument("--lr", type=float, default=LR)
    a = options.parse_args(argv)
    known: dict[str, list[Picture]] = {}
    records = []
    for seed in a.seeds:
        data = split(a, seed, known)
        for name in a.rows:
            records.append(trained(a, name, seed, data))
            print(f"{name} seed {seed}: {records[-1]['mIoU']:.2f} in {records[-1]['seconds']:.0f} s", file=sys.stderr)
    if a.no_report:
        return
    rows: list[Row] = [{key: record[key] for key in ("row", "seed", *FIGURES)} for record in records]
    figures_table(a, rows, FIGURES, gains(rows))
    plot(
        [record for record in records if record["seed"] == a.seeds[0]],
        a.out / "curves.png",
        f"{a.data}, seed {a.seeds[0]}",
    )


FIGURES = ("mIoU", "head", "middle", "tail", "coarse")

if __name__ == "__main__":
    main()
