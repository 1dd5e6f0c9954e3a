from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from ovbench.errors import DataError
from ovbench.results import record as module
from ovbench.results.record import (
    Efficiency,
    Environment,
    Latency,
    RunRecord,
    metrics_from_areas,
    migrate,
    new_run_id,
    schema,
)


def test_metrics_follow_from_areas_by_hand():
    # Three classes, of which "sea" is in neither label nor prediction and "sun" only in the prediction.
    metrics = metrics_from_areas(
        ["sky", "road", "sea", "sun"], [30, 10, 0, 0], [50, 40, 0, 10], [40, 20, 0, 10], [40, 30, 0, 0], images=2
    )
    assert [score.iou for score in metrics.classes] == [60.0, 25.0, None, 0.0]
    assert [score.acc for score in metrics.classes] == [75.0, 100 / 3, None, None]
    assert metrics.miou == pytest.approx((60 + 25 + 0) / 3, abs=0)
    assert metrics.macc == pytest.approx((75 + 100 / 3) / 2, abs=1e-12)
    assert metrics.aacc == 100 * 40 / 70
    assert metrics.absent_classes == ("sea",)


def test_metrics_agree_with_mmseg_where_it_rounds(run_python):
    """The same areas through mmseg's own function, which averages with nan for absent classes."""
    code = """
from ovbench.mm.compat import prepare
prepare()
import json, torch
from mmseg.evaluation import IoUMetric
areas = [[30, 10, 0, 0], [50, 40, 0, 10], [40, 20, 0, 10], [40, 30, 0, 0]]
found = IoUMetric.total_area_to_metrics(*[torch.tensor(a, dtype=torch.float64) for a in areas])
print(json.dumps({k: (v.tolist() if v.ndim else float(v)) for k, v in found.items()}))
"""
    done = run_python("-c", code)
    theirs = json.loads(done.stdout.strip().splitlines()[-1].replace("NaN", "null"))
    ours = metrics_from_areas(list("abcd"), [30, 10, 0, 0], [50, 40, 0, 10], [40, 20, 0, 10], [40, 30, 0, 0], images=2)
    assert [score.iou / 100 if score.iou is not None else None for score in ours.classes] == theirs["IoU"]
    assert [score.acc / 100 if score.acc is not None else None for score in ours.classes] == pytest.approx(
        theirs["Acc"]
    )
    assert ours.aacc / 100 == pytest.approx(theirs["aAcc"], abs=1e-15)


def test_metrics_take_integer_arrays_beyond_32_bits():
    import numpy as np

    big = 3_000_000_000
    areas = np.array([big], dtype=np.int64)
    metrics = metrics_from_areas(["sky"], areas, areas, areas, areas, images=1)
    assert metrics.classes[0].union == big and metrics.miou == 100.0


def test_metrics_of_nothing_are_null():
    metrics = metrics_from_areas(["sky"], [0], [0], [0], [0], images=0)
    assert (metrics.miou, metrics.macc, metrics.aacc) == (None, None, None)
    assert metrics.absent_classes == ("sky",)


@pytest.mark.parametrize(
    "areas",
    [([5], [6], [4], [8]), ([4], [7], [4], [8]), ([-1], [3], [1], [1]), ([1, 1], [1], [1], [1])],
    ids=["more than predicted", "wrong union", "negative", "two for one class"],
)
def test_contradictory_areas_are_refused(areas):
    with pytest.raises(ValueError, match=r"areas|Areas"):
        metrics_from_areas(["sky"], *areas, images=1)


def test_a_record_survives_json_and_gives_the_same_bytes(make_record):
    record = make_record(metrics=metrics_from_areas(["ca\u00f1on"], [7], [13], [9], [11], images=1))
    text = record.to_json()
    again = RunRecord.model_validate_json(text)
    assert again == record
    assert again.to_json() == text
    assert json.loads(text)["metrics"]["miou"] == 100 * 7 / 13  # unrounded through the text
    assert again.spec.spec_hash() == record.spec_hash
    samples = [line for line in text.splitlines() if '"samples"' in line]
    assert len(samples) == 2 and all(line.strip().startswith('{"median"') or "[" in line for line in samples)


def test_keys_that_others_rely_on(make_record):
    data = json.loads(make_record().to_json())
    assert list(data) == [
        "schema_version", "run_id", "spec", "spec_hash", "metrics", "efficiency", "environment", "provenance", "status",
        "partial", "demo", "reason", "failures", "constants",
    ]  # fmt: skip
    assert {"method", "dataset", "protocol", "arch", "weights", "dtype", "device", "mode"} <= set(data["spec"])
    assert {"miou", "macc", "aacc", "classes"} <= set(data["metrics"])
    assert {"name", "intersect", "union", "pred", "label", "iou"} <= set(data["metrics"]["classes"][0])
    assert {
        "params_m", "gmacs", "gflops", "input", "tool", "latency_ms", "stages_ms", "images_per_s", "peak_memory_mib",
    } <= set(data["efficiency"])  # fmt: skip
    assert {"median", "iqr", "p95", "n", "samples"} == set(data["efficiency"]["latency_ms"])
    assert {
        "git_commit", "git_dirty", "weights_sha256", "dataset_fingerprint", "command", "started", "finished",
        "package_versions",
    } <= set(data["provenance"])  # fmt: skip


@pytest.mark.parametrize("where", ["", "metrics", "efficiency", "environment", "provenance", "spec"])
def test_unknown_fields_are_refused(make_record, where):
    data = json.loads(make_record().to_json())
    (data[where] if where else data)["extra"] = 1
    with pytest.raises(ValidationError, match=r"extra\n"):
        RunRecord.model_validate(data)


def test_a_null_figure_needs_a_reason():
    reasons = {name: "not measured" for name in Efficiency.model_fields if name.endswith("_reason")}
    assert Efficiency(**reasons).gmacs is None
    with pytest.raises(ValidationError, match=r"\bgmacs is null: give gmacs_reason"):
        Efficiency(**{key: value for key, value in reasons.items() if key != "gmacs_reason"})
    with pytest.raises(ValidationError, match=r"\bgmacs has a value: gmacs_reason must be null"):
        Efficiency(gmacs=1.0, **reasons)


def test_nan_is_no_figure(make_record):
    with pytest.raises(ValidationError, match="finite"):
        Latency(median=float("nan"), iqr=0, p95=0, n=1, samples=(1.0,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "failed"}, "reason is needed"),
        ({"partial": True}, "reason is needed"),
        ({"metrics": None}, "status is ok but metrics is null"),
        ({"demo": True}, "demo is True but spec.demo is False"),
        ({"run_id": "../../etc"}, "run_id"),
        ({"run_id": ".hidden"}, "run_id"),
        ({"spec_hash": "123"}, "spec_hash"),
    ],
)
def test_a_record_cannot_contradict_itself(make_record, fields, message):
    with pytest.raises(ValidationError, match=message):
        make_record(**fields)


def test_run_ids_are_in_utc_and_differ():
    started = datetime(2026, 1, 2, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    ids = {new_run_id("f" * 64, started) for _ in range(50)}
    assert len(ids) > 45
    assert all(run_id.startswith("20260101T230000Z-ffffffff-") for run_id in ids)


@pytest.mark.parametrize("version", [None, "1", True, 0, 1.0])
def test_a_schema_version_that_is_none_is_refused(version):
    with pytest.raises(DataError, match="schema_version must be an integer"):
        migrate({"schema_version": version})


def test_a_newer_schema_version_asks_for_a_newer_ovbench():
    with pytest.raises(DataError, match=r"schema version 99.*Install a newer ovbench"):
        migrate({"schema_version": 99})


def test_old_versions_pass_through_every_step(monkeypatch):
    monkeypatch.setattr(module, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(
        module,
        "_MIGRATIONS",
        {1: lambda data: {**data, "two": True}, 2: lambda data: {**data, "three": data["two"]}},
    )
    old = {"schema_version": 1}
    assert migrate(old) == {"schema_version": 3, "two": True, "three": True}
    assert old == {"schema_version": 1}


@pytest.mark.parametrize(
    ("told", "forwards", "reason"),
    [
        ("1x3x224x224, one forward; the first image takes 6", 6, None),
        ("1x3x224x224, one forward; the first image takes 1", 1, None),
        ("1x3x896x896, one forward with 100 masks, the generator left out; the first image takes 1", 1, None),
        ("1x3x336x448, one whole image: networks, solver and upsampling", 1, None),
        ("1x3x512x683, one forward; the first image takes 1 at scale 1; it has 1 views", 1, None),
        ("1x3x512x683, one forward; the first image takes 1 at scale 1; it has 12 views", None, "several sizes"),
        ("1x3x336x448", None, "not recorded how many forwards"),
        (None, None, "not recorded how many forwards"),
    ],
)
def test_records_of_before_get_the_number_of_forwards_that_they_tell_in_words(make_record, told, forwards, reason):
    old = json.loads(make_record().to_json())
    old["schema_version"] = 1
    old["efficiency"]["input"] = told
    for name in ("forwards", "image_gmacs", "image_gmacs_reason"):
        del old["efficiency"][name]
    found = RunRecord.model_validate_json(json.dumps(migrate(old)))
    cost = found.efficiency
    assert cost.forwards == forwards and (cost.gmacs, cost.gflops, cost.input) == (17.5, 35.0, told)
    assert cost.image_gmacs == (None if forwards is None else 17.5 * forwards)
    assert (reason is None) == (cost.image_gmacs_reason is None) and (reason or "") in (cost.image_gmacs_reason or "")
    # nothing else is touched
    new = json.loads(found.to_json())
    assert {**new, "efficiency": None} == {**old, "schema_version": 2, "efficiency": None}
    assert old["efficiency"].items() <= new["efficiency"].items()


def test_a_record_of_before_without_cost_or_operations_is_read_as_well(make_record):
    old = json.loads(make_record().to_json()) | {"schema_version": 1, "efficiency": None}
    assert RunRecord.model_validate_json(json.dumps(migrate(old))).efficiency is None
    old["efficiency"] = {name: "not measured" for name in Efficiency.model_fields if name.endswith("_reason")}
    del old["efficiency"]["image_gmacs_reason"]
    assert RunRecord.model_validate_json(json.dumps(migrate(old))).efficiency.image_gmacs_reason == "not measured"


def test_there_is_a_migration_from_every_old_version():
    assert sorted(module._MIGRATIONS) == list(range(1, module.SCHEMA_VERSION))
    assert RunRecord.model_fields["schema_version"].default == module.SCHEMA_VERSION


def test_every_figure_in_the_schema_says_its_unit():
    definitions = schema()["$defs"]
    for model in ("Metrics", "ClassScore", "Latency", "Efficiency", "Environment", "Provenance"):
        for name, entry in definitions[model]["properties"].items():
            if not name.endswith("_reason") and name != "precision":
                assert entry.get("description"), f"{model}.{name}"


def test_the_environment_of_this_machine_fits_the_record():
    from ovbench.measure.environment import environment

    assert Environment(**environment("cpu")).device == "cpu"
