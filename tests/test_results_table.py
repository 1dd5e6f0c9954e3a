from __future__ import annotations

import csv
import io
import json

import pytest

from ovbench.errors import UsageError
from ovbench.tables import render
from ovbench.tables.runs import FIGURES, table


def _values(section):
    return {row.settings: [cell.value for cell in row.cells] for row in section.rows}


def test_the_newest_finished_run_counts(make_record):
    older = make_record(intersect=(50, 10))
    newer = make_record(intersect=(60, 40))
    failed = make_record(intersect=(0, 0), status="failed", reason="out of memory")
    (section,) = table([newer, failed, older]).sections
    (row,) = section.rows
    assert row.cells[0].run_id == newer.run_id and row.cells[0].value == 100.0
    assert table([newer, failed, older]).left_out == ("1 failed run left out",)


def test_rows_are_settings_and_columns_benchmarks_with_a_mean(make_record):
    records = [
        make_record(method="clip", dataset="voc21", intersect=(60, 40)),
        make_record(method="clip", dataset="ade20k", intersect=(0, 0)),
        make_record(method="sc-clip", dataset="voc21", intersect=(60, 40)),
    ]
    (section,) = table(records, datasets=["voc21", "ade20k"]).sections
    assert [column.heading for column in section.columns] == ["voc21 mIoU (%)", "ade20k mIoU (%)", "mean mIoU (%)"]
    assert _values(section) == {
        ("clip", "sclip", "openai"): [100.0, 0.0, 50.0],
        ("sc-clip", "sc-clip", "openai"): [100.0, None, None],
    }


def test_order_as_asked_for(make_record):
    records = [make_record(method=method) for method in ("clip", "sc-clip")]
    (section,) = table(records, methods=["sc-clip", "clip"]).sections
    assert [row.settings[0] for row in section.rows] == ["sc-clip", "clip"]


def test_what_was_asked_for_and_has_no_run_is_said(make_record):
    arranged = table([make_record()], methods=["sc-clip", "clip"], datasets=["voc21", "ade20k"])
    assert arranged.left_out == ("no finished run of method 'clip'", "no finished run of dataset 'ade20k'")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"spec": {"weights": "builtin", "demo": True}}, "demo"),
        ({"spec": {"weights": "builtin"}}, "builtin-weights"),
        ({"spec": {"weights": "random"}}, "random-weights"),
        ({"partial": True, "reason": "limited"}, "partial"),
        ({"spec": {"weights": "random"}, "partial": True, "reason": "limited"}, "random-weights+partial"),
        ({"spec": {"weights": "builtin", "demo": True}, "partial": True, "reason": "24 images"}, "demo"),
    ],
)
def test_what_is_no_result_never_stands_beside_results(make_record, change, kind):
    result, other = make_record(), make_record(**change)
    sections = table([other, result]).sections
    assert [section.kind for section in sections] == ["results", kind]
    for section, record in zip(sections, (result, other), strict=True):
        assert [cell.run_id for row in section.rows for cell in row.cells] == [record.run_id]
    marked = sections[1].title
    assert marked.isupper() is False and marked.split(",")[0].split(":")[0].isupper()  # begins with a word in capitals
    assert marked in render.to_markdown(table([other, result]))


@pytest.mark.parametrize(
    ("spec", "setting", "shown"),
    [
        ({"protocol": "common"}, "protocol", "common"),
        ({"protocol": {"name": "sc-clip", "prob_thd": 0.7}}, "protocol", "sc-clip prob_thd=0.7"),
        ({"arch": "ViT-L-14"}, "arch", "ViT-L-14"),
        ({"dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"device": "cuda"}, "device", "cuda"),
        ({"weights": "laion2b"}, "weights", "laion2b"),
        ({"method_options": {"beta": 0.5, "same": 1}}, "options", "beta=0.5"),
    ],
)
def test_settings_are_rows_of_their_own_and_shown(make_record, spec, setting, shown):
    records = [make_record(spec={"method_options": {"beta": 0.4, "same": 1}}), make_record(spec=spec)]
    if setting != "options":
        records[0] = make_record()
    (section,) = table(records).sections
    assert len(section.rows) == 2
    assert shown in [row.settings[section.settings.index(setting)] for row in section.rows]


def test_settings_that_tell_nothing_apart_are_not_shown(make_record):
    records = [
        make_record(method="clip", spec={"method_options": {"a": 1}}),
        make_record(method="sc-clip", spec={"method_options": {"b": 2}}),
    ]
    (section,) = table(records).sections
    assert section.settings == ("method", "protocol", "weights")


def test_two_files_of_one_name_are_told_apart(make_record):
    records = [
        make_record(spec={"weights": "clip.pt"}, provenance={"weights_sha256": digits * 32}) for digits in ("aa", "bb")
    ]
    (section,) = table(records).sections
    assert section.settings == ("method", "protocol", "weights", "weights_sha256")
    assert [row.settings[-1] for row in section.rows] == ["aaaaaaaa", "bbbbbbbb"]


def test_machines_in_one_latency_column_are_named(make_record):
    records = [
        make_record(method="clip", environment_fields={"cpu": "CPU one", "threads": 2}),
        make_record(method="sc-clip", environment_fields={"cpu": "CPU two", "threads": 4}),
    ]
    (section,) = table(records, columns=["miou", "latency"]).sections
    assert section.notes == (
        "voc21 latency: rows differ in cpu: CPU one, CPU two",
        "voc21 latency: rows differ in threads: 2, 4",
    )
    assert table(records, columns=["miou", "gmacs"]).sections[0].notes == ()


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        ({"spec": {"dataset_version": 1}}, {"spec": {"dataset_version": 2}}, "benchmark version: 1, 2"),
        (
            {"provenance": {"dataset_fingerprint": "12" * 32}},
            {"provenance": {"dataset_fingerprint": "34" * 32}},
            "dataset fingerprint: 12121212, 34343434",
        ),
        ({"images": 3}, {"images": 4}, "images: 3, 4"),
        (
            {"spec": {"protocol": {"name": "common", "wording_sha256": "56" * 32}}},
            {"spec": {"protocol": {"name": "common", "wording_sha256": "78" * 32}}},
            "the content of wording",
        ),
    ],
)
def test_unequal_data_in_one_column_is_said(make_record, first, second, note):
    records = [make_record(method="clip", **first), make_record(method="sc-clip", **second)]
    (section,) = table(records).sections
    assert [text for text in section.notes if note in text and text.startswith("voc21: rows differ in")]


def test_every_figure_reads_its_own_value(make_record):
    (section,) = table([make_record(intersect=(30, 10))], columns=list(FIGURES)).sections
    values = dict(zip((column.figure for column in section.columns), _values(section).popitem()[1], strict=True))
    # sky: 30 of 60 labelled, 60 predicted; road: 10 of 40 labelled, 40 predicted
    assert values.pop("miou") == pytest.approx(100 * (30 / 90 + 10 / 70) / 2)
    assert values.pop("macc") == pytest.approx(100 * (30 / 60 + 10 / 40) / 2)
    assert values.pop("aacc") == pytest.approx(40.0)
    assert values == {
        "pq": None, "sq": None, "rq": None,
        "latency": 11.0, "images_per_s": 80.0, "gmacs": 70.0, "gflops": 140.0,
        "forward_gmacs": 17.5, "params": 149.6, "memory": 900.0,
    }  # fmt: skip


def test_an_unknown_column_names_the_nearest():
    with pytest.raises(UsageError, match=r"Unknown column 'mio'\. Did you mean: miou"):
        table([], columns=["mio"])


def test_output_does_not_depend_on_the_order_of_records(make_record):
    records = [
        make_record(method=method, dataset=dataset, spec={"weights": weights})
        for method in ("clip", "sc-clip")
        for dataset in ("voc21", "ade20k")
        for weights in ("openai", "random")
    ]
    for write in (render.to_markdown, render.to_csv, lambda arranged: json.dumps(render.to_data(arranged))):
        assert write(table(records)) == write(table(records[::-1]))


def test_markdown(make_record):
    records = [make_record(method="clip", intersect=(30, 10)), make_record(method="sc-clip", dataset="ade20k")]
    text = render.to_markdown(table(records, columns=["miou", "memory"]))
    assert text.splitlines()[:6] == [
        "**Results**",
        "",
        "| method | protocol | weights | ade20k mIoU (%) | ade20k peak memory (MiB) "
        "| voc21 mIoU (%) | voc21 peak memory (MiB) | mean mIoU (%) |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| clip | sclip | openai | – | – | 23.81 | 900 | – |",
        "| sc-clip | sc-clip | openai | 37.78 | 900 | – | – | – |",
    ]


def test_csv_and_json_are_unrounded(make_record):
    record = make_record(intersect=(30, 10))
    value = record.metrics.miou
    (row,) = csv.DictReader(io.StringIO(render.to_csv(table([record]))))
    assert float(row["value"]) == value and len(row["value"]) > 10
    assert (row["section"], row["method"], row["dataset"], row["unit"], row["run_id"]) == (
        "results", "sc-clip", "voc21", "%", record.run_id,
    )  # fmt: skip
    cell = render.to_data(table([record]))["sections"][0]["rows"][0]["cells"][0]
    expected = {"dataset": "voc21", "figure": "miou", "unit": "%", "value": value, "run_id": record.run_id}
    assert {key: cell[key] for key in expected} == expected


def test_names_with_brackets_are_no_markup(make_record):
    from rich.console import Console

    (section,) = table([make_record(spec={"weights": "[red]x.pt"})]).sections
    console = Console(file=io.StringIO(), width=120)
    console.print(*render.to_rich(section))
    assert "[red]x.pt" in console.file.getvalue()


def test_the_printed_number_stands_beside_a_run_under_the_papers_settings(make_record):
    record = make_record(spec={"arch": "ViT-B-16-quickgelu"})
    (section,) = table([record]).sections
    (cell,) = section.rows[0].cells
    assert cell.published == "64.6" and cell.difference == record.metrics.miou - 64.6
    assert "| 37.78 | 64.6 | −26.82 |" in render.to_markdown(table([record]))
    assert any("as printed" in note for note in section.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"arch": "ViT-B-32"}},
        {"spec": {"arch": "ViT-B-16", "weights": "laion2b"}},
        {"spec": {"arch": "ViT-B-16", "protocol": "common"}},
        {"spec": {"arch": "ViT-B-16", "protocol": {"name": "sc-clip", "prob_thd": 0.7}}},
        {"spec": {"arch": "ViT-B-16", "method_options": {"beta": 0.5}}},
        {"spec": {"arch": "ViT-B-16", "weights": "random"}},
        {"spec": {"arch": "ViT-B-16"}, "partial": True, "reason": "limited"},
        {"spec": {"arch": "ViT-B-16"}, "dataset": "made-up"},
    ],
)
def test_no_printed_number_beside_anything_else(make_record, change):
    sections = table([make_record(**change)]).sections
    assert [cell.published for section in sections for row in section.rows for cell in row.cells] == [None]


def test_explain_names_older_and_failed_runs(make_record):
    older, newer = make_record(), make_record()
    failed = make_record(status="failed", reason="out of memory")
    assert render.explain(table([failed, older, newer])) == [
        "sc-clip, sc-clip, openai | voc21 mIoU (%)",
        f"    shown    {newer.run_id}",
        f"    older    {older.run_id}",
        f"    refused  {failed.run_id}: failed: out of memory",
    ]


def test_a_mean_names_its_members(make_record):
    records = [make_record(dataset=dataset) for dataset in ("voc21", "ade20k")]
    (section,) = table(records, datasets=["voc21", "ade20k"]).sections
    assert section.rows[0].cells[-1].sources == tuple(record.run_id for record in records)


def test_random_weights_of_a_second_network_count_as_random(make_record):
    record = make_record(method="proxyclip", spec={"method_options": {"attention_weights": "random"}})
    assert [section.kind for section in table([record]).sections] == ["random-weights"]
