"""The papers' printed numbers and what a run must be to stand beside one of them.

``published.csv`` holds the numbers of our papers, ``rivals.csv`` those that others print; ``rules.json`` says which of our
methods a row is and which settings it means. All are described in the README beside them.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ovbench.errors import OvbenchError, UsageError, unknown_name
from ovbench.results.measured import CLASS, GROUP

_RIVALS = "rivals.csv"
_FILES = ("published.csv", _RIVALS)


def of_accuracy(metric: str) -> bool:
    """Whether a metric says how good predictions are."""
    return metric in ("mIoU", "PQ", "mAP", GROUP) or metric.startswith(CLASS)


def published_dir() -> Path:
    """The folder of the published numbers, in a checkout or a wheel."""
    spec = importlib.util.find_spec("ovbench.published")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[2] / "results" / "published"


@dataclass(frozen=True)
class Printed:
    """One printed number; fields as the columns of ``published.csv``, ``value`` as printed.

    ``origin`` is the column ``from`` of ``rivals.csv``: where it was read; empty for a paper of ours, which printed it itself.
    """

    source: str
    table: str
    row: str
    variant: str
    method: str
    backbone: str
    train_data: str
    dataset: str
    metric: str
    value: str
    unit: str
    setting: str
    origin: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Benchmark and metric, where the share of a class in the training set goes to the column of the class."""
        return self.dataset, self.metric.replace("ratio:", CLASS)


@dataclass(frozen=True)
class Wanted:
    """What a run or profile must be to stand beside one printed number.

    Attributes:
        method: Our method id; empty where the row is someone else's.
        arch: Backbones that are the printed one, as :func:`plain_arch` writes them; empty where the paper does not say.
        datasets: Benchmarks that a run may be on: the printed one, or those that a rule names in its place.
        metric: Name of the metric in ``published.csv``.
        weights: open_clip tag of the paper; empty where it does not matter.
        require: Fields of a spec (``protocol.mode``, ``method_options.base``) and the values they must have.
        prefer: The same, but only said where it differs: what the paper used and our machine may not have.
        assume: The same, for what not every run can know of itself, such as the training data of a public checkpoint: a
            run that says otherwise does not fit, and of one that says nothing that is remarked.
        protocol: Preset that does besides the method's own; empty for none.
        machine: What the paper measured on, words of a GPU's name; empty for none.
        unknown: Why no run can be known to fit (an ablation that no rule describes); empty where one can.
        state: The same in two words where a rule says it.
        classes: Of :data:`GROUP`, the classes that it is the mean of.
    """

    method: str
    arch: tuple[str, ...]
    datasets: tuple[str, ...]
    metric: str
    weights: str = ""
    require: dict[str, Any] = field(default_factory=dict)
    prefer: dict[str, Any] = field(default_factory=dict)
    assume: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    machine: str = ""
    unknown: str = ""
    state: str = ""
    classes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> bool:
        """Whether the metric says how good the predictions are."""
        return of_accuracy(self.metric)


@lru_cache(maxsize=1)
def numbers() -> tuple[Printed, ...]:
    """All printed numbers in the order of the files, those of our papers first.

    Raises:
        OvbenchError: A file is missing from this installation.
    """
    found: list[Printed] = []
    for name in _FILES:
        path = published_dir() / name
        try:
            with path.open(encoding="utf-8", newline="") as file:
                found += [Printed(origin=row.pop("from", ""), **row) for row in csv.DictReader(file)]
        except FileNotFoundError:
            raise OvbenchError(f"The published numbers are missing from this installation: no '{path}'.") from None
    return tuple(found)


@lru_cache(maxsize=1)
def _rules() -> dict[str, Any]:
    rules: dict[str, Any] = json.loads((published_dir() / "rules.json").read_text(encoding="utf-8"))
    return rules


def papers() -> list[str]:
    """Ids of all papers and of other printers of numbers, those without a printed table included."""
    return list(_rules()["papers"])


@cache
def methods() -> list[str]:
    """Our methods that someone prints the accuracy of; each names a table of all who do (:data:`BY_METHOD`)."""
    found = {wanted(entry).method for entry in numbers() if entry.metric in _OF_A_METHOD}
    return sorted(found.difference({"", *papers()}))


BY_METHOD = "printed"
_OF_A_METHOD = ("mIoU", "PQ")  # what such a table holds


def title(paper: str) -> str:
    """Authors' title of a paper."""
    if paper in papers():
        return str(_rules()["papers"][paper]["title"])
    return f"Who prints what for {paper}"


def no_tables(paper: str) -> str | None:
    """Why a paper has no numbers here; None for those that have."""
    reason: str | None = _rules()["papers"].get(paper, {}).get("no_tables")
    return reason


def tables(paper: str) -> list[str]:
    """Ids of a paper's tables in the order of the file; of a method, the one table of all who print numbers of it.

    Raises:
        UsageError: No such paper.
    """
    if paper not in papers():
        if paper in methods():
            return [BY_METHOD]
        raise unknown_name("paper", paper, [*papers(), *methods()])
    return list(dict.fromkeys(entry.table for entry in numbers() if entry.source == paper))


def table_of(paper: str, table: str | None) -> str:
    """The table that is meant: the named one, or the only one.

    Raises:
        UsageError: No such paper, or several tables and none named.
    """
    known = tables(paper)
    if table is None and len(known) != 1:
        raise UsageError(
            f"Which table of {paper}? --table is one of: {', '.join(known)}." if known else str(no_tables(paper))
        )
    return table or known[0]


def table_numbers(paper: str, table: str) -> list[Printed]:
    """The printed numbers of one table.

    Raises:
        UsageError: No such paper or table.
    """
    known = tables(paper)
    if table not in known:
        raise unknown_name(f"table of {paper}", table, known, f"ovbench table --paper {paper}")
    if paper not in papers():
        return [entry for entry in numbers() if entry.metric in _OF_A_METHOD and wanted(entry).method == paper]
    return [entry for entry in numbers() if entry.source == paper and entry.table == table]


@cache
def wanted(entry: Printed) -> Wanted:
    """What a run must be to stand beside a printed number: its columns and all rules that match them."""
    matching = [rule for rule in _rules()["rules"] if _matches(rule["where"], entry)]
    merged: dict[str, Any] = {
        "method": entry.method,
        "arch": [entry.backbone] if entry.backbone else [],
        "datasets": [entry.dataset],
        "require": {},
        "prefer": {},
        "assume": {},
        "protocol": "",
        "machine": "",
        "weights": _rules()["papers"][entry.source].get("weights", ""),
        "unknown": "",
        "state": "",
    }
    for rule in matching:
        for key, value in rule.items():
            if key in ("require", "prefer", "assume"):
                merged[key] |= value
            elif key != "where":
                merged[key] = value
    told = {name for rule in matching for name in rule["where"]}
    unknown = merged["unknown"]
    if not unknown and entry.variant and "variant" not in told:
        unknown = f"which options make '{entry.row}' ({entry.variant}) is not stated in rules.json"
    elif not unknown and entry.setting and "setting" not in told:
        unknown = f"no rule says what '{entry.setting}' is in a run"
    return Wanted(
        method=merged["method"],
        arch=tuple(plain_arch(name) for name in merged["arch"]),
        datasets=tuple(merged["datasets"]),
        metric=entry.metric,
        weights=merged["weights"],
        require=merged["require"],
        prefer=merged["prefer"],
        assume=merged["assume"],
        protocol=merged["protocol"],
        machine=merged["machine"],
        unknown=unknown,
        state=merged["state"],
        classes=_group(entry) if entry.metric == GROUP else (),
    )


def _group(entry: Printed) -> tuple[str, ...]:
    """The classes that a mean over a group stands beside."""
    return tuple(
        other.metric.removeprefix(CLASS)
        for other in numbers()
        if other.metric.startswith(CLASS)
        and (other.source, other.table, other.row, other.variant)
        == (entry.source, entry.table, entry.row, entry.variant)
    )


def _matches(where: dict[str, Any], entry: Printed) -> bool:
    """Whether an entry has the values (or one of the listed values) that a rule is for."""
    return all(
        getattr(entry, name) in (allowed if isinstance(allowed, list) else [allowed]) for name, allowed in where.items()
    )


def plain_arch(name: str) -> str:
    """An architecture's name without separators, case and activation: ``ViT-B/16`` and ``ViT-B-16-quickgelu`` agree."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("quickgelu")
    for short, long in _rules()["backbones"].items():
        plain = re.sub(f"{re.escape(short)}$", long, plain)
    return plain


def arch_names() -> list[str]:
    """Names of our command line that printed backbones stand for."""
    return list(_rules()["archs"])


def trained_methods() -> list[str]:
    """Methods besides the closed-set ones whose results are of trained weights."""
    return list(_rules()["trained"])


def is_mean(dataset: str) -> bool:
    """Whether a benchmark's name is that of a mean over several, such as ``mean8``."""
    return re.fullmatch(r"mean\d+", dataset) is not None


def mean_members(
    figure: str, dataset: str, printed: Sequence[tuple[str, str]], columns: Sequence[tuple[str, str]]
) -> list[str] | None:
    """The benchmarks of a column such as ``mean8``: all of its row, or all of its table, with the same metric.

    Args:
        figure: Metric of the mean.
        dataset: Name of the column.
        printed: (dataset, metric) of what is printed in the row.
        columns: The same of all columns of the table.

    Returns:
        None for a column that is no mean; empty where neither has that many benchmarks.
    """
    if not is_mean(dataset):
        return None
    for near in (printed, columns):
        members = [name for name, metric in near if metric == figure and not is_mean(name)]
        if len(members) == int(dataset.removeprefix("mean")):
            return members
    return []


def accuracy_of(method: str, arch: str, dataset: str, metric: str = "mIoU") -> list[Printed]:
    """The mIoU or PQ that our papers print of a method under its own settings, equal values once.

    Rows of an ablation are left out, and so is what others print: they do not agree.
    """
    found: dict[str, Printed] = {}
    for entry in numbers():
        if not entry.origin and (entry.metric, entry.variant, entry.method) == (metric, "", method):
            want = wanted(entry)
            if dataset in want.datasets and plain_arch(arch) in (want.arch or ("",)) and not want.unknown:
                found.setdefault(entry.value, entry)
    return list(found.values())
