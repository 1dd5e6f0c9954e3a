"""Colours for class lists without a palette of their own: far apart for any eye, the first ten also for colour-blind ones.

The first seven are those of Okabe and Ito ("Color Universal Design", 2008). Every further one is the candidate that is
farthest from all before it in OKLab (Ottosson 2020), seen with normal sight and with simulated colour blindness (Machado,
Oliveira and Fernandes, IEEE TVCG 15, 2009, severity 1.0). The first twenty of that order are written down, so that they
stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Float = npt.NDArray[np.float64]

GREY: Colour = (110, 110, 110)
"""Colour of the class called "background": no hue, so that it does not pass for a thing."""

FIRST: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (86, 180, 233),
    (135, 0, 75), (45, 0, 210), (0, 240, 195), (165, 75, 255), (45, 90, 0), (195, 15, 150), (120, 0, 165),
    (255, 45, 105), (255, 180, 255), (135, 195, 105), (195, 15, 60), (150, 135, 240), (105, 15, 255),
)  # fmt: skip

# Sights as matrices on linear RGB. Columns are R, G, B of the colour, rows those that are seen.
SIGHTS: dict[str, Float] = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Cone responses of linear RGB, and OKLab of their cube roots.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(colours: Sequence[Colour] | npt.NDArray[np.int64], sight: str = "normal") -> Float:
    """OKLab (n, 3) of sRGB colours 0..255 as a kind of sight sees them; a distance of about .02 is just seen.

    Args:
        colours: n colours.
        sight: A key of :data:`SIGHTS`.
    """
    value = np.asarray(colours, dtype=np.float64).reshape(-1, 3) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ SIGHTS[sight].T, 0, 1)
    return np.asarray(np.cbrt(seen @ _CONES.T) @ _LAB.T)


def least_distance(colours: Sequence[Colour], sight: str = "normal") -> float:
    """The OKLab distance of the two colours that are nearest to each other."""
    lab = oklab(colours, sight)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return float(distance[~np.eye(len(lab), dtype=bool)].min())


def distinct(count: int) -> list[Colour]:
    """``count`` different colours; a shorter list is the beginning of a longer one."""
    if count <= len(FIRST):
        return list(FIRST[:count])
    # in steps, so that lists of similar length share the work
    return list(_grown(-(-count // 64) * 64))[:count]


@lru_cache(maxsize=8)
def _grown(count: int) -> tuple[Colour, ...]:
    """The written-down colours, continued; distances seen with red-green blindness count double, as they are smaller.

    Raises:
        ValueError: More colours than candidates.
    """
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(grid)
    # neither black nor white nor grey: on a photograph they look like shadow, sky and the background class
    usable = (lab[:, 0] > 0.38) & (lab[:, 0] < 0.93) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.07)
    candidates = grid[usable]
    if count > len(candidates):
        raise ValueError(f"{count} colours asked for, {len(candidates)} can be told apart")
    weights = {"normal": 1.0, "protanopia": 2.0, "deuteranopia": 2.0}
    seen = {sight: oklab(candidates, sight) for sight in weights}
    nearest = np.full(len(candidates), np.inf)
    chosen: list[Colour] = []

    def take(colour: Colour) -> None:
        chosen.append(colour)
        for sight, weight in weights.items():
            gap = np.linalg.norm(seen[sight] - oklab([colour], sight), axis=-1) * weight
            np.minimum(nearest, gap, out=nearest)

    for colour in FIRST:
        take(colour)
    while len(chosen) < count:
        red, green, blue = candidates[int(nearest.round(9).argmax())]
        take((int(red), int(green), int(blue)))
    return tuple(chosen)


def for_classes(names: Sequence[str]) -> list[Colour]:
    """One colour per class; a class called "background" is grey and takes no colour from the others."""
    plain = [name.strip().lower() == "background" for name in names]
    colours = iter(distinct(len(names) - sum(plain)))
    return [GREY if is_background else next(colours) for is_background in plain]
