"""Records as the report shows them: what a run is called, what keeps it out of the results, whether a newer one exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovbench.results.comparable import KINDS, kind_of
from ovbench.results.record import RunRecord
from ovbench.tables.runs import table

OLDER = "older"

# What hides a run unless asked for: the word on its badge, and what it means.
HIDING = {
    "demo": ("demo", KINDS["demo"]),
    "builtin-weights": ("built-in weights", KINDS["builtin-weights"]),
    "random-weights": ("random weights", KINDS["random-weights"]),
    "partial": ("partial", KINDS["partial"]),
    "failed": ("failed", "FAILED on the way: figures are of the images that were finished"),
    "interrupted": ("interrupted", "INTERRUPTED: figures are of the images that were finished"),
    OLDER: ("older", "OLDER, there is a newer run of the same setting on the same benchmark"),
}


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        record: Its record.
        hiding: Keys of :data:`HIDING` that hold.
        published: The printed mIoU that the run may stand beside; None where there is none.
        difference: Ours, unrounded, minus that.
        gallery: The gallery's file; None where the run has none.
    """

    record: RunRecord
    hiding: tuple[str, ...]
    published: str | None
    difference: float | None
    gallery: Path | None

    @property
    def anchor(self) -> str:
        """The id of its details in the page."""
        return f"run-{self.record.run_id}"

    @property
    def title(self) -> str:
        """Method and benchmark."""
        return f"{self.record.spec.method} on {self.record.spec.dataset}"

    @property
    def kind(self) -> tuple[str, ...]:
        """What the run is, whether or not a newer one exists; runs of other kinds are not drawn together."""
        return tuple(kind for kind in self.hiding if kind != OLDER)


def entries(records: Sequence[RunRecord], galleries: Sequence[Path | None]) -> list[Entry]:
    """One entry per record: by benchmark, results before the rest, the highest mIoU first.

    Args:
        records: Any records.
        galleries: The gallery of each, or None.
    """
    older: set[str] = set()
    printed: dict[str, tuple[str, float | None]] = {}
    for section in table(records).sections:
        for row in section.rows:
            for cell in row.cells:
                older.update(cell.others)
                if cell.run_id is not None and cell.published is not None:
                    printed[cell.run_id] = cell.published, cell.difference
    found = []
    for record, gallery in zip(records, galleries, strict=True):
        hiding = [kind for kind in kind_of(record) if kind != "partial"]
        if record.status != "ok":  # which says as well that it is not whole
            hiding.append(record.status)
        elif record.partial:
            hiding.append("partial")
        if record.run_id in older:
            hiding.append(OLDER)
        published, difference = printed.get(record.run_id, (None, None))
        found.append(Entry(record, tuple(hiding), published, difference, gallery))

    def order(entry: Entry) -> tuple[str, bool, float, str]:
        miou = entry.record.metrics.miou if entry.record.metrics else None
        return entry.record.spec.dataset, bool(entry.hiding), -(miou or 0.0), entry.record.run_id

    return sorted(found, key=order)


def scope(entry: Entry, *, with_method: bool = True) -> dict[str, str]:
    """Attributes by which the page's filter finds whatever shows a run."""
    attributes = {"data_dataset": entry.record.spec.dataset, "data_hiding": " ".join(entry.hiding)}
    if with_method:
        attributes["data_method"] = entry.record.spec.method
        attributes["data_words"] = words(entry)
    return attributes


def words(entry: Entry) -> str:
    """What the search looks through, in lower case."""
    spec = entry.record.spec
    options = [f"{name}={value}" for name, value in spec.method_options.items()]
    machine = entry.record.environment
    parts = [
        entry.record.run_id, spec.method, spec.dataset, spec.protocol.name, spec.arch or "", spec.weights, spec.dtype,
        machine.gpu or machine.cpu, *entry.hiding, *options,
    ]  # fmt: skip
    return " ".join(parts).lower()
