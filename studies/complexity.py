"""Parameters and multiply-accumulates of what the discrepancy solvers run, and which convention gives the paper's figures.

    python studies/complexity.py                    # the tables of docs/complexity-direct-seg.md
    python studies/complexity.py --json out.json    # unrounded
    python studies/complexity.py --voc .../VOC2012  # also CLIP's mean over the val images of this folder

Everything is counted on torch's meta device: no weights, no memory, any machine. Three conventions:

    all        matrix products and convolutions, attention's products included (ovbench.measure.flops)
    linear     the same without attention's products (softmax(q k^T) v), as counters that know layers only
    modules    forward hooks on nn.Linear and nn.Conv2d: nn.MultiheadAttention, whose matrices are no nn.Linear that runs,
               counts as nothing

For CLIP also `linear + last`: linear and the attention products of one block of twelve, as counters see it that know
matrix products but no fused kernel, where a method writes the last block's attention out.

Needs diffusers: pip install 'ovbench[sd2]'.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovbench.measure.flops import count, tool
from ovbench.networks.attention_sd2_weights import PROMPT_TOKENS, TEXT, UNET, VAE
from study import comma, markdown, parser, size, write

# The rows of the paper (arXiv 2604.07723) that are looked for, in 10^9 and 10^6.
PAPER_GIGA = {"CLIP B/16": 52.2, "mv": 339.2, "op": 351.3}
PAPER_PARAMS_M = {"CLIP B/16": 149.6, "op, mv": 1006.8}
# Image sizes in pixels; h x w of a 4:3 photo at short sides 224 .. 512 with whole patches of 16.
CLIP_SIZES = (
    (224, 224),
    (224, 288),
    (336, 336),
    (336, 448),
    (384, 384),
    (448, 448),
    (448, 592),
    (512, 512),
    (512, 672),
)
SD2_SIZES = ((512, 512), (448, 576), (512, 704), (1024, 1024))
VISION = "CLIP B/16 vision"
CONVENTIONS = ("all", "linear", "modules")
# SD 1.x differs in these; it is here only because its size is often quoted.
UNET_SD1 = {**UNET, "attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}


@dataclass(frozen=True)
class Cost:
    """One part at one input.

    Attributes:
        part: What runs.
        input: On what.
        all: 10^9 multiply-accumulates with attention's products.
        linear: Without them.
        modules: Of nn.Linear and nn.Conv2d modules only.
    """

    part: str
    input: str
    all: float
    linear: float
    modules: float


def cost(part: str, given: str, model: nn.Module, run: Callable[[], object]) -> Cost:
    """The cost of ``run()``, which calls ``model``."""
    with module_counter(model) as counter:
        flops = count(run)
    attention = flops.by_op.get("bmm", 0) + flops.by_op.get("baddbmm", 0)  # linear layers are mm and addmm
    return Cost(part, given, flops.gmacs, flops.gmacs - attention / 2e9, counter.macs / 1e9)


class module_counter:
    """Counts what exact nn.Linear and nn.Conv2d modules of a model do while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.macs = 0
        self._layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]

    def __enter__(self) -> module_counter:
        self._handles = [layer.register_forward_hook(self._add) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.macs += output.numel() * layer.weight[0].numel()


def clip_on_meta() -> Any:
    """CLIP ViT-B/16 of open_clip without data."""
    import open_clip

    return open_clip.create_model("ViT-B-16", pretrained=None).eval().to("meta")


def vision_cost(visual: Any, h: int, w: int) -> Cost:
    """The vision tower on an image of h x w pixels, with all dense tokens projected."""
    x = torch.zeros(1, h * w // 256 + 1, 768, device="meta")
    image = torch.zeros(1, 3, h, w, device="meta")

    def run() -> None:
        visual.conv1(image)
        visual.transformer(x)
        torch.mm(x[0], visual.proj)

    return cost(VISION, f"{h} x {w}", visual, run)


def voc_mean(visual: Any, folder: Path, short_side: int = 336) -> Cost:
    """The vision tower's mean over the val images in a VOC 2012 folder, whole images at a short side."""
    from PIL import Image

    sizes: Counter[tuple[int, int]] = Counter()
    for name in (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split():
        width, height = Image.open(folder / "JPEGImages" / f"{name}.jpg").size
        h, w = (round(side * short_side / min(width, height)) // 16 * 16 for side in (height, width))
        sizes[h, w] += 1
    costs = [(vision_cost(visual, h, w), times) for (h, w), times in sizes.items()]
    means = {how: sum(getattr(c, how) * n for c, n in costs) / sizes.total() for how in CONVENTIONS}
    return Cost(VISION, f"mean of {sizes.total()} VOC val images, short side {short_side}", **means)


def clip_costs(clip: Any, sizes: Sequence[tuple[int, int]], voc: Path | None) -> Iterator[Cost]:
    """The vision tower at every size, and the text tower for one word."""
    for h, w in sizes:
        yield vision_cost(clip.visual, h, w)
    if voc:
        yield voc_mean(clip.visual, voc)
    words = torch.zeros(1, 77, dtype=torch.long, device="meta")
    yield cost("CLIP B/16 text", "1 word", clip, lambda: clip.encode_text(words))


def sd2_costs(unet: Any, vae: Any, text: Any, sizes: Sequence[tuple[int, int]]) -> Iterator[Cost]:
    """UNet and VAE encoder at every size, and the text encoder, which runs once per load."""
    prompt = torch.zeros(1, PROMPT_TOKENS, TEXT["hidden_size"], device="meta")
    step = torch.zeros((), device="meta")
    for h, w in sizes:
        latents = torch.zeros(1, 4, h // 8, w // 8, device="meta")
        image = torch.zeros(1, 3, h, w, device="meta")
        yield cost("SD 2 UNet", f"{h} x {w}", unet, lambda x=latents: unet(x, step, prompt))  # type: ignore[misc]
        yield cost("SD 2 VAE encoder", f"{h} x {w}", vae, lambda x=image: vae.encode(x))  # type: ignore[misc]
    ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long, device="meta")
    yield cost("SD 2 text encoder", "the empty prompt", text, lambda: text(ids))


def after_last_attention(unet: Any) -> float:
    """10^9 MAC (convention ``linear``) that the UNet spends at 512 x 512 behind its last self-attention, to no purpose."""
    last = unet.up_blocks[-1].attentions[-1]
    block = last.transformer_blocks[0]
    patches = UNET["sample_size"] ** 2
    layers = [*block.ff.modules(), block.attn2.to_q, block.attn2.to_out[0], last.proj_out, unet.conv_out]
    per_patch = sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear | nn.Conv2d))
    context = sum(m.weight.numel() for m in (block.attn2.to_k, block.attn2.to_v))
    return float(patches * per_patch + PROMPT_TOKENS * context) / 1e9


def parameters(clip: Any, unet: Any, vae: Any, text: Any, unet_sd1: Any) -> dict[str, float]:
    """10^6 parameters of every part."""
    parts = {
        "CLIP B/16": clip,
        "CLIP B/16 vision": clip.visual,
        "SD 2 UNet": unet,
        "SD 2 VAE encoder": nn.ModuleList([vae.encoder, vae.quant_conv]),
        "SD 2 VAE decoder": nn.ModuleList([vae.decoder, vae.post_quant_conv]),
        "SD 2 text encoder": text,
        "SD 1.x UNet": unet_sd1,
    }
    found = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in parts.items()}
    return {**found, "CLIP B/16 text": found["CLIP B/16"] - found["CLIP B/16 vision"]}


def nearest(target: float, candidates: dict[str, float], shown: int = 8) -> list[tuple[str, float, float]]:
    """(name, value, value / target - 1) of the nearest candidates."""
    rows = [(name, value, value / target - 1) for name, value in candidates.items()]
    return sorted(rows, key=lambda row: abs(row[2]))[:shown]


def clip_candidates(costs: list[Cost]) -> dict[str, float]:
    """The vision tower alone or with one word, every convention, MAC and FLOP."""
    [text] = [c for c in costs if c.part == "CLIP B/16 text"]
    found = {}
    for c, (factor, unit) in itertools.product([c for c in costs if c.part == VISION], ((1, "MAC"), (2, "FLOP"))):
        values = {how: (getattr(c, how), getattr(text, how)) for how in CONVENTIONS}
        values["linear + last"] = c.linear + (c.all - c.linear) / 12, text.linear
        for how, (vision, word) in values.items():
            found[f"vision {c.input}, {how}, {unit}"] = factor * vision
            found[f"vision {c.input} + 1 word, {how}, {unit}"] = factor * (vision + word)
    return found


def sd2_candidates(costs: list[Cost]) -> dict[str, float]:
    """UNet alone, with the VAE encoder, with CLIP at 336 x 448, every convention; MAC."""
    clip = next(c for c in reversed(costs) if c.part == VISION and c.input in ("336 x 448", costs[0].input))
    encoders = {c.input: c for c in costs if c.part == "SD 2 VAE encoder"}
    found = {}
    for c, how in itertools.product([c for c in costs if c.part == "SD 2 UNet"], CONVENTIONS):
        value, encoder, logits = (getattr(part, how) for part in (c, encoders[c.input], clip))
        found[f"UNet {c.input}, {how}"] = value
        found[f"UNet {c.input} + CLIP, {how}"] = value + logits
        found[f"UNet + VAE encoder {c.input}, {how}"] = value + encoder
        found[f"UNet + VAE encoder {c.input} + CLIP, {how}"] = value + encoder + logits
    return found


def parameter_candidates(params: dict[str, float]) -> dict[str, float]:
    """Every set of parts with one UNet and one of CLIP's wholes or towers."""
    optional = ("SD 2 VAE encoder", "SD 2 VAE decoder", "SD 2 text encoder")
    found = {}
    for unet, clip in itertools.product(
        ("SD 2 UNet", "SD 1.x UNet"), ("CLIP B/16", "CLIP B/16 vision", "CLIP B/16 text")
    ):
        for many in range(len(optional) + 1):
            for more in itertools.combinations(optional, many):
                found[" + ".join((clip, unet, *more))] = sum(params[name] for name in (clip, unet, *more))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    cli = parser(__doc__)
    cli.add_argument("--json", type=Path, help="write the unrounded figures here")
    cli.add_argument("--voc", type=Path, help="folder VOC2012 with ImageSets and JPEGImages")
    cli.add_argument("--clip-sizes", type=comma(size), default=CLIP_SIZES, help="HxW, comma-separated; the paper's")
    cli.add_argument("--sd2-sizes", type=comma(size), default=SD2_SIZES, help="likewise of Stable Diffusion 2")
    options = cli.parse_args(argv)
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")

    clip = clip_on_meta()
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(**UNET).eval(), diffusers.AutoencoderKL(**VAE).eval()
        unet_sd1 = diffusers.UNet2DConditionModel(**UNET_SD1)
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()
    costs = [*clip_costs(clip, options.clip_sizes, options.voc), *sd2_costs(unet, vae, text, options.sd2_sizes)]
    params = parameters(clip, unet, vae, text, unet_sd1)
    fits = {
        "CLIP B/16, 52.2 G": nearest(PAPER_GIGA["CLIP B/16"], clip_candidates(costs)),
        "mv, 339.2 G": nearest(PAPER_GIGA["mv"], sd2_candidates(costs)),
        "op, 351.3 G": nearest(PAPER_GIGA["op"], sd2_candidates(costs), 4),
        "CLIP B/16, 149.6 M": nearest(PAPER_PARAMS_M["CLIP B/16"], {"CLIP B/16": params["CLIP B/16"]}),
        "op and mv, 1006.8 M": nearest(PAPER_PARAMS_M["op, mv"], parameter_candidates(params)),
    }
    wasted = after_last_attention(unet)
    print(f"{tool()}; diffusers {diffusers.__version__}\n")
    write(markdown(["part", "parameters M"], [(name, f"{value:.3f}") for name, value in params.items()]), None)
    print()
    write(markdown(["part", "input", "GMAC all", "linear", "modules"], [astuple(c) for c in costs]), None)
    print(f"\nUNet behind its last self-attention at 512 x 512: {wasted:.2f} GMAC")
    for name, rows in fits.items():
        shown = [(what, value, f"{100 * off:+.2f} %") for what, value, off in rows]
        print("", *markdown([f"the paper's {name}", "ours", "ours / paper - 1"], shown), sep="\n")
    if options.json:
        content = {"tool": tool(), "costs": [asdict(c) for c in costs], "params_m": params, "fits": fits}
        write([json.dumps(content, indent=1)], options.json)


if __name__ == "__main__":
    main()
