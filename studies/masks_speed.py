"""What masks cost beside the plain image tower: FISA, its baseline, mask pooling, and the straightforward way.

    python studies/masks_speed.py                                # ViT-B-16 at 896 x 896, 100 masks, 150 classes
    python studies/masks_speed.py --arch ViT-L-14-336 --repeats 3

Medians of forwards taken in turn in one process (ratios are what counts), 10^9 multiply-accumulates with attention's
products, and the peak resident set of one forward each in a fresh process. The generator is left out. "Straightforward" puts
the mask tokens behind the image tokens into one sequence whose attention has an (1 + N + M)^2 mask, as the public code of
MaskCLIP does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.measure import flops
from ovbench.measure.timing import peak_memory, reset_peak_memory
from ovbench.models.mask_method import Words
from ovbench.models.mask_model import example_masks
from ovbench.networks.clip_weights import load_clip
from ovbench.ops.masks import touched_patches
from ovbench.registry import method_class

ROWS = ("plain tower", "maskclip-ding", "fisa", "fc-clip", "scn", "straightforward")


def straightforward(clip, images: Tensor, masks: Tensor) -> Tensor:
    """Mask embeddings (B, M, D) with image and mask tokens in one masked sequence."""
    x, grid = clip.embed(images)
    count, tokens = masks.shape[1], x.shape[1]
    touched = touched_patches(masks, grid, (images.shape[-2], images.shape[-1]))
    allowed = torch.zeros(len(x), 1, tokens + count, tokens + count, dtype=torch.bool)
    allowed[:, :, :tokens, :tokens] = True
    allowed[:, 0, tokens:, 0] = True  # CLS, as maskclip-ding
    allowed[:, 0, tokens:, 1:tokens] = touched
    x = torch.cat([x, x[:, :1].expand(-1, count, -1)], dim=1)
    for index in range(clip.depth):
        q, k, v = clip.qkv(x, index)
        x = clip.finish_block(index, x, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
    return clip.project(x[:, tokens:])


def steps(arch: str, side: int, masks: int, classes: int) -> dict[str, Callable[[], object]]:
    """One forward of each row on one random image."""
    clip = load_clip("random", arch)
    clip.pos_interp = "bilinear"
    image = torch.randn(1, 3, side, side)
    proposals = example_masks(masks, (side // 4, side // 4))[None]
    text = F.normalize(torch.randn(classes, clip.embed_dim), dim=-1)
    words = Words(text, torch.arange(classes), classes, 100.0, torch.zeros(classes, dtype=torch.bool))
    found: dict[str, Callable[[], object]] = {
        "plain tower": lambda: clip.project(clip.tokens(image, [clip.depth - 1]).after[clip.depth - 1]),
        "straightforward": lambda: straightforward(clip, image, proposals),
    }
    for name in ("maskclip-ding", "fisa", "fc-clip", "scn"):
        cls = method_class(name)
        method = cls(clip, cls.configure({"generator": "grid"}))
        found[name] = lambda method=method: method.classify(image, proposals, words)
    return {name: found[name] for name in ROWS}


def peak(arguments: argparse.Namespace, row: str) -> float:
    """MiB that one forward adds to the peak resident set, in a fresh process."""
    command = [
        sys.executable, __file__, "--only", row, "--arch", arguments.arch, "--side", str(arguments.side),
        "--masks", str(arguments.masks), "--classes", str(arguments.classes),
    ]  # fmt: skip
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--side", type=int, default=896)
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, beside the plain tower")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    with torch.inference_mode():
        todo = steps(given.arch, given.side, given.masks, given.classes)
        if given.only:
            device = torch.device("cpu")
            reset_peak_memory(device)
            before = peak_memory(device)
            todo[given.only]()
            after = peak_memory(device)
            assert before is not None and after is not None  # Linux tells
            print(after[0] - before[0])
            return
        todo = {name: step for name, step in todo.items() if name in (ROWS[0], *given.rows.split(","))}
        times: dict[str, list[float]] = {name: [] for name in todo}
        for step in todo.values():
            step()
        for _ in range(given.repeats):
            for name, step in todo.items():
                start = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - start))
        gmacs = {name: flops.count(step).gmacs for name, step in todo.items()}
    del todo
    plain = statistics.median(times["plain tower"])
    print(f"{given.arch} at {given.side} x {given.side}, {given.masks} masks, {given.classes} classes, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {given.repeats}")  # fmt: skip
    print("| row | GMACs | / plain | ms | min..max | / plain | MiB added |\n|---|---|---|---|---|---|---|")
    for name, samples in times.items():
        median = statistics.median(samples)
        print(
            f"| {name} | {gmacs[name]:.1f} | {gmacs[name] / gmacs['plain tower']:.3f} | {median:.0f} | "
            f"{min(samples):.0f}..{max(samples):.0f} | {median / plain:.3f} | {peak(given, name):.0f} |"
        )


if __name__ == "__main__":
    main()
