"""Operations of CAT-Seg and LSMSeg on PC-459 beside the published ones, each under a named convention.

    python studies/catseg_flops.py --out results/tables/thesis-lsmseg-5.8-conventions.md

B/16, 459 classes, one image in five views: four windows of 384 and the whole image. Counted on the meta device, so
nothing is computed and no weights are needed. "Public steps" are those of the public code (guidance repeated for every class,
padding as tokens, text of 77 tokens); "ours" gives the same result to rounding with what all classes share computed once.
Printed FLOPs are multiply-accumulates, as every counter here reports them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ovbench.measure.conventions import Convention
from ovbench.measure.counters import count
from ovbench.measure.parameters import count_parameters
from ovbench.models.view_averaging import ImageViews
from ovbench.networks.clip_weights import load_clip
from ovbench.ops.windows import windows
from ovbench.registry import method_class
from ovbench.words.embeddings import encode_tokens

CLASSES, SQUARE, CROP, STRIDE = 459, 640, 384, 256
CONTEXT = 77  # tokens that the public code encodes
SHORT = 14  # tokens of the longest "A photo of a {} in the scene" of PC-459, all that ours encodes
# G, in text in / text out: reference counts of the public code, run unmodified, with fvcore itself and with torch's counter
PUBLIC: dict[tuple[Convention, int], tuple[float, float]] = {
    ("fvcore", 256): (3459.73, 2123.19),
    ("fvcore", 32): (1834.08, 497.54),
    ("torch", 256): (3502.8, 2135.0),
    ("torch", 32): (1888.6, 520.9),
}
PRINTED = {("fvcore", 256): (3459.7, 2122.0)}  # Table 5.8: CAT-Seg, and LSMSeg without SAM
PARAMETERS = {"ViT-B-16": (154.289, "156.4"), "ViT-L-14-336": (433.727, "")}  # M: of the public code, printed


def built(name: str, arch: str, **options: Any) -> Any:
    """A method on the meta device."""
    cls = method_class(name)
    method = cls(load_clip("random", arch), cls.configure(options))
    return method.to("meta")


def text_step(method: Any, length: int) -> Callable[[], Tensor]:
    """Encodes a prompt per class."""
    tokens = torch.zeros(CLASSES, CONTEXT, dtype=torch.int64, device="meta")
    return lambda: encode_tokens(method.clip.clip, tokens, length)


def image_step(method: Any) -> Callable[[], object]:
    """Five views of one image to probabilities of all classes at 640 x 640, the texts given."""
    boxes = tuple(windows(SQUARE, SQUARE, CROP, STRIDE))
    image = torch.empty(1, 3, SQUARE, 853, device="meta")
    text = torch.empty(CLASSES, 1, method.clip.embed_dim, device="meta")

    def step() -> object:
        square = torch.nn.functional.interpolate(image, (SQUARE, SQUARE), mode="bilinear")
        whole = torch.nn.functional.interpolate(image, (CROP, CROP), mode="bilinear")
        views = [square[..., top:bottom, left:right] for top, left, bottom, right in boxes]
        found = method.class_logits(method.clip.normalise(torch.cat([*views, whole])), text)
        logits = found.dense(CLASSES).float()
        averaged = ImageViews(logits, None, CLASSES, (SQUARE, SQUARE), boxes, True)
        probabilities = averaged.probabilities(torch.arange(CLASSES, device="meta"), (SQUARE, SQUARE))
        return torch.nn.functional.interpolate(probabilities[None], scale_factor=1.0, mode="bilinear")  # to the label

    return step


def gmacs(method: Any, convention: Convention, length: int) -> tuple[float, float]:
    """10^9 multiply-accumulates with the text and without."""
    with patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()):  # the meta device has none
        of_image = count(image_step(method), convention).gmacs
        return of_image + count(text_step(method, length), convention).gmacs, of_image


def difference(found: float, expected: float) -> str:
    """Relative difference for display."""
    return f"{100 * (found / expected - 1):+.2f} %"


def steps_table() -> Iterator[str]:
    """Counts in the public code's steps beside those of the public code itself, and ours."""
    yield "| counter | classes that go on | text | public code | our count of its steps | difference | printed | ours |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for k in (256, 32):
        for convention in ("fvcore", "torch"):
            public = built("cat-seg", "ViT-B-16", pad_len=k, as_published=True)
            shared = built("cat-seg", "ViT-B-16", pad_len=k)
            theirs, ours = gmacs(public, convention, CONTEXT), gmacs(shared, convention, SHORT)
            expected = PUBLIC[convention, k]
            printed = PRINTED.get((convention, k), (None, None))
            for at, text in enumerate(("encoded", "cached")):
                shown = "" if printed[at] is None else f"{printed[at]:.1f}"
                yield (
                    f"| {convention} | {k} | {text} | {expected[at]:.1f} | {theirs[at]:.1f} | "
                    f"{difference(theirs[at], expected[at])} | {shown} | {ours[at]:.1f} |"
                )


def variants_table() -> Iterator[str]:
    """LSMSeg, k = 32, text cached, with each second encoder."""
    yield "| second encoder | fvcore, public steps | fvcore, ours | torch, ours | parameters (M) |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for visual in ("none", "dinov2-b", "sam-b", "sam-l"):
        options = {"visual": visual, "visual_weights": "random"}
        public, ours = (built("lsmseg", "ViT-B-16", as_published=steps, **options) for steps in (True, False))
        counts = [
            gmacs(method, convention, SHORT)[1]
            for method, convention in ((public, "fvcore"), (ours, "fvcore"), (ours, "torch"))
        ]
        shown = " | ".join(f"{value:.1f}" for value in counts)
        yield f"| {visual} | {shown} | {count_parameters(ours).total / 1e6:.2f} |"


def parameters_table() -> Iterator[str]:
    """Parameters of cat-seg."""
    yield "| architecture | cat-seg (M) | public code | difference | printed |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for arch, (public, printed) in PARAMETERS.items():
        found = count_parameters(built("cat-seg", arch)).total / 1e6
        yield f"| {arch} | {found:.3f} | {public:.3f} | {difference(found, public)} | {printed} |"


def main() -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: to the terminal")
    out = parser.parse_args().out
    lines = [
        "**CAT-Seg and LSMSeg on PC-459, B/16, five views, 10^9 multiply-accumulates** (`studies/catseg_flops.py`)",
        "",
        *steps_table(),
        "",
        "The printed 3459.7 G and 2122.0 G differ by the text encoder alone (both with 256 classes); 32 classes save far more.",
        "",
        "**LSMSeg with 32 classes, text cached**",
        "",
        *variants_table(),
        "",
        "**Parameters**",
        "",
        *parameters_table(),
    ]
    text = "\n".join(lines) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
