"""What a check of a benchmark's data found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ovbench.errors import DataError

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """One kind of fault.

    Attributes:
        kind: Short id for scripts, e.g. ``"out_of_range"``.
        level: "error" spoils a score; "warning" is worth knowing.
        message: What is wrong and how often.
        fix: What to do.
        count: Number of files concerned.
        files: Up to three of them, relative to the data root where they lie below it.
    """

    kind: str
    level: Level
    message: str
    fix: str
    count: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """The outcome of a check.

    Attributes:
        benchmark: Benchmark id.
        split: "val" or "train".
        root: Resolved data root, or what was given where none was found.
        synthetic: The root is a generated copy.
        expected: Images of the official split.
        listed: Images that a run would read.
        checked: Pairs that were opened.
        classes_present: Classes that occur in the checked labels.
        ignore_share: Share of their pixels that no metric counts, 0..1; None where no label could be read.
        problems: Errors first.
    """

    benchmark: str
    split: str
    root: str
    synthetic: bool
    expected: int
    listed: int
    checked: int
    classes_present: int
    ignore_share: float | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """No error; warnings may be there."""
        return not any(problem.level == "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, with ``ok``."""
        content = asdict(self)
        content["problems"] = [{**asdict(problem), "files": list(problem.files)} for problem in self.problems]
        return {"ok": self.ok, **content}

    def raise_for_errors(self) -> None:
        """Raises ``DataError`` with all errors of the report; returns where there is none."""
        errors = [problem for problem in self.problems if problem.level == "error"]
        if errors:
            lines = [describe(problem) for problem in errors]
            raise DataError(f"The {self.benchmark} data in '{self.root}' cannot be used:\n" + "\n".join(lines))


def describe(problem: Problem) -> str:
    """One problem as a line of text: message, examples, fix."""
    examples = f" E.g. {', '.join(problem.files)}." if problem.files else ""
    return f"{problem.level}: {problem.message}{examples} {problem.fix}".rstrip()
