"""What the studies share: their command line, a random model, times, memory, Markdown."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from ovbench.measure.samples import summary
from ovbench.measure.timing import Stopwatch, peak_memory, reset_peak_memory
from ovbench.models.patch_model import OpenVocabModel
from ovbench.networks.clip_weights import load_clip
from ovbench.registry import method_class
from ovbench.spec import DType, protocol

Name = TypeVar("Name")
Result = TypeVar("Result")


def parser(text: str | None, *, speed: bool = False, repeats: int = 3) -> argparse.ArgumentParser:
    """A command line that shows a script's docstring; those that measure speed take a device and repeats."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if speed:
        found.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        found.add_argument("--repeats", type=int, default=repeats, help="timed passes, after one to warm up")
        found.add_argument(
            "--weights", default="random", help="of CLIP: random (an open_clip ViT), builtin (tiny), or a file"
        )
    return found


def comma(kind: Callable[[str], Result]) -> Callable[[str], list[Result]]:
    """Type of an option that takes values separated by commas; an empty one has none."""
    return lambda text: [kind(part.strip()) for part in text.split(",") if part.strip()]


def size(text: str) -> tuple[int, int]:
    """Height and width of ``HxW``."""
    height, width = text.lower().split("x")
    return int(height), int(width)


def random_model(
    method: str,
    words: int,
    preset: str,
    *,
    weights: str = "random",
    arch: str | None = "ViT-B-16",
    device: str = "cpu",
    dtype: DType = "float32",
    **protocol_fields: Any,
) -> OpenVocabModel:
    """A method with ``words`` one-word classes whose text embeddings are random, since texts cost nothing per image."""
    clip = load_clip(weights, None if weights == "builtin" else arch, device=device)
    settings = protocol(preset, templates="plain", **protocol_fields)
    model = OpenVocabModel(method_class(method).build(clip), ["a"], settings, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    model.text = F.normalize(torch.randn(words, clip.embed_dim, generator=generator), dim=-1).to(device)
    model.word_class = torch.arange(words, device=device)
    model.query_words, model.words = ["a"] * words, [["a"]] * words
    return model


def noise_image(height: int, width: int, device: str = "cpu") -> torch.Tensor:
    """An image (3, H, W) of noise, uint8, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator).to(device)


def in_turns(steps: Mapping[Name, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[Name, list[float]]:
    """Times in milliseconds of steps that are taken in turn, so that a drift of the machine meets all alike."""
    watch = Stopwatch(device)
    for turn in range(repeats + 1):
        for place, step in enumerate(steps.values()):
            with watch.stage(str(place)):
                step()
        if turn == 0:  # warm-up
            watch.discard()
    return {name: watch.samples[str(place)] for place, name in enumerate(steps)}


def median(times: Sequence[float]) -> float:
    """Median of times in milliseconds."""
    return float(summary(times)["median"])


def added_mib(step: Callable[[], object], device: str = "cpu") -> float | None:
    """Peak memory in MiB of one call above what is in use before it; None where the system does not tell.

    Only true in a process that has computed nothing before, see :func:`in_fresh_process`: freed memory is not all given back.
    """
    reset_peak_memory(device)
    before = peak_memory(device)
    step()
    after = peak_memory(device)
    return None if before is None or after is None else after[0] - before[0]


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new process; the function must be importable."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table: text as it is, floats with two decimals; None is a dash."""

    def cell(value: object) -> str:
        return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    body = [[cell(value) for value in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]


def write(lines: Iterable[str], out: Path | None) -> None:
    """Lines to a file, or to the terminal."""
    text = "\n".join(lines) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
