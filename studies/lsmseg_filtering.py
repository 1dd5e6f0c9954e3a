"""What the category filter and cached texts save: time and memory of one image, 459 classes, in one run.

    python studies/lsmseg_filtering.py
    python studies/lsmseg_filtering.py --weights random --hidden 128 --five --device cuda --repeats 20  # B/16

The whole path from image to labels, LSMSeg without a second encoder; by default one view of 384 pixels, the built-in small
CLIP and a narrow aggregator, so that it runs on two CPU cores in two minutes; --five: the protocol's five views. What counts
are the ratios of a run, not its seconds. Rows are timed in turns. Weights are random: labels mean nothing, the work is the
same. The public CAT-Seg keeps 256 classes. Memory is the peak of one image less what the model itself takes, each row in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ovbench.measure.environment import environment
from ovbench.measure.samples import noise, summary
from ovbench.measure.timing import Stopwatch, peak_memory, reset_peak_memory
from ovbench.models.view_averaging import ViewModel
from ovbench.networks.clip_weights import load_clip
from ovbench.registry import method_class
from ovbench.spec import protocol
from ovbench.words.embeddings import prompts

Row = tuple[int, bool]  # classes that go on (0: all), texts encoded anew for the image
ROWS: tuple[Row, ...] = ((0, False), (256, True), (256, False), (32, True), (32, False))
BASE = ROWS[0]
IMAGE = (480, 640)


def words_of(classes: int) -> list[str]:
    """PC-459's names, as far as asked for."""
    from ovbench import benchmarks

    benchmark = benchmarks.get("context459")
    return [entry[0] for entry in benchmark.words(benchmark.wordings[0])][:classes]


def built(a: argparse.Namespace, words: list[str]) -> ViewModel:
    """The model, on its device."""
    cls = method_class("lsmseg")
    clip = load_clip(a.weights, device=a.device)
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


def picture() -> torch.Tensor:
    """An image (3, h, w) of noise, uint8."""
    return torch.randint(0, 256, (3, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def times(a: argparse.Namespace) -> dict[Row, list[float]]:
    """Times in milliseconds of every row."""
    words = words_of(a.classes)
    model, image = built(a, words), picture()
    watch = Stopwatch(a.device)
    for turn in range(a.repeats + 1):
        for row in ROWS:
            with watch.stage(str(row)):
                one_image(model, image, words, *row)
        if turn == 0:  # warm-up
            watch.discard()
    return {row: watch.samples[str(row)] for row in ROWS}


def memory(a: argparse.Namespace, row: Row) -> float | None:
    """Peak memory in MiB of one image above what was in use before it; None where the system does not tell."""
    words = words_of(a.classes)
    model, image = built(a, words), picture()
    reset_peak_memory(a.device)
    before = peak_memory(a.device)
    one_image(model, image, words, *row)
    after = peak_memory(a.device)
    return None if before is None or after is None else after[0] - before[0]


def memory_of_rows(a: argparse.Namespace) -> dict[Row, float | None]:
    """Peak memory of every row: a process that has freed memory does not give all of it back."""
    found: dict[Row, float | None] = {}
    for index, row in enumerate(ROWS):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", str(index)]
        found[row] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def report(a: argparse.Namespace) -> list[str]:
    """Markdown lines."""
    samples, peak = times(a), memory_of_rows(a)
    median = {row: summary(values)["median"] for row, values in samples.items()}
    machine = environment(a.device)
    lines = [
        f"**Filter and cached texts, {a.classes} classes, {'five views' if a.five else 'one view'}, CLIP `{a.weights}`, "
        f"hidden width {a.hidden}, {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, median of {a.repeats}** "
        "(`studies/lsmseg_filtering.py`)",
        "",
        "| classes that go on | texts | time (ms) | IQR / median | of all classes, cached | peak memory (MiB) | of all classes |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        k, encode = row
        own, all_of = peak[row], peak[BASE]
        shown = f"{own:.0f} | {own / all_of:.3f}" if own is not None and all_of else "– | –"
        lines.append(
            f"| {k or a.classes} | {'encoded' if encode else 'cached'} | {median[row]:.0f} | {noise(samples[row]):.2f} | "
            f"{median[row] / median[BASE]:.3f} | {shown} |"
        )
    text_in, cached, filtered = (median[row] for row in ((256, True), (256, False), (32, False)))
    lines += [
        "",
        f"As the rows of Table 5.8 (256 classes with texts encoded : the same cached : 32 classes, cached): "
        f"1 : {cached / text_in:.3f} : {filtered / text_in:.3f}; printed (L40) 535.2 ms and 362.8 ms, 1 : {362.8 / 535.2:.3f}.",
    ]
    return lines


def main() -> None:
    """Measures and prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="builtin", help="builtin, random (ViT-B/16), or any of CLIP's")
    parser.add_argument("--hidden", type=int, default=32, help="width of the aggregator; 128 as published")
    parser.add_argument("--classes", type=int, default=459)
    parser.add_argument("--five", action="store_true", help="four windows and the whole image, instead of that alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: to the terminal")
    a = parser.parse_args()
    if a.memory_of is not None:
        print(json.dumps(memory(a, ROWS[a.memory_of])))
        return
    text = "\n".join(report(a)) + "\n"
    if a.out is None:
        print(text, end="")
    else:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
