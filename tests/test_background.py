"""Thresholds leave pixels to the background: which class that is, and what happens where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import DataError, NoBackgroundError, UsageError
from ovbench.models.build import build_model
from ovbench.ops.labels import decide
from ovbench.spec import RunSpec, protocol, protocol_names

THRESHOLDS: list[dict[str, Any]] = [
    {"prob_thd": 0.9},
    {"area_thd": 0.5, "area_rule": "background"},
    {"area_thd": 0.5, "area_rule": "next-best"},
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("voc20", tmp_path_factory.mktemp("voc"), images=2, size=(64, 96))


def spec(weights: str, dataset: str, **fields: Any) -> dict[str, Any]:
    sizes = {"name": "common", "templates": "plain", "short_side": 32, "crop": 32, "stride": 32}
    return {"method": "clip", "dataset": dataset, "weights": weights, "protocol": {**sizes, **fields}}


def own(home: Path, classes: str) -> Path:
    for part in ("images", "labels"):
        (home / part).mkdir(parents=True)
    (home / "classes.txt").write_text(classes)
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"images/{index}.png")
        Image.fromarray(np.full((32, 32), index, np.uint8)).save(home / f"labels/{index}.png")
    return home


@pytest.mark.parametrize("fields", THRESHOLDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_background_can_be_any_class(place: int, fields: dict[str, Any]) -> None:
    """The labels under another order of the classes are the same classes."""
    generator = torch.Generator().manual_seed(place)
    values = torch.randn(9, 11, 3, generator=generator)
    if "prob_thd" in fields:
        fields = {"prob_thd": 0.6}
    first = decide(values, None, torch.arange(3), background=0, **fields)
    order = [0, 1, 2]
    order[0], order[place] = order[place], order[0]
    moved = decide(values[..., order], None, torch.arange(3), background=place, **fields)
    assert torch.equal(torch.tensor(order)[moved], first)
    plain = decide(values, None, torch.arange(3))
    assert not torch.equal(first, plain) or "area_thd" in fields


@pytest.mark.parametrize("fields", THRESHOLDS)
def test_every_door_refuses_thresholds_without_a_background(
    fields: dict[str, Any], weights: str, voc: Path, tmp_path: Path
) -> None:
    from ovbench.evaluate.config import mmengine_config
    from ovbench.evaluate.expected import expected
    from ovbench.evaluate.run import RunOptions
    from ovbench.measure.profile.record import ProfileSpec
    from ovbench.measure.profile.subject import build_subject

    asked = spec(weights, "voc20", **fields)
    chosen = protocol("sclip", "voc20", templates="plain", **fields)
    words = benchmarks.get("voc20").words("sclip")
    doors = {
        "run": lambda: ovbench.run(asked, data_root=voc, results=tmp_path, workers=0),
        "expected": lambda: expected(RunSpec(**asked), voc),
        "config": lambda: mmengine_config(RunSpec(**asked), RunOptions(data_root=voc)),
        "Python": lambda: build_model("clip", classes=words, weights=weights, protocol=chosen),
        "Python, by benchmark": lambda: build_model(
            "clip", classes=words, weights=weights, benchmark="voc20", **fields
        ),
        "profile": lambda: build_subject(
            ProfileSpec(method="clip", dataset="voc20", weights="builtin", protocol=chosen, device="cpu")
        ),
    }
    for door, call in doors.items():
        with pytest.raises(NoBackgroundError, match="has no background class") as caught:
            call()
        option = "--prob-thd" if "prob_thd" in fields else "--area-thd"
        assert option in str(caught.value) and caught.value.exit_code == 2, door
    assert not list(tmp_path.rglob("*.json*"))


def test_a_list_of_classes_may_be_replaced_but_not_lose_its_background(weights: str) -> None:
    model = build_model(
        "clip", classes=["cat", "Background"], weights=weights, prob_thd=0.999, logit_scale=1, templates="plain"
    )
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert model.predict_labels([image], [(64, 64)])[0].unique().tolist() == [1]
    model.set_classes(["cat", "dog"])
    with pytest.raises(NoBackgroundError):
        model.predict_labels([image], [(64, 64)])
    told = build_model(
        "clip", classes=["sky", "dog"], weights=weights, prob_thd=0.999, logit_scale=1, templates="plain", background=1
    )
    assert told.predict_labels([image], [(64, 64)])[0].unique().tolist() == [1]
    with pytest.raises(UsageError, match=r"The background is class 2, but classes are 0\.\.1"):
        build_model("clip", classes=["sky", "dog"], weights=weights, prob_thd=0.9, templates="plain", background=2)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_line_called_background_is_it_wherever_it_stands(place: int, weights: str, tmp_path: Path) -> None:
    names = ["cat", "dog"]
    names.insert(place, "background")
    home = own(tmp_path / "data", "\n".join(names))
    found = benchmarks.get(str(home))
    assert found.background == place and found.has_background is (place == 0)
    told: list[str] = []
    options: dict[str, Any] = {"results": tmp_path / "r", "workers": 0, "gallery": 0, "on_message": told.append}
    record = ovbench.run(spec(weights, str(home), prob_thd=0.999, logit_scale=1), **options)
    assert any(f"background, class {place} (background)" in text for text in told) is (place > 0)
    assert record.metrics is not None
    assert [one.pred for one in record.metrics.classes] == [2 * 32 * 32 * (index == place) for index in range(3)]


def test_a_folder_tells_its_background(weights: str, tmp_path: Path) -> None:
    home = own(tmp_path / "data", "cat\ndog\nother: sky, road\n")
    plain = benchmarks.get(str(home))
    before = plain.fingerprint(home)
    assert plain.background is None
    with pytest.raises(NoBackgroundError, match="data has no background class"):
        ovbench.run(spec(weights, str(home), prob_thd=0.9), results=tmp_path / "r", workers=0, gallery=0)
    (home / "dataset.json").write_text(json.dumps({"background": "other"}))
    told = benchmarks.get(str(home))
    assert (told.background, told.has_background) == (2, False)
    assert told.fingerprint(home) != before  # thresholds mean something else
    record = ovbench.run(
        spec(weights, str(home), prob_thd=0.999, logit_scale=1), results=tmp_path / "r", workers=0, gallery=0
    )
    assert record.metrics is not None and record.metrics.classes[2].pred == 2 * 32 * 32
    (home / "dataset.json").write_text(json.dumps({"background": "sky"}))
    with pytest.raises(DataError, match="background is 'sky', which is no class"):
        benchmarks.get(str(home))
    (home / "dataset.json").write_text(json.dumps({"background": 2}))
    with pytest.raises(DataError, match="background is 2, not a bool or a str"):
        benchmarks.get(str(home))
    for flag, index in ((True, 0), (False, None)):
        (home / "dataset.json").write_text(json.dumps({"background": flag}))
        assert benchmarks.get(str(home)).background == index


def test_a_config_tells_its_background(tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    text = (
        "benchmark = dict(title='t', expected_images=1, background={})\ndataset = dict(data_prefix=dict(img_path='i', "
        "seg_map_path='l'), img_suffix='.png', seg_map_suffix='.png')\n"
    )
    config.with_suffix(".txt").write_text("cat\nrest\n")
    config.write_text(text.format(1))
    assert benchmarks.get(str(config)).background == 1
    for wrong in ("2", "-1", "0", "'rest'", "True"):
        config.write_text(text.format(wrong))
        with pytest.raises(DataError, match="background"):
            benchmarks.get(str(config))


def test_presets_set_thresholds_only_where_there_is_a_background() -> None:
    for name in benchmarks.names():
        benchmark = benchmarks.get(name)
        for preset in protocol_names():
            protocol(preset, name).require_background(benchmark.background, name)
    known = {name: benchmarks.get(name).background for name in benchmarks.names()}
    assert {name: index for name, index in known.items() if index is not None} == {
        "voc21": 0, "context60": 0, "coco_object": 0, "voc20b": 20,
    }  # fmt: skip


def test_predict_takes_the_background_by_name(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture)
    command = [
        "predict", str(picture), "-m", "clip", "--weights", weights, "--prompts", "plain", "--short-side", "32", "--device",
        "cpu", "--crop", "32", "--stride", "32", "--json", "--prob-thd", "0.999", "--logit-scale", "1", "--classes",
    ]  # fmt: skip
    assert run_command([*command, "cat,dog"]) == 2
    assert "no background class" in capsys.readouterr().err
    for classes, more, name in (
        ("cat,background", [], "background"),
        ("cat,other", ["--background", "other"], "other"),
    ):
        assert run_command([*command, classes, *more]) == 0
        shares = {one["name"]: one["share"] for one in json.loads(capsys.readouterr().out)["classes"]}
        assert shares[name] == 1.0
    assert run_command([*command, "cat,other", "--background", "othr"]) == 2
    assert "Did you mean: other?" in capsys.readouterr().err


def test_a_sweep_says_which_runs_cannot_be(weights: str, voc: Path, tmp_path: Path) -> None:
    from test_sweep import spec_of

    from ovbench.evaluate.sweep.plan import Grid, plan

    options = {"weights": weights, "templates": "plain"}
    grid = Grid(("clip",), ("voc20",), data_root=voc, set=options, vary={"prob_thd": ("0", "0.1")})
    fine, refused = plan([grid], spec_of, results=tmp_path, device="cpu")
    assert not fine.problem and "no background class" in str(refused.problem)
