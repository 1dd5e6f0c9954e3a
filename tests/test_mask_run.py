"""Mask-based methods through the command's own path: records with PQ, oracles, cached proposals, mmseg's loop, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ovbench
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import UsageError
from ovbench.results.record import RunRecord

SIZES = {"short_side": 64, "long_side": 96, "templates": "plain"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("panoptic")
    return synth("ade20k_panoptic", out, images=4, train_images=6, size=(64, 96), seed=5)


def run(data: Path, results: Path, method: str = "fisa", dataset: str = "ade20k_panoptic", **fields: Any) -> RunRecord:
    options = fields.pop("options", {"generator": "noisy-oracle"})
    name = "fisa" if method in ("fisa", "maskclip-ding") else "fc-clip"
    where = {key: fields.pop(key) for key in ("cache_masks", "batch") if key in fields}
    spec = {
        "method": method, "dataset": dataset, "weights": "builtin", "method_options": options,
        "protocol": {"name": name, **SIZES, **({"square": 64} if name == "fisa" else {})}, **fields,
    }  # fmt: skip
    return ovbench.run(spec, data_root=data, results=results, workers=0, gallery=0, **where)


def test_oracle_masks_with_oracle_classes_are_the_truth(data, tmp_path):
    record = run(data, tmp_path, "maskclip-ding", options={"generator": "oracle", "classifier": "oracle"})
    assert record.metrics.panoptic.pq == 100.0 and record.metrics.panoptic.rq == 100.0
    assert record.metrics.miou > 99.0  # crowds are no segments, so their pixels have a class but no mask
    assert record.partial and "oracle" in record.reason  # no result: it stays out of tables
    assert record.spec.method_options["generator"] == "oracle" and record.spec.method_options["generator_identity"]


@pytest.mark.parametrize("method", ["fisa", "scn"])
def test_a_record_has_both_metrics_and_does_not_depend_on_the_batch(method, data, tmp_path):
    one, two = (run(data, tmp_path, method, batch=size, window_batch=2) for size in (1, 3))
    assert one.metrics.panoptic.pq is not None and one.metrics.panoptic == two.metrics.panoptic
    assert one.metrics.classes == two.metrics.classes and one.spec_hash == two.spec_hash
    assert set(one.efficiency.stages_ms) >= {"generator", "classify", "decide"}
    assert "100 masks" in one.efficiency.input and one.efficiency.gmacs > 0


def test_cached_proposals_change_no_number(data, tmp_path, monkeypatch):
    monkeypatch.setenv("OVBENCH_CACHE", str(tmp_path / "cache"))
    plain = run(data, tmp_path / "runs")
    first, second = (run(data, tmp_path / "runs", cache_masks=0.1) for _ in range(2))
    assert plain.metrics == first.metrics == second.metrics and plain.spec_hash == second.spec_hash
    assert len(list((tmp_path / "cache" / "proposals").rglob("*.safetensors"))) == 4
    with pytest.raises(UsageError, match="cache-masks"):
        ovbench.run(
            {"method": "clip", "dataset": "ade20k_panoptic", "weights": "builtin"},
            data_root=data, results=tmp_path / "runs", cache_masks=1.0,
        )  # fmt: skip


def test_mmsegs_own_loop_gives_the_same_miou(tmp_path):
    from mmengine.config import Config
    from mmengine.runner import Runner

    root = synth("voc20", tmp_path / "voc20", images=3, size=(64, 96))
    record = run(root, tmp_path / "runs", "fisa", "voc20", options={"generator": "grid"})
    assert not record.partial
    command = [
        "run", "-m", "fisa", "-d", "voc20", "--data-root", str(root), "--weights", "builtin", "-o", "generator=grid",
        "--device", "cpu", "--short-side", "64", "--long-side", "96", "--templates", "plain", "--square", "64",
        "--dump-config", str(tmp_path / "run.py"),
    ]  # fmt: skip
    assert run_command(command) == 0
    config = Config.fromfile(str(tmp_path / "run.py"))
    config.work_dir = str(tmp_path / "work")
    metrics = Runner.from_cfg(config).test()
    assert metrics["mIoU"] == pytest.approx(record.metrics.miou, abs=0.006)


def test_trained_and_evaluated_by_the_command(data, tmp_path, capsys):
    command = [
        "train", "-m", "fisa", "-d", "ade20k_panoptic", "--data-root", str(data), "--weights", "builtin", "--device", "cpu",
        "-o", "generator=noisy-oracle", "-o", "training_side=64", "--trainings", str(tmp_path / "trainings"), "--workers", "0",
        "--set", "iters=2", "--set", "batch=2", "--set", "crop=64", "--set", "resize=96,64", "--no-eval", "--json",
    ]  # fmt: skip
    assert run_command(command) == 0
    record = json.loads(capsys.readouterr().out)
    parts = {part["part"]: part["trainable"] for part in record["parts"]}
    assert parts["clip.queries"] == 12 * (128 * 128 + 128) and parts["frozen"] == 0 and parts["seve"] > 0
    assert {"loss_class", "loss_dice", "loss_bce"} <= set(record["final_losses"])
    weights = next((tmp_path / "trainings").rglob("model.safetensors"))
    found = run(data, tmp_path / "runs", weights=str(weights), options={})
    assert found.spec.method_options["trained_on"] == "ade20k_panoptic" and found.metrics.panoptic.pq is not None
    assert found.spec.method_options["generator"] == "noisy-oracle"
