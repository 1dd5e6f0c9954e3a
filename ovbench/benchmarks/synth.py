"""Small generated copies of the benchmarks in their true layout, file names and label encoding.

For trying the tool and for tests: the scenes come from ``ovbench.builtin.scenes``, never from photographs, with seeds
that the built-in CLIP was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovbench.benchmarks import get
from ovbench.benchmarks.labels import IGNORE_INDEX, UInt8
from ovbench.errors import DataError, UsageError

if TYPE_CHECKING:
    from ovbench.benchmarks.benchmark import Benchmark

MARKER = ".ovbench-synth.json"
# Raised whenever the same arguments give other files.
GENERATOR_VERSION = 1
_MOST_IMAGES = 5000


@dataclass(frozen=True)
class _Vocabulary:
    """The words that a benchmark's scenes are made of, and the raw label value of each."""

    words: tuple[str, ...]
    raw_ids: UInt8
    things: tuple[str, ...] | None
    classes: tuple[str, ...]  # one word per class that scenes should cover
    always: tuple[str, ...]


def _vocabulary(benchmark: Benchmark) -> _Vocabulary:
    """Words of the customary wording that the generator knows, each look claimed by one class only."""
    from ovbench.builtin.scenes import appearance_key

    rules = benchmark.synth_rules
    first = 1 if benchmark.reduce_zero_label else 0
    per_id = {index + first: words for index, words in enumerate(benchmark.words(benchmark.wordings[0]))}
    if rules.zero_words:
        per_id[0] = list(rules.zero_words)
    zero_is_rest = benchmark.has_background or bool(rules.zero_words)
    # Classes claim looks before "everything else" does: coco_object has "bed" both as a class and as background.
    order = sorted(per_id, key=lambda raw: (raw == 0 and zero_is_rest, raw))
    taken: set[str] = set()
    chosen: dict[int, list[str]] = {}
    for raw in order:
        words = [word for word in per_id[raw] if appearance_key(word) not in taken | {None}]
        taken |= {str(appearance_key(word)) for word in words}
        if words:
            chosen[raw] = words
    classes = [words[0] for raw, words in chosen.items() if not (raw == 0 and zero_is_rest)]
    things = tuple(word for raw, words in chosen.items() if raw != 0 for word in words)
    return _Vocabulary(
        words=tuple(word for words in chosen.values() for word in words),
        raw_ids=np.array([raw for raw, words in chosen.items() for _ in words], np.uint8),
        things=things if rules.things == "foreground" else None,
        classes=tuple(classes),
        always=(chosen[0][0],) if rules.always_zero and 0 in chosen else (),
    )


def _number(benchmark: Benchmark, seed: int, index: int) -> int:
    """The seed of one image, below 2**32; training seeds lie from 2**40."""
    return zlib.crc32(f"{benchmark.name}:{seed}:{index}".encode())


def _included(vocabulary: _Vocabulary, benchmark: Benchmark, images: int, seed: int) -> list[list[str]]:
    """For each image the words that it must show, so that the images together cover as many classes as they can."""
    count = len(vocabulary.classes)
    each = min(6, max(3, -(-count // images)), count)
    rng = np.random.Generator(np.random.PCG64(_number(benchmark, seed, -1)))
    order: list[str] = []
    while len(order) < each * images:
        order += [vocabulary.classes[int(i)] for i in rng.permutation(count)]
    return [[*vocabulary.always, *order[i * each : (i + 1) * each]] for i in range(images)]


def _spoil(benchmark: Benchmark, raw: UInt8, rng: np.random.Generator) -> UInt8:
    """``raw`` with the unlabelled pixels that the benchmark's real files have."""
    void = 0 if benchmark.reduce_zero_label and not benchmark.has_255 else IGNORE_INDEX
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
class _Plan:
    """Everything that decides the files of one generated copy."""

    benchmark: Benchmark
    images: int
    seed: int

    def stem(self, index: int) -> str:
        stems = self.benchmark.synth_rules.stems
        return stems[index % len(stems)].format(i=index + 1)

    def identity(self) -> dict[str, Any]:
        """What the marker records; the same identity means the same files."""
        from ovbench.builtin.scenes import render

        vocabulary = _vocabulary(self.benchmark)
        # A small scene of the whole vocabulary stands for the generator's code and its table of looks.
        probe = render(vocabulary.words, 64, 96, self.seed, things=vocabulary.things)
        rules = json.dumps([asdict(self.benchmark.synth_rules), vocabulary.words, vocabulary.raw_ids.tolist()])
        digest = hashlib.sha256(rules.encode() + probe.image.tobytes() + probe.label.tobytes())
        return {
            "generator": GENERATOR_VERSION,
            "benchmark": self.benchmark.name,
            "version": self.benchmark.version,
            "images": self.images,
            "seed": self.seed,
            "content_sha256": digest.hexdigest(),
        }


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a generated copy in ``folder``; None where there is none that can be read."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    plan: _Plan, vocabulary: _Vocabulary, index: int, include: Sequence[str], image: Path, label: Path
) -> None:
    from PIL import Image

    from ovbench.builtin.scenes import render

    rules = plan.benchmark.synth_rules
    height, width = rules.short, rules.long
    if rules.portraits and index % 3 == 2:
        height, width = width, height
    number = _number(plan.benchmark, plan.seed, index)
    scene = render(vocabulary.words, height, width, number, things=vocabulary.things, include=include)
    raw = _spoil(plan.benchmark, vocabulary.raw_ids[scene.label], np.random.Generator(np.random.PCG64(number)))
    picture, mask = Image.fromarray(scene.image), Image.fromarray(raw)
    if rules.label_mode == "P":
        mask.putpalette(_colormap())
    # 4:4:4 and high quality: chroma subsampling would wash out the fine textures by which classes are told apart.
    options: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0} if image.suffix == ".jpg" else {}
    _write(image, lambda path: picture.save(path, **(options or {"format": "PNG"})))
    _write(label, lambda path: mask.save(path, format="PNG"))


def synth(
    name: str,
    out: Path | str,
    images: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The data root of a generated copy of a benchmark below ``out``, written now or found complete.

    The same arguments give the same label files and, with the same image libraries, the same images. Only files below
    ``out`` are written; files that an earlier call with other arguments made there are removed, nothing else is.

    Args:
        name: Benchmark id.
        out: Folder that is empty, missing, or was made by this function.
        images: Number of images.
        seed: Which copy; every seed is held out from the training of the built-in CLIP.
        progress: Called with (images done, images in all).

    Raises:
        UsageError: Unknown benchmark, or a number of images or a seed out of range.
        DataError: ``out`` holds files that this function did not make, or cannot be written.
    """
    benchmark = get(name)
    if not 1 <= images <= _MOST_IMAGES:
        raise UsageError(f"The number of images is {images}; it must be 1 to {_MOST_IMAGES}.")
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"The seed is {seed}; it must be 0 to {(1 << 32) - 1}.")
    target = Path(out).expanduser()
    try:
        return _synth(_Plan(benchmark, images, seed), target, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"The generated copy of {name} cannot be written to '{target}': {reason}.") from error


def _is_complete(out: Path, marker: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether a finished call with the same arguments made ``out`` and all its files still have their sizes."""
    if marker.get("complete") is not True or not identity.items() <= marker.items():
        return False
    paths = ((out / file, size) for file, size in marker["files"].items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _synth(plan: _Plan, out: Path, progress: Callable[[int, int], None] | None) -> Path:
    layout, home = plan.benchmark.layout, plan.benchmark.synth_rules.home
    root = out / home if home else out
    identity = plan.identity()
    before = _read_marker(out)
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"'{out}' is not empty and was not made by 'ovbench data synth': give a new folder as --out.")
    old_files = {} if before is None else before["files"]
    if before is not None and _is_complete(out, before, identity):
        if progress:
            progress(plan.images, plan.images)
        return root

    vocabulary = _vocabulary(plan.benchmark)
    prefix = f"{home}/" if home else ""
    stems = [plan.stem(index) for index in range(plan.images)]
    pairs = [(prefix + layout.image(stem), prefix + layout.label(stem)) for stem in stems]
    lists = [prefix + layout.split_file] if layout.split_file else []
    files = [file for pair in pairs for file in pair] + lists
    out.mkdir(parents=True, exist_ok=True)
    # The unfinished marker names old and new files, so that an interrupted call leaves nothing that is not ours.
    _write_marker(out, identity, dict.fromkeys([*old_files, *files], -1), complete=False)
    includes = _included(vocabulary, plan.benchmark, plan.images, plan.seed)
    for index, (image, label) in enumerate(pairs):
        _write_pair(plan, vocabulary, index, includes[index], _inside(out, image), _inside(out, label))
        if progress:
            progress(index + 1, plan.images)
    for file in lists:
        _write(_inside(out, file), lambda path: _text(path, "".join(f"{stem}\n" for stem in sorted(stems))))
    for file in sorted(set(old_files) - set(files)):
        _inside(out, file).unlink(missing_ok=True)
    _write_marker(out, identity, {file: (out / file).stat().st_size for file in files}, complete=True)
    return root
