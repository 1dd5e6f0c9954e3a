"""Which classes the images of a generated copy show: all as evenly as they can, or head and tail."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.labels import Ids

if TYPE_CHECKING:
    from ovbench.benchmarks.benchmark import Benchmark

SHOWN = 5  # classes of a long-tailed image on average: render finds room for five regions and five things


@dataclass(frozen=True)
class Vocabulary:
    """The words that a benchmark's scenes are made of.

    Attributes:
        words: All of them, Q.
        raw_ids: The value in label files of each, (Q,).
        things: The words that are drawn with an outline; None lets the generator say.
        classes: One word per class that scenes should cover, in label order, C.
        always: Words that every image shows.
    """

    words: tuple[str, ...]
    raw_ids: Ids
    things: tuple[str, ...] | None
    classes: tuple[str, ...]
    always: tuple[str, ...]

    def first(self, count: int | None) -> Vocabulary:
        """The vocabulary of the first ``count`` of its classes, and of what is no class; None takes all."""
        if count is None or count >= len(self.classes):
            return self
        raw_of = dict(zip(self.words, self.raw_ids.tolist(), strict=True))
        dropped = {raw_of[word] for word in self.classes[count:]}
        kept = [i for i, raw in enumerate(self.raw_ids.tolist()) if raw not in dropped]
        words = tuple(self.words[i] for i in kept)
        things = None if self.things is None else tuple(word for word in self.things if word in words)
        return replace(self, words=words, raw_ids=self.raw_ids[kept], things=things, classes=self.classes[:count])

    def only(self, classes: Sequence[str]) -> Vocabulary:
        """The vocabulary of one image that shows these classes and what every image shows."""
        raw_of = dict(zip(self.words, self.raw_ids.tolist(), strict=True))
        shown = {raw_of[word] for word in (*classes, *self.always)}
        kept = [i for i, raw in enumerate(self.raw_ids.tolist()) if raw in shown]
        return replace(self, words=tuple(self.words[i] for i in kept), raw_ids=self.raw_ids[kept])


def vocabulary(benchmark: Benchmark) -> Vocabulary:
    """Words of the customary wording that the generator knows, each look claimed by one class only."""
    from ovbench.networks.builtin.scenes import appearance_key

    rules = benchmark.synth_rules
    per_id = dict(zip(benchmark.stored_ids, benchmark.words(benchmark.wordings[0]), strict=True))
    if rules.zero_words:
        per_id[0] = list(rules.zero_words)
    zero_is_rest = benchmark.has_background or bool(rules.zero_words) or rules.things == "foreground"
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
    countable = set(chosen) - {0} if benchmark.panoptic is None else set(benchmark.panoptic.things)
    things = tuple(word for raw, words in chosen.items() if raw in countable for word in words)
    return Vocabulary(
        words=tuple(word for words in chosen.values() for word in words),
        raw_ids=np.array([raw for raw, words in chosen.items() for _ in words], benchmark.id_table.dtype),
        things=things if rules.things == "foreground" or benchmark.panoptic is not None else None,
        classes=tuple(classes),
        always=(chosen[0][0],) if rules.always_zero and 0 in chosen else (),
    )


def number(benchmark: Benchmark, seed: int, index: int) -> int:
    """The seed of one image of the benchmark's split, below 2**32; the built-in CLIP's training seeds lie from 2**40."""
    place = seed if benchmark.split == "val" else f"{seed}:{benchmark.split}"
    return zlib.crc32(f"{benchmark.name}:{place}:{index}".encode())


def evenly(found: Vocabulary, images: int, seed: int) -> list[list[str]]:
    """For each image the words that it must show, so that the images together cover as many classes as they can."""
    count = len(found.classes)
    each = min(6, max(3, -(-count // images)), count)
    rng = np.random.Generator(np.random.PCG64(seed))
    order: list[str] = []
    while len(order) < each * images:
        order += [found.classes[int(i)] for i in rng.permutation(count)]
    return [[*found.always, *order[i * each : (i + 1) * each]] for i in range(images)]


def long_tailed(found: Vocabulary, images: int, exponent: float, seed: int) -> list[list[str]]:
    """For each image the classes that it shows, class number r (from 1) in images in proportion to r**-exponent.

    Every class is in at least one image where there is room, and none in an image twice.
    """
    quota = occurrences(len(found.classes), images, exponent)
    rng = np.random.Generator(np.random.PCG64(seed))
    shown: list[list[str]] = [[] for _ in range(images)]
    for word, times in zip(found.classes, quota.tolist(), strict=True):
        # to the emptiest images, drawn by lot among equals
        order = np.lexsort((rng.random(images), np.array([len(words) for words in shown])))
        for index in order[:times].tolist():
            shown[index].append(word)
    return shown


def occurrences(classes: int, images: int, exponent: float) -> npt.NDArray[np.int64]:
    """In how many of the images each class occurs, (classes,): max(s r**-exponent, least), at most ``SHOWN`` an image.

    The first class is in every image, or in as many as ``SHOWN`` allows. ``least`` is 1 where the images have room for
    all classes, else 0.
    """
    wanted = SHOWN * images
    least = 1 if classes <= wanted else 0
    share = np.arange(1, classes + 1, dtype=np.float64) ** -exponent

    def dealt(scale: float) -> npt.NDArray[np.int64]:
        return np.maximum(np.rint(scale * share), least).astype(np.int64)

    if dealt(images).sum() <= wanted:
        return dealt(images)
    low, high = 0.0, float(images)
    for _ in range(64):  # dealt(scale).sum() grows with the scale
        middle = (low + high) / 2
        low, high = (middle, high) if dealt(middle).sum() <= wanted else (low, middle)
    return dealt(low)
