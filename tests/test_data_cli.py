"""``ovbench data``: data on stdout, messages on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ovbench import benchmarks
from ovbench.cli.data import app
from ovbench.errors import UsageError

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
    assert made.stdout.count("1 images in") == 8


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


@pytest.mark.parametrize("verb", ["synth", "check"])
def test_help_has_examples(verb: str) -> None:
    result = runner.invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and "Examples:" in result.stdout
