"""Where a benchmark's files lie: finds the data root in customary folders and pairs images with labels.

The order and the choice of files are those of mmseg's ``BaseSegDataset``: the lines of the split list, or every image
below the image folder sorted by path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from ovbench.errors import DataError
from ovbench.paths import user_path


class Pair(NamedTuple):
    """One image and its label; ``stem`` is the path of the image below its folder without the suffix, '/'-separated."""

    image: Path
    label: Path
    stem: str


@dataclass(frozen=True)
class Layout:
    """Folders and file names of a benchmark, relative to its data root.

    Attributes:
        homes: Customary places of the data root below a folder that holds several datasets; "" is the folder itself.
        split_file: List of stems, or "" where all images of ``image_dir`` count.
        panoptic_file: The json file that says what the segments of the labels are, or "" where labels are classes.
    """

    image_dir: str
    label_dir: str
    split_file: str
    image_suffix: str
    label_suffix: str
    homes: tuple[str, ...]
    panoptic_file: str = ""

    def image(self, stem: str) -> str:
        return f"{self.image_dir}/{stem}{self.image_suffix}"

    def label(self, stem: str) -> str:
        return f"{self.label_dir}/{stem}{self.label_suffix}"


@dataclass(frozen=True)
class Scan:
    """What lies below a data root: complete pairs in mmseg's order, and everything that does not fit.

    Attributes:
        pairs: Image and label both there.
        missing_images: Listed images that are not there, relative to the root.
        missing_labels: Labels of listed images that are not there, relative to the root.
        extra_labels: Labels without an image, below the label folder; empty for benchmarks with a split list.
        repeated: Stems that the split list has more than once.
        blank_lines: Numbers of empty lines in the split list.
        listed: How many images mmseg would try to read.
    """

    pairs: tuple[Pair, ...]
    missing_images: tuple[str, ...]
    missing_labels: tuple[str, ...]
    extra_labels: tuple[str, ...]
    repeated: tuple[str, ...]
    blank_lines: tuple[int, ...]
    listed: int


def _no_access(error: OSError) -> NoReturn:
    raise DataError(f"'{error.filename}' cannot be read: {error.strerror}. Change its access rights.") from error


def _files(folder: Path, suffix: str) -> Iterator[str]:
    """Relative '/'-separated paths of the files below ``folder`` that end with ``suffix``, as mmengine lists them."""
    for base, _, names in os.walk(folder, onerror=_no_access, followlinks=True):
        relative = Path(base).relative_to(folder)
        for name in names:
            # mmengine leaves out hidden files, but not files in hidden folders.
            if not name.startswith(".") and name.endswith(suffix):
                yield (relative / name).as_posix()


def _has_file(folder: Path, suffix: str) -> bool:
    return next(_files(folder, suffix), None) is not None


def _faults(layout: Layout, root: Path) -> list[str] | None:
    """What a candidate root lacks; None where it does not even have the image folder."""
    if not (root / layout.image_dir).is_dir():
        return None
    faults = []
    if not _has_file(root / layout.image_dir, layout.image_suffix):
        faults.append(f"no *{layout.image_suffix} in {layout.image_dir}")
    if not (root / layout.label_dir).is_dir():
        faults.append(f"no folder {layout.label_dir}")
    elif not _has_file(root / layout.label_dir, layout.label_suffix):
        faults.append(f"no *{layout.label_suffix} in {layout.label_dir}")
        names = (name for name in _files(root / layout.label_dir, "") if not layout.panoptic_file.endswith(f"/{name}"))
        other = next(names, None)
        if other is not None:
            faults[-1] += f" (there is '{other}')"
    for needed in (layout.split_file, layout.panoptic_file):
        if needed and not (root / needed).is_file():
            faults.append(f"no file {needed}")
    return faults


def _candidates(layout: Layout, name: str, start: Path) -> list[Path]:
    """The folders to try, most direct first: the folder, customary places below it, the folders above it."""
    below = [start / home for home in layout.homes]
    below += [start / name / home for home in layout.homes]
    # The user may have pointed into the dataset, at JPEGImages or leftImg8bit/val.
    inner = {part for path in (layout.image_dir, layout.label_dir, layout.split_file) for part in Path(path).parts}
    above: list[Path] = []
    here = start.absolute()
    while here.name in inner and len(above) < 3:
        here = here.parent
        above.append(here)
    return list(dict.fromkeys(below + above))


def resolve_root(layout: Layout, name: str, labels_from: str, path: Path | str) -> Path:
    """The data root of a benchmark at, below or just above ``path``.

    Args:
        layout: What the root must hold.
        name: Benchmark id, also tried as a folder name.
        labels_from: Where the label files come from, for the message.
        path: What the user gave.

    Raises:
        DataError: Nothing there, only part of the layout there, or several copies to choose from.
    """
    start = user_path(path)
    if not start.exists():
        raise DataError(
            f"The data root '{path}' does not exist. Give the folder that holds '{layout.image_dir}', or one above it, "
            f"as --data-root; 'ovbench data synth {name}' makes a small generated copy to try."
        )
    if not start.is_dir():
        raise DataError(f"The data root '{path}' is a file. Give the folder that holds '{layout.image_dir}'.")
    near: list[tuple[Path, list[str]]] = []
    try:
        for candidate in _candidates(layout, name, start):
            faults = _faults(layout, candidate)
            if faults == []:
                return candidate
            if faults:
                near.append((candidate, faults))
        children = sorted(
            entry.name for entry in os.scandir(start) if entry.is_dir() and not entry.name.startswith(".")
        )
        found: dict[Path, Path] = {}
        for child in children:
            for home in layout.homes:
                candidate = start / child / home
                faults = _faults(layout, candidate)
                if faults == []:
                    found.setdefault(candidate.resolve(), candidate)
                elif faults:
                    near.append((candidate, faults))
    except OSError as error:
        raise DataError(
            f"No permission to read '{error.filename}'. Change its access rights or the data root."
        ) from error
    if len(found) > 1:
        places = ", ".join(f"'{place}'" for place in list(found.values())[:4])
        raise DataError(f"Several copies of {name} lie below '{path}': {places}. Give one of them as --data-root.")
    if found:
        return next(iter(found.values()))
    if near:
        place, faults = min(near, key=lambda item: len(item[1]))
        raise DataError(f"The {name} data in '{place}' is incomplete: {'; '.join(faults)}. {name}: {labels_from}.")
    wanted = [f"{layout.image_dir}/*{layout.image_suffix}", f"{layout.label_dir}/*{layout.label_suffix}"]
    wanted += [file for file in (layout.split_file, layout.panoptic_file) if file]
    homes = ", ".join(home for home in layout.homes if home)
    raise DataError(
        f"No {name} data in '{path}'. Looked for {' + '.join(wanted)} there, in {homes} and one folder deeper. Give "
        f"the folder that holds '{layout.image_dir}' as --data-root; 'ovbench data synth {name}' makes a small "
        "generated copy."
    )


def _stems(layout: Layout, root: Path, images: set[str]) -> tuple[list[str], list[int]]:
    """The stems in mmseg's order and the numbers of blank lines in the split list."""
    if not layout.split_file:
        # mmseg sorts whole paths: with the suffix, which orders 'a.jpg' and 'a-b.jpg' differently from the stems.
        return [image[: -len(layout.image_suffix)] for image in sorted(images)], []
    try:
        lines = (root / layout.split_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The split list '{root / layout.split_file}' cannot be read: {error}.") from error
    if lines and lines[-1] == "":
        lines.pop()
    stripped = [line.strip() for line in lines]
    return [line for line in stripped if line], [number for number, line in enumerate(stripped, 1) if not line]


def scan(layout: Layout, root: Path) -> Scan:
    """Everything below a resolved data root, images matched with labels by name; no file is opened but the list."""
    images = set(_files(root / layout.image_dir, layout.image_suffix))
    labels = set(_files(root / layout.label_dir, layout.label_suffix))
    stems, blank = _stems(layout, root, images)
    pairs, missing_images, missing_labels, seen, repeated = [], [], [], set(), []
    for stem in stems:
        if stem in seen:
            repeated.append(stem)
        seen.add(stem)
        has_image = stem + layout.image_suffix in images
        has_label = stem + layout.label_suffix in labels
        if not has_image:
            missing_images.append(layout.image(stem))
        if not has_label:
            missing_labels.append(layout.label(stem))
        if has_image and has_label:
            pairs.append(Pair(root / layout.image(stem), root / layout.label(stem), stem))
    suffix = len(layout.label_suffix)
    # Beside a split list the folders hold other splits as well, so labels without a listed image are no fault there.
    extra = () if layout.split_file else sorted(label for label in labels if label[:-suffix] not in seen)
    return Scan(
        pairs=tuple(pairs),
        missing_images=tuple(missing_images),
        missing_labels=tuple(missing_labels),
        extra_labels=tuple(extra),
        repeated=tuple(repeated),
        blank_lines=tuple(blank),
        listed=len(stems) + len(blank),
    )


def complete_pairs(layout: Layout, name: str, labels_from: str, root: Path) -> list[Pair]:
    """All pairs in mmseg's order.

    Raises:
        DataError: An image or label is missing, or there is no pair at all.
    """
    result = scan(layout, root)
    for kind, missing in (("image", result.missing_images), ("label", result.missing_labels)):
        if missing:
            examples = ", ".join(missing[:3])
            raise DataError(
                f"{name}: {len(missing)} of {result.listed} {kind} files are missing in '{root}', e.g. {examples}. "
                + (f"{labels_from}." if kind == "label" else "Fetch them again, or shorten the split list.")
            )
    if result.blank_lines:
        raise DataError(
            f"The split list '{root / layout.split_file}' has an empty line ({result.blank_lines[0]}): remove it, "
            "mmseg would read it as a file name."
        )
    if not result.pairs:
        raise DataError(f"{name}: the split list '{root / layout.split_file}' is empty.")
    return list(result.pairs)
