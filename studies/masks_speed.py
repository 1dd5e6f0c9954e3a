"""What masks cost beside the plain image tower: FISA, its baseline, mask pooling, and the straightforward way.

    python studies/masks_speed.py --memory                       # ViT-B-16 at 896 x 896, 100 masks, 150 classes
    python studies/masks_speed.py --arch ViT-L-14-336 --repeats 3

Medians of forwards taken in turn in one process (ratios are what counts), 10^9 multiply-accumulates with attention's
products, and the peak resident set of one forward each in a fresh process. The generator is left out. "Straightforward" puts
the mask tokens behind the image tokens into one sequence whose attention has an (1 + N + M)^2 mask, as the public code of
MaskCLIP does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.measure import flops
from ovbench.models.mask_method import Words
from ovbench.models.mask_model import example_masks
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.masks import touched_patches
from ovbench.registry import method_class
from study import added_mib, comma, in_fresh_process, in_turns, markdown, median, parser

PLAIN = "plain tower"
METHODS = ("maskclip-ding", "fisa", "fc-clip", "scn")
ROWS = (PLAIN, *METHODS, "straightforward")


def straightforward(clip: DenseCLIP, images: Tensor, masks: Tensor) -> Tensor:
    """Mask embeddings (B, M, D) with image and mask tokens in one masked sequence."""
    x, grid = clip.embed(images)
    count, tokens = masks.shape[1], x.shape[1]
    touched = touched_patches(masks, grid, (images.shape[-2], images.shape[-1]))
    allowed = torch.zeros(len(x), 1, tokens + count, tokens + count, dtype=torch.bool, device=x.device)
    allowed[:, :, :tokens, :tokens] = True
    allowed[:, 0, tokens:, 0] = True  # CLS
    allowed[:, 0, tokens:, 1:tokens] = touched
    x = torch.cat([x, x[:, :1].expand(-1, count, -1)], dim=1)
    for index in range(clip.depth):
        q, k, v = clip.qkv(x, index)
        x = clip.finish_block(index, x, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
    embeddings: Tensor = clip.project(x[:, tokens:])
    return embeddings


def steps(a: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """One forward of each row on one random image."""
    clip = load_clip(a.weights, None if a.weights == "builtin" else a.arch, device=a.device)
    clip.pos_interp = "bilinear"
    image = torch.randn(1, 3, a.side, a.side, device=a.device)
    proposals = example_masks(a.masks, (a.side // 4, a.side // 4))[None].to(a.device)
    with torch.device(a.device):
        text = F.normalize(torch.randn(a.classes, clip.embed_dim), dim=-1)
        words = Words(text, torch.arange(a.classes), a.classes, 100.0, torch.zeros(a.classes, dtype=torch.bool))
    found: dict[str, Callable[[], object]] = {
        PLAIN: lambda: clip.project(clip.tokens(image, [clip.depth - 1]).after[clip.depth - 1]),
        "straightforward": lambda: straightforward(clip, image, proposals),
    }
    for name in METHODS:
        cls = method_class(name)
        method: Any = cls(clip, cls.configure({"generator": "grid"})).to(a.device)
        found[name] = partial(method.classify, image, proposals, words)
    return {name: found[name] for name in ROWS}


@torch.inference_mode()
def peak(a: argparse.Namespace, row: str) -> float | None:
    """MiB that one forward adds to what is in use."""
    return added_mib(steps(a)[row], a.device)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli = parser(__doc__, speed=True, repeats=5)
    cli.add_argument("--arch", default="ViT-B-16")
    cli.add_argument("--side", type=int, default=896)
    cli.add_argument("--masks", type=int, default=100)
    cli.add_argument("--classes", type=int, default=150)
    cli.add_argument("--rows", type=comma(str), default=list(ROWS), help="comma-separated, beside the plain tower")
    cli.add_argument("--memory", action="store_true", help="also peak memory, each row in a fresh process")
    a = cli.parse_args(argv)
    with torch.inference_mode():
        todo = {name: step for name, step in steps(a).items() if name in (PLAIN, *a.rows)}
        times = in_turns(todo, a.repeats, a.device)
        gmacs = {name: flops.count(step).gmacs for name, step in todo.items()}
    del todo
    plain = median(times[PLAIN])
    print(f"{a.arch} at {a.side} x {a.side}, {a.masks} masks, {a.classes} classes, {a.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {a.repeats}\n")  # fmt: skip
    rows = [
        (name, gmacs[name], gmacs[name] / gmacs[PLAIN], median(samples), f"{min(samples):.0f}..{max(samples):.0f}",
         median(samples) / plain, in_fresh_process(peak, a, name) if a.memory else None)
        for name, samples in times.items()
    ]  # fmt: skip
    print("\n".join(markdown(["row", "GMACs", "/ plain", "ms", "min..max", "/ plain", "MiB added"], rows)))


if __name__ == "__main__":
    main()
