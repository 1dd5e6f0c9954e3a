"""Small generated copies of the benchmarks in their true layout, file names and label encoding.

For trying the tool and for tests: the scenes come from ``ovbench.networks.builtin.scenes``, never from photographs, with seeds
that the built-in CLIP was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovbench.benchmarks import get
from ovbench.benchmarks.labels import Ids
from ovbench.benchmarks.synth import class_choice, segment_ids
from ovbench.benchmarks.synth.class_choice import Vocabulary
from ovbench.errors import DataError, UsageError
from ovbench.paths import user_path

if TYPE_CHECKING:
    from ovbench.benchmarks.benchmark import Benchmark

MARKER = ".ovbench-synth.json"
# Raised whenever the same arguments give other files.
GENERATOR_VERSION = 1
MOST_IMAGES = 5000  # of a split


def _spoil(benchmark: Benchmark, raw: Ids, rng: np.random.Generator) -> Ids:
    """``raw`` with the unlabelled pixels that the benchmark's real files have."""
    void = 0 if benchmark.reduce_zero_label and not benchmark.has_255 else benchmark.ignore_index
    height, width = raw.shape
    spoiled = raw.copy()
    if benchmark.synth_rules.void == "border":
        edge = np.zeros(raw.shape, bool)
        down, right = raw[1:] != raw[:-1], raw[:, 1:] != raw[:, :-1]
        for part, change in ((edge[1:], down), (edge[:-1], down), (edge[:, 1:], right), (edge[:, :-1], right)):
            part |= change
        spoiled[edge] = void
    elif benchmark.synth_rules.void == "patch":
        h, w = height // 8, width // 8
        y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
        spoiled[y : y + h, x : x + w] = void
    elif benchmark.synth_rules.void == "strip":
        spoiled[height - height // 20 :] = void
    return spoiled


def _colormap() -> list[int]:
    """The 256 x 3 PASCAL VOC palette: the bits of an index, dealt to red, green and blue from the top bit down."""
    flat = []
    for index in range(256):
        for channel in range(3):
            flat.append(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)))
    return flat


@dataclass(frozen=True)
class _Part:
    """One split of a generated copy.

    Attributes:
        benchmark: Looked at in that split.
        images: How many.
        exponent: Of the fall of class occurrence with the class number; 0 is even.
    """

    benchmark: Benchmark
    images: int
    exponent: float

    @property
    def stems(self) -> list[str]:
        """The stems of the images in the order in which they are made."""
        patterns = self.benchmark.synth_rules.stems
        return [patterns[index % len(patterns)].format(i=index + 1) for index in range(self.images)]


@dataclass(frozen=True)
class _Plan:
    """Everything that decides the files of one generated copy."""

    parts: tuple[_Part, ...]
    vocabulary: Vocabulary
    seed: int
    classes: int | None
    size: tuple[int, int] | None

    @property
    def benchmark(self) -> Benchmark:
        return self.parts[0].benchmark

    def identity(self) -> dict[str, Any]:
        """What the marker records; the same identity means the same files."""
        from ovbench.networks.builtin.scenes import render

        found, rules = self.vocabulary, [asdict(part.benchmark.synth_rules) for part in self.parts]
        # A small scene of the whole vocabulary stands for the generator's code and its table of looks.
        probe = render(found.words, 64, 96, self.seed, things=found.things)
        text = json.dumps([*rules, found.words, found.raw_ids.tolist()])
        digest = hashlib.sha256(text.encode() + probe.image.tobytes() + probe.label.tobytes())
        images = {part.benchmark.split: part.images for part in self.parts}
        return {
            "generator": GENERATOR_VERSION,
            "benchmark": self.benchmark.name,
            "version": self.benchmark.version,
            "images": images.get("val", 0),
            "train_images": images.get("train", 0),
            "long_tail": max(part.exponent for part in self.parts),
            "classes": self.classes,
            "size": None if self.size is None else list(self.size),
            "seed": self.seed,
            "content_sha256": digest.hexdigest(),
        }


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a generated copy in ``folder``; None where there is none that can be read."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def is_synthetic(root: Path | str) -> bool:
    """Whether a data root lies in a generated copy (its marker is there or up to three folders above)."""
    start = Path(root).absolute()
    return any(_read_marker(folder) is not None for folder in [start, *start.parents[:3]])


def _inside(out: Path, relative: str) -> Path:
    """``out / relative``, refused where a link or '..' would lead out of ``out``."""
    path = out / relative
    if not path.resolve().is_relative_to(out.resolve()):
        raise DataError(f"'{path}' leads out of '{out}': remove the link, or give another --out folder.")
    return path


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under another name and moves it into place, so that a half-written file is never found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_marker(out: Path, identity: dict[str, Any], files: dict[str, int], complete: bool) -> None:
    content = {"generated_by": "ovbench data synth", **identity, "complete": complete, "files": files}
    _write(out / MARKER, lambda path: _text(path, json.dumps(content, indent=1) + "\n"))


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_pair(
    part: _Part, found: Vocabulary, index: int, include: Sequence[str], seed: int, image: Path, label: Path
) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Writes image and label; returns the size (height, width) and, where labels are segments, what the json says."""
    from PIL import Image

    from ovbench.networks.builtin.scenes import render

    rules = part.benchmark.synth_rules
    height, width = rules.short, rules.long
    if rules.portraits and index % 3 == 2:
        height, width = width, height
    number = class_choice.number(part.benchmark, seed, index)
    scene = render(found.words, height, width, number, things=found.things, include=include)
    rng = np.random.Generator(np.random.PCG64(number))
    raw = _spoil(part.benchmark, found.raw_ids[scene.label], rng)
    told: list[dict[str, Any]] = []
    if part.benchmark.panoptic is not None:
        raw, told = segment_ids.segments(raw, part.benchmark, rng)
    picture, mask = Image.fromarray(scene.image), Image.fromarray(raw)
    if rules.label_mode == "P":
        mask.putpalette(_colormap())
    # 4:4:4 and high quality: chroma subsampling would wash out the fine textures by which classes are told apart.
    options: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0} if image.suffix == ".jpg" else {}
    _write(image, lambda path: picture.save(path, **(options or {"format": "PNG"})))
    _write(label, lambda path: mask.save(path, format="TIFF" if label.suffix in (".tif", ".tiff") else "PNG"))
    return (height, width), told


def synth(
    name: str,
    out: Path | str,
    images: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    train_images: int = 0,
    long_tail: float = 0.0,
    classes: int | None = None,
    size: tuple[int, int] | None = None,
) -> Path:
    """The data root of a generated copy of a benchmark below ``out``, written now or found complete.

    The same arguments give the same label files and, with the same image libraries, the same images. Only files below
    ``out`` are written; files that an earlier call with other arguments made there are removed, nothing else is.

    Args:
        name: Benchmark id.
        out: Folder that is empty, missing, or was made by this function.
        images: Number of validation images. They show all classes evenly, whatever ``long_tail`` says, so that the tail
            can be scored as well.
        seed: Which copy; every seed is held out from the training of the built-in CLIP.
        progress: Called with (images done, images in all).
        train_images: Number of training images, with other seeds than any of validation.
        long_tail: In training, the r-th class that the generator knows (label order) occurs in images in proportion to
            r**-long_tail; 0 is even.
        classes: Draw only the first so many of the classes that the generator knows; by default all.
        size: Short and long side of the images in pixels; by default the benchmark's.

    Raises:
        UsageError: Unknown benchmark, one without training split where training images are wanted, or a number out of
            range.
        DataError: ``out`` holds files that this function did not make, or cannot be written.
    """
    benchmark = get(name)
    _require_range("number of images", images, 0 if train_images else 1, MOST_IMAGES)
    _require_range("number of training images", train_images, 0, MOST_IMAGES)
    _require_range("seed", seed, 0, (1 << 32) - 1)
    if not 0 <= long_tail <= 10:
        raise UsageError(f"The exponent of the long tail is {long_tail}; it must be 0 to 10.")
    if long_tail and not train_images:
        raise UsageError(
            "Only training images are long-tailed: validation covers all classes. Ask for training images."
        )
    found = class_choice.vocabulary(benchmark)
    if classes is not None:
        _require_range(f"number of classes of generated {name} images", classes, 1, len(found.classes))
    if size is not None:
        _require_range("short side", size[0], 32, size[1])
        _require_range("long side", size[1], 32, 2048)
    wanted = {"val": (images, 0.0), "train": (train_images, long_tail)}
    parts = [
        _Part(_sized(benchmark.for_split(split), size), count, exponent)
        for split, (count, exponent) in wanted.items()
        if count
    ]
    target = user_path(out)
    try:
        return _synth(_Plan(tuple(parts), found.first(classes), seed, classes, size), target, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"The generated copy of {name} cannot be written to '{target}': {reason}.") from error


def known_classes(name: str) -> int:
    """How many of a benchmark's classes the generator can draw.

    Raises:
        UsageError: Unknown benchmark.
    """
    return len(class_choice.vocabulary(get(name)).classes)


def _require_range(what: str, given: int, least: int, most: int) -> None:
    if not least <= given <= most:
        raise UsageError(f"The {what} is {given}; it must be {least} to {most}.")


def _sized(benchmark: Benchmark, size: tuple[int, int] | None) -> Benchmark:
    if size is None:
        return benchmark
    return replace(benchmark, synth_rules=replace(benchmark.synth_rules, short=size[0], long=size[1]))


def _is_complete(out: Path, marker: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether a finished call with the same arguments made ``out`` and all its files still have their sizes."""
    if marker.get("complete") is not True or not identity.items() <= marker.items():
        return False
    paths = ((out / file, size) for file, size in marker["files"].items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _shown(plan: _Plan, part: _Part) -> Iterator[tuple[Vocabulary, list[str]]]:
    """For each image its vocabulary and the words of it that must be there."""
    seed = class_choice.number(part.benchmark, plan.seed, -1)
    if not part.exponent:
        for include in class_choice.evenly(plan.vocabulary, part.images, seed):
            yield plan.vocabulary, include
        return
    for words in class_choice.long_tailed(plan.vocabulary, part.images, part.exponent, seed):
        yield plan.vocabulary.only(words), [*plan.vocabulary.always, *words]


def _synth(plan: _Plan, out: Path, progress: Callable[[int, int], None] | None) -> Path:
    home = plan.benchmark.synth_rules.home
    root, prefix = (out / home, f"{home}/") if home else (out, "")
    identity, total = plan.identity(), sum(part.images for part in plan.parts)
    before = _read_marker(out)
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"'{out}' is not empty and was not made by 'ovbench data synth': give a new folder as --out.")
    old_files = {} if before is None else before["files"]
    if before is not None and _is_complete(out, before, identity):
        if progress:
            progress(total, total)
        return root

    pairs: list[tuple[_Part, int, str, str]] = []
    lists: dict[str, str] = {}
    for part in plan.parts:
        layout, stems = part.benchmark.layout, part.stems
        pairs += [(part, i, prefix + layout.image(stem), prefix + layout.label(stem)) for i, stem in enumerate(stems)]
        if layout.split_file:
            lists[prefix + layout.split_file] = "".join(f"{stem}\n" for stem in sorted(stems))
    json_files = [prefix + name for part in plan.parts if (name := part.benchmark.layout.panoptic_file)]
    files = [file for _, _, *both in pairs for file in both] + list(lists) + json_files
    out.mkdir(parents=True, exist_ok=True)
    # The unfinished marker names old and new files, so that an interrupted call leaves nothing that is not ours.
    _write_marker(out, identity, dict.fromkeys([*old_files, *files], -1), complete=False)
    shown = [each for part in plan.parts for each in _shown(plan, part)]
    told: dict[str, list[tuple[str, tuple[int, int], list[dict[str, Any]]]]] = {}
    for done, ((part, index, image, label), (found, include)) in enumerate(zip(pairs, shown, strict=True), 1):
        size, segments = _write_pair(part, found, index, include, plan.seed, _inside(out, image), _inside(out, label))
        told.setdefault(part.benchmark.split, []).append((part.stems[index], size, segments))
        if progress:
            progress(done, total)
    for part in plan.parts:
        if name := part.benchmark.layout.panoptic_file:
            lists[prefix + name] = segment_ids.annotation_file(part.benchmark, told[part.benchmark.split])
    for file, text in lists.items():
        _write(_inside(out, file), partial(_text, text=text))
    for file in sorted(set(old_files) - set(files)):
        _inside(out, file).unlink(missing_ok=True)
    _write_marker(out, identity, {file: (out / file).stat().st_size for file in files}, complete=True)
    return root
