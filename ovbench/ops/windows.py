"""Sliding windows over images of any size, and the padding of a window to whole patches."""

from __future__ import annotations

Box = tuple[int, int, int, int]  # top, left, bottom, right; bottom and right exclusive


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Window starts along one side: steps of ``stride``, the last one shifted back so that it ends at ``length``.

    A side shorter than ``crop`` has one window of its own length.
    """
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(index * stride + crop, length) - crop, 0) for index in range(count)]


def windows(height: int, width: int, crop: int, stride: int) -> list[Box]:
    """Boxes of all windows of an image, row by row; all have the same size, min(crop, side) on each side."""
    bottom, right = min(crop, height), min(crop, width)
    return [
        (top, left, top + bottom, left + right)
        for top in starts(height, crop, stride)
        for left in starts(width, crop, stride)
    ]


def patch_padding(height: int, width: int, patch: int) -> tuple[int, int, int, int]:
    """Padding (left, right, top, bottom) that makes both sides multiples of ``patch``, the odd pixel at the end."""
    horizontal, vertical = -width % patch, -height % patch
    return horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2
