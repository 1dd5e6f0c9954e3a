"""What the category filter and cached texts save: time and memory of one image, 459 classes, in one run.

    python studies/lsmseg_filtering.py
    python studies/lsmseg_filtering.py --weights random --hidden 128 --five --device cuda --repeats 20  # B/16

The whole path from image to labels, LSMSeg without a second encoder; by default one view of 384 pixels, the built-in small
CLIP and a narrow aggregator, so that it runs on two CPU cores in two minutes; --five: the protocol's five views. What counts
are the ratios of a run, not its seconds. Rows are timed in turns. Weights are random: labels mean nothing, the work is the
same. The public CAT-Seg keeps 256 classes. With --memory also the peak of one image less what the model itself takes, each row in
a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ovbench import benchmarks
from ovbench.measure.environment import environment
from ovbench.measure.samples import noise
from ovbench.models.view_averaging import ViewModel
from ovbench.networks.clip_weights import load_clip
from ovbench.registry import method_class
from ovbench.spec import protocol
from ovbench.words.embeddings import prompts
from study import added_mib, in_fresh_process, in_turns, markdown, median, noise_image, parser, write

Row = tuple[int, bool]  # classes that go on (0: all), texts encoded anew for the image
ROWS: tuple[Row, ...] = ((0, False), (256, True), (256, False), (32, True), (32, False))
BASE = ROWS[0]
IMAGE = (480, 640)


def words_of(classes: int) -> list[str]:
    """PC-459's names, as far as asked for."""
    benchmark = benchmarks.get("context459")
    return [entry[0] for entry in benchmark.words(benchmark.wordings[0])][:classes]


def built(a: argparse.Namespace, words: list[str]) -> ViewModel:
    """The model, on its device."""
    cls = method_class("lsmseg")
    clip = load_clip(a.weights, None if a.weights == "builtin" else "ViT-B-16", device=a.device)
    options = {"visual": "none", "hidden": a.hidden, "grid": 384 // clip.patch}
    views = {} if a.five else {"mode": "whole"}
    return ViewModel(cls(clip, cls.configure(options)), words, protocol("cat-seg", **views))


def one_image(model: ViewModel, image: torch.Tensor, words: list[str], k: int, encode: bool) -> torch.Tensor:
    """Labels of the image with the filter at ``k``."""
    method: Any = model.method
    method.aggregator.keep = k
    if encode:
        method.changed = True  # as in training: no embedding is looked up
        with torch.inference_mode():
            model.text = method.text_embeddings(words, prompts("cat-seg"))
    return model.predict_labels([image], [IMAGE])[0]


def memory(a: argparse.Namespace, row: Row) -> float | None:
    """Peak memory in MiB of one image above what was in use before it; None where the system does not tell."""
    words = words_of(a.classes)
    return added_mib(partial(one_image, built(a, words), noise_image(*IMAGE), words, *row), a.device)


def report(a: argparse.Namespace) -> list[str]:
    """Markdown lines."""
    words = words_of(a.classes)
    model, image = built(a, words), noise_image(*IMAGE)
    samples = in_turns({row: partial(one_image, model, image, words, *row) for row in ROWS}, a.repeats, a.device)
    del model
    peak = {row: in_fresh_process(memory, a, row) if a.memory else None for row in ROWS}
    times = {row: median(values) for row, values in samples.items()}
    machine = environment(a.device)
    rows: list[list[object]] = []
    for row in ROWS:
        k, encode = row
        own, all_of = peak[row], peak[BASE]
        less = own / all_of if own is not None and all_of else None
        rows.append(
            [k or a.classes, "encoded" if encode else "cached", times[row], noise(samples[row]), times[row] / times[BASE],
             own, less]
        )  # fmt: skip
    text_in, cached, filtered = (times[row] for row in ((256, True), (256, False), (32, False)))
    header = ["classes that go on", "texts", "time (ms)", "IQR / median", "of all classes, cached", "peak memory (MiB)"]
    return [
        f"**Filter and cached texts, {a.classes} classes, {'five views' if a.five else 'one view'}, CLIP `{a.weights}`, "
        f"hidden width {a.hidden}, {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, median of {a.repeats}** "
        "(`studies/lsmseg_filtering.py`)",
        "",
        *markdown([*header, "of all classes"], rows),
        "",
        f"As the rows of Table 5.8 (256 classes with texts encoded : the same cached : 32 classes, cached): "
        f"1 : {cached / text_in:.3f} : {filtered / text_in:.3f}; printed (L40) 535.2 ms and 362.8 ms, 1 : {362.8 / 535.2:.3f}.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints or writes the table."""
    cli = parser(__doc__, speed=True)
    cli.set_defaults(weights="builtin")
    cli.add_argument("--hidden", type=int, default=32, help="width of the aggregator; 128 as published")
    cli.add_argument("--classes", type=int, default=459)
    cli.add_argument("--five", action="store_true", help="four windows and the whole image, instead of that alone")
    cli.add_argument("--memory", action="store_true", help="also peak memory")
    cli.add_argument("--out", type=Path, help="default: to the terminal")
    a = cli.parse_args(argv)
    write(report(a), a.out)


if __name__ == "__main__":
    main()
