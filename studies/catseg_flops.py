"""Operations of CAT-Seg and LSMSeg on PC-459 beside the published ones, each under a named convention.

    python studies/catseg_flops.py --out results/tables/thesis-lsmseg-5.8-conventions.md

B/16, 459 classes, one image in five views: four windows of 384 and the whole image. Counted on the meta device, so
nothing is computed and no weights are needed. "Public steps" are those of the public code (guidance repeated for every class,
padding as tokens, text of 77 tokens); "ours" gives the same result to rounding with what all classes share computed once.
Printed FLOPs are multiply-accumulates, as every counter here reports them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
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
from study import comma, markdown, parser, write

CLASSES, SQUARE, CROP, STRIDE = 459, 640, 384, 256
CONVENTIONS: tuple[Convention, ...] = ("fvcore", "torch")
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


def text_step(method: Any, length: int, classes: int) -> Callable[[], Tensor]:
    """Encodes a prompt per class."""
    tokens = torch.zeros(classes, CONTEXT, dtype=torch.int64, device="meta")
    return lambda: encode_tokens(method.clip.clip, tokens, length)


def image_step(method: Any, classes: int) -> Callable[[], object]:
    """Five views of one image to probabilities of all classes at 640 x 640, the texts given."""
    boxes = tuple(windows(SQUARE, SQUARE, CROP, STRIDE))
    image = torch.empty(1, 3, SQUARE, 853, device="meta")
    text = torch.empty(classes, 1, method.clip.embed_dim, device="meta")

    def step() -> object:
        square = torch.nn.functional.interpolate(image, (SQUARE, SQUARE), mode="bilinear")
        whole = torch.nn.functional.interpolate(image, (CROP, CROP), mode="bilinear")
        views = [square[..., top:bottom, left:right] for top, left, bottom, right in boxes]
        found = method.class_logits(method.clip.normalise(torch.cat([*views, whole])), text)
        logits = found.dense(classes).float()
        averaged = ImageViews(logits, None, classes, (SQUARE, SQUARE), boxes, True)
        probabilities = averaged.probabilities(torch.arange(classes, device="meta"), (SQUARE, SQUARE))
        return torch.nn.functional.interpolate(probabilities[None], scale_factor=1.0, mode="bilinear")  # to the label

    return step


def gmacs(method: Any, convention: Convention, length: int, classes: int) -> tuple[float, float]:
    """10^9 multiply-accumulates with the text and without."""
    with patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()):  # the meta device has none
        of_image = count(image_step(method, classes), convention).gmacs
        return of_image + count(text_step(method, length, classes), convention).gmacs, of_image


def difference(found: float, expected: float | None) -> str | None:
    """Relative difference for display."""
    return None if expected is None else f"{100 * (found / expected - 1):+.2f} %"


def tenths(value: float | None) -> str:
    """For display."""
    return "" if value is None else f"{value:.1f}"


def steps_table(a: argparse.Namespace) -> list[str]:
    """Counts in the public code's steps beside those of the public code itself, and ours."""
    none = (None, None)
    rows: list[list[object]] = []
    for k, convention in itertools.product(a.keep, CONVENTIONS):
        public = built("cat-seg", a.arch, pad_len=k, as_published=True)
        shared = built("cat-seg", a.arch, pad_len=k)
        theirs, ours = gmacs(public, convention, CONTEXT, a.classes), gmacs(shared, convention, SHORT, a.classes)
        known = a.classes == CLASSES and a.arch == "ViT-B-16"  # what the public code was counted with
        expected: tuple[float | None, float | None] = PUBLIC.get((convention, k), none) if known else none
        printed = PRINTED.get((convention, k), none) if known else none
        for at, text in enumerate(("encoded", "cached")):
            rows.append(
                [convention, k, text, tenths(expected[at]), tenths(theirs[at]), difference(theirs[at], expected[at]),
                 tenths(printed[at]), tenths(ours[at])]
            )  # fmt: skip
    header = ["counter", "classes that go on", "text", "public code", "our count of its steps", "difference", "printed"]
    return [
        f"**CAT-Seg and LSMSeg on PC-459, {a.arch}, five views, 10^9 multiply-accumulates** (`studies/catseg_flops.py`)",
        "",
        *markdown([*header, "ours"], rows),
        "",
        "The printed 3459.7 G and 2122.0 G differ by the text encoder alone (both with 256 classes); 32 classes save far more.",
    ]


def variants_table(a: argparse.Namespace) -> list[str]:
    """LSMSeg, k = 32, text cached, with each second encoder."""
    rows = []
    for visual in a.visual:
        options = {"visual": visual, "visual_weights": "random"}
        public, ours = (built("lsmseg", a.arch, as_published=steps, **options) for steps in (True, False))
        which: tuple[tuple[Any, Convention], ...] = ((public, "fvcore"), (ours, "fvcore"), (ours, "torch"))
        counts = [tenths(gmacs(method, convention, SHORT, a.classes)[1]) for method, convention in which]
        rows.append([visual, *counts, count_parameters(ours).total / 1e6])
    header = ["second encoder", "fvcore, public steps", "fvcore, ours", "torch, ours", "parameters (M)"]
    return ["**LSMSeg with 32 classes, text cached**", "", *markdown(header, rows)]


def parameters_table(a: argparse.Namespace) -> list[str]:
    """Parameters of cat-seg."""
    rows = []
    for arch, (public, printed) in PARAMETERS.items():
        found = count_parameters(built("cat-seg", arch)).total / 1e6
        rows.append([arch, f"{found:.3f}", f"{public:.3f}", difference(found, public), printed])
    header = ["architecture", "cat-seg (M)", "public code", "difference", "printed"]
    return ["**Parameters**", "", *markdown(header, rows)]


TABLES = {"steps": steps_table, "variants": variants_table, "parameters": parameters_table}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints or writes the tables."""
    cli = parser(__doc__)
    cli.add_argument("--table", choices=TABLES, action="append", help="default: all")
    cli.add_argument("--arch", default="ViT-B-16")
    cli.add_argument("--classes", type=int, default=CLASSES)
    cli.add_argument("--keep", type=comma(int), default=[256, 32], help="classes that go on, comma-separated")
    cli.add_argument(
        "--visual", type=comma(str), default=["none", "dinov2-b", "sam-b", "sam-l"], help="second encoders"
    )
    cli.add_argument("--out", type=Path, help="default: to the terminal")
    a = cli.parse_args(argv)
    lines = [line for table in a.table or TABLES for line in ("", *TABLES[table](a))]
    write(lines[1:], a.out)


if __name__ == "__main__":
    main()
