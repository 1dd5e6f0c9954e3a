"""Every script of studies/ runs, at its smallest setting, through its own command line."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import warm

from ovbench.benchmarks.synth.copies import synth

STUDIES = Path(__file__).resolve().parents[1] / "studies"
SHARED = {"study", "learning", "inferred"}  # no scripts, and one that test_inferred.py runs
SPEED = {"discrepancy_speed", "engine", "lsmseg_filtering", "masks_speed", "paper_efficiency", "sizes"}
BUILTIN = ("--weights", "builtin", "--repeats", "1")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script's ``main`` and gives what it printed; its fresh processes are this one, unless ``fresh``."""
    monkeypatch.syspath_prepend(str(STUDIES))

    def call(name: str, *argv: object, fresh: bool = False) -> str:
        script = importlib.import_module(name)
        if not fresh and hasattr(script, "in_fresh_process"):
            monkeypatch.setattr(script, "in_fresh_process", lambda function, *arguments: function(*arguments))
        capsys.readouterr()
        script.main([str(argument) for argument in argv])
        return capsys.readouterr().out

    yield call
    for name in [name for name, module in sys.modules.items() if str(STUDIES) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def table(text: str) -> list[list[str]]:
    """Cells of the rows of the first Markdown table, without its header."""
    lines = [line for line in re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_script_has_a_test_here():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = [call.args for call in calls if call.func.id in ("run", "learned")]
    run = {value.value for values in given for value in values if isinstance(value, ast.Constant)}
    assert {path.stem for path in STUDIES.glob("*.py")} - SHARED <= run


@pytest.mark.parametrize("name", sorted(SPEED))
def test_what_measures_speed_takes_a_device(run, capsys, name):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0 and "--device" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_agrees_with_the_straightforward_way(run, tmp_path, dtype):
    out = tmp_path / "engine.json"
    run("engine", *BUILTIN, "--case", "224x240:5", "--dtype", dtype, "--memory", "--json", out)
    [found] = json.loads(out.read_text())["results"]
    assert found["windows"] == 2 and found["label_agreement_percent"] > (99.9 if dtype == "float32" else 90)
    assert found["ours_over_plain"] == pytest.approx(found["ours_ms"] / found["plain_ms"])
    assert found["ours_peak_mib"] >= 0 and found["straightforward_peak_mib"] >= 0


def test_sizes_in_fresh_processes(run):
    rows = table(run("sizes", *BUILTIN, "--sizes", "48,160", "--words", "3", fresh=True))
    assert [row[0] for row in rows] == ["48 x 64", "160 x 213"]
    assert float(rows[0][1]) > 0 and rows[0][3] == "–" and rows[1][3].startswith("pixels^")


def test_discrepancy_speed(run):
    rows = table(run("discrepancy_speed", *BUILTIN, "--side", "4", "--classes", "2,3"))
    assert [row[:2] for row in rows] == [[row[0], str(k)] for k in (2, 3) for row in rows[:7]]


def test_masks_speed(run):
    rows = table(run("masks_speed", *BUILTIN, "--side", "64", "--masks", "4", "--classes", "3", "--memory"))
    assert [row[0] for row in rows] == ["plain tower", "maskclip-ding", "fisa", "fc-clip", "scn", "straightforward"]
    gmacs = {row[0]: float(row[2]) for row in rows}  # beside those of the plain tower
    assert gmacs["fc-clip"] < gmacs["plain tower"] < gmacs["fisa"] < gmacs["straightforward"]


def test_the_straightforward_masks_give_what_the_method_gives(run):
    import torch

    from ovbench.models.mask_model import example_masks
    from ovbench.networks.clip_weights import load_clip
    from ovbench.registry import method_class

    script = importlib.import_module("masks_speed")
    cls, clip = method_class("maskclip-ding"), load_clip("builtin")
    method = cls(clip, cls.configure({"generator": "grid"}))
    generator = torch.Generator().manual_seed(3)
    images, masks = torch.randn(1, 3, 64, 64, generator=generator), example_masks(5, (16, 16))[None]
    with torch.inference_mode():
        ours = method.mask_embeddings(images, masks, torch.zeros(1, clip.embed_dim))
        torch.testing.assert_close(script.straightforward(clip, images, masks), ours, rtol=1e-4, atol=1e-4)


def test_lsmseg_filtering(run, tmp_path):
    out = tmp_path / "deep" / "filtering.md"
    run("lsmseg_filtering", "--repeats", "1", "--hidden", "8", "--classes", "6", "--memory", "--out", out)
    rows = table(out.read_text())
    assert [row[:2] for row in rows] == [
        ["6", "cached"], ["256", "encoded"], ["256", "cached"], ["32", "encoded"], ["32", "cached"],
    ]  # fmt: skip
    assert rows[0][4] == "1.00"


def test_catseg_flops(run):
    text = run(
        "catseg_flops", "--classes", "8", "--keep", "4", "--visual", "none", "--table", "steps", "--table", "variants"
    )
    rows = table(text)
    assert [row[:3] for row in rows] == [[c, "4", t] for c in ("fvcore", "torch") for t in ("encoded", "cached")]
    assert all(float(row[7]) <= float(row[4]) for row in rows)  # ours costs no more than the public steps
    assert all(row[5] == "–" for row in rows)  # the public figures are of 459 classes


def test_catseg_parameters_are_those_of_the_public_code(run):
    rows = table(run("catseg_flops", "--table", "parameters"))
    assert [(row[0], row[3].strip("+-")) for row in rows] == [("ViT-B-16", "0.00 %"), ("ViT-L-14-336", "0.00 %")]


def test_complexity(run, tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "complexity.json"
    text = run("complexity", "--clip-sizes", "336x448", "--sd2-sizes", "64x64", "--json", out)
    found = json.loads(out.read_text())
    assert found["params_m"]["CLIP B/16"] == pytest.approx(149.62, abs=0.01)
    assert dict(table(text))["SD 2 UNet"] == f"{found['params_m']['SD 2 UNet']:.3f}"
    assert found["fits"]["CLIP B/16, 149.6 M"][0][2] == pytest.approx(0, abs=0.001)


def test_discrepancy_demo(run):
    rows = table(run("discrepancy_demo", "--dataset", "voc21", "--base", "clip", "--limit", "1"))
    assert [row[1] for row in rows] == ["none, bilinear", "none", "kl", "propagate", "op", "mv"]
    assert all(0 < float(row[2]) <= 100 and row[2] == row[3] for row in rows)


def test_discrepancy_ablation_with_clips_own_attention(run, tmp_path):
    from ovbench.benchmarks.synth.copies import synth

    root = synth("voc21", tmp_path / "data", 3, size=(48, 64))
    run(
        "discrepancy_ablation", "--data", "voc21", root, 3, "--attention", "clip", "--weights", "builtin",
        "--short-side", 96, "--shrink", 2, "--seeds", 1, "--groups", "baselines", "--out", tmp_path / "out",
    )  # fmt: skip
    text = (tmp_path / "out" / "grid.md").read_text()
    assert text.startswith("labels at 1/2, attention clip (builtin), logits damaged-labels, scale 8")
    assert "Choosing: 2 images" in text and "Held back: 1 images" in text and "| mv, tau 0.6 |" in text


def test_paper_efficiency(run, tmp_path):
    asked = ("--only", "thesis-ecac", "--first", "1", "--samples", "1", "--results", tmp_path)
    run("paper_efficiency", *asked)
    [profile] = [path for path in (tmp_path / "profiles").rglob("*.json")]
    written = profile.stat().st_mtime_ns
    assert "ours" in (tmp_path / "tables" / "thesis-ecac-4.6.md").read_text().lower()
    run("paper_efficiency", *asked)
    assert profile.stat().st_mtime_ns == written  # a stored one is not measured again


def learned(run, out: Path, name: str, scenes: str, rows: str, columns: set[str]) -> None:
    asked = ("--out", out, "--rows", rows, "--scenes", scenes, "--iters", "2", "--seeds", "0")
    run(name, *asked)
    lines = (out / "learning.csv").read_text().splitlines()
    assert columns <= set(lines[0].split(",")) and [line.split(",")[0] for line in lines[1:]] == rows.split(",")
    assert [row[0] for row in table((out / "learning.md").read_text())] == rows.split(",")
    assert (out / "losses.png").stat().st_size > 1000
    before = sorted((out / "runs").rglob("*.json"))
    run(name, *asked, "--no-report")
    assert before and sorted((out / "runs").rglob("*.json")) == before  # what is there is taken


def test_caa_layouts(run):
    out = run("caa_layouts")
    found = table(out)
    assert ["448", "64", "2", "1", "False", "True", "F"] in [row[:7] for row in found]  # what methods/caa.py has
    assert f"{len(found)} of 5600 layouts" in out
    assert len(table(run("caa_layouts", "--within", "3"))) > len(found)


def test_closed_set_learning(run, tmp_path):
    """On generated scenes, and on a benchmark's images in folds; what is there is taken."""
    rows = "fcn,ecac-fcn"
    asked = ("--rows", rows, "--iters", "2", "--seeds", "0", "--side", "168")
    run("closed_set_learning", "--out", tmp_path / "a", "--scenes", "3,2", *asked)
    real = synth("voc21", tmp_path / "voc", images=5, size=(48, 64))
    photographs = ("--data", "voc21", "--data-root", real, "--out", tmp_path / "b", "--scenes", "5,0")
    run("closed_set_learning", *photographs, *asked)
    for out in (tmp_path / "a", tmp_path / "b"):
        lines = (out / "learning.csv").read_text().splitlines()
        assert lines[0] == "row,seed,mIoU,head,middle,tail,coarse"
        assert [row[0] for row in table((out / "learning.md").read_text())] == rows.split(",")
        assert "ecac-fcn - host, mIoU, by seed: " in (out / "learning.md").read_text()
        assert (out / "curves.png").stat().st_size > 1000
    [record] = [json.loads(path.read_text()) for path in (tmp_path / "b" / "heads").glob("ecac*.json")]
    assert [point["iteration"] for point in record["curve"]] == [1, 2] and len(record["classes"]) == 21
    before = (tmp_path / "b" / "learning.csv").read_text()
    run("closed_set_learning", *photographs, *asked)
    assert (tmp_path / "b" / "learning.csv").read_text() == before


def test_lsmseg_learning(run, tmp_path):
    learned(run, tmp_path, "lsmseg_learning", "4,2,2", "cat-seg,prompts", {"seen", "unseen", "unseen_classes"})


def test_masks_learning(run, tmp_path):
    learned(run, tmp_path, "masks_learning", "4,2,2", "MaskCLIP,+ SEVE", {"seen PQ", "unseen mIoU"})


def test_survival(run, monkeypatch):
    script = importlib.import_module("survival")
    monkeypatch.setattr(script, "IMAGES", 6)
    monkeypatch.setattr(script, "RUN", [*script.RUN, "--limit", "6", "--templates", "plain"])
    monkeypatch.setattr(
        script,
        "start",
        lambda results, *more: warm.Started(warm.ovbench, [*script.RUN, "--results", str(results), *more], cwd="."),
    )
    out = run("survival", "--kills", "1", "--worlds", "", "--no-dead")
    assert "after 1 kills: areas of 6 images identical" in out and "0 finished images lost" in out
