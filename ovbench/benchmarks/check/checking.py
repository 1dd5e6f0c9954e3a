"""Finds what would spoil a run before any time is spent on it: missing, damaged or wrongly numbered files."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ovbench.benchmarks import get
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.check.findings import Findings
from ovbench.benchmarks.check.one_pair import Counts, Seen, look
from ovbench.benchmarks.check.outcome import CheckReport, Problem
from ovbench.benchmarks.check.segment_faults import PanopticFindings
from ovbench.benchmarks.labels import KINDS, id_ranges
from ovbench.benchmarks.layout import Pair, Scan
from ovbench.benchmarks.synth.copies import is_synthetic
from ovbench.errors import DataError

# Statistical rules (shifted numbering, empty masks) need a few files before they say anything.
_ENOUGH_FILES = 5
# None of the ids that a raw numbering leaves unused occurs: by chance that must be rarer.
_CHANCE = 0.001
# Below that many classes ids 1, 2, 3 in every file are nothing special.
_MANY_CLASSES = 10
# Faults of single files, which a run can pass over; ids that no class has speak of the whole copy.
_OF_ONE_FILE = {"missing_images", "unreadable_image", *KINDS} - {
    "narrow_ids",
    "wide_ids",
    "out_of_range",
    "segment_ids",
}


class _Findings(Findings):
    """Collects what the pairs show and turns it into problems."""

    told_apart = Findings.told_apart | {"out_of_range"}

    def __init__(self, benchmark: Benchmark, root: Path) -> None:
        super().__init__(benchmark, root)
        self.ids, self.ignored = benchmark.id_table.astype(np.int64), benchmark.ignore_index
        self.wrong_ids: set[int] = set()
        self.files_with = np.zeros(self.ignored + 1, np.int64)
        self.pixels = np.zeros(self.ignored + 1, np.int64)
        self.readable = 0

    def inspect(self, pair: Pair) -> Seen:
        """What is in one pair of files; runs in threads."""
        return look(pair, self.benchmark.label_rule.stored)

    def add(self, seen: Seen) -> None:
        """Takes one pair into account."""
        benchmark = self.benchmark
        self.note_files(
            (seen.pair.image, seen.image_size, seen.image_error),
            (seen.pair.label, seen.label_size, seen.label_fault),
        )
        if seen.label_fault is not None:
            return
        present, ids = np.zeros(self.ignored + 1, bool), self.ids
        present[seen.values] = True
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
        things = np.nonzero(present[1 : self.ignored])[0] + 1
        if things.size:
            self.tally["labelled"] += 1
            if things[-1] == things.size:
                self.note("numbered", seen.pair.label, f"ids {id_ranges(things)}")
        self.readable += 1
        self.files_with += present
        self.pixels[seen.values] += seen.counts

    def class_pixels(self) -> Counts:
        """Pixels per training id 0..K-1."""
        counts = np.zeros_like(self.pixels)
        np.add.at(counts, self.ids, self.pixels)
        return counts[: self.benchmark.num_classes]

    def ignore_share(self) -> float | None:
        """Share of the pixels that no metric counts; None without any pixel."""
        pixels = int(self.pixels.sum())
        return int(self.pixels[self.ids == self.ignored].sum()) / pixels if pixels else None

    def judge(self, synthetic: bool) -> None:
        """All problems of the files."""
        self.judge_files()
        self.judge_numbering(synthetic)

    def judge_files(self) -> None:
        """Problems that single files show."""
        tally, made = self.tally, f"{self.benchmark.labels_from}."
        self.judge_readability()
        if tally["out_of_range"]:
            low = 1 if self.benchmark.reduce_zero_label else 0
            allowed = f"{low}..{self.benchmark.num_classes - 1 + low}"
            text = (
                f"{tally['out_of_range']} labels have ids that {self.benchmark.name} does not have: "
                f"{id_ranges(sorted(self.wrong_ids))} (classes are {allowed})."
            )
            self.report("out_of_range", "error", text, f"The files look unconverted or of another dataset. {made}")

    def judge_numbering(self, synthetic: bool) -> None:
        """Problems that only many files together show: shifted or unconverted numbering, instances, empty masks."""
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
            # Where 0 is not counted either, a 255 for it changes no score.
            spoiled = shifted or (many and with_255 >= 0.2 and not benchmark.reduce_zero_label)
            self.report("has_255", "error" if spoiled else "warning", text, f"{fix} {made}")
        if many and benchmark.ignored_in_most and not self.files_with[self.ignored]:
            text = f"None of {self.readable} labels has {self.ignored} (not counted), which most official files have."
            fix = f"Its pixels seem to be counted under another id (shifted by one?). {made}"
            self.report("no_ignored", "error", text, fix)
        # Small generated copies of a few classes look so; they have labels of classes.
        if many and not synthetic and benchmark.zero_in_most and benchmark.num_classes >= _MANY_CLASSES:
            self.judge_instances(made)
        distinct = int((self.files_with[list(benchmark.stored_ids)] > 0).sum())
        if benchmark.raw_gaps and not self.files_with[list(benchmark.raw_gaps)].any() and self.is_telling(distinct):
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

    def judge_instances(self, made: str) -> None:
        """Ids that count 1, 2, 3 ... in every file: objects of an image, not classes."""
        numbered, labelled = self.tally["numbered"], self.tally["labelled"]
        if labelled >= _ENOUGH_FILES and numbered >= 0.9 * labelled:
            text = f"{numbered} of {labelled} labels have the ids 1, 2, 3 ... without a gap."
            fix = f"These look like objects numbered in each image (SegmentationObject?), not classes. {made}"
            self.report("numbered", "error", text, fix)

    def is_telling(self, distinct: int) -> bool:
        """Whether ``distinct`` ids would hardly miss all unused ones of a raw numbering by chance."""
        classes = self.benchmark.num_classes
        chance = 1.0
        for index in range(len(self.benchmark.raw_gaps)):
            chance *= max(0, classes - distinct - index) / (classes - index)
        return chance < _CHANCE


def _judge_pairing(findings: Findings, found: Scan, synthetic: bool) -> None:
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
    findings = _Findings(benchmark, home) if benchmark.panoptic is None else PanopticFindings(benchmark, home)
    _judge_pairing(findings, found, synthetic)
    pairs = found.pairs[:limit]
    executor = ThreadPoolExecutor(max_workers=workers or min(16, os.cpu_count() or 1))
    try:
        for done, seen in enumerate(executor.map(findings.inspect, pairs), 1):
            findings.add(seen)  # type: ignore[arg-type]  # each kind gets what its own inspect has seen
            if progress:
                progress(done, len(pairs))
    finally:
        executor.shutdown(cancel_futures=True)  # Ctrl-C must not wait for thousands of files
    if not found.listed:
        findings.report("empty", "error", "The split list names no image.", "Fetch the list again.")
    findings.judge(synthetic)
    per_class = findings.class_pixels()
    return CheckReport(
        benchmark=benchmark.name,
        split=split,
        root=str(home),
        synthetic=synthetic,
        expected=benchmark.expected_images,
        listed=found.listed,
        checked=len(pairs),
        classes_present=int((per_class > 0).sum()),
        ignore_share=findings.ignore_share(),
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
