"""Which pictures a command was given, and a result name for each that no other has."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovbench.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Picture:
    """A picture to work on.

    Attributes:
        path: The file.
        name: Where its results go below the output folder, '/'-separated, without a suffix.
    """

    path: Path
    name: str


def gather(given: Sequence[Path], out_dir: Path) -> list[Picture]:
    """The given files, and all pictures below the given folders, sorted within each; a file given twice counts once.

    Names are the files' own without suffix, below a folder with their path. Where two would meet, both keep their suffix,
    or are told apart by the folder that was given, or at last by a number.

    Args:
        given: Files and folders.
        out_dir: Where results go; what lies in it already is no input.

    Raises:
        DataError: Something is not there, or a folder without a picture.
        UsageError: Results would go among the pictures.
    """
    target = out_dir.resolve()
    found: dict[Path, list[str]] = {}
    for path in given:
        if path.is_dir():
            if path.resolve() == target:
                raise UsageError(
                    f"--out-dir '{out_dir}' is a folder of pictures: the next time its results would be read as pictures. "
                    "Give another folder."
                )
            inside = [file for file in _below(path) if target not in file.resolve().parents]
            if not inside:
                raise DataError(f"No picture in '{path}' (looked for {', '.join(SUFFIXES)}, also in folders below).")
            for file in inside:
                found.setdefault(file, _names(file.relative_to(path), path))
        elif path.exists():
            found.setdefault(path, _names(Path(path.name), path.parent))
        else:
            raise DataError(f"There is no picture or folder '{path}'.")
    unique: dict[Path, tuple[Path, list[str]]] = {}
    for file, names in found.items():
        unique.setdefault(file.resolve(), (file, names))
    chosen = _told_apart([names for _, names in unique.values()])
    return [Picture(file, name) for (file, _), name in zip(unique.values(), chosen, strict=True)]


def _below(folder: Path) -> Iterator[Path]:
    for base, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(base) / name


def _names(relative: Path, given: Path) -> list[str]:
    """Names for one picture, each telling more than the one before."""
    above = Path(os.path.abspath(given)).name
    full = relative.as_posix()
    return [relative.with_suffix("").as_posix(), full, *([f"{above}/{full}"] if above else [])]


def _told_apart(candidates: Sequence[Sequence[str]]) -> list[str]:
    """One name of each row, no two alike, not even in upper and lower case; the first where that is possible."""
    level = [0] * len(candidates)
    while True:
        names = [row[depth] for row, depth in zip(candidates, level, strict=True)]
        often = Counter(name.casefold() for name in names)
        raised = False
        for index, name in enumerate(names):
            if often[name.casefold()] > 1 and level[index] + 1 < len(candidates[index]):
                level[index] += 1
                raised = True
        if not raised:
            break
    taken = {name.casefold() for name in names if often[name.casefold()] == 1}
    for index, name in enumerate(names):
        if often[name.casefold()] > 1:
            number = 1
            while (other := f"{name}-{number}").casefold() in taken:
                number += 1
            names[index] = other
            taken.add(other.casefold())
    return names
