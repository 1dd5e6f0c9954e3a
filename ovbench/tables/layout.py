"""A table as data: sections of rows and cells, each cell with the runs it comes from; writers are in ``render``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ovbench.results.quantities import FIGURES


@dataclass(frozen=True)
class Refused:
    """A run that was looked at for a cell and not taken, and why."""

    run_id: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """One figure, where it comes from, and the published number beside it.

    Attributes:
        value: Ours, unrounded; None where there is no run or the run lacks the figure.
        run_id: The run or profile that ``value`` comes from; None for a mean and an empty cell.
        published: The published number as printed; None where there is none.
        comparable: Whether a difference to the published number says something (not across machines).
        members: The runs that a mean was taken over.
        others: Runs that fit as well, newest first; the newest counts.
        refused: Runs of the same method that do not fit.
        remarks: What should be known of ``value``, e.g. random weights.
    """

    value: float | None
    run_id: str | None
    published: str | None = None
    comparable: bool = True
    members: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Ours, unrounded, minus the published number as printed; None where either is missing or they do not compare."""
        if self.value is None or self.published is None or not self.comparable:
            return None
        return self.value - float(self.published)

    @property
    def sources(self) -> tuple[str, ...]:
        """Ids of all runs that the value comes from."""
        return self.members if self.run_id is None else (self.run_id,)


@dataclass(frozen=True)
class Column:
    """One figure of one benchmark.

    Attributes:
        dataset: Benchmark id; ``"mean"`` for the mean over all benchmark columns, ``"mean8"`` and the like in papers;
            empty where the figure belongs to no benchmark.
        figure: Name of the figure.
        label: Its words in the heading; None takes those of :data:`ovbench.results.quantities.FIGURES`.
        unit: Unit of the cells; None the same.
        digits: Digits after the point of ours; None the same.
        relative: Whether the difference is shown in percent of the published number.
    """

    dataset: str
    figure: str
    label: str | None = None
    unit: str | None = None
    digits: int | None = None
    relative: bool = False

    @property
    def shown_label(self) -> str:
        """Words of the figure."""
        return FIGURES[self.figure].label if self.label is None else self.label

    @property
    def shown_unit(self) -> str:
        """Unit of the figure, empty for none."""
        return FIGURES[self.figure].unit if self.unit is None else self.unit

    @property
    def shown_digits(self) -> int:
        """Digits after the point of ours."""
        return FIGURES[self.figure].digits if self.digits is None else self.digits

    @property
    def heading(self) -> str:
        """Benchmark and figure with its unit."""
        unit = f" ({self.shown_unit})" if self.shown_unit else ""
        return f"{self.dataset} {self.shown_label}{unit}".strip()


@dataclass(frozen=True)
class Row:
    """One setting: the shown settings in order of ``Section.settings`` and one cell per column."""

    settings: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Section:
    """Rows that may stand beside each other.

    Attributes:
        kind: ``results``, ``paper``, or what sets these runs apart: ``demo``, ``builtin-weights``, ``random-weights``,
            ``partial``, joined by '+'.
        title: Heading, which says so in words.
        settings: Names of the shown settings.
        columns: Figure columns.
        rows: One per setting.
        notes: What still differs within a column, and what else a reader must know.
    """

    kind: str
    title: str
    settings: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """All sections, and what was left out of them."""

    sections: tuple[Section, ...]
    left_out: tuple[str, ...] = field(default=())
