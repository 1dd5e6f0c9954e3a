"""Time of the solvers and of JBU against one ViT-B/16 forward of the same image, in one run.

    python studies/discrepancy_speed.py
    python studies/discrepancy_speed.py --weights dinov2_vits14.safetensors --image photo.jpg   # real attention

Without weights the attention is made up: each patch looks at patches near it in the image and in a smooth random feature
field, as sharply as the last blocks of DINOv2 do. The posterior is a smooth random field per class; early rejection is off
so that every class is solved. On a GPU (--device cuda) times are synchronised.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.networks.clip_weights import load_clip
from ovbench.ops.discrepancy import SolverConfig, discrepancy_maps
from ovbench.ops.jbu import jbu


def made_up_attention(side: int) -> Tensor:
    """Row-stochastic attention (N, N), N = side^2."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 16, max(2, side // 4), max(2, side // 4), generator=generator)
    feature = F.normalize(F.interpolate(coarse, (side, side), mode="bicubic")[0].flatten(1), dim=0)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([rows, columns]).flatten(1).float() / side
    distance = (place[:, :, None] - place[:, None]).square().sum(0)
    return (8 * (feature.T @ feature) - 20 * distance).softmax(1)


def real_attention(weights: str, image: str, side: int) -> Tensor:
    """Attention (N, N) of DINOv2-S/14 on a photograph."""
    from ovbench.networks.attention import load_source
    from ovbench.pictures import read_rgb

    picture = torch.from_numpy(read_rgb(Path(image))).permute(2, 0, 1)[None].float()
    picture = F.interpolate(picture, (14 * side, 14 * side), mode="bilinear")
    with torch.inference_mode():
        return load_source("dinov2-s14", weights).attention(picture)[0][0]


def posterior_of(classes: int, side: int) -> Tensor:
    """Posterior (K, N) of smooth random fields."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, classes, max(2, side // 3), max(2, side // 3), generator=generator)
    return (3 * F.interpolate(coarse, (side, side), mode="bicubic")[0].flatten(1)).softmax(0)


def median_ms(function: Callable[[], object], repeats: int, device: str) -> float:
    """Median wall time in milliseconds after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def main() -> None:
    """Measures and prints milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="patches along a side: N = side^2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", help="DINOv2-S/14, for real attention of --image")
    parser.add_argument("--image")
    a = parser.parse_args()
    clip = load_clip("random", "ViT-B-16", device=a.device)
    image = torch.randn(1, 3, 16 * a.side, 16 * a.side, device=a.device)
    attention = real_attention(a.weights, a.image, a.side) if a.weights else made_up_attention(a.side)
    attention = attention.to(a.device)
    guide = torch.rand(3, 512, 683, device=a.device)
    with torch.inference_mode():
        forward = median_ms(lambda: clip.tokens(image, [-1]), a.repeats, a.device)
        print(f"ViT-B/16 forward of {16 * a.side} x {16 * a.side}: {forward:.1f} ms")
        print(f"{'stage':28} {'classes':>7} {'ms':>8} {'/ forward':>9}")
        for classes in (21, 171):
            posterior = posterior_of(classes, a.side).to(a.device)
            for name, options in (
                ("op", {"solver": "op"}),
                ("op bfloat16", {"solver": "op", "matmul_dtype": "bfloat16"}),
                ("mv", {"solver": "mv"}),
                ("mv bfloat16", {"solver": "mv", "matmul_dtype": "bfloat16"}),
                ("propagate", {"solver": "propagate"}),
                ("kl", {"solver": "kl"}),
            ):
                config = SolverConfig(early_rejection=False, **options)  # type: ignore[arg-type]
                ms = median_ms(lambda c=config, p=posterior: discrepancy_maps(p, attention, c), a.repeats, a.device)
                print(f"{name:28} {classes:7d} {ms:8.1f} {ms / forward:9.2f}", flush=True)
            low = posterior.view(classes, a.side, a.side)
            ms = median_ms(lambda v=low: jbu(v, guide), a.repeats, a.device)
            print(f"{'jbu to 512 x 683':28} {classes:7d} {ms:8.1f} {ms / forward:9.2f}", flush=True)


if __name__ == "__main__":
    main()
