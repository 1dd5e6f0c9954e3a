"""Time of the solvers and of JBU against one ViT-B/16 forward of the same image, in one run.

    python studies/discrepancy_speed.py
    python studies/discrepancy_speed.py --attention-weights dinov2_vits14.safetensors --image photo.jpg

Without weights the attention is made up: each patch looks at patches near it in the image and in a smooth random feature
field, as sharply as the last blocks of DINOv2 do. The posterior is a smooth random field per class; early rejection is off
so that every class is solved. On a GPU (--device cuda) times are synchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.networks.attention import load_source
from ovbench.networks.clip_weights import load_clip
from ovbench.ops.discrepancy import SolverConfig, discrepancy_maps
from ovbench.ops.jbu import jbu
from ovbench.pictures import read_rgb
from study import comma, in_turns, markdown, median, parser

CONFIGS = {
    "op": SolverConfig(early_rejection=False, solver="op"),
    "op bfloat16": SolverConfig(early_rejection=False, solver="op", matmul_dtype="bfloat16"),
    "mv": SolverConfig(early_rejection=False, solver="mv"),
    "mv bfloat16": SolverConfig(early_rejection=False, solver="mv", matmul_dtype="bfloat16"),
    "propagate": SolverConfig(early_rejection=False, solver="propagate"),
    "kl": SolverConfig(early_rejection=False, solver="kl"),
}


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
    picture = torch.from_numpy(read_rgb(Path(image))).permute(2, 0, 1)[None].float()
    picture = F.interpolate(picture, (14 * side, 14 * side), mode="bilinear")
    with torch.inference_mode():
        return load_source("dinov2-s14", weights).attention(picture)[0][0]


def posterior_of(classes: int, side: int) -> Tensor:
    """Posterior (K, N) of smooth random fields."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, classes, max(2, side // 3), max(2, side // 3), generator=generator)
    return (3 * F.interpolate(coarse, (side, side), mode="bicubic")[0].flatten(1)).softmax(0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints milliseconds and ratios."""
    cli = parser(__doc__, speed=True)
    cli.add_argument("--side", type=int, default=32, help="patches along a side: N = side^2")
    cli.add_argument("--classes", type=comma(int), default=[21, 171], help="comma-separated")
    cli.add_argument("--attention-weights", help="DINOv2-S/14, for real attention of --image")
    cli.add_argument("--image")
    a = cli.parse_args(argv)
    if a.attention_weights and not a.image:
        cli.error("--attention-weights needs --image, a photograph")
    clip = load_clip(a.weights, None if a.weights == "builtin" else "ViT-B-16", device=a.device)
    side, patch = a.side, clip.patch
    image = torch.randn(1, 3, patch * side, patch * side, device=a.device)
    real = real_attention(a.attention_weights, a.image, side) if a.attention_weights else made_up_attention(side)
    attention = real.to(a.device)
    guide = torch.rand(3, 512, 683, device=a.device)
    steps: dict[tuple[str, int], Callable[[], object]] = {("forward", 0): lambda: clip.tokens(image, [-1])}
    for classes in a.classes:
        posterior = posterior_of(classes, side).to(a.device)
        for name, config in CONFIGS.items():
            steps[name, classes] = partial(discrepancy_maps, posterior, attention, config)
        steps["jbu to 512 x 683", classes] = partial(jbu, posterior.view(classes, side, side), guide)
    with torch.inference_mode():
        times = {key: median(samples) for key, samples in in_turns(steps, a.repeats, a.device).items()}
    forward = times.pop(("forward", 0))
    print(f"ViT forward ({a.weights}) of {patch * side} x {patch * side} on {a.device}: {forward:.1f} ms\n")
    rows = [(name, classes, ms, ms / forward) for (name, classes), ms in times.items()]
    print("\n".join(markdown(["stage", "classes", "ms", "/ forward"], rows)))


if __name__ == "__main__":
    main()
