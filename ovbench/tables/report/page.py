"""The page put together: filter, table, plots, galleries, runs one by one, profiles."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from ovbench import __version__
from ovbench.errors import DataError
from ovbench.results import store
from ovbench.results.measured import Measured
from ovbench.results.quantities import FIGURES
from ovbench.results.record import RunRecord
from ovbench.tables.pareto import COSTS, points
from ovbench.tables.report.charts import legend, pareto, plain
from ovbench.tables.report.details import details
from ovbench.tables.report.entries import HIDING, OLDER, Entry, entries, scope
from ovbench.tables.report.markup import Child, Markup, element, join, raw
from ovbench.tables.report.pictures import embedded
from ovbench.tables.report.tables import badges, profiles_table, runs_table
from ovbench.tables.runs import table

GALLERY_BYTES = 300_000


def page(
    records: Sequence[RunRecord],
    profiles: Sequence[Measured] = (),
    *,
    results: Path = store.DEFAULT_ROOT,
    gallery_bytes: int = GALLERY_BYTES,
    on_problem: Callable[[str], None] = lambda message: None,
) -> str:
    """The report as HTML: one file that loads nothing else, the same bytes for the same records.

    Args:
        records: Runs.
        profiles: Profiles.
        results: Root folder of the records, in which galleries lie.
        gallery_bytes: Upper limit of each embedded gallery; 0 leaves them out.
        on_problem: Gets the message of each gallery that cannot be read.
    """
    galleries = [_gallery_file(record, results) if gallery_bytes else None for record in records]
    runs = entries(records, galleries)
    figures = [_figure(entry, gallery_bytes, on_problem) for entry in runs]
    parts: dict[str, Markup | None] = {
        "table": _table_section(runs, records),
        "pareto": _pareto_section(runs),
        "gallery": _section("gallery", "Image, prediction and ground truth.", _drawn(figures, "galleries")),
        "runs": _section("runs", "Classes, times and provenance of each run.", [details(entry) for entry in runs]),
        "profiles": _section(
            "profiles",
            "Cost measured by 'ovbench profile', without accuracy.",
            [_scroll(profiles_table(profiles), "Profiles")] if profiles else [],
        ),
    }
    present = {name: part for name, part in parts.items() if part is not None}
    script, style = _file("script.js"), _file("style.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"ovbench {__version__}"),
        element("title", "ovbench report"),
        raw("style", style),
        # the script hides what is no result; without it everything is shown, and nothing can be asked for
        element("noscript", raw("style", ".filter{display:none}button.sort::after{content:none}")),
    )
    body = element(
        "body",
        element("a", "To the runs", href="#table", class_="skip"),
        _header(runs, profiles, list(present)),
        element("main", _filter(runs), *present.values()),
        element(
            "footer", element("p", f"Made by ovbench {__version__} from records; numbers are rounded in display only.")
        ),
        element("div", id="tip", role="status", hidden=True),
        raw("script", script),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _file(name: str) -> str:
    return resources.files("ovbench.tables.report").joinpath(name).read_text(encoding="utf-8")


def _gallery_file(record: RunRecord, results: Path) -> Path | None:
    path = store.record_path(record, results).with_suffix("") / "gallery.png"
    return path if path.is_file() else None


_PARTS = {
    "table": "All runs",
    "pareto": "Accuracy and cost",
    "gallery": "Predictions",
    "runs": "Runs one by one",
    "profiles": "Profiles",
}


def _header(runs: Sequence[Entry], profiles: Sequence[Measured], present: Sequence[str]) -> Markup:
    good = [entry for entry in runs if not entry.hiding]
    datasets = {entry.record.spec.dataset for entry in good}
    text = f"{_count(len(good), 'result')} on {_count(len(datasets), 'benchmark')}"
    if len(runs) > len(good):
        text += f", {_count(len(runs) - len(good), 'other run')}"
    if profiles:
        text += f", {_count(len(profiles), 'profile')}"
    menu = [element("a", _PARTS[name], href=f"#{name}") for name in present]
    return element(
        "header", element("h1", "Open-vocabulary segmentation"), element("p", text), element("nav", *menu, aria_label="Parts")
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _filter(runs: Sequence[Entry]) -> Markup:
    """Choices; what is no result is left out unless ticked."""
    counts = {kind: sum(kind in entry.hiding for entry in runs) for kind in HIDING}
    boxes = [
        element(
            "label",
            element("input", type="checkbox", name="kind", value=kind),
            f" {HIDING[kind][0]} ({count})",
            title=HIDING[kind][1],
        )
        for kind, count in counts.items()
        if count
    ]
    hidden = None
    if boxes:
        hidden = element("fieldset", element("legend", "Show also"), *boxes)
    return element(
        "form",
        element("label", "Search", element("input", type="search", id="search", autocomplete="off")),
        _choice("dataset", "Benchmark", {entry.record.spec.dataset for entry in runs}),
        _choice("method", "Method", {entry.record.spec.method for entry in runs}),
        hidden,
        element("p", id="shown", role="status"),
        class_="filter", id="filter", aria_label="Filter", autocomplete="off",
    )  # fmt: skip


def _choice(id_: str, label: str, names: set[str]) -> Markup:
    options = [element("option", "all", value="")] + [element("option", name, value=name) for name in sorted(names)]
    return element("label", label, element("select", *options, id=id_))


def _section(id_: str, lead: str, content: Sequence[Child]) -> Markup | None:
    if not content:
        return None
    return element("section", element("h2", _PARTS[id_]), element("p", lead, class_="lead"), *content, id=id_)


def _scroll(child: Markup, label: str) -> Markup:
    return element("div", child, class_="scroll", tabindex=0, role="region", aria_label=label)


def _table_section(runs: Sequence[Entry], records: Sequence[RunRecord]) -> Markup:
    if not runs:
        return element(
            "section", element("h2", _PARTS["table"]), element("p", "No record was found. 'ovbench run' makes one."), id="table"
        )  # fmt: skip
    empty = element("p", id="empty", class_="empty", hidden=True)
    arranged = table(records, columns=("miou", "latency"))
    notes = [note for section in arranged.sections if section.kind == "results" for note in section.notes]
    listed = None
    if notes:
        listed = element(
            "details", element("summary", "What differs between results, and where published numbers come from"),
            element("ul", *(element("li", note) for note in notes)), class_="inner notes",
        )  # fmt: skip
    return element(
        "section", element("h2", _PARTS["table"]), _scroll(runs_table(runs), "Runs"), empty, listed, id="table"
    )


def _pareto_section(runs: Sequence[Entry]) -> Markup | None:
    """A plot per benchmark, cost and kind of run: what is no result stands on no frontier with results."""
    by_id = {entry.record.run_id: entry for entry in runs}
    groups: dict[tuple[str, tuple[str, ...]], list[RunRecord]] = {}
    for entry in runs:
        if entry.record.status == "ok" and OLDER not in entry.hiding:
            groups.setdefault((entry.record.spec.dataset, entry.kind), []).append(entry.record)
    plots = []
    for (dataset, kinds), records in sorted(groups.items(), key=lambda item: (bool(item[0][1]), item[0])):
        for cost in COSTS:
            plots.append(_plot(dataset, kinds, records, cost, by_id))
    return _section(
        "pareto",
        "Every point is a run and leads to it; the line joins those that no other beats in both. Up and left is better.",
        _drawn(plots, "plots"),
    )  # fmt: skip


def _plot(
    dataset: str, kinds: tuple[str, ...], records: Sequence[RunRecord], cost: str, runs: dict[str, Entry]
) -> Markup | None:
    chosen = [record for record in records if _has(record, cost, runs[record.run_id])]
    if not chosen:
        return None
    found = [plain(point) for point in points(chosen, cost)]  # type: ignore[arg-type]
    lacking = len(records) - len(chosen)
    what = f"{dataset}: mIoU over {COSTS[cost]}"
    caption = element(
        "figcaption",
        element("strong", what),
        badges(kinds),
        *(element("span", f"{HIDING[kind][1]}.", class_="warning") for kind in kinds),
        element("span", f"{_count(lacking, 'run')} without this figure left out.", class_="hint") if lacking else None,
    )
    return element(
        "figure", caption, pareto(found, runs, cost, what), legend(found),
        data_dataset=dataset, data_hiding=" ".join(kinds),
    )  # fmt: skip


def _has(record: RunRecord, cost: str, entry: Entry) -> bool:
    value = FIGURES[cost].value(record)
    return value is not None and FIGURES["miou"].value(record) is not None


def _figure(entry: Entry, limit: int, on_problem: Callable[[str], None]) -> Markup | None:
    """The gallery of a run; None where there is none."""
    if entry.gallery is None:
        return None
    try:
        picture = embedded(entry.gallery, limit)
    except DataError as error:
        on_problem(str(error))
        return None
    run_id = entry.record.run_id
    image = element(
        "img", src=Markup(picture.address), width=picture.width, height=picture.height,
        alt=f"Images of {entry.record.spec.dataset} with the prediction of {entry.record.spec.method} and the ground truth",
    )  # fmt: skip
    link = element("a", entry.title, href=f"#{entry.anchor}")
    caption = element("figcaption", link, badges(entry.hiding), element("code", run_id))
    return element("figure", caption, image, id=f"gallery-{run_id}", **scope(entry))


def _drawn(figures: Sequence[Markup | None], class_: str) -> list[Child]:
    found = [figure for figure in figures if figure is not None]
    return [element("div", join(found), class_=class_)] if found else []
