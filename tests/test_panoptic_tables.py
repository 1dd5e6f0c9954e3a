"""Panoptic quality in tables: of records, of FISA's paper, and in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovbench.results import store
from ovbench.results.measured import of_record
from ovbench.results.panoptic_quality import panoptic_from_sums
from ovbench.results.record import RunRecord
from ovbench.tables.paper import arrange
from ovbench.tables.runs import table

FISA = {"method": "fisa", "spec": {"arch": "ViT-L-14-336", "protocol": {"name": "common"}}}
PQ = panoptic_from_sums(("sky", "road"), [1], [1.5, 0.7], [2, 1], [1, 0], [0, 2])


@pytest.fixture
def make(make_record: Callable[..., RunRecord]) -> Callable[..., RunRecord]:
    def run(dataset: str, *, panoptic: Any = None, reason: str | None = None, **fields: Any) -> RunRecord:
        record = make_record(dataset=dataset, **{**FISA, **fields})
        assert record.metrics is not None
        metrics = record.metrics.model_copy(update={"panoptic": panoptic, "panoptic_reason": reason})
        return record.model_copy(update={"metrics": metrics})

    return run


def cells(records: list[RunRecord], number: str = "1", row: str = "FISA") -> dict[tuple[str, str], Any]:
    (section,) = arrange("fisa", number, [of_record(record) for record in records], "common").sections
    index = section.settings.index("row")
    [found] = [each for each in section.rows if each.settings[index] == row]
    return {(col.dataset, col.figure): cell for col, cell in zip(section.columns, found.cells, strict=True)}


def test_pq_and_miou_of_a_row_come_from_where_the_paper_measures_them(make: Callable[..., RunRecord]) -> None:
    panoptic, semantic, coco = make("ade20k_panoptic", panoptic=PQ), make("ade20k"), make("coco_panoptic", panoptic=PQ)
    found = cells([panoptic, semantic, coco])
    assert (found["ade20k", "PQ"].run_id, found["ade20k", "PQ"].published) == (panoptic.run_id, "28.1")
    assert found["ade20k", "PQ"].value == PQ.pq
    assert (found["ade20k", "mIoU"].run_id, found["ade20k", "mIoU"].published) == (semantic.run_id, "36.8")
    assert {found["coco_panoptic", name].run_id for name in ("PQ", "mIoU")} == {coco.run_id}
    assert found["coco_panoptic", "PQ"].difference == pytest.approx((PQ.pq or 0) - 56.4)
    assert found["mapillary", "PQ"].value is None and found["mapillary", "PQ"].published == "19.0"


def test_a_run_without_segments_fills_no_pq_and_says_why(make: Callable[..., RunRecord]) -> None:
    found = cells([make("ade20k_panoptic", reason="it gives labels per pixel, no segments")])
    assert found["ade20k", "PQ"].value is None
    [refused] = found["ade20k", "PQ"].refused
    assert refused.reason == "it has no PQ (it gives labels per pixel, no segments)"


def test_speed_of_table_2_may_come_from_either(make: Callable[..., RunRecord]) -> None:
    for dataset in ("ade20k", "ade20k_panoptic"):
        run = make(dataset)
        found = cells([run], "2")
        assert found["ade20k", "throughput"].run_id == found["ade20k", "peak_memory"].run_id == run.run_id
        assert (found["ade20k", "mIoU"].run_id == run.run_id) is (dataset == "ade20k")


SHORT = "iters=10000"
ABLATIONS = [
    ("3a", "Baseline", "maskclip-ding", {}),
    ("3a", "+ SEVE", "fisa", {"training_overrides": [SHORT, "policy=seve"]}),
    ("3a", "+ SEVE + SIMO (FISA)", "fisa", {"training_overrides": [SHORT]}),
    ("3b", "FISA + adapt language encoder", "fisa", {"training_overrides": [SHORT, "policy=simo+text"]}),
    ("3c", "ViT-L-14-336", "fisa", {"training_overrides": [SHORT]}),
    ("3d", "LoRA rank 128", "fisa", {"training_overrides": [SHORT, "policy=lora"], "lora_rank": 128}),
    ("3e", "3 adapter layers", "fisa", {"training_overrides": [SHORT], "adapter_layers": 3}),
    ("4", "Swin-T", "fisa", {"generator": "mask2former-swin-t"}),
]


@pytest.mark.parametrize(("number", "row", "method", "options"), ABLATIONS)
def test_an_ablation_has_the_run_with_its_options(
    number: str, row: str, method: str, options: dict[str, Any], make: Callable[..., RunRecord]
) -> None:
    given = {"generator": "mask2former-swin-b", "trained_on": "coco_panoptic", **options}
    spec = {**FISA["spec"], "method_options": given}
    fitting = make("ade20k_panoptic", panoptic=PQ, method=method, spec=spec)
    other = make(
        "ade20k_panoptic", panoptic=PQ, spec={**spec, "method_options": {**given, "training_overrides": ["lr=1.0"]}}
    )
    found = cells([fitting, other], number, row)["ade20k", "PQ"]
    assert found.run_id == fitting.run_id and found.published is not None
    assert cells([other], number, row)["ade20k", "PQ"].value is None


def test_tables_of_records_show_pq_where_there_is_some(make: Callable[..., RunRecord]) -> None:
    runs = [make("ade20k_panoptic", panoptic=PQ), make("voc21")]
    (section,) = table(runs).sections
    assert [(col.dataset, col.figure) for col in section.columns] == [
        ("ade20k_panoptic", "miou"), ("ade20k_panoptic", "pq"), ("voc21", "miou"), ("mean", "miou"),
    ]  # fmt: skip
    row = section.rows[0].cells
    assert row[1].value == PQ.pq and row[1].run_id == runs[0].run_id
    (only,) = table([make("voc21")]).sections
    assert [col.figure for col in only.columns] == ["miou"]
    (asked,) = table(runs, columns=["pq", "sq", "rq"], datasets=["ade20k_panoptic"]).sections
    assert [cell.value for cell in asked.rows[0].cells] == [PQ.pq, PQ.sq, PQ.rq]


def test_report_has_a_column_of_pq_only_where_there_is_some(make: Callable[..., RunRecord], tmp_path: Path) -> None:
    from ovbench.cli.app import run_command

    pages = []
    for name, panoptic in (("with", PQ), ("without", None)):
        store.write(make("ade20k_panoptic", panoptic=panoptic), tmp_path / name)
        out = tmp_path / f"{name}.html"
        assert run_command(["report", "--results", str(tmp_path / name), "--out", str(out)]) == 0
        pages.append(out.read_text(encoding="utf-8"))
    assert "PQ (%)" in pages[0] and f"{PQ.pq:.2f} % PQ" in pages[0]
    assert "PQ" not in pages[1]


def test_trackers_get_pq(make: Callable[..., RunRecord]) -> None:
    from ovbench.evaluate.track import scalars

    assert scalars(make("mapillary", panoptic=PQ))["accuracy/PQ"] == PQ.pq
    assert "accuracy/PQ" not in scalars(make("mapillary"))
