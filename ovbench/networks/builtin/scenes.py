"""Generated scenes with the benchmarks' real class names: an image and its exact label map, from a seed.

A scene is one to four regions of stuff (warped bands or cells), larger images have more, with things on top. A class is
recognised by its texture and, as a thing, by its outline (``appearances.json``). The built-in CLIP was trained on the
same generator with other seeds, so a score on these scenes checks the pipeline; it says nothing about open-vocabulary
ability or about which method is better.

Seeds: ``render`` takes any; training uses ``TRAINING_SEEDS`` (from 2**40), so that evaluation, which should stay below
2**32, never meets a trained scene.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovbench.errors import UsageError, unknown_name
from ovbench.networks.builtin.appearances import index, normalise, table, tile
from ovbench.networks.builtin.silhouettes import INSIDE, RIM, mask
from ovbench.networks.builtin.silhouettes import SIDE as MASK_SIDE
from ovbench.networks.builtin.textures import SIDE as TEXTURE_SIDE
from ovbench.networks.builtin.textures import TILE

TRAINING_SEEDS = range(1 << 40, 1 << 41)
_TEXELS = np.float32(TEXTURE_SIDE / TILE)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Scene:
    """``image`` (H, W, 3) uint8 RGB and ``label`` (H, W) int32, the index of each pixel's word."""

    image: Bytes
    label: Labels


@dataclass(frozen=True)
class Variety:
    """How much scenes differ; training draws wider than the default to cover resizing."""

    scale: tuple[float, float] = (0.75, 1.4)  # of the texture
    turn: float = 0.3  # radians either way
    thing: tuple[float, float] = (0.35, 0.85)  # of the short side


def known_words() -> list[str]:
    """All words that can be rendered, sorted."""
    return sorted(index())


def appearance_key(word: str) -> str | None:
    """The first of the words that share this word's look ("couch" -> "sofa"), or None for an unknown word."""
    position = index().get(normalise(word))
    return None if position is None else table()[position].key


def _positions(words: Sequence[str]) -> list[int]:
    known = index()
    found = []
    for word in words:
        position = known.get(normalise(word))
        if position is None:
            raise unknown_name("scene word", word, known)
        found.append(position)
    return found


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _wobble(rng: np.random.Generator, length: int, reach: float) -> Floats:
    """A smooth curve of ``length`` samples within about +-``reach``."""
    t = np.arange(length, dtype=np.float32) / np.float32(length)
    curve = np.zeros(length, np.float32)
    for cycles in (1, 2, 4):
        phase, size = _uniform(rng, 0, 1), _uniform(rng, 0.2, 1.0) / cycles
        curve += np.float32(size) * np.sin(np.float32(2 * np.pi) * (cycles * t + np.float32(phase)))
    return np.float32(reach * 0.6) * curve


def _layout(rng: np.random.Generator, height: int, width: int, count: int) -> NDArray[np.uint8]:
    """A partition into ``count`` regions, (H, W) uint8; bands are numbered from the top."""
    if count == 1:
        return np.zeros((height, width), np.uint8)
    side = min(height, width)
    if rng.random() < 0.6:
        weights = np.array([_uniform(rng, 0.7, 1.6) for _ in range(count)])
        cuts = np.cumsum(weights)[:-1] / weights.sum()
        rows = np.arange(height, dtype=np.float32)[:, None]
        tilt = _uniform(rng, -0.2, 0.2)
        columns = np.arange(width, dtype=np.float32) - np.float32(width / 2)
        region = np.zeros((height, width), np.uint8)
        for cut in cuts:
            edge = np.float32(cut * height) + np.float32(tilt) * columns + _wobble(rng, width, 0.08 * side)
            region += rows > edge[None, :]
        return region
    ys = np.arange(height, dtype=np.float32)[:, None] + _wobble(rng, width, 0.07 * side)[None, :]
    xs = np.arange(width, dtype=np.float32)[None, :] + _wobble(rng, height, 0.07 * side)[:, None]
    nearest: Floats = np.full((height, width), np.inf, np.float32)
    region = np.zeros((height, width), np.uint8)
    for i in range(count):
        # One site per column strip, so that no cell is a sliver.
        cx, cy = (i + _uniform(rng, 0.2, 0.8)) / count * width, _uniform(rng, 0.12, 0.88) * height
        squared = (xs - np.float32(cx)) ** 2 + (ys - np.float32(cy)) ** 2
        closer = squared < nearest
        region[closer] = i
        nearest = np.minimum(nearest, squared)
    return region


def _surface(rng: np.random.Generator, position: int, y: Floats, x: Floats, variety: Variety) -> Floats:
    """Texture of one class at pixel coordinates ``y``, ``x`` (same shape, N points): (N, 3) float32 in 0..255."""
    scale, turn = _uniform(rng, *variety.scale), _uniform(rng, -variety.turn, variety.turn)
    step = float(_TEXELS) / scale
    cosine, sine = np.float32(step * np.cos(turn)), np.float32(step * np.sin(turn))
    du, dv = np.float32(_uniform(rng, 0, TEXTURE_SIDE)), np.float32(_uniform(rng, 0, TEXTURE_SIDE))
    # The offset keeps coordinates positive, so that truncation is a floor.
    u = (cosine * x - sine * y + (du + np.float32(TEXTURE_SIDE * 64))).astype(np.int32) & (TEXTURE_SIDE - 1)
    v = (sine * x + cosine * y + (dv + np.float32(TEXTURE_SIDE * 64))).astype(np.int32) & (TEXTURE_SIDE - 1)
    gains = np.array([_uniform(rng, 0.93, 1.07) for _ in range(3)], np.float32) * np.float32(_uniform(rng, 0.92, 1.08))
    palette = tile(position).reshape(-1, 3)
    coloured: Floats = palette[v * TEXTURE_SIDE + u] * gains
    return coloured


def _thing(rng: np.random.Generator, position: int, image: Floats, label: Labels, word: int, variety: Variety) -> None:
    """Draws one thing over ``image`` and ``label``, in place."""
    entry = table()[position]
    height, width = label.shape
    side = min(height, width)
    size = _uniform(rng, *variety.thing) * side
    stretch = _uniform(rng, 0.85, 1.2)
    half_h, half_w = 0.5 * size * stretch, 0.5 * size / stretch
    cy, cx = _uniform(rng, 0.12, 0.88) * height, _uniform(rng, 0.1, 0.9) * width
    turn, flip = _uniform(rng, -0.25, 0.25), -1.0 if rng.random() < 0.5 else 1.0
    reach = 1.25 * max(half_h, half_w)
    y0, y1 = max(0, int(cy - reach)), min(height, int(cy + reach) + 1)
    x0, x1 = max(0, int(cx - reach)), min(width, int(cx + reach) + 1)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(cy)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] - np.float32(cx)
    cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along, down = cosine * x + sine * y, cosine * y - sine * x
    u = (np.float32(flip * 0.5 * MASK_SIDE / half_w) * along + np.float32(0.5 * MASK_SIDE)).astype(np.int32)
    v = (np.float32(0.5 * MASK_SIDE / half_h) * down + np.float32(0.5 * MASK_SIDE)).astype(np.int32)
    on_mask = (u >= 0) & (u < MASK_SIDE) & (v >= 0) & (v < MASK_SIDE)
    soft = np.where(on_mask, mask(entry.outline)[v.clip(0, MASK_SIDE - 1), u.clip(0, MASK_SIDE - 1)], 0)
    rows, columns = np.nonzero(soft >= INSIDE)
    if len(rows) == 0:
        return
    colour = _surface(rng, position, down[rows, columns], along[rows, columns], variety)
    shade = np.float32(1.08) - np.float32(0.16 / (2 * half_h)) * (down[rows, columns] + np.float32(half_h))
    shade = np.where(soft[rows, columns] < RIM, np.float32(0.72) * shade, shade)
    image[y0 + rows, x0 + columns] = colour * shade[:, None]
    label[y0 + rows, x0 + columns] = word


def render(
    words: Sequence[str],
    height: int,
    width: int,
    seed: int,
    *,
    things: Collection[str] | None = None,
    include: Sequence[str] = (),
    variety: Variety | None = None,
) -> Scene:
    """One scene of these words: image (height, width, 3) uint8 and label (height, width) int32, every pixel labelled.

    Deterministic in all arguments. Looks, not words, are drawn evenly: synonyms together count as one class, and one of
    them is chosen at random, so a list in which two words of one look belong to different classes is ambiguous.

    Args:
        words: Words known to the appearance table; labels index this list.
        height: Pixels.
        width: Pixels.
        seed: Scene number; keep it out of ``TRAINING_SEEDS`` for evaluation.
        things: The words to draw with an outline; by default the table says which.
        include: Words (of ``words``) that are drawn first, so that a small set of scenes can cover a long class list:
            as things and as regions until the scene is full. Later things can still cover earlier ones.
        variety: Ranges of texture scale, rotation and object size.

    Raises:
        UsageError: For an unknown or missing word, or a size below 16 pixels.
    """
    if not words:
        raise UsageError("render needs at least one word; see ovbench.networks.builtin.scenes.known_words()")
    if height < 16 or width < 16:
        raise UsageError(f"render needs height and width of at least 16 pixels, got {height} x {width}")
    variety = variety or Variety()
    rng = np.random.Generator(np.random.PCG64(seed))
    positions = _positions(words)
    entries = table()
    by_look: dict[int, list[int]] = {}
    for i, position in enumerate(positions):
        by_look.setdefault(position, []).append(i)
    thing_looks = set(_positions(list(things))) if things is not None else None

    def is_thing(position: int) -> bool:
        return position in thing_looks if thing_looks is not None else not entries[position].stuff

    first = list(dict.fromkeys(_positions(include)))
    missing = [word for word, position in zip(include, _positions(include), strict=True) if position not in by_look]
    if missing:
        raise UsageError(f"words to include that are not among the scene's words: {', '.join(missing)}")
    looks = list(by_look)
    order = first + [p for p in (looks[i] for i in rng.permutation(len(looks))) if p not in first]
    stuff, objects = [p for p in order if not is_thing(p)], [p for p in order if is_thing(p)]

    roomy = min(3, int(height * width / 90_000))  # larger images show more
    regions = 1 + int(rng.integers(0, 4)) + roomy
    count = 1 + int(rng.integers(0, 4)) + roomy
    wanted_stuff, wanted_objects = sum(p in first for p in stuff), sum(p in first for p in objects)
    grounds = stuff[: max(regions, min(wanted_stuff, 5 + roomy))] or objects[-1:]
    drawn = [p for p in objects if p not in grounds][: max(count, min(wanted_objects, 5 + roomy))]

    # Bands run from top to bottom: what belongs on top comes first.
    level = {"top": 0.0, "any": 1.0, "bottom": 2.0}
    keyed = sorted((level[entries[p].place] + _uniform(rng, 0, 0.9), p) for p in grounds)
    layout = _layout(rng, height, width, len(grounds))
    image = np.empty((height, width, 3), np.float32)
    label = np.empty((height, width), np.int32)

    def word_of(position: int) -> int:
        choices = by_look[position]
        return choices[int(rng.integers(len(choices)))]

    for region, (_, position) in enumerate(keyed):
        rows, columns = np.nonzero(layout == region)
        image[rows, columns] = _surface(rng, position, rows.astype(np.float32), columns.astype(np.float32), variety)
        label[rows, columns] = word_of(position)
    for position in reversed(drawn):  # what must be included is drawn last, on top
        _thing(rng, position, image, label, word_of(position), variety)

    lean_y, lean_x = _uniform(rng, -0.1, 0.1), _uniform(rng, -0.1, 0.1)
    light = (
        np.float32(_uniform(rng, 0.94, 1.06))
        + np.linspace(-lean_y, lean_y, height, dtype=np.float32)[:, None]
        + np.linspace(-lean_x, lean_x, width, dtype=np.float32)[None, :]
    )
    noise = rng.standard_normal((height, width), np.float32) * np.float32(_uniform(rng, 1.5, 5.0))
    image *= light[..., None]
    image += noise[..., None]
    image += np.float32(0.5)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), label)
