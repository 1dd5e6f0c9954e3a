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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.measure.environment import environment
from ovbench.models.patch_model import OpenVocabModel
from ovbench.ops.windows import windows
from ovbench.spec import DType
from study import (
    added_mib,
    in_fresh_process,
    in_turns,
    markdown,
    median,
    noise_image,
    parser,
    random_model,
    size,
    write,
)

Case = tuple[tuple[int, int], int, tuple[int, int]]  # image, words, label
CASES: dict[str, Case] = {
    "336x448:150": ((336, 448), 150, (512, 683)),
    "448x597:171": ((448, 597), 171, (480, 640)),
    "336x448:847": ((336, 448), 847, (512, 683)),
    "560x1120:19": ((560, 1120), 19, (1024, 2048)),
}


def straightforward(model: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map (H, W) of one image (3, h, w) as first written: one window per forward, everything at full size."""
    p, method, clip = model.protocol, model.method, model.clip
    h, w = image.shape[-2:]
    q = len(model.query_words)
    preds, count = (torch.zeros(1, channels, h, w, device=image.device) for channels in (q, 1))
    normalised = clip.normalise(image[None])
    for top, left, bottom, right in windows(h, w, p.crop, p.stride):
        with model.precision():
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
    labels: Tensor = probs.argmax(0)
    return labels


def straightforward_features(method: Any, images: Tensor) -> Tensor:
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
        mixed: Tensor = clip.merge_heads(((kk + attention) / 2) @ v)[0] + c.cls_weight * cls
        return mixed

    out = shallow @ last(gather @ mend(x), feats[deep][0, 0])
    levels = sum(feats[i][0] for i in range(method.first, method.last + 1))
    out = out + shallow @ last(levels[1:], levels[0])
    dense: Tensor = clip.project(out).view(1, h, w, -1)
    return dense


def case_of(text: str) -> Case:
    """A case of :data:`CASES`, or any ``HxW:WORDS``, whose label has the image's size."""
    if text in CASES:
        return CASES[text]
    image, _, words = text.partition(":")
    return size(image), int(words), size(image)


def built(a: argparse.Namespace, case: str, dtype: DType) -> tuple[OpenVocabModel, Tensor, tuple[int, int]]:
    """SC-CLIP, the case's image and its label's size."""
    image, words, label = case_of(case)
    model = random_model("sc-clip", words, "sc-clip", weights=a.weights, device=a.device, dtype=dtype)
    return model, noise_image(*image, device=a.device), label


@torch.inference_mode()
def measure(a: argparse.Namespace, case: str, dtype: DType) -> dict[str, Any]:
    """Medians and ratios of one case at one precision."""
    model, image, label = built(a, case, dtype)
    height, width = image.shape[-2:]
    boxes = windows(height, width, model.protocol.crop, model.protocol.stride)
    batch = model.clip.normalise(torch.stack([image[:, t:b, u:r] for t, u, b, r in boxes]))

    def plain() -> None:
        with model.precision():
            model.clip.visual(batch)

    steps: dict[str, Callable[[], object]] = {
        "plain": plain,
        "ours": lambda: model.predict_labels([image], [label])[0],
        "straightforward": lambda: straightforward(model, image, label),
    }
    agreement = (model.predict_labels([image], [label])[0] == straightforward(model, image, label)).double().mean()
    times = {name: median(samples) for name, samples in in_turns(steps, a.repeats, a.device).items()}
    return {
        "case": case,
        "dtype": dtype,
        "windows": len(boxes),
        "repeats": a.repeats,
        **{f"{name}_ms": value for name, value in times.items()},
        "ours_over_plain": times["ours"] / times["plain"],
        "straightforward_over_ours": times["straightforward"] / times["ours"],
        "straightforward_over_plain": times["straightforward"] / times["plain"],
        "label_agreement_percent": 100 * float(agreement),
    }


@torch.inference_mode()
def peak_mib(a: argparse.Namespace, case: str, dtype: DType, which: str) -> float | None:
    """Peak memory in MiB that one image adds with the model loaded."""
    model, image, label = built(a, case, dtype)
    if which == "ours":
        return added_mib(lambda: model.predict_labels([image], [label]), a.device)
    return added_mib(lambda: straightforward(model, image, label), a.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the chosen cases and prints a table."""
    cli = parser(__doc__, speed=True, repeats=5)
    cli.add_argument("--case", action="append", help=f"HxW:WORDS; default: {', '.join(CASES)}")
    cli.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    cli.add_argument("--memory", action="store_true", help="also peak memory, in fresh processes (Linux, or a GPU)")
    cli.add_argument("--json", type=Path, help="write the figures to this file")
    a = cli.parse_args(argv)
    results = []
    for case in a.case or CASES:
        for dtype in a.dtype or ["float32", "bfloat16"]:
            found = measure(a, case, dtype)
            for which in ("ours", "straightforward") if a.memory else ():
                found[f"{which}_peak_mib"] = in_fresh_process(peak_mib, a, case, dtype, which)
            results.append(found)
    print("\n".join(markdown(list(results[0]), [list(found.values()) for found in results])))
    if a.json:
        write([json.dumps({"environment": environment(a.device), "results": results}, indent=2)], a.json)


if __name__ == "__main__":
    main()
