"""Finds what would spoil a run before any time is spent on it: missing, damaged or wrongly numbered files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks import get
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.labels import id_ranges
from ovbench.benchmarks.layout import Pair, Scan
from ovbench.benchmarks.report import CheckReport, Level, Problem
from ovbench.benchmarks.synth import is_synthetic
from ovbench.errors import DataError

Counts = npt.NDArray[np.int64]

# Statistical rules (shifted numbering, empty masks) need a few files before they say anything.
_ENOUGH_FILES = 5
# An unconverted COCO-Stuff copy shows none of its 11 unused ids; by chance that has p < .001 at 90 distinct ids.
_ENOUGH_IDS = 90
# Faults of single files, which a run can pass over.
_OF_ONE_FILE = {"missing_images", "missing_labels", "unreadable_image", "unreadable_label", "size_mismatch"}


class _Seen(NamedTuple):
    """What was found in one pair of files. ``counts`` are pixels per raw id, int64 (256,) or, of 16 bits, (65536,)."""

    pair: Pair
    image_error: str | None
    label_error: str | None
    image_size: tuple[int, int] | None
    label_size: tuple[int, int] | None
    colour: str | None
    lossy: bool
    narrow: bool
    widest: int
    counts: Counts | None


def _read_image(path: Path) -> tuple[tuple[int, int] | None, str | None]:
    """Size (width, height) as a reader that follows EXIF rotation sees it, and what is wrong with the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            # A JPEG is decoded at an eighth: all its data is read, so that a truncated file shows, in less time.
            image.draft("L", (1, 1))
            image.load()
            return ((height, width) if turned else (width, height)), None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, str(error) or type(error).__name__


def _inspect(pair: Pair, largest: int) -> _Seen:
    """Opens one pair; never raises for what is in the files. ``largest`` is the largest value that a label may have."""
    from PIL import Image

    image_size, image_error = _read_image(pair.image)
    label_size, colour, lossy, narrow, widest, counts = None, None, False, False, 0, None
    try:
        with Image.open(pair.label) as label:
            label.load()
            label_size, lossy = label.size, label.format == "JPEG"
            if label.mode in ("L", "P"):
                narrow, counts = True, np.zeros(largest + 1, np.int64)
                counts[:256] = label.histogram()
            elif label.mode in ("1", "I", "I;16", "I;16B"):
                values = np.asarray(label).astype(np.int64)
                widest = int(values.max())
                counts = np.bincount(values.clip(0, largest).ravel(), minlength=largest + 1).astype(np.int64)
            else:
                bands = [np.asarray(band) for band in label.split()]
                grey = label.mode.startswith("RGB") and all((band == bands[0]).all() for band in bands[1:3])
                colour = f"{label.mode}, all channels equal" if grey else label.mode
        label_error = None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        label_error = str(error) or type(error).__name__
    return _Seen(pair, image_error, label_error, image_size, label_size, colour, lossy, narrow, widest, counts)


class _Findings:
    """Collects what the pairs show and turns it into problems."""

    def __init__(self, benchmark: Benchmark, root: Path) -> None:
        self.benchmark, self.root = benchmark, root
        self.ids, self.ignored = benchmark.id_table.astype(np.int64), benchmark.ignore_index
        self.examples: dict[str, list[str]] = {}
        self.tally: Counter[str] = Counter()
        self.wrong_ids: set[int] = set()
        self.files_with = np.zeros(self.ignored + 1, np.int64)
        self.pixels = np.zeros(self.ignored + 1, np.int64)
        self.readable = 0
        self.only_ignored = 0
        self.problems: list[Problem] = []

    def note(self, kind: str, path: Path | str, detail: str = "") -> None:
        self.tally[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < 3:
            path = Path(path)
            name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
            shown.append(f"{name} ({detail})" if detail else name)

    def report(self, kind: str, level: Level, message: str, fix: str) -> None:
        """Adds a problem under the files noted for ``kind``."""
        files = tuple(self.examples.get(kind, ()))
        self.problems.append(Problem(kind, level, message, fix, self.tally[kind], files))

    def add(self, seen: _Seen) -> None:
        """Takes one pair into account."""
        benchmark = self.benchmark
        if seen.image_error:
            self.note("unreadable_image", seen.pair.image, seen.image_error)
        if seen.label_error:
            self.note("unreadable_label", seen.pair.label, seen.label_error)
        if seen.image_size and seen.label_size and seen.image_size != seen.label_size:
            sizes = [f"{width} x {height}" for width, height in (seen.label_size, seen.image_size)]
            self.note("size_mismatch", seen.pair.label, f"{sizes[0]}, image {sizes[1]}")
        if seen.colour:
            self.note("colour_label", seen.pair.label, seen.colour)
        if seen.lossy:
            self.note("lossy_label", seen.pair.label)
        if seen.narrow and benchmark.wide:
            self.note("narrow_ids", seen.pair.label)
        if seen.widest > self.ignored:
            self.note("wide_ids", seen.pair.label, f"up to {seen.widest}")
        if seen.counts is None or seen.widest > self.ignored:
            return
        present, ids = seen.counts > 0, self.ids
        wrong = np.nonzero(present & (ids >= benchmark.num_classes) & (ids != self.ignored))[0]
        if wrong.size:
            self.note("out_of_range", seen.pair.label, f"ids {id_ranges(wrong)}")
            self.wrong_ids |= set(wrong.tolist())
        if not (present & (ids != self.ignored)).any():
            self.note("all_ignored", seen.pair.label)
        if present[self.ignored]:
            self.note("has_255", seen.pair.label)
        if not present[0]:
            self.note("no_zero", seen.pair.label)
        self.readable += 1
        self.files_with += present
        self.pixels += seen.counts

    def class_pixels(self) -> Counts:
        """Pixels per training id 0..K-1."""
        counts = np.zeros_like(self.pixels)
        np.add.at(counts, self.ids, self.pixels)
        return counts[: self.benchmark.num_classes]

    def ignored_pixels(self) -> int:
        """Pixels that no metric counts."""
        return int(self.pixels[self.ids == self.ignored].sum())

    def judge_files(self) -> None:
        """Problems that single files show."""
        tally, made = self.tally, f"{self.benchmark.labels_from}."
        if tally["unreadable_image"]:
            text = f"{tally['unreadable_image']} images are damaged or truncated."
            self.report("unreadable_image", "error", text, "Fetch these files again.")
        if tally["unreadable_label"]:
            text = f"{tally['unreadable_label']} label files are damaged or no image."
            self.report("unreadable_label", "error", text, f"Fetch or make them again: {made}")
        if tally["size_mismatch"]:
            text = f"{tally['size_mismatch']} labels have another size than their image."
            fix = "Use images and labels of the same release, none of them resized or rotated."
            self.report("size_mismatch", "error", text, fix)
        if tally["colour_label"]:
            text = f"{tally['colour_label']} labels are coloured pictures, not one class id per pixel."
            fix = f"Use the index PNGs, or turn colours into ids and save grey ('L') or palette ('P') PNGs. {made}"
            self.report("colour_label", "error", text, fix)
        if tally["lossy_label"]:
            text = f"{tally['lossy_label']} labels are JPEG data, which changes ids near borders."
            self.report("lossy_label", "error", text, f"Make them again as PNG: {made}")
        if tally["narrow_ids"]:
            classes = self.benchmark.num_classes
            text = f"{tally['narrow_ids']} labels have 8 bits, which cannot tell {classes} classes apart."
            self.report("narrow_ids", "error", text, f"Ids above 255 are lost in them. {made}")
        if tally["wide_ids"]:
            text = f"{tally['wide_ids']} labels have values above {self.ignored}."
            self.report("wide_ids", "error", text, f"These look like instance ids, not class ids. {made}")
        if tally["out_of_range"]:
            low = 1 if self.benchmark.reduce_zero_label else 0
            allowed = f"{low}..{self.benchmark.num_classes - 1 + low}"
            text = (
                f"{tally['out_of_range']} labels have ids that {self.benchmark.name} does not have: "
                f"{id_ranges(sorted(self.wrong_ids))} (classes are {allowed})."
            )
            self.report("out_of_range", "error", text, f"The files look unconverted or of another dataset. {made}")

    def judge_numbering(self) -> None:
        """Problems that only many files together show: shifted or unconverted numbering, empty masks."""
        benchmark, tally, made = self.benchmark, self.tally, f"{self.benchmark.labels_from}."
        if not self.readable:
            return
        many = self.readable >= _ENOUGH_FILES
        last = benchmark.num_classes - 1 + int(benchmark.reduce_zero_label)
        with_zero, with_255 = self.files_with[0] / self.readable, self.files_with[self.ignored] / self.readable
        # In labels that were reduced already, the last class is never found at its old place, and 0 is a class.
        moved = many and not self.files_with[last] and (benchmark.reduce_zero_label or with_zero < 0.8)
        meaning = "background" if benchmark.zero_in_most and benchmark.has_255 else "background or unlabelled"
        if benchmark.zero_in_most and with_zero < 0.2 and many:
            text = (
                f"{tally['no_zero']} of {self.readable} labels have no 0 ({meaning}), which most official files have."
            )
            fix = f"The ids look shifted by one (already reduced?). {made}"
            self.report("no_zero", "error" if moved else "warning", text, fix)
        if not benchmark.has_255 and tally["has_255"]:
            text = f"{tally['has_255']} of {self.readable} labels have {self.ignored}, which the official files do not have."
            shifted = moved and with_255 >= 0.2
            fix = f"{self.ignored} is not counted."
            fix = "The ids look shifted by one (already reduced: 0 is a class)." if shifted else fix
            self.report("has_255", "error" if shifted else "warning", text, f"{fix} {made}")
        distinct = int((self.files_with > 0).sum())
        if benchmark.raw_gaps and distinct >= _ENOUGH_IDS and not self.files_with[list(benchmark.raw_gaps)].any():
            text = (
                f"{distinct} ids occur, but none of {id_ranges(benchmark.raw_gaps, 12)}, which unconverted files lack."
            )
            self.report("unconverted", "error", text, f"The labels look unconverted. {made}")
        present = self.class_pixels() > 0
        if tally["all_ignored"]:
            text = f"{tally['all_ignored']} of {self.readable} labels have no counted pixel at all."
            everything = tally["all_ignored"] == self.readable
            self.report("all_ignored", "error" if everything else "warning", text, f"Look at these files. {made}")
        elif many and benchmark.has_background and not present[1:].any():
            text = f"None of {self.readable} labels shows anything but background."
            self.report("one_class", "error", text, f"The masks look empty. {made}")
        elif many and present.sum() == 1:
            text = f"All {self.readable} labels show one and the same class."
            self.report("one_class", "warning", text, f"Look at the label files. {made}")


def _judge_pairing(findings: _Findings, found: Scan, synthetic: bool) -> None:
    """Problems that the names alone show."""
    benchmark = findings.benchmark
    for kind, missing in (("missing_images", found.missing_images), ("missing_labels", found.missing_labels)):
        for name in missing:
            findings.note(kind, findings.root / name)
        if missing:
            what = "images" if kind == "missing_images" else "labels"
            fix = f"{benchmark.labels_from}." if what == "labels" else "Fetch them, or shorten the split list."
            findings.report(kind, "error", f"{len(missing)} of {found.listed} {what} are missing.", fix)
    if found.blank_lines:
        text = f"The split list has {len(found.blank_lines)} empty lines (line {found.blank_lines[0]})."
        findings.note("blank_lines", findings.root / benchmark.layout.split_file)
        findings.report("blank_lines", "error", text, "Remove them: mmseg reads them as file names.")
    for stem in found.repeated:
        findings.note("repeated", stem)
    if found.repeated:
        text = f"{len(found.repeated)} images are in the split list more than once."
        findings.report("repeated", "error", text, "Remove the repetitions: they would count twice.")
    for name in found.extra_labels:
        findings.note("extra_labels", findings.root / benchmark.layout.label_dir / name)
    if found.extra_labels:
        text = f"{len(found.extra_labels)} labels have no image and are not used."
        findings.report("extra_labels", "warning", text, "Fetch the missing images if the copy should be complete.")
    if found.listed != benchmark.expected_images and not synthetic:
        which = benchmark.name if benchmark.split == "val" else f"{benchmark.name} {benchmark.split}"
        text = f"{found.listed} images, but the official {which} split has {benchmark.expected_images}."
        fix = "Numbers from this copy cannot be compared with published ones."
        findings.report("count", "warning", text, fix)


def check(
    name: str,
    root: Path | str,
    *,
    split: str = "val",
    workers: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """A report on the data of one split of a benchmark; reads every pair, changes nothing.

    Args:
        name: Benchmark id.
        root: Data root or a folder above it.
        split: "val" or "train".
        workers: Threads; by default one per core, at most 16 (decoding runs outside Python's lock).
        limit: Open only the first pairs; names and pairing are checked for all.
        progress: Called with (pairs done, pairs in all).

    Raises:
        UsageError: Unknown benchmark, or it has no such split.
    """
    benchmark = get(name).for_split(split)
    try:
        home = benchmark.resolve_root(root)
        found = benchmark.scan(home)
    except DataError as error:
        problem = Problem("layout", "error", str(error), "", 0)
        return CheckReport(
            benchmark.name, split, str(root), False, benchmark.expected_images, 0, 0, 0, None, (problem,)
        )
    synthetic = is_synthetic(home)
    findings = _Findings(benchmark, home)
    _judge_pairing(findings, found, synthetic)
    pairs = found.pairs[:limit]
    executor = ThreadPoolExecutor(max_workers=workers or min(16, os.cpu_count() or 1))
    try:
        for done, seen in enumerate(executor.map(partial(_inspect, largest=benchmark.ignore_index), pairs), 1):
            findings.add(seen)
            if progress:
                progress(done, len(pairs))
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C must not wait for thousands of files
    if not found.listed:
        findings.report("empty", "error", "The split list names no image.", "Fetch the list again.")
    findings.judge_files()
    findings.judge_numbering()
    per_class, pixels = findings.class_pixels(), int(findings.pixels.sum())
    return CheckReport(
        benchmark=benchmark.name,
        split=split,
        root=str(home),
        synthetic=synthetic,
        expected=benchmark.expected_images,
        listed=found.listed,
        checked=len(pairs),
        classes_present=int((per_class > 0).sum()),
        ignore_share=findings.ignored_pixels() / pixels if pixels else None,
        problems=tuple(sorted(findings.problems, key=lambda problem: problem.level != "error")),
    )


def quick_check(name: str, root: Path | str, first: int = 8, split: str = "val", skip: bool = False) -> CheckReport:
    """The report on the names of all files and the content of the first pairs, for use before a run.

    Args:
        name: Benchmark id.
        root: Data root or a folder above it.
        first: Pairs to open.
        split: "val" or "train".
        skip: Files that are missing, damaged or of the wrong size are no errors, because a run is to skip them.

    Raises:
        UsageError: Unknown benchmark.
        DataError: Any error; warnings are in the report.
    """
    report = check(name, root, split=split, limit=first)
    if skip:
        report = replace(report, problems=tuple(found for found in report.problems if found.kind not in _OF_ONE_FILE))
    report.raise_for_errors()
    return report
