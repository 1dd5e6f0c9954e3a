"""Runs from a spec to a record on generated data in the true layouts, with a tiny random CLIP."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from tiny_clip import save_tiny

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.synth.copies import synth
from ovbench.errors import DataError, Interrupted, RunError, UsageError
from ovbench.evaluate.shards import Shard
from ovbench.results import store
from ovbench.results.record import RunRecord, metrics_from_areas

IMAGES = 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("voc21", tmp_path_factory.mktemp("voc"), images=IMAGES)


def spec(weights: str, **fields: Any) -> dict[str, Any]:
    protocol = {
        "name": "common",
        "templates": "plain",
        "short_side": 128,
        "crop": 96,
        "stride": 64,
        **fields.pop("protocol", {}),
    }
    return {"method": "clip", "dataset": "voc21", "weights": weights, "window_batch": 4, "protocol": protocol, **fields}


def areas_of(record: RunRecord) -> list[tuple[int, ...]]:
    assert record.metrics is not None
    return [(c.intersect, c.union, c.pred, c.label) for c in record.metrics.classes]


@pytest.fixture(scope="module")
def plain(weights: str, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    results = tmp_path_factory.mktemp("results")
    return ovbench.run(spec(weights), data_root=voc, results=results, save_predictions=True, workers=0), results


def test_a_run_in_low_precision_counts_operations(
    plain: tuple[RunRecord, Path], weights: str, voc: Path, tmp_path: Path
) -> None:
    """They are counted behind the evaluation, where a fault would cost the whole run."""
    low = ovbench.run(spec(weights, dtype="bfloat16", limit=1), data_root=voc, results=tmp_path, gallery=0, workers=0)
    before, after = plain[0].efficiency, low.efficiency
    assert before is not None and after is not None and after.gmacs == before.gmacs


def test_a_file_of_areas_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = {"run_id": "r", "spec_hash": "a", "dataset_fingerprint": "b", "started": "c"}
    first = Shard(tmp_path / "r.areas.jsonl", header, 2)
    monkeypatch.setattr("ovbench.evaluate.shards.PATIENCE_S", 0.0)
    with pytest.raises(RunError, match="Another process is evaluating"):
        Shard(tmp_path / "r.areas.jsonl", header, 2)
    first.close()
    Shard(tmp_path / "r.areas.jsonl", header, 2).close()


def test_record_and_files(plain: tuple[RunRecord, Path], voc: Path) -> None:
    record, results = plain
    path = store.record_path(record, results)
    assert store.read(path) == record
    assert record.status == "ok" and not record.partial and record.reason is None
    assert record.demo  # generated scenes, whatever the weights
    benchmark = benchmarks.get("voc21")
    pairs = benchmark.pairs(voc)
    folder = path.with_suffix("")
    total = np.zeros((4, 21), dtype=np.int64)
    for pair in pairs:  # the stored PNGs and the label files must give the record's areas
        pred = np.array(Image.open(folder / "predictions" / f"{pair.stem}.png"))
        label = benchmark.load_label(pair.label)
        valid = label != 255
        for c in range(21):
            p, t = (pred == c) & valid, label == c
            total[:, c] += (p & t).sum(), (p | t).sum(), p.sum(), t.sum()
    assert areas_of(record) == [tuple(int(v) for v in total[:, c]) for c in range(21)]
    ious = [100 * total[0, c] / total[1, c] for c in range(21) if total[1, c]]
    assert record.metrics is not None and record.metrics.miou == pytest.approx(sum(ious) / len(ious), abs=1e-12)
    assert Image.open(folder / "gallery.png").width == 900

    cost = record.efficiency
    assert cost is not None and cost.latency_ms is not None
    assert cost.latency_ms.n == IMAGES
    assert set(cost.stages_ms) == {"prepare", "backbone", "decide"}
    assert cost.gflops == pytest.approx(2 * cost.gmacs)
    assert cost.input == "1x3x96x96, one forward; the first image takes 6"
    assert (cost.forwards, cost.image_gmacs) == (6, 6 * cost.gmacs)
    assert record.provenance.dataset_fingerprint == benchmark.fingerprint(voc)
    assert record.spec.weights == "tiny.safetensors" and record.spec.activation == "quickgelu"
    assert record.spec.protocol.wording_sha256 == benchmark.words_sha256("sclip")


@pytest.mark.parametrize("workers", [0, 1])
def test_image_batches_give_the_same_areas(
    plain: tuple[RunRecord, Path], weights: str, voc: Path, tmp_path: Path, workers: int
) -> None:
    """Portrait and landscape images in one batch, at a fixed window batch: equal to the pixel."""
    record = ovbench.run(spec(weights), data_root=voc, results=tmp_path, batch=4, workers=workers, gallery=0)
    assert areas_of(record) == areas_of(plain[0])
    assert record.spec_hash == plain[0].spec_hash


def test_whole_non_square_images(weights: str, voc: Path, tmp_path: Path) -> None:
    fields = spec(weights, protocol={"mode": "whole", "short_side": 100})
    one, two = (ovbench.run(fields, data_root=voc, results=tmp_path, batch=batch, workers=0) for batch in (1, 3))
    assert one.spec.mode == "whole"
    assert areas_of(one) == areas_of(two)
    assert one.efficiency is not None and one.efficiency.input is not None
    sides = {int(side) for side in one.efficiency.input.split(",")[0].split("x")[2:]}
    assert len(sides) == 2 and min(sides) == 112  # 100 padded to whole patches, 133 to 144


@pytest.mark.parametrize("dataset", ["ade20k", "coco_object", "mapillary"])
def test_dumped_config_in_plain_mmseg(
    dataset: str, weights: str, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """mmseg's own TestLoop and IoUMetric reach the same mIoU, before rounding; once where nothing else is loaded."""
    from ovbench.evaluate import RunOptions
    from ovbench.evaluate.config import dump_config
    from ovbench.spec import RunSpec

    root = synth(dataset, tmp_path / "data", images=3)
    threshold = 0.0 if benchmarks.get(dataset).background is None else 0.02
    fields = spec(weights, dataset=dataset, method="sc-clip", protocol={"prob_thd": threshold})
    record = ovbench.run(fields, data_root=root, results=tmp_path / "results", workers=0, gallery=0)
    dump_config(RunSpec(**fields), RunOptions(data_root=root), tmp_path / "config.py")
    code = f"""
from mmengine.config import Config
from mmengine.runner import Runner
config = Config.fromfile({str(tmp_path / "config.py")!r})
config.work_dir = {str(tmp_path / "work")!r}
config.device = "cpu"
from mmseg.evaluation import IoUMetric
areas = []
compute = IoUMetric.compute_metrics
def keep(self, results):
    areas.extend(zip(*results))
    return compute(self, results)
IoUMetric.compute_metrics = keep
runner = Runner.from_cfg(config)
assert type(runner.test_loop).__module__ == "mmengine.runner.loops"
runner.test()
intersect, union = sum(areas[0]), sum(areas[1])
seen = union > 0
print("RESULT", repr(float((intersect[seen] / union[seen]).double().mean() * 100)))
"""
    if dataset == "ade20k":
        done = run_python("-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="-1")
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        process = warm.Started(warm.python, code, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": "-1"})
        (out, err), status = process.communicate(timeout=300), process.returncode
    assert status == 0, err[-2000:]
    found = float(out.split("RESULT ")[1].split()[0])
    assert record.metrics is not None and found == pytest.approx(record.metrics.miou, abs=1e-6)


def test_limit_marks_the_run_partial(weights: str, voc: Path, tmp_path: Path) -> None:
    record = ovbench.run(spec(weights, limit=2), data_root=voc, results=tmp_path, workers=0, gallery=0)
    assert record.partial and "limited to the first 2 of 6 images" in str(record.reason)
    assert record.metrics is not None and record.metrics.images == 2


def test_interrupt_keeps_finished_images_and_resume_equals_one_run(
    plain: tuple[RunRecord, Path], weights: str, voc: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == IMAGES
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="--resume"):
        ovbench.run(spec(weights), data_root=voc, results=tmp_path, workers=0, on_images=interrupt)
    [stopped] = store.load_all(tmp_path)
    assert stopped.status == "interrupted" and stopped.partial
    assert stopped.metrics is not None and stopped.metrics.images == 3

    [shard] = tmp_path.rglob("*.areas.jsonl")
    with shard.open("a") as file:
        file.write('{"index":3,"name":"cut by a ki')  # a line that SIGKILL cut
    seen: list[int] = []
    record = ovbench.run(
        spec(weights),
        data_root=voc,
        results=tmp_path,
        workers=0,
        resume=True,
        on_images=lambda done, total: seen.append(done),
    )
    assert seen == [3, 4, 5, 6]
    assert record.run_id == stopped.run_id and record.status == "ok"
    assert areas_of(record) == areas_of(plain[0])
    assert [r.status for r in store.load_all(tmp_path)] == ["ok"]

    again = ovbench.run(spec(weights), data_root=voc, results=tmp_path, workers=0, resume=True, gallery=0)
    assert again.run_id != record.run_id  # nothing unfinished is left


def test_a_shard_of_another_run_is_refused(tmp_path: Path) -> None:
    header = {"spec_hash": "a", "dataset_fingerprint": "b", "run_id": "r", "started": "now"}
    Shard(tmp_path / "x.areas.jsonl", header, 3).close()
    with pytest.raises(DataError, match="belongs to another run"):
        Shard(tmp_path / "x.areas.jsonl", {**header, "spec_hash": "c"}, 3)


def test_a_cut_image_ends_the_run_with_its_name(weights: str, tmp_path: Path) -> None:
    root = synth("voc21", tmp_path / "data", images=3)
    path = benchmarks.get("voc21").pairs(root)[2].image
    path.write_bytes(path.read_bytes()[:-500])
    for workers in (0, 1):
        with pytest.raises(DataError, match=rf"^The image '.*{path.name}' is cut off .* Record of the failed run"):
            ovbench.run(spec(weights), data_root=root, results=tmp_path / "results", workers=workers, check=False)
    failed = store.load_all(tmp_path / "results")
    assert [r.status for r in failed] == ["failed", "failed"]
    assert all(r.metrics is not None and r.metrics.images == 2 and path.name in str(r.reason) for r in failed)


def test_wrong_labels_are_found_before_anything_is_computed(weights: str, tmp_path: Path) -> None:
    root = synth("voc21", tmp_path / "data", images=2)
    pair = benchmarks.get("voc21").pairs(root)[0]
    Image.open(pair.label).convert("RGB").save(pair.label)
    with pytest.raises(DataError, match="colour"):
        ovbench.run(spec(weights), data_root=root, results=tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.json*"))


def test_label_ids_out_of_range_name_file_and_ids(weights: str, tmp_path: Path) -> None:
    root = synth("voc21", tmp_path / "data", images=2)
    pair = benchmarks.get("voc21").pairs(root)[1]
    label = np.array(Image.open(pair.label))
    label[:20, :20] = 77
    Image.fromarray(label).save(pair.label)
    with pytest.raises(DataError, match=rf"{pair.label.name}.*77"):
        ovbench.run(spec(weights), data_root=root, results=tmp_path / "results", check=False, workers=0)


def test_own_words_from_a_file(weights: str, voc: Path, tmp_path: Path) -> None:
    words = benchmarks.get("voc21").words("plain")
    path = tmp_path / "words.txt"
    path.write_text("# my words\n" + "\n".join(", ".join(entry) for entry in words) + "\n")
    fields = spec(weights, limit=1, protocol={"wording": str(path)})
    record = ovbench.run(fields, data_root=voc, results=tmp_path, workers=0, gallery=0)
    assert record.spec.protocol.wording_sha256 == benchmarks.get("voc21").words_sha256("plain")
    path.write_text(path.read_text() + "unicorn\n")
    with pytest.raises(UsageError, match="has 22 classes, but voc21 has 21"):
        ovbench.run(fields, data_root=voc, results=tmp_path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="class list is empty"):
        ovbench.run(fields, data_root=voc, results=tmp_path)


def test_nan_logits_are_a_recorded_failure(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    from ovbench.methods.clip import Clip

    features = Clip.features
    calls = iter(range(100))

    def broken(self: Clip, images: torch.Tensor) -> torch.Tensor:
        out = features(self, images)
        return out * float("nan") if next(calls) >= 4 else out

    monkeypatch.setattr(Clip, "features", broken)
    with pytest.raises(RunError, match=r"NaN or infinity in the patch logits of .*\.jpg, window .*stage: backbone"):
        ovbench.run(spec(weights), data_root=voc, results=tmp_path, workers=0)
    [record] = store.load_all(tmp_path)
    assert record.status == "failed" and "NaN" in str(record.reason)


def test_disk_full_keeps_what_is_finished(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    line = Shard._line

    def full(self: Shard, content: dict[str, Any]) -> None:
        if content.get("index") == 2:
            raise OSError(28, "No space left on device")
        line(self, content)

    monkeypatch.setattr(Shard, "_line", full)
    with pytest.raises(RunError, match=r"No space left on device.*--resume"):
        ovbench.run(spec(weights), data_root=voc, results=tmp_path, workers=0)
    [record] = store.load_all(tmp_path)
    assert record.status == "failed" and record.metrics is not None and record.metrics.images == 2


def test_results_folder_that_cannot_be_written(voc: Path, tmp_path: Path, weights: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write results"):
        ovbench.run(spec(weights), data_root=voc, results=tmp_path / "file" / "runs")


def test_missing_data(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Give its folder with --data-root"):
        ovbench.run(spec(weights), results=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        ovbench.run(spec(weights), data_root=tmp_path / "nowhere", results=tmp_path)
    with pytest.raises(UsageError, match="Unknown run option dataroot"):
        ovbench.run(spec(weights), dataroot=tmp_path)


def test_metrics_are_over_the_dataset_not_the_mean_over_images() -> None:
    metrics = metrics_from_areas(["a", "b", "c"], [1, 90, 0], [10, 100, 0], [2, 95, 0], [9, 95, 0], images=2)
    assert metrics.miou == (10 + 90) / 2
    assert metrics.absent_classes == ("c",)


def test_stored_json_has_the_keys_others_rely_on(plain: tuple[RunRecord, Path]) -> None:
    data = json.loads(store.record_path(*plain).read_text())
    assert {
        "schema_version",
        "spec",
        "spec_hash",
        "metrics",
        "efficiency",
        "environment",
        "provenance",
        "status",
        "partial",
        "demo",
        "reason",
    } <= set(data)
    assert {"method", "dataset", "protocol", "arch", "weights", "dtype", "device", "mode"} <= set(data["spec"])
    assert {"miou", "macc", "aacc", "classes"} <= set(data["metrics"])
    assert {"name", "intersect", "union", "pred", "label", "iou"} <= set(data["metrics"]["classes"][0])
    assert {
        "params_m",
        "gmacs",
        "gflops",
        "input",
        "tool",
        "latency_ms",
        "stages_ms",
        "images_per_s",
        "peak_memory_mib",
    } <= set(data["efficiency"])
    assert {"median", "iqr", "n", "samples"} <= set(data["efficiency"]["latency_ms"])
    assert {
        "git_commit",
        "git_dirty",
        "weights_sha256",
        "dataset_fingerprint",
        "command",
        "started",
        "finished",
        "package_versions",
    } <= set(data["provenance"])
