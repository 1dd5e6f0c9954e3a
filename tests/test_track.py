"""Records sent to trackers and read back from where those keep them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovbench.errors import OvbenchWarning, UsageError
from ovbench.evaluate import track
from ovbench.results import store
from ovbench.results.record import metrics_from_areas


def _needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    """No tracker reports about itself to its makers while it is tested; read when they are imported."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def stored(make_record, tmp_path):
    """A record with a gallery, whose classes have names that trackers do not allow."""
    names = ("television receiver, TV", "wall-other", "a,b", "a;b")
    metrics = metrics_from_areas(names, (50, 10, 0, 7), (60, 20, 0, 9), (55, 15, 0, 8), (55, 15, 0, 8), images=3)
    record = make_record(metrics=metrics, spec={"method_options": {"beta": 0.4, "blocks": {"pre": 8, "multi": [3, 9]}}})
    path = store.write(record, tmp_path / "runs")
    path.with_suffix("").mkdir()
    pixels = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
    Image.fromarray(pixels).save(path.with_suffix("") / "gallery.png")
    return record, tmp_path / "runs"


def test_scalars_have_every_figure_and_names_that_trackers_allow(stored):
    record, _ = stored
    found = track.scalars(record)
    assert found["accuracy/mIoU"] == record.metrics.miou
    assert found["IoU/television receiver_ TV"] == pytest.approx(100 * 50 / 60)
    assert "IoU/a_b" not in found  # its union is 0
    assert found["IoU/a_b 3"] == pytest.approx(100 * 7 / 9)  # would have had the same name
    assert found["efficiency/latency_ms"] == 11.0 and found["efficiency/image_gmacs"] == 70.0
    assert found["efficiency/forward_gmacs"] == 17.5
    assert found["efficiency/params_m"] == 149.6 and found["efficiency/peak_memory_mib"] == 900.0
    assert found["efficiency/stage_ms/encode"] == 11.0
    assert all(isinstance(value, float) for value in found.values())


def test_tags_say_what_is_no_result(make_record):
    assert track.tags(make_record())["kind"] == "result"
    demo = make_record(spec={"weights": "random", "demo": True})
    assert track.tags(demo)["kind"] == "demo random-weights"


def test_missing_packages_and_unknown_names_are_said_before_a_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install mlflow\."):
        track.require(["mlflow"])
    with pytest.raises(UsageError, match=r"Unknown tracker 'tensorbord'\. Did you mean: tensorboard"):
        track.require(["tensorbord"])
    monkeypatch.undo()
    if importlib.util.find_spec("tensorboard"):
        assert track.require(["tensorboard", "tensorboard"]) == ("tensorboard",)


def test_a_tracker_that_fails_is_a_warning_and_the_record_stays(stored, monkeypatch):
    record, runs = stored

    def broken(*arguments):
        raise ConnectionError("no route to the server\nand more")

    monkeypatch.setitem(track._SENDERS, "wandb", broken)
    with pytest.warns(
        OvbenchWarning, match="stored, but wandb did not take it: ConnectionError: no route to the server$"
    ):
        assert track.send(record, "wandb", runs) is None
    assert store.load_all(runs) == [record]


@_needs("tensorboard")
def test_tensorboard_event_file_read_back(stored):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record, runs = stored
    with warnings.catch_warnings():
        warnings.simplefilter("error", OvbenchWarning)
        where = track.send(record, "tensorboard", runs)
    folder = runs.parent / "track" / "tensorboard" / "sc-clip" / "voc21" / record.run_id
    assert where is not None and where.startswith(str(folder))
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    sent = track.scalars(record)
    assert set(tags["scalars"]) == set(sent)
    for name, value in sent.items():
        assert events.Scalars(name)[0].value == pytest.approx(value, rel=1e-6)  # the format is float32
    image = events.Images("gallery")[0]
    assert (image.height, image.width) == (6, 9)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "sc-clip" in text and "short_side" in text


@_needs("mlflow")
def test_mlflow_file_store_read_back(stored, tmp_path, monkeypatch):
    from mlflow import MlflowClient, active_run

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record, runs = stored
    with warnings.catch_warnings():
        warnings.simplefilter("error", OvbenchWarning)
        where = track.send(record, "mlflow", runs)
        assert where is not None
    assert active_run() is None  # the next record must not land in this run
    client = MlflowClient(tracking_uri=(runs.parent / "track" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("ovbench")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == record.run_id and run.info.status == "FINISHED"
    assert run.data.metrics == track.scalars(record)
    assert run.data.params["protocol.short_side"] == str(record.spec.protocol.short_side)
    assert run.data.params["method_options.blocks.multi"] == "[3, 9]"
    assert "work_dir" not in run.data.params
    assert {key: run.data.tags[key] for key in track.tags(record)} == track.tags(record)
    files = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert files == {"record.json", "config.py", "gallery.png"}
    local = client.download_artifacts(run.info.run_id, "record.json", str(tmp_path))
    with open(local, encoding="utf-8") as file:
        assert json.load(file) == json.loads(record.to_json())

    track.send(record.model_copy(update={"run_id": "second"}), "mlflow", runs)
    assert len(client.search_runs([experiment.experiment_id])) == 2


@_needs("mlflow")
def test_mlflow_after_an_evaluation(stored, tmp_path, monkeypatch):
    """mmengine's Runner leaves a logger whose file is gone; its MLflow backend would try to reopen that file."""
    from mmengine.logging import MMLogger

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "gone"
    folder.mkdir()
    logger = MMLogger.get_instance(f"run-{tmp_path.name}", log_file=str(folder / "run.log"))
    for handler in logger.handlers:
        handler.close()
    shutil.rmtree(folder)
    record, runs = stored
    with warnings.catch_warnings():
        warnings.simplefilter("error", OvbenchWarning)
        assert track.send(record, "mlflow", runs) is not None


@_needs("mlflow")
def test_mlflow_that_fails_in_the_middle_leaves_no_open_run(stored, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record, runs = stored
    monkeypatch.setattr(track, "scalars", lambda record: {"mIoU": "no number"})
    with pytest.warns(OvbenchWarning, match="mlflow did not take it"):
        assert track.send(record, "mlflow", runs) is None
    assert mlflow.active_run() is None


@_needs("wandb")
def test_wandb_offline(stored, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.py").write_text("password = 1\n")
    record, runs = stored
    with warnings.catch_warnings():
        warnings.simplefilter("error", OvbenchWarning)
        where = track.send(record, "wandb", runs)
    assert where is not None and (runs.parent / "track" / "wandb") in Path(where).parents
    import wandb

    wandb.teardown()  # its service may still be writing
    [log] = (runs.parent / "track").rglob("*.wandb")
    content = log.read_bytes()
    assert b"accuracy/mIoU" in content and record.run_id.encode() in content and b"short_side" in content
    assert not list((runs.parent / "track").rglob("secret.py"))  # mmengine's backend would have taken all code along
