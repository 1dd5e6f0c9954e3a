"""Faults of panoptic labels: what PNGs and json file say against each other and against the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.check.findings import Findings, Size
from ovbench.benchmarks.check.one_pair import read_image
from ovbench.benchmarks.check.outcome import Level
from ovbench.benchmarks.labels import LabelFault, decode_label, id_ranges
from ovbench.benchmarks.layout import Pair
from ovbench.benchmarks.panoptic_files import Described, PanopticFile, read_panoptic, segment_ids
from ovbench.errors import DataError

Counts = npt.NDArray[np.int64]

# Before it is said that a copy has no instances, so many things must have been seen.
_ENOUGH_THINGS = 20


class Seen(NamedTuple):
    """What was found in one pair of files; ``ids`` and ``counts`` are the segment ids that occur and their pixels."""

    pair: Pair
    image_size: Size | None
    image_error: str | None
    label_size: Size | None
    label_fault: LabelFault | None
    ids: Counts | None
    counts: Counts | None


class PanopticFindings(Findings):
    """Collects what the pairs show and turns it into problems.

    Args:
        benchmark: A panoptic one, in the split that is checked.
        root: Data root.
    """

    def __init__(self, benchmark: Benchmark, root: Path) -> None:
        super().__init__(benchmark, root)
        assert benchmark.panoptic is not None  # held by the caller
        self.facts = benchmark.panoptic
        self.class_of = {category: index for index, category in enumerate(self.facts.category_ids)}
        self.json_path = root / benchmark.layout.panoptic_file
        self.pixels = np.zeros(benchmark.num_classes + 1, np.int64)  # the last are void
        self.things = self.most_of_one = self.readable = 0
        self.strange: set[int] = set()
        self.annotations = PanopticFile({}, (), {})
        self.broken = False
        try:
            self.annotations = read_panoptic(self.json_path)
        except DataError as error:
            self.broken = True
            self.note("broken_json", self.json_path)
            self.report("broken_json", "error", str(error), f"{benchmark.labels_from}.")

    def inspect(self, pair: Pair) -> Seen:
        """What is in one pair of files; runs in threads and never raises for what is in them."""
        image_size, image_error = read_image(pair.image)
        try:
            label = segment_ids(decode_label(pair.label, colours=True), pair.label)
        except LabelFault as fault:
            return Seen(pair, image_size, image_error, fault.size, fault, None, None)
        ids, counts = np.unique(label, return_counts=True)
        return Seen(pair, image_size, image_error, (label.shape[1], label.shape[0]), None, ids, counts)

    def add(self, seen: Seen) -> None:
        """Takes one pair into account."""
        pair = seen.pair
        image, label = (seen.image_size, seen.image_error), (seen.label_size, seen.label_fault)
        self.note_files((pair.image, *image), (pair.label, *label))
        told = self.annotations.images.get(pair.label.stem)
        if told is None and not self.broken:
            self.note("no_annotation", pair.label)
        if told is not None and seen.ids is not None and seen.counts is not None:
            self._compare(pair.label, told, dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)))

    def _compare(self, path: Path, told: Described, pixels: dict[int, int]) -> None:
        """What json and PNG of one image say of its segments."""
        self.readable += 1
        void = pixels.pop(0, 0)
        self.pixels[-1] += void
        ids = told.ids.tolist()
        foreign = sorted(set(pixels) - set(ids))
        if foreign:
            self.note("ids_not_in_json", path, f"ids {id_ranges(foreign, 3)}")
        absent = [one for one in ids if one not in pixels]
        if absent:
            self.note("segments_not_in_png", path, f"ids {id_ranges(absent, 3)}")
        if len(set(ids)) < len(ids) or 0 in ids:
            self.note("repeated_segments", path)
        unknown = {one for one in told.categories.tolist() if one not in self.class_of}
        if unknown:
            self.strange |= unknown
            self.note("unknown_category", path, f"category {id_ranges(sorted(unknown), 3)}")
        areas = zip(ids, told.areas.tolist(), strict=True)
        wrong = [(one, area) for one, area in areas if one in pixels and area != pixels[one]]
        if wrong:
            one, area = wrong[0]
            said = f"says {area}" if area >= 0 else "says nothing"
            self.note("wrong_area", path, f"segment {one} has {pixels[one]} pixels, the json {said}")
        if not pixels:
            self.note("all_void", path)
        per_class: dict[int, int] = {}
        for one, category in zip(ids, told.categories.tolist(), strict=True):
            cls = self.class_of.get(category)
            if cls is not None and one in pixels:
                self.pixels[cls] += pixels[one]
                per_class[cls] = per_class.get(cls, 0) + 1
        things = {cls: count for cls, count in per_class.items() if cls in self.facts.things}
        self.things += sum(things.values())
        self.most_of_one = max(self.most_of_one, *things.values(), 0)
        split = [cls for cls, count in per_class.items() if count > 1 and cls not in self.facts.things]
        if split:
            self.note("split_stuff", path, self.benchmark.class_names[split[0]])

    def class_pixels(self) -> Counts:
        """Pixels per class 0..K-1."""
        return self.pixels[:-1]

    def ignore_share(self) -> float | None:
        """Share of the pixels that no metric counts; None without any pixel."""
        return int(self.pixels[-1]) / total if (total := int(self.pixels.sum())) else None

    def judge(self, synthetic: bool) -> None:
        """All problems of files and json."""
        self.judge_readability()
        self._judge_json()
        tally, made, name = self.tally, f"{self.benchmark.labels_from}.", self.benchmark.name
        if tally["ids_not_in_json"]:
            text = f"{tally['ids_not_in_json']} labels have segment ids that the json does not have."
            self.report("ids_not_in_json", "error", text, f"PNGs and json are of different releases. {made}")
        if tally["unknown_category"]:
            strange = id_ranges(sorted(self.strange))
            text = (
                f"{tally['unknown_category']} images have segments of categories that {name} does not have: {strange}."
            )
            self.report("unknown_category", "error", text, f"The json is of another dataset or was renumbered. {made}")
        exact = self.facts.exact_areas
        level: Level = "error" if exact else "warning"
        genuine = "The official preparation leaves some such, because it draws things over stuff."
        if tally["segments_not_in_png"]:
            text = f"{tally['segments_not_in_png']} images have segments in the json that the PNG does not have."
            fix = f"PNGs and json are of different releases, or a PNG was resized. {made}" if exact else genuine
            self.report("segments_not_in_png", level, text, fix)
        if tally["wrong_area"]:
            text = f"{tally['wrong_area']} images have segments whose area in the json is not that of the PNG."
            fix = f"PNGs or json were changed. {made}" if exact else genuine
            self.report("wrong_area", level, text, fix)
        if tally["repeated_segments"]:
            text = f"{tally['repeated_segments']} images have a segment id twice in the json, or the id 0 (no segment)."
            self.report("repeated_segments", "error", text, f"Fetch or make the json again: {made}")
        if tally["all_void"]:
            text = f"{tally['all_void']} of {self.readable} labels have no segment at all."
            everything = tally["all_void"] == self.readable
            self.report("all_void", "error" if everything else "warning", text, f"Look at these files. {made}")
        if tally["split_stuff"]:
            text = f"{tally['split_stuff']} images have stuff in several segments, which counts each of them."
            self.report("split_stuff", "warning", text, f"Stuff has one segment per image and class. {made}")
        if self.things >= _ENOUGH_THINGS and self.most_of_one == 1:
            text = f"No image has two segments of one thing ({self.things} segments of things seen)."
            self.report("no_instances", "error", text, f"These look like semantic labels. {made}")

    def _judge_json(self) -> None:
        """Problems of the json file by itself and against the names of files."""
        if self.broken:
            return
        made, told = f"{self.benchmark.labels_from}.", self.annotations
        if self.tally["no_annotation"]:
            text = f"{self.tally['no_annotation']} labels have no annotation in the json."
            self.report("no_annotation", "error", text, f"PNGs and json are of different splits or releases. {made}")
        for stem in told.repeated:
            self.note("repeated_annotations", self.root / self.benchmark.layout.label(stem))
        if told.repeated:
            text = f"{len(told.repeated)} images are in the json more than once."
            self.report("repeated_annotations", "error", text, f"Fetch or make the json again: {made}")
        extra = sorted(told.images.keys() - {Path(pair.label).stem for pair in self.benchmark.scan(self.root).pairs})
        for stem in extra:
            self.note("extra_annotations", self.root / self.benchmark.layout.label(stem))
        if extra:
            text = f"{len(extra)} images of the json are not there and not used."
            self.report("extra_annotations", "warning", text, "Fetch them if the copy should be complete.")
        lacking = [one for one in self.facts.category_ids if one not in told.categories]
        other = [one for index, one in enumerate(self.facts.category_ids) if self._kind_differs(index, one)]
        if lacking or other:
            parts = [f"it lacks {id_ranges(lacking)}"] if lacking else []
            parts += [f"things and stuff are exchanged in {id_ranges(other)}"] if other else []
            self.note("categories", self.json_path)
            text = f"The categories of the json are not those of {self.benchmark.name}: {'; '.join(parts)}."
            self.report("categories", "error", text, f"It is of another dataset. {made}")

    def _kind_differs(self, index: int, category: int) -> bool:
        stored = self.annotations.categories.get(category, {}).get("isthing")
        return stored is not None and bool(stored) != (index in self.facts.things)
