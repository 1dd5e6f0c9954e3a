"""The sortable tables of the report: runs, and profiles."""

from __future__ import annotations

from collections.abc import Sequence

from ovbench.results.measured import Measured
from ovbench.results.quantities import FIGURES
from ovbench.tables.report.entries import HIDING, Entry, scope
from ovbench.tables.report.figures import NONE, NUMBERS, NumberColumn, number
from ovbench.tables.report.markup import Child, Markup, element


def badges(hiding: Sequence[str]) -> Markup | None:
    """What keeps a run out of the results, a word each."""
    if not hiding:
        return None
    words = (element("span", HIDING[kind][0], class_=f"badge {kind}", title=HIDING[kind][1]) for kind in hiding)
    return element("span", *words, class_="badges")


def heading(label: str, unit: str = "", title: str | None = None, *, numeric: bool = False) -> Markup:
    """A column heading that sorts; without a script it is plain text."""
    text = f"{label} ({unit})" if unit else label
    button = element("button", text, type="button", class_="sort", title=title)
    return element("th", button, scope="col", class_="number" if numeric else None)


def value_cell(value: float | None, digits: int, why: str = "") -> Markup:
    """A number; the unrounded one is what sorts."""
    return element(
        "td",
        number(value, digits),
        class_="number",
        data_value=None if value is None else repr(value),
        title=why if value is None and why else None,
    )


def runs_table(runs: Sequence[Entry]) -> Markup:
    """One row per run, with a link to its details."""
    with_published = any(entry.published is not None for entry in runs)
    with_pq = any(FIGURES["pq"].value(entry.record) is not None for entry in runs)
    heads = [heading("method"), heading("benchmark")]
    columns = [column for column in NUMBERS if column.label != "PQ" or with_pq]
    for column in columns:
        heads.append(heading(column.label, column.unit, column.title, numeric=True))
        if column.label == "mIoU" and with_published:
            heads.append(heading("published", "%", "as printed for the method under its own settings", numeric=True))
            heads.append(heading("difference", "", "ours, unrounded, minus the published one", numeric=True))
    heads += [heading(name) for name in ("protocol", "weights", "precision", "machine", "finished (UTC)")]
    rows = [_row(entry, columns, with_published) for entry in runs]
    return element(
        "table",
        element("caption", "Runs. A heading sorts, a name leads to the run's details.", class_="visually-hidden"),
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
        class_="sortable", id="runs-table",
    )  # fmt: skip


def _row(entry: Entry, columns: Sequence[NumberColumn], with_published: bool) -> Markup:
    spec, environment = entry.record.spec, entry.record.environment
    link = element("a", spec.method, href=f"#{entry.anchor}")
    cells: list[Child] = [
        element("th", link, badges(entry.hiding), scope="row", data_value=spec.method),
        element("td", spec.dataset),
    ]
    for column in columns:
        cells.append(value_cell(column.value(entry), column.digits, column.why(entry)))
        if column.label == "mIoU" and with_published:
            printed = entry.published
            cells.append(element("td", printed or NONE, class_="number", data_value=printed))
            shown = number(entry.difference, 2, "+")
            value = None if entry.difference is None else repr(entry.difference)
            cells.append(element("td", shown, class_="number", data_value=value))
    finished = entry.record.provenance.finished
    overrides = f" (+ {', '.join(spec.protocol.overrides)})" if spec.protocol.overrides else ""
    cells += [
        element("td", spec.protocol.name + overrides),
        element("td", f"{spec.arch or 'unknown'}, {spec.weights}"),
        element("td", spec.dtype),
        element("td", environment.gpu or environment.cpu),
        element("td", f"{finished:%Y-%m-%d %H:%M}", data_value=finished.timestamp()),
    ]
    return element("tr", *cells, **scope(entry))


_PROFILE_FIGURES = ("params", "gmacs", "forward_gmacs", "latency", "images_per_s", "memory")
_READ = {
    "params": "params_m", "forward_gmacs": "gmacs", "images_per_s": "images_per_s", "memory": "peak_memory_mib",
}  # fmt: skip


def profiles_table(profiles: Sequence[Measured]) -> Markup:
    """One row per profile; its conventions and doubts stand in the last column."""
    heads = [heading("method"), heading("weights"), heading("input")]
    for name in _PROFILE_FIGURES:
        figure = FIGURES[name]
        heads.append(heading(figure.label, figure.unit, numeric=True))
    heads += [heading(name) for name in ("machine", "precision", "finished", "notes")]
    rows = [_profile_row(profile) for profile in sorted(profiles, key=lambda one: (one.method, one.id))]
    return element(
        "table",
        element("caption", "Profiles: cost without accuracy. A heading sorts.", class_="visually-hidden"),
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
        class_="sortable",
    )  # fmt: skip


def _profile_row(profile: Measured) -> Markup:
    cost, machine = profile.efficiency, profile.environment
    cells: list[Child] = [
        element("th", profile.method, scope="row", title=profile.id),
        element("td", f"{profile.arch or '–'}, {profile.weights}"),
        element("td", (cost.input if cost else None) or NONE),
    ]
    for name in _PROFILE_FIGURES:
        if name == "latency":
            timing = None if cost is None else cost.latency_ms
            value = None if timing is None else timing.median
        elif name == "gmacs":
            value = profile.image_gmacs
        else:
            value = None if cost is None else getattr(cost, _READ[name])
        cells.append(value_cell(value, FIGURES[name].digits))
    notes = [text for text in (profile.convention, *profile.notes) if text]
    threads = f", {machine.threads} threads" if machine.gpu is None else ""
    cells += [
        element("td", (machine.gpu or machine.cpu) + threads),
        element("td", str(profile.fields.get("dtype", NONE))),
        element("td", f"{profile.finished:%Y-%m-%d %H:%M}", data_value=profile.finished.timestamp()),
        element("td", *(element("p", note) for note in notes), class_="notes"),
    ]
    words = f"{profile.method} {profile.id} {profile.arch} {profile.weights} {profile.dataset}".lower()
    return element(
        "tr", *cells, data_method=profile.method, data_words=words, data_hiding="", data_dataset=profile.dataset
    )
