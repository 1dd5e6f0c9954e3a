"""What each class of the generated scenes looks like: a frozen table, and the rule that adds a name to it.

``appearances.json`` holds one entry per appearance: the words that share it (synonyms across benchmarks), stuff or
thing, base and accent colour, pattern and frequency, outline. The table is data: ``python -m
ovbench.networks.builtin.appearances --add WORD`` appends an entry that is as far as possible from all others and changes nothing
else. The built-in CLIP knows only the words that were in the table when it was trained.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovbench.networks.builtin.silhouettes import FAMILIES
from ovbench.networks.builtin.textures import PATTERNS, texture

TABLE = Path(__file__).with_name("appearances.json")
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Appearance:
    """One look. ``key`` is the first of ``words``."""

    words: tuple[str, ...]
    stuff: bool
    place: str  # where stuff likes to be: "top", "bottom" or "any"
    base: RGB
    accent: RGB
    pattern: str
    frequency: int  # cycles per 64 image pixels
    outline: str  # family of silhouettes, used when the class is drawn as a thing
    seed: int

    @property
    def key(self) -> str:
        return self.words[0]


def _seed(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")


def read(path: Path = TABLE) -> list[Appearance]:
    """All appearances in table order."""
    rows = json.loads(path.read_text(encoding="utf-8"))["appearances"]
    return [
        Appearance(
            words=tuple(row["words"]),
            stuff=row["stuff"],
            place=row["place"],
            base=(row["base"][0], row["base"][1], row["base"][2]),
            accent=(row["accent"][0], row["accent"][1], row["accent"][2]),
            pattern=row["pattern"],
            frequency=row["frequency"],
            outline=row["outline"],
            seed=row["seed"],
        )
        for row in rows
    ]


def write(table: Iterable[Appearance], path: Path = TABLE) -> None:
    """One appearance per line, so that a diff shows what was added."""
    lines = [json.dumps(asdict(entry), separators=(", ", ": ")) for entry in table]
    path.write_text('{"version": 1, "appearances": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


@lru_cache(maxsize=1)
def table() -> tuple[Appearance, ...]:
    """The frozen table, read once."""
    return tuple(read())


@lru_cache(maxsize=1)
def index() -> dict[str, int]:
    """Word -> position in the table."""
    return {word: i for i, entry in enumerate(table()) for word in entry.words}


def digest(keys: Iterable[str]) -> str:
    """SHA-256 of the looks with these keys: unchanged as long as the scenes are those that weights were trained on."""
    wanted = set(keys)
    rows = [{**asdict(entry), "words": entry.key} for entry in table() if entry.key in wanted]
    rows.sort(key=lambda row: str(row["words"]))
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def normalise(word: str) -> str:
    """Lower case, single spaces: how words are looked up."""
    return " ".join(word.lower().replace("_", " ").split())


@cache
def tile(position: int) -> NDArray[np.uint8]:
    """The texture of one table entry, (128, 128, 3) uint8."""
    entry = table()[position]
    return texture(entry.pattern, entry.frequency, entry.base, entry.accent, entry.seed)


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of sRGB in 0..1; (..., 3) -> (..., 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def _look(base: RGB, accent: RGB, pattern: str, frequency: int) -> tuple[NDArray[np.float64], str, float]:
    lab = _lab(np.array([base, accent], float) / 255)
    return lab, pattern, float(np.log2(frequency))


def _distance(a: tuple[NDArray[np.float64], str, float], b: tuple[NDArray[np.float64], str, float]) -> float:
    """How easily two looks are told apart, in Lab units: both colours in either order, pattern, frequency.

    The two-colour mean counts most, because it is all that is left of a texture after strong shrinking.
    """
    straight = float(((a[0] - b[0]) ** 2).sum())
    swapped = float(((a[0] - b[0][::-1]) ** 2).sum()) + 100.0
    mean = float(((a[0].mean(0) - b[0].mean(0)) ** 2).sum())
    pattern = 0.0 if a[1] == b[1] else 700.0
    return float(np.sqrt(min(straight, swapped) + 2.0 * mean + pattern + (12.0 * (a[2] - b[2])) ** 2))


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    """A colour, a little calmer than asked for: neon and pure black tire the eye."""
    colour = colorsys.hsv_to_rgb(hue % 1.0, min(1.0, max(0.0, saturation)), min(1.0, max(0.0, value)))
    grey = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    r, g, b = (round(14 + 232 * (grey + 0.82 * (channel - grey))) for channel in colour)
    return r, g, b


def propose(
    words: tuple[str, ...],
    others: Iterable[Appearance],
    *,
    stuff: bool,
    place: str = "any",
    outline: str | None = None,
    hsv: tuple[float, float, float] | None = None,
    pattern: str | None = None,
    candidates: int = 400,
) -> Appearance:
    """The candidate look that is farthest from all of ``others``; candidates follow from the first word alone.

    Args:
        words: The synonyms that share the look.
        others: The table so far; unchanged.
        stuff: Drawn as a region (true) or as a thing with an outline.
        place: "top", "bottom" or "any".
        outline: A key of ``FAMILIES``; by default one follows from the word.
        hsv: Hue in degrees, saturation and value (0..1) around which the base colour is drawn, for words that people
            expect in a certain colour.
        pattern: A key of ``PATTERNS`` to insist on.
        candidates: How many looks to draw.
    """
    seed = _seed(words[0])
    rng = np.random.Generator(np.random.PCG64(seed))
    looks = [_look(entry.base, entry.accent, entry.pattern, entry.frequency) for entry in others]
    best: tuple[float, RGB, RGB, str, int] | None = None
    names = sorted(PATTERNS)
    while best is None or candidates > 0:
        candidates -= 1
        if hsv is None:
            # Regions fill the picture, so they stay calmer than things.
            hue, saturation = rng.uniform(0, 1), rng.uniform(0.06, 0.5 if stuff else 0.72)
            value = rng.uniform(0.3, 0.96)
        else:
            hue = hsv[0] / 360 + rng.uniform(-0.03, 0.03)
            saturation, value = hsv[1] + rng.uniform(-0.12, 0.12), hsv[2] + rng.uniform(-0.12, 0.12)
        chosen = pattern or names[int(rng.integers(len(names)))]
        frequency = int(rng.integers(4, 8))
        # The accent stays near in hue, or is a lighter, darker or greyer companion: anything else looks garish.
        turn = rng.uniform(-0.11, 0.11) if hsv is not None or rng.random() < 0.8 else rng.uniform(-0.5, 0.5)
        side = 1.0 if rng.random() < 0.5 else -1.0
        base = _rgb(hue, saturation, value)
        accent = _rgb(
            hue + turn, min(0.75, saturation * rng.uniform(0.35, 1.25)), value + side * rng.uniform(0.12, 0.5)
        )
        gap = float(np.linalg.norm((np.array(base) - np.array(accent)) / 255.0))
        if not 0.24 <= gap <= 0.55:
            continue
        look = _look(base, accent, chosen, frequency)
        nearest = min((_distance(look, other) for other in looks), default=0.0)
        if best is None or nearest > best[0]:
            best = (nearest, base, accent, chosen, frequency)
    if outline is None:
        outline = sorted(FAMILIES)[seed % len(FAMILIES)]
    return Appearance(words, stuff, place, best[1], best[2], best[3], best[4], outline, seed)


def main(argv: list[str] | None = None) -> int:
    """Append words to the table file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--add", action="append", required=True, metavar="WORD[,SYNONYM...]")
    parser.add_argument("--thing", action="store_true", help="draw it with an outline instead of as a region")
    parser.add_argument("--outline", choices=sorted(FAMILIES))
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(argv)
    entries = read(options.table)
    known = {word for entry in entries for word in entry.words}
    for item in options.add:
        words = tuple(normalise(word) for word in item.split(",") if word.strip())
        taken = sorted(known.intersection(words))
        if taken or not words:
            parser.error(f"already in the table: {', '.join(taken)}" if taken else "an empty word")
        entries.append(propose(words, entries, stuff=not options.thing, outline=options.outline))
        known.update(words)
    write(entries, options.table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
