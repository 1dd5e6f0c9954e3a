"""Records repeated: equal ones, ones whose areas differ, and what has to be given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_clip import save_tiny
from typer.testing import CliRunner

import ovbench
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli import verify as cli
from ovbench.errors import DataError, Interrupted, RunError, UsageError, WeightsError
from ovbench.evaluate.verify import Given, Verification, options_again, spec_again, verify
from ovbench.results import image_areas, store
from ovbench.results.record import RunRecord, metrics_from_areas

IMAGES = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("voc21", tmp_path_factory.mktemp("voc"), images=IMAGES)


@pytest.fixture(scope="module")
def made(weights: Path, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    results = tmp_path_factory.mktemp("results")
    protocol = {"name": "common", "templates": "plain", "short_side": 112, "crop": 96, "stride": 64}
    spec = {
        "method": "sc-clip", "method_options": {"beta": 0.3}, "dataset": "voc21", "weights": str(weights),
        "window_batch": 4, "protocol": protocol,
    }  # fmt: skip
    record = ovbench.run(spec, data_root=voc, results=results, workers=0, gallery=0)
    object.__setattr__(record, "_path", store.record_path(record, results))
    return record


@pytest.fixture
def stored(made: RunRecord, tmp_path: Path) -> tuple[RunRecord, Path]:
    """The record in a folder of the test's own, where it may be changed."""
    source: Path = made._path  # type: ignore[attr-defined]
    path = store.write(made, tmp_path / "runs")
    image_areas.path_beside(path).write_bytes(image_areas.path_beside(source).read_bytes())
    return made, path


def moved(record: RunRecord, path: Path, pixels: int) -> RunRecord:
    """The record as if so many pixels of its second image had been predicted as another class, areas beside it too."""
    beside = image_areas.path_beside(path)
    lines = [json.loads(line) for line in beside.read_text().splitlines()]
    entry = lines[2]
    wrong = [pred - inter for pred, inter in zip(entry["pred"], entry["intersect"], strict=True)]
    source = max(range(len(wrong)), key=wrong.__getitem__)
    target = (
        next(i for i, label in enumerate(entry["label"]) if label == 0 and i != source) if 0 in entry["label"] else -1
    )
    assert wrong[source] >= pixels and target >= 0
    entry["pred"][source] -= pixels
    entry["pred"][target] += pixels
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record.metrics is not None
    classes = list(record.metrics.classes)
    pred = [score.pred for score in classes]
    pred[entry["classes"][source]] -= pixels
    pred[entry["classes"][target]] += pixels
    inter, label = [score.intersect for score in classes], [score.label for score in classes]
    union = [p + q - i for p, q, i in zip(pred, label, inter, strict=True)]
    metrics = metrics_from_areas([s.name for s in classes], inter, union, pred, label, images=record.metrics.images)
    changed = record.model_copy(update={"metrics": metrics})
    store.write(changed, path.parents[2])
    return changed


def given(voc: Path, weights: Path, **fields: Any) -> Given:
    return Given(data_root=voc, weights=weights, workers=0, **fields)


def run_cli(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(cli.verify)
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_same_run_is_equal_and_nothing_is_stored(stored: tuple[RunRecord, Path], voc: Path, weights: Path) -> None:
    _, path = stored
    before = sorted(path.parents[2].rglob("*"))
    code, out = run_cli(str(path), "--data-root", str(voc), "--weights", str(weights), "--workers", "0")
    assert code == 0
    assert out.startswith(f"EQUAL: {IMAGES} images, the areas of all classes in every image are the recorded ones.")
    assert "The same as recorded: IoU of classes, spec, data, machine, packages" in out
    assert sorted(path.parents[2].rglob("*")) == before


def test_pixels_that_moved_are_counted_and_their_image_is_named(
    stored: tuple[RunRecord, Path], voc: Path, weights: Path
) -> None:
    record, path = stored
    changed = moved(record, path, 37)
    found = verify(changed, path, given(voc, weights))
    assert not found.equal and found.per_image and not found.label_differs
    assert found.pixels == 37
    [image] = found.differing
    assert image.pixels == 37 and image.labelled > 0
    assert changed.metrics is not None and record.metrics is not None
    assert found.miou == (changed.metrics.miou, record.metrics.miou)
    assert found.difference == record.metrics.miou - changed.metrics.miou  # type: ignore[operator]
    pairs = zip(changed.metrics.classes, record.metrics.classes, strict=True)
    assert found.classes == {one.name: (one.iou, two.iou) for one, two in pairs if one.iou != two.iou} != {}

    code, out = run_cli(str(path), "--data-root", str(voc), "--weights", str(weights), "--workers", "0")
    assert code == cli.DIFFERENT == 6
    assert "At least 37 of" in out and image.name in out

    # the first image alone is as recorded
    code, out = run_cli(
        str(path), "--data-root", str(voc), "--weights", str(weights), "--workers", "0", "--limit", "1", "--json"
    )
    data = json.loads(out)
    assert code == 0 and data["equal"] and (data["images"], data["of"]) == (1, IMAGES)


def test_without_areas_beside_it_the_sums_are_compared(
    stored: tuple[RunRecord, Path], voc: Path, weights: Path
) -> None:
    record, path = stored
    changed = moved(record, path, 5)
    image_areas.path_beside(path).unlink()
    said: list[str] = []
    found = verify(changed, path, given(voc, weights), on_message=said.append)
    assert (found.per_image, found.pixels, found.differing) == (False, 5, ())
    assert not found.equal and "only the sums" in said[0]
    with pytest.raises(DataError, match="leave --limit away"):
        verify(changed, path, given(voc, weights, images=1))


def test_fields_that_differ_are_named_and_alone_make_no_difference(
    stored: tuple[RunRecord, Path], voc: Path, weights: Path
) -> None:
    record, path = stored
    older = record.model_copy(
        update={
            "environment": record.environment.model_copy(update={"torch": "1.0", "cpu": "another"}),
            "provenance": record.provenance.model_copy(
                update={
                    "package_versions": {**record.provenance.package_versions, "mmengine": "0.1"},
                    "git_commit": "a" * 40,
                }
            ),
        }
    )
    found = verify(older, path, given(voc, weights, images=1))
    assert found.equal
    assert set(found.environment) == {"torch", "cpu"} and found.environment["torch"][0] == "1.0"
    assert found.packages["mmengine"][0] == "0.1" and set(found.packages) == {"mmengine"}
    assert found.code["git commit"][0] == "a" * 40
    assert found.spec == {} and found.data == {}
    assert json.loads(json.dumps(found.to_data()))["environment"]["torch"][0] == "1.0"


def test_weights_from_a_file_are_asked_for_and_their_hash_is_checked(
    stored: tuple[RunRecord, Path], voc: Path, tmp_path: Path
) -> None:
    record, path = stored
    with pytest.raises(UsageError, match=r"weights file 'tiny.safetensors'.*add --weights FILE"):
        verify(record, path, Given(data_root=voc))
    other = save_tiny(tmp_path / "tiny.safetensors", seed=1)
    with pytest.raises(WeightsError, match="is not what the run used"):
        verify(record, path, given(voc, other))


def test_other_images_are_refused(stored: tuple[RunRecord, Path], weights: Path, tmp_path: Path) -> None:
    record, path = stored
    beside = image_areas.path_beside(path)
    lines = [json.loads(line) for line in beside.read_text().splitlines()]
    lines[2]["name"] = "another.jpg"
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = synth("voc21", tmp_path / "data", images=IMAGES)
    with pytest.raises(DataError, match=r"images are not those of the record: .*'another.jpg'"):
        verify(record, path, given(root, weights))


def test_an_interrupt_and_a_failure_do_not_speak_of_a_record(
    stored: tuple[RunRecord, Path], weights: Path, voc: Path
) -> None:
    record, path = stored

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^Interrupted: nothing is verified\.$"):
        verify(record, path, given(voc, weights), on_images=stop)

    def break_off(done: int, total: int) -> None:
        raise ValueError("broken")

    with pytest.raises(RunError, match="Cannot repeat the run: ValueError: broken") as caught:
        verify(record, path, given(voc, weights), on_images=break_off)
    assert "Record of the failed run" not in str(caught.value)


def test_what_only_files_hold_is_asked_for(make_record: Callable[..., RunRecord]) -> None:
    own = make_record(method="mine:Mine", spec={"method_options": {"source_sha256": "ab"}, "protocol": "common"})
    with pytest.raises(UsageError, match="add --method FILE"):
        spec_again(own, Given())
    own = make_record(dataset="streets", spec={"protocol": "common"})
    with pytest.raises(UsageError, match="'streets' is a benchmark of your own: add --dataset"):
        spec_again(own, Given())
    empty = make_record(metrics=None, efficiency=None, status="failed", partial=True, reason="no memory")
    with pytest.raises(UsageError, match="no finished image"):
        verify(empty, Path("run.json"))


def test_a_run_that_ended_early_is_repeated_as_far_as_it_came(make_record: Callable[..., RunRecord]) -> None:
    whole = make_record(images=50)
    assert spec_again(whole, Given()).limit is None
    assert spec_again(whole, Given(images=80)).limit == 50
    assert spec_again(make_record(images=7, status="interrupted", partial=True, reason="x"), Given()).limit == 7
    assert spec_again(make_record(spec={"limit": 5}, partial=True, reason="x"), Given()).limit == 5


def test_options_of_a_record_make_the_same_method() -> None:
    """Records hold what a method found out besides its options; that must not be given back to it."""
    from ovbench.registry import method_class

    proxy = method_class("proxyclip")
    recorded = {
        "attention": "dinov2-b14", "attention_weights": "timm/some-repository", "attention_weights_sha256": "ab",
        "attention_random": False, "attention_patch": 14, "beta": 1.5,
    }  # fmt: skip
    assert options_again(recorded, proxy, {}) == {"attention": "dinov2-b14", "beta": 1.5}
    random = options_again({**recorded, "attention_weights": "random"}, proxy, {})
    assert random["attention_weights"] == "random"
    with pytest.raises(UsageError, match=r"used 'dino\.pth' for attention_weights.*--option attention_weights=FILE"):
        options_again({**recorded, "attention_weights": "dino.pth"}, proxy, {})
    file = {"attention_weights": "/data/dino.pth"}
    assert (
        options_again({**recorded, "attention_weights": "dino.pth"}, proxy, file)["attention_weights"]
        == "/data/dino.pth"
    )
    own = options_again({"attention": "clip", "attention_weights": "ViT.safetensors"}, proxy, {})
    assert own == {"attention": "clip"}


def test_every_method_is_made_again_from_its_record(weights: Path) -> None:
    from ovbench.networks.clip_weights import load_clip
    from ovbench.registry import method_class, method_names

    clip = load_clip(str(weights))
    for name in method_names():
        cls = method_class(name)
        first = cls(clip, cls.configure(cls.OFFLINE_OPTIONS)).options()
        stored = json.loads(json.dumps(first))
        again = cls(clip, cls.configure(options_again(stored, cls, {}))).options()
        assert json.loads(json.dumps(again)) == stored, name


def test_verdict_names_labels_that_changed() -> None:
    found = Verification(
        run_id="r", images=2, of=2, per_image=True, pixels=0, labelled=10, differing=(), label_differs=("a.png",),
        miou=(50.0, 50.0), classes={}, spec={}, data={}, environment={}, packages={}, code={},
    )  # fmt: skip
    assert not found.equal
    assert "The labels of 1 images are not the recorded ones: a.png" in cli.verdict(found)
