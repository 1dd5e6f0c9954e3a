"""Tileable two-colour textures: fifteen patterns that stay recognisable when an image is resized by 0.75 to 1.7.

A texture is a pure function of (pattern, frequency, base, accent, seed). It covers 64 x 64 image pixels at scale one
and is stored at twice that resolution, so that a nearest-neighbour gather under rotation and enlargement stays smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
TILE = 64  # image pixels per tile at scale one
SIDE = 128  # texels per tile

_AXIS = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
_U, _V = np.meshgrid(_AXIS, _AXIS)  # u to the right, v down; both (SIDE, SIDE) in 0..1
_TAU = np.float32(2 * np.pi)


def _soft(x: NDArray[np.floating[Any]], gain: float = 1.6) -> Floats:
    """0..1: ``x`` around zero turned into a mask with soft edges."""
    on: Floats = np.clip(0.5 + gain * x, 0.0, 1.0).astype(np.float32)
    return on


def _wave_sum(low: int, high: int, seed: int, stretch: tuple[int, int] = (1, 1), terms: int = 14) -> Floats:
    """Zero-mean unit-variance tileable noise: cosines with whole frequencies, scaled per axis (u, v) by ``stretch``."""
    rng = np.random.Generator(np.random.PCG64(seed))
    total = np.zeros_like(_U)
    for _ in range(terms):
        radius, angle, phase = rng.uniform(low, high), rng.uniform(0, np.pi), rng.uniform(0, 1)
        fu = round(radius * float(np.cos(angle)) * stretch[0])
        fv = round(radius * float(np.sin(angle)) * stretch[1])
        if fu == 0 and fv == 0:
            fu = 1
        total += np.cos(_TAU * (fu * _U + fv * _V + np.float32(phase)))
    return (total / np.float32(np.sqrt(terms / 2))).astype(np.float32)


def _even(f: int) -> int:
    return max(2, 2 * round(f / 2))


def _hbars(f: int, seed: int) -> Floats:
    return _soft(np.cos(_TAU * f * _V))


def _vbars(f: int, seed: int) -> Floats:
    return _soft(np.cos(_TAU * f * _U))


def _diagonal(f: int, seed: int) -> Floats:
    return _soft(np.cos(_TAU * round(f * 0.71) * (_U + _V)))


def _antidiagonal(f: int, seed: int) -> Floats:
    return _soft(np.cos(_TAU * round(f * 0.71) * (_U - _V)))


def _checker(f: int, seed: int) -> Floats:
    half = max(2, round(f * 0.6))
    return _soft(np.cos(_TAU * half * _U) * np.cos(_TAU * half * _V), 3.0)


def _dots(f: int, seed: int) -> Floats:
    return _soft(np.cos(_TAU * f * _U) + np.cos(_TAU * f * _V) - 0.35, 1.3)


def _grid(f: int, seed: int) -> Floats:
    return _soft(np.maximum(np.cos(_TAU * f * _U), np.cos(_TAU * f * _V)) - 0.72, 2.5)


def _bricks(f: int, seed: int) -> Floats:
    rows, columns = _even(f), max(2, f // 2)
    row = np.floor(_V * rows)
    x, y = _U * columns + 0.5 * (row % 2), _V * rows
    to_joint_x = np.abs((x + 0.5) % 1.0 - 0.5) * 2.0  # 0 at a joint, in brick heights
    to_joint_y = np.abs((y + 0.5) % 1.0 - 0.5)
    return _soft(0.14 - np.minimum(to_joint_x, to_joint_y), 7.0)


def _waves(f: int, seed: int) -> Floats:
    return _soft(np.cos(_TAU * (f * _V + 0.38 * np.sin(_TAU * max(2, f // 2) * _U))))


def _zigzag(f: int, seed: int) -> Floats:
    ramp = np.abs((_U * max(2, f // 2)) % 1.0 - 0.5) * 2.0
    return _soft(np.cos(_TAU * (f * _V + 0.9 * ramp)))


def _scales(f: int, seed: int) -> Floats:
    rows = _even(f)
    row = np.floor(_V * rows)
    x = (_U * rows * 0.5 + 0.5 * (row % 2)) % 1.0 - 0.5
    y = (_V * rows) % 1.0
    return _soft(2.0 * np.abs(x) + 0.75 * y - 0.85, 2.2)


def _diamonds(f: int, seed: int) -> Floats:
    half = max(2, round(f * 0.6))
    distance = np.abs((_U * half) % 1.0 - 0.5) + np.abs((_V * half) % 1.0 - 0.5)
    return _soft(np.abs(distance - 0.5) - 0.22, 4.0)


def _speckle(f: int, seed: int) -> Floats:
    return _soft(_wave_sum(f, f + 3, seed) - 0.35, 1.2)


def _clouds(f: int, seed: int) -> Floats:
    return _soft(_wave_sum(2, max(3, f // 2 + 1), seed), 0.55)


def _fibres(f: int, seed: int) -> Floats:
    return _soft(_wave_sum(2, 4, seed, stretch=(max(2, f // 2), 1)), 0.7)


PATTERNS: dict[str, Callable[[int, int], Floats]] = {
    "hbars": _hbars,
    "vbars": _vbars,
    "diagonal": _diagonal,
    "antidiagonal": _antidiagonal,
    "checker": _checker,
    "dots": _dots,
    "grid": _grid,
    "bricks": _bricks,
    "waves": _waves,
    "zigzag": _zigzag,
    "scales": _scales,
    "diamonds": _diamonds,
    "speckle": _speckle,
    "clouds": _clouds,
    "fibres": _fibres,
}


def texture(
    pattern: str, frequency: int, base: tuple[int, int, int], accent: tuple[int, int, int], seed: int
) -> NDArray[np.uint8]:
    """The tile, (SIDE, SIDE, 3) uint8 RGB: ``base`` where the pattern is off, ``accent`` where it is on.

    Args:
        pattern: A key of ``PATTERNS``.
        frequency: Cycles per 64 image pixels.
        base: RGB 0..255.
        accent: RGB 0..255.
        seed: For the patterns made of noise and for the fine grain.
    """
    on = PATTERNS[pattern](frequency, seed)[..., None]
    low, high = np.array(base, np.float32), np.array(accent, np.float32)
    colour = low + (high - low) * on
    grain = 1.0 + 0.035 * _wave_sum(8, 16, seed + 1, terms=10)
    tile: NDArray[np.uint8] = np.clip(colour * grain[..., None] + 0.5, 0, 255).astype(np.uint8)
    return tile
