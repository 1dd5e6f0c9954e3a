"""``ovbench data``: data on stdout, messages on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ovbench import benchmarks
from ovbench.cli.data import app
from ovbench.errors import DataError, UsageError

TRAIN = benchmarks.get("ade20k").for_split("train")
runner = CliRunner()


def test_synth_then_check(tmp_path: Path) -> None:
    made = runner.invoke(app, ["synth", "voc21", "ade20k", "--images", "3", "--out", str(tmp_path), "--json"])
    assert made.exit_code == 0, made.output
    entries = json.loads(made.stdout)
    assert [entry["benchmark"] for entry in entries] == ["voc21", "ade20k"]
    assert entries[0]["root"] == str(tmp_path / "voc21/VOCdevkit/VOC2012")
    for entry in entries:
        assert len(benchmarks.get(entry["benchmark"]).pairs(entry["root"])) == entry["images"] == 3
        checked = runner.invoke(app, ["check", entry["benchmark"], "--data-root", str(tmp_path), "--json"])
        assert checked.exit_code == 0 and json.loads(checked.stdout)["ok"] is True


def test_synth_all_makes_all(tmp_path: Path) -> None:
    made = runner.invoke(app, ["synth", "all", "--images", "1", "--out", str(tmp_path)])
    assert made.exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(benchmarks.names())
    assert made.stdout.count("1 images in") == len(benchmarks.names())


def test_synth_of_both_splits_then_check_of_both(tmp_path: Path) -> None:
    arguments = ["--images", "2", "--train-images", "5", "--long-tail", "1", "--num-classes", "21", "--size", "64x96"]
    made = runner.invoke(app, ["synth", "ade20k", "--split", "all", *arguments, "--out", str(tmp_path / "d"), "--json"])
    assert made.exit_code == 0, made.output
    [entry] = json.loads(made.stdout)
    assert (entry["images"], entry["train_images"], entry["long_tail"], entry["classes"]) == (2, 5, 1.0, 21)
    checked = runner.invoke(app, ["check", "ade20k", "--data-root", str(tmp_path), "--split", "all", "--json"])
    assert checked.exit_code == 0
    val, train = json.loads(checked.stdout)
    assert (val["split"], val["listed"], train["split"], train["listed"]) == ("val", 2, "train", 5)
    TRAIN.pairs(tmp_path)[0].label.unlink()
    assert runner.invoke(app, ["check", "ade20k", "--data-root", str(tmp_path)]).exit_code == 0
    for split in ("train", "all"):
        result = runner.invoke(app, ["check", "ade20k", "--data-root", str(tmp_path), "--split", split])
        assert result.exit_code == 3 and "ade20k train: not usable" in result.stdout


def test_synth_of_training_images_alone_and_of_all_benchmarks_that_have_some(tmp_path: Path) -> None:
    arguments = ["--split", "train", "--train-images", "1", "--size", "48x64"]
    made = runner.invoke(app, ["synth", "all", *arguments, "--out", str(tmp_path)])
    assert made.exit_code == 0, made.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(benchmarks.with_split())
    assert made.stdout.count(": 1 training images in") == len(benchmarks.with_split())
    with pytest.raises(DataError):
        benchmarks.get("ade20k").pairs(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ade20k", "voc21", "--split", "all"], "voc21 has no training split"),
        (["ade20k", "--split", "test"], "Unknown split 'test'"),
        (["ade20k", "--train-images", "8"], "goes with --split train or --split all"),
        (["ade20k", "--long-tail", "1"], "Only training images are long-tailed"),
        (["ade20k", "--size", "128"], "The size is '128'; give short and long side"),
        (["ade20k", "--size", "160x128"], "short side is 160; it must be 32 to 128"),
    ],
)
def test_wrong_wishes_are_explained_and_leave_nothing_behind(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = runner.invoke(app, ["synth", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UsageError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_check_says_what_is_wrong_and_exits_3(tmp_path: Path) -> None:
    runner.invoke(app, ["synth", "coco_object", "--images", "2", "--out", str(tmp_path)])
    label = benchmarks.get("coco_object").pairs(tmp_path)[1].label
    label.write_bytes(label.read_bytes()[:100])
    result = runner.invoke(app, ["check", "coco_object", "--data-root", str(tmp_path)])
    assert result.exit_code == 3
    assert result.stdout.startswith("error: 1 label files are damaged") and label.name in result.stdout
    assert "coco_object: not usable" in result.stdout
    limited = runner.invoke(app, ["check", "coco_object", "--data-root", str(tmp_path), "--limit", "1"])
    assert limited.exit_code == 0 and "1 of 2 pairs opened" in limited.stdout


def test_unknown_name_leaves_nothing_behind(tmp_path: Path) -> None:
    result = runner.invoke(app, ["synth", "voc21", "voc", "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["synth", "check", "frequencies"])
def test_help_has_examples(verb: str) -> None:
    result = runner.invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and "Examples:" in result.stdout
