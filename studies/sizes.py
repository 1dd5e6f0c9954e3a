"""Time and memory of one whole image over its size: how the cost grows, one fresh process per size.

python studies/sizes.py --method sc-clip --arch ViT-B-16 --mode whole
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from study import added_mib, comma, in_fresh_process, in_turns, markdown, median, noise_image, parser, random_model


@torch.inference_mode()
def one(a: argparse.Namespace, side: int) -> tuple[float, float | None]:
    """Median milliseconds, and peak memory in MiB that an image adds, of a 4:3 image with this short side."""
    model = random_model(
        a.method, a.words, "common", weights=a.weights, arch=a.arch, device=a.device, dtype=a.dtype, mode=a.mode
    )
    image = noise_image(side, side * 4 // 3, a.device)

    def step() -> object:
        return model.predict_labels([image], [(side, side * 4 // 3)])

    peak = added_mib(step, a.device)
    return median(in_turns({"": step}, a.repeats, a.device)[""]), peak


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every size and prints the growth from one to the next as an exponent of the pixel count."""
    cli = parser(__doc__, speed=True)
    cli.add_argument("--method", default="sc-clip")
    cli.add_argument("--arch", default="ViT-B-16")
    cli.add_argument("--mode", default="whole", choices=["whole", "slide"])
    cli.add_argument("--dtype", default="float32")
    cli.add_argument("--words", type=int, default=150)
    cli.add_argument("--sizes", type=comma(int), default=[336, 448, 672, 1024], help="short sides, comma-separated")
    a = cli.parse_args(argv)
    found = {side: in_fresh_process(one, a, side) for side in a.sizes}
    rows: list[list[object]] = []
    for side, before in zip(a.sizes, [None, *a.sizes], strict=False):
        grown: list[str | None] = [None, None]
        if before:
            pixels = math.log((side / before) ** 2)
            pairs = zip(found[side], found[before], strict=True)
            grown = [f"pixels^{math.log(new / old) / pixels:.2f}" if new and old else None for new, old in pairs]
        rows.append([f"{side} x {side * 4 // 3}", *found[side], *grown])
    print(f"{a.method}, {a.arch}, {a.mode}, {a.dtype}, {a.words} words, {a.device}\n")
    print("\n".join(markdown(["input", "ms", "extra MiB", "growth of time", "of memory"], rows)))


if __name__ == "__main__":
    main()
