"""Everything that is kept of one run: classes, stages, provenance; folded until somebody wants it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ovbench.results.comparable import protocol_of
from ovbench.results.measured import flat
from ovbench.results.record import Latency, RunRecord
from ovbench.tables.report.charts import GROUPS, bar, stacked
from ovbench.tables.report.entries import HIDING, Entry, scope
from ovbench.tables.report.figures import NONE, number
from ovbench.tables.report.markup import Child, Markup, element
from ovbench.tables.report.tables import badges, heading, value_cell


def details(entry: Entry) -> Markup:
    """A run's block, which a click opens."""
    record = entry.record
    miou = record.metrics.miou if record.metrics else None
    panoptic = record.metrics.panoptic if record.metrics else None
    score = f"{number(miou, 2)} % mIoU" + ("" if panoptic is None else f", {number(panoptic.pq, 2)} % PQ")
    summary = element(
        "summary",
        element("span", entry.title, class_="name"),
        badges(entry.hiding),
        element("span", score, class_="score"),
        element("code", record.run_id),
    )
    said = [element("p", f"{HIDING[kind][1]}.", class_="warning") for kind in entry.hiding]
    if record.reason:
        said.append(element("p", f"Reason: {record.reason}", class_="warning"))
    gallery = None
    if entry.gallery is not None:
        gallery = element("p", element("a", "Predictions beside the ground truth", href=f"#gallery-{record.run_id}"))
    parts: list[Child] = [*said, gallery, classes(record), stages(record), provenance(record)]
    return element("details", summary, element("div", *parts, class_="inside"), id=entry.anchor, **scope(entry))


def classes(record: RunRecord) -> Markup | None:
    """IoU and accuracy of every class with a bar, the best first; None where no image was finished."""
    if record.metrics is None:
        return None
    scores = sorted(
        enumerate(record.metrics.classes),
        key=lambda item: (item[1].iou is None, -(item[1].iou or 0.0), item[0]),
    )
    rows = []
    for index, score in scores:
        why = "neither predicted nor labelled in any image" if score.iou is None else ""
        rows.append(
            element(
                "tr",
                element("th", score.name, scope="row", data_value=score.name),
                value_cell(score.iou, 2, why),
                element("td", bar(score.iou, 100.0), class_="bars", data_value=index),
                value_cell(score.acc, 2),
                element("td", f"{score.label:,}".replace(",", " "), class_="number", data_value=score.label),
            )
        )
    order = heading("order", "", "sorts by the place in the class list")
    head = element(
        "tr",
        heading("class"),
        heading("IoU", "%", numeric=True),
        order,
        heading("accuracy", "%", numeric=True),
        heading("labelled pixels", numeric=True),
    )
    absent = len(record.metrics.absent_classes)
    note = f", {absent} of them in no image and left out of the mean" if absent else ""
    return element(
        "section",
        element("h4", f"IoU of the {len(rows)} classes{note}"),
        element(
            "div",
            element("table", element("thead", head), element("tbody", *rows), class_="sortable classes"),
            class_="scroll", tabindex=0, role="region", aria_label=f"Classes of {record.run_id}",
        ),
    )  # fmt: skip


def stages(record: RunRecord) -> Markup | None:
    """Time of each stage of an image with its share; None where it was not measured."""
    cost = record.efficiency
    if cost is None or not cost.stages_ms:
        return None
    parts = [(name, timing.median) for name, timing in cost.stages_ms.items()]
    rows = [_stage_row(name, timing, index) for index, (name, timing) in enumerate(cost.stages_ms.items())]
    if cost.latency_ms is not None:
        rows.append(_stage_row("whole image", cost.latency_ms, None))
    names = ("stage", "median (ms)", "IQR (ms)", "p95 (ms)", "images")
    head = element(
        "tr", *(element("th", name, scope="col", class_=None if name == "stage" else "number") for name in names)
    )
    return element(
        "section",
        element("h4", "Time of an image by stage"),
        stacked(parts),
        element(
            "div",
            element("table", element("thead", head), element("tbody", *rows), class_="stages"),
            class_="scroll", tabindex=0, role="region", aria_label=f"Stages of {record.run_id}",
        ),
        element("p", "The rest of a whole image is spent between the stages.", class_="hint"),
    )  # fmt: skip


def _stage_row(name: str, timing: Latency, index: int | None) -> Markup:
    key = None if index is None else element("span", class_=f"key s{index % GROUPS}", aria_hidden="true")
    return element(
        "tr",
        element("th", key, name, scope="row"),
        *(value_cell(value, 2) for value in (timing.median, timing.iqr, timing.p95)),
        element("td", str(timing.n), class_="number"),
    )


def provenance(record: RunRecord) -> Markup:
    """Where the run came from: what is needed to believe it and to repeat it."""
    source, spec, cost = record.provenance, record.spec, record.efficiency
    commit = source.git_commit or f"none ({source.git_reason})"
    general = {
        "run": record.run_id,
        "status": record.status,
        "started": source.started.isoformat(),
        "finished": source.finished.isoformat(),
        "command": source.command,
        "commit of ovbench": commit + (" with uncommitted changes" if source.git_dirty else ""),
        "spec hash": record.spec_hash,
        "weights": f"{spec.weights} ({spec.arch or 'unknown'}, {spec.activation})",
        "sha256 of the weights": source.weights_sha256,
        "benchmark": f"{spec.dataset}, version {spec.dataset_version}",
        "data fingerprint": source.dataset_fingerprint,
    }
    rest = {
        name: value
        for name, value in flat(spec.model_dump(mode="json")).items()
        if "." not in name and name not in ("method", "method_options", "protocol", "dataset", "dataset_version")
    }
    measured = {} if cost is None else {
        "counted by": cost.tool, "counted input": cost.input, "batch": cost.batch, "memory measured as": cost.peak_memory_kind,
    }  # fmt: skip
    groups: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("Run", general),
        ("Method options", dict(spec.method_options)),
        ("Protocol", protocol_of(record)),
        ("Other settings", rest),
        ("Measurement", measured),
        ("Machine", flat(record.environment.model_dump(mode="json"))),
        ("Packages", dict(sorted(source.package_versions.items()))),
    )
    blocks = [_group(title, pairs) for title, pairs in groups if pairs]
    return element(
        "details", element("summary", "Provenance"), element("div", *blocks, class_="provenance"), class_="inner"
    )


def _group(title: str, pairs: Mapping[str, object]) -> Markup:
    rows: Sequence[Markup] = [
        element("div", element("dt", name), element("dd", _words(value))) for name, value in pairs.items()
    ]
    return element("section", element("h4", title), element("dl", *rows))


def _words(value: object) -> str:
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
