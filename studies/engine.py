"""Speed of the whole pipeline against a plain ViT forward and against a straightforward implementation, in one run.

    python studies/engine.py                        # the cases of the project's targets, float32 and bfloat16
    python studies/engine.py --case 336x448:150 --dtype float32 --repeats 5 --json out.json

Prints medians and ratios. "plain" is open_clip's own forward of the same windows in one batch: the floor that no
pipeline on these windows can beat. "straightforward" is SC-CLIP as one would first write it, window by window: distances
from an N x N x C difference, every window's logits upsampled and padded to the whole image, words reduced to classes by
a one-hot product, a softmax over all words at the label's size. Both run at the same precision and on the same random
ViT-B/16; ratios of one run are what counts, not the seconds of a machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.measure.environment import environment
from ovbench.models.patch_model import OpenVocabModel
from ovbench.models.windowed import DTYPES
from ovbench.networks.clip_weights import load_clip
from ovbench.ops.windows import windows
from ovbench.registry import method_class
from ovbench.spec import protocol

CASES = {
    "336x448:150": ((336, 448), 150, (512, 683)),
    "448x597:171": ((448, 597), 171, (480, 640)),
    "336x448:847": ((336, 448), 847, (512, 683)),
    "560x1120:19": ((560, 1120), 19, (1024, 2048)),
}


def straightforward(model: OpenVocabModel, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map (H, W) of one image (3, h, w) as first written: one window per forward, everything at full size."""
    p, method, clip = model.protocol, model.method, model.clip
    h, w = image.shape[-2:]
    q = len(model.query_words)
    preds, count = torch.zeros(1, q, h, w), torch.zeros(1, 1, h, w)
    normalised = clip.normalise(image[None])
    for top, left, bottom, right in windows(h, w, p.crop, p.stride):
        with model._precision():
            features = straightforward_features(method, normalised[:, :, top:bottom, left:right])
        features = F.normalize(features.float(), dim=-1)
        logits = (features @ model.text.T).permute(0, 3, 1, 2)
        logits = F.interpolate(logits, size=(bottom - top, right - left), mode="bilinear")
        preds += F.pad(logits, (left, w - right, top, h - bottom))
        count[:, :, top:bottom, left:right] += 1
    logits = F.interpolate(preds / count, size=size, mode="bilinear")[0] * p.logit_scale
    probs = logits.softmax(0)
    classes = F.one_hot(model.word_class).T.view(model.num_classes, q, 1, 1)
    if model.num_classes != q:
        probs = (probs[None] * classes).max(1)[0]
    return probs.argmax(0)


def straightforward_features(method: torch.nn.Module, images: Tensor) -> Tensor:
    """SC-CLIP's dense features with distances from a broadcast N x N x C difference and a loop over outliers."""
    c, clip = method.config, method.clip
    deep = clip.depth - 2
    tokens = clip.tokens(images, {deep, method.pre, method.post, *range(method.first, method.last + 1)})
    (h, w), feats = tokens.grid, dict(tokens.after)
    x = feats[deep][0, 1:]
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    nearest, index = distance.topk(c.neighbours + 1, largest=False)
    nearest, index = nearest[:, 1:], index[:, 1:]
    reach = torch.maximum(nearest[:, -1:].expand_as(nearest), nearest)
    density = c.neighbours / reach.mean(-1)
    factor = density[index].mean(-1) / density
    bad = (factor.float() > torch.quantile(factor.float(), 1 - c.contamination)).tolist()

    def mend(patches: Tensor) -> Tensor:
        out = patches.clone()
        for i in range(h * w):
            if bad[i]:
                y, z = divmod(i, w)
                near = [(y + a, z + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
                good = [m * w + n for m, n in near if 0 <= m < h and 0 <= n < w and not bad[m * w + n]]
                if good:
                    out[i] = patches[good].mean(0)
        return out

    def weights(patches: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(patches, dim=-1)
        similarity = unit @ unit.T
        kept = torch.where(similarity < c.beta, torch.zeros_like(similarity), similarity)
        return similarity, kept / (kept.sum(-1, keepdim=True) + 1e-6)

    similarity, gather = weights(mend(feats[method.pre][0, 1:]))
    centred = (similarity - similarity.mean()) * c.sharpness
    attention = centred.masked_fill(centred < 0, float("-inf")).softmax(-1)
    _, shallow = weights(feats[method.post][0, 1:])

    def last(patches: Tensor, cls: Tensor) -> Tensor:
        _, k, v = clip.qkv(patches[None])
        kk = (k @ k.transpose(-1, -2) / k.shape[-1] ** 0.5).softmax(-1)
        return clip.merge_heads(((kk + attention) / 2) @ v)[0] + c.cls_weight * cls

    out = shallow @ last(gather @ mend(x), feats[deep][0, 0])
    levels = sum(feats[i][0] for i in range(method.first, method.last + 1))
    out = out + shallow @ last(levels[1:], levels[0])
    return clip.project(out).view(1, h, w, -1)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median wall time in milliseconds after one warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def build(words: int, dtype: str, crop: int = 224) -> OpenVocabModel:
    """SC-CLIP on a random ViT-B/16 with ``words`` one-word classes; text embeddings random, they cost nothing here."""
    clip = load_clip("random", "ViT-B-16")
    model = OpenVocabModel(
        method_class("sc-clip").build(clip), ["a"], protocol("sc-clip", templates="plain", crop=crop), dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    model.text = F.normalize(torch.randn(words, clip.embed_dim, generator=generator), dim=-1)
    model.word_class = torch.arange(words)
    model.query_words, model.words = ["a"] * words, [["a"]] * words
    return model


def measure(case: str, dtype: str, repeats: int) -> dict[str, object]:
    """Medians and ratios of one case at one precision."""
    size, words, label = CASES[case]
    model = build(words, dtype)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    boxes = windows(*size, model.protocol.crop, model.protocol.stride)
    crops = torch.stack([image[:, t:b, u:r] for t, u, b, r in boxes])
    batch = model.clip.normalise(crops)
    precise = nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=DTYPES[dtype])

    def plain() -> None:
        with precise:
            model.clip.clip.visual(batch)

    with torch.inference_mode():
        agreement = (model.predict_labels([image], [label])[0] == straightforward(model, image, label)).double().mean()
        times = {
            "plain": median_ms(plain, repeats),
            "ours": median_ms(lambda: model.predict_labels([image], [label]), repeats),
            "straightforward": median_ms(lambda: straightforward(model, image, label), repeats),
        }
    return {
        "case": case,
        "dtype": dtype,
        "windows": len(boxes),
        "repeats": repeats,
        **{f"{name}_ms": value for name, value in times.items()},
        "ours_over_plain": times["ours"] / times["plain"],
        "straightforward_over_ours": times["straightforward"] / times["ours"],
        "straightforward_over_plain": times["straightforward"] / times["plain"],
        "label_agreement": float(agreement),
    }


def peak_mib(case: str, dtype: str, which: str) -> float:
    """Peak resident memory in MiB that one image adds to a fresh process with the model loaded."""
    code = (
        "import sys, resource, torch; sys.path.insert(0, sys.argv[1]); import engine\n"
        "size, words, label = engine.CASES[sys.argv[2]]; model = engine.build(words, sys.argv[3])\n"
        "image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)\n"
        "small = image[:, :224, :224]\n"
        "run = (lambda x, s: engine.straightforward(model, x, s)) if sys.argv[4] == 'straightforward' else "
        "(lambda x, s: model.predict_labels([x], [s]))\n"
        "torch.inference_mode().__enter__()\n"
        "now = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "open('/proc/self/clear_refs', 'w').write('5'); run(image, label)\n"
        "peak = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0] * 1024\n"
        "print((peak - now) / 2**20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), case, dtype, which],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def main() -> None:
    """Measures the chosen cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also peak memory, in fresh processes (Linux)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    results = []
    print(
        f"{'case':14} {'dtype':9} {'plain ms':>9} {'ours ms':>9} {'straight ms':>11} "
        f"{'ours/plain':>10} {'straight/ours':>13} {'straight/plain':>14} {'agree %':>8}"
    )
    for case in arguments.case or CASES:
        for dtype in arguments.dtype or ["float32", "bfloat16"]:
            found = measure(case, dtype, arguments.repeats)
            if arguments.memory:
                for which in ("ours", "straightforward"):
                    found[f"{which}_peak_mib"] = peak_mib(case, dtype, which)
            results.append(found)
            print(
                f"{case:14} {dtype:9} {found['plain_ms']:9.0f} {found['ours_ms']:9.0f} {found['straightforward_ms']:11.0f} "
                f"{found['ours_over_plain']:10.2f} {found['straightforward_over_ours']:13.2f} "
                f"{found['straightforward_over_plain']:14.2f} {100 * found['label_agreement']:8.3f}"
                + (
                    f"   peak MiB ours {found['ours_peak_mib']:.0f}, straightforward {found['straightforward_peak_mib']:.0f}"
                    if arguments.memory
                    else ""
                ),
                flush=True,
            )
    if arguments.json:
        content = {"environment": environment("cpu"), "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
