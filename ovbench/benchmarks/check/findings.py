"""What a check collects: examples and counts of each kind of fault, and the problems they make."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.check.outcome import Level, Problem
from ovbench.benchmarks.labels import KINDS, LabelFault

Size = tuple[int, int]


class Findings:
    """Notes of single files and the problems that come of them.

    Attributes:
        told_apart: Kinds of faults of labels that a subclass says more of.

    Args:
        benchmark: Looked at in the split that is checked.
        root: Data root.
    """

    told_apart: frozenset[str] = frozenset({"missing_labels"})  # the names alone tell

    def __init__(self, benchmark: Benchmark, root: Path) -> None:
        self.benchmark, self.root = benchmark, root
        self.examples: dict[str, list[str]] = {}
        self.tally: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def note(self, kind: str, path: Path | str, detail: str = "") -> None:
        """Counts one file, and keeps it as an example where there are fewer than three."""
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

    def note_files(
        self,
        image: tuple[Path, Size | None, str | None],
        label: tuple[Path, Size | None, LabelFault | None],
    ) -> None:
        """Takes path, size and what is wrong of an image and its label."""
        if image[2]:
            self.note("unreadable_image", image[0], image[2])
        if label[2] is not None:
            self.note(label[2].kind, label[0], label[2].detail)
        if image[1] and label[1] and image[1] != label[1]:
            sizes = [f"{width} x {height}" for width, height in (label[1], image[1])]
            self.note("size_mismatch", label[0], f"{sizes[0]}, image {sizes[1]}")

    def judge_readability(self) -> None:
        """Problems that :meth:`note_files` has noted."""
        tally, made = self.tally, f"{self.benchmark.labels_from}."
        if tally["unreadable_image"]:
            text = f"{tally['unreadable_image']} images are damaged or truncated."
            self.report("unreadable_image", "error", text, "Fetch these files again.")
        for kind, known in KINDS.items():
            if kind in tally and kind not in self.told_apart:
                text = f"{tally[kind]} {known.many}."
                self.report(kind, "error", text, known.fix if kind == "size_mismatch" else f"{known.fix} {made}")
