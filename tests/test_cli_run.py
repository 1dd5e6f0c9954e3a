"""The verbs ``run`` and ``predict`` as a user meets them: output, files, and the message for every wrong input."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_clip import photo, save_tiny

from ovbench.cli.app import run_command

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    Image.fromarray(photo(120, 200).permute(1, 2, 0).numpy()).save(path)
    return path


def test_run_prints_the_record_alone_on_stdout(run_cli: Cli, tmp_path: Path, weights: str) -> None:
    """In a process of its own, so that nothing else that is loaded may print."""
    assert run_cli("data", "synth", "voc20", "--images", "2", "--out", "data").returncode == 0
    done = run_cli(
        "run", "-m", "clip", "-d", "voc20", "--data-root", "data", "--weights", weights, "--templates", "plain",
        "--protocol", "common", "--short-side", "100", "--device", "cpu", "--results", "out", "--workers", "0",
        "--json", fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "ok" and record["demo"]
    assert record["spec"]["protocol"]["overrides"] == ["short_side", "templates"]
    assert record["provenance"]["command"].startswith("ovbench run -m clip -d voc20")
    path = tmp_path / "out" / "clip" / "voc20" / f"{record['run_id']}.json"
    assert json.loads(path.read_text()) == record
    assert "clip on voc20" in done.stderr
    table = run_cli("table", "--results", "out")
    assert "DEMO" in table.stdout


def test_predict_writes_what_was_asked_for(run_cli: Cli, tmp_path: Path, picture: Path, weights: str) -> None:
    (tmp_path / "classes.txt").write_text("sky\nroad, street\ncar\n")
    done = run_cli(
        "predict", str(picture), "--method", "clip", "--weights", weights, "--classes", "classes.txt",
        "--device", "cpu", "--short-side", "96", "--crop", "64", "--stride", "32", "--out", "a/label.png", "--overlay", "a/over.png",
        "--save-logits", "a/l.npz", "--save-features", "a/f.npz", "--json", fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [entry["name"] for entry in report["classes"]] == ["sky", "road", "car"]
    assert sum(entry["share"] for entry in report["classes"]) == pytest.approx(1)
    label = Image.open(tmp_path / "a" / "label.png")
    assert label.mode == "P" and label.size == (200, 120)
    assert set(np.unique(np.array(label))) <= {0, 1, 2}
    overlay = Image.open(tmp_path / "a" / "over.png")
    assert overlay.width == 200 and overlay.height > 120  # the legend
    logits = np.load(tmp_path / "a" / "l.npz")
    assert logits["seg_logits"].shape == (4, 120, 200) and logits["seg_logits"].dtype == np.float32
    assert logits["words"].tolist() == ["sky", "road", "street", "car"]
    features = np.load(tmp_path / "a" / "f.npz")
    assert features["grid"].tolist() == [6, 10] and features["features"].shape == (60, 32)


def test_predict_without_outputs_writes_an_overlay(run_cli: Cli, tmp_path: Path, picture: Path, weights: str) -> None:
    done = run_cli(
        "predict", str(picture), "-m", "clip", "--weights", weights, "--classes", "sky, road", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "street-overlay.png").is_file()


RUN = ["run", "-m", "clip", "-d", "voc21", "--data-root", "nowhere", "--weights", "random", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "-m", "clipp", "-d", "voc21"], 2, "Unknown method 'clipp'. Did you mean: clip"),
        (["run", "-m", "clip", "-d", "voc"], 2, "Unknown dataset 'voc'. Did you mean: voc20, voc21, voc20b?"),
        ([*RUN, "--arch", "ViT-B/61"], 3, "does not exist"),
        ([*RUN, "--crop", "0"], 2, "--crop: Input should be greater than or equal to 1 (given: 0)"),
        ([*RUN, "--stride", "300"], 2, "stride 300 is larger than crop 224"),
        ([*RUN, "--mode", "slid"], 2, "--mode: Input should be 'slide' or 'whole' (given: 'slid')"),
        ([*RUN, "--dtype", "int8"], 2, "--dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ([*RUN, "--protocol", "sc_clip"], 2, "Unknown protocol 'sc_clip'. Did you mean: sc-clip"),
        ([*RUN, "--pretrained", "openai"], 2, "--weights and --pretrained both say"),
        ([*RUN, "-o", "beta"], 2, "give KEY=VALUE"),
        (RUN, 3, "The data root 'nowhere' does not exist"),
        (["run", "-m", "clip", "-d", "voc21", "--weights", "random"], 2, "Give its folder with --data-root"),
        (["run", "-m", "clip", "-d", "voc21", "--demo", "--weights", "x.pt"], 2, "--demo runs on the built-in CLIP"),
        (["run", "-m", "clip", "-d", "voc21", "--demo", "--data-root", "x"], 2, "--demo makes its own scenes"),
        (["predict", "PICTURE", "--classes", " , "], 2, "The class list is empty"),
        (["predict", "PICTURE", "--classes", "list.txt"], 2, "No class list 'list.txt'"),
        (["predict", "none.jpg", "--classes", "sky"], 3, "Cannot read the image 'none.jpg': No such file"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "none.pt"], 4, "No weights file 'none.pt'"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "random", "--arch", "ViT-B16"], 2, "Unknown architecture 'ViT-B16'"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "TINY", "--arch", "ViT-S-32-alt"], 4, "does not fit ViT-S-32-alt"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "TINY", "--device", "cuda:7"], 2, "Device 'cuda:7' is not there"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "TINY", "--overlay", "x.unknown"], 2, "Use a name that ends in .png"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "TINY", "--out", "PICTURE/label.png"], 5, "Cannot write"),
        (["predict", "PICTURE", "--classes", "sky", "--weights", "TINY", "--short-side", "4"], 2, "smaller than one 16-pixel patch"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_clear_line(
    arguments: list[str],
    code: int,
    message: str,
    picture: Path,
    weights: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(picture.parent)
    replaced = [a.replace("PICTURE", str(picture)).replace("TINY", weights) for a in arguments]
    if replaced[0] == "predict" and "--device" not in replaced:
        replaced += ["--device", "cpu", "--templates", "plain", "--patch-pad", "none"]
    assert run_command(replaced) == code
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert message in line


def test_damaged_pictures(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(photo(300, 300).permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    for name, data, message in (
        ("cut.jpg", content[:-200], "is cut off"),
        ("no.jpg", b"text", "is not an image"),
        ("empty.png", b"", "is empty"),
    ):
        (tmp_path / name).write_bytes(data)
        assert run_command(["predict", str(tmp_path / name), "--classes", "sky", "--weights", weights]) == 3
        assert message in capsys.readouterr().err


def test_offline_user_learns_what_to_do(
    run_cli: Cli, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE stands for a machine without a network; the hub's cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = run_cli("predict", str(picture), "--classes", "sky", "--pretrained", "openai")
    assert done.returncode == 4
    assert "Could not get the weights 'openai' for ViT-B-16" in done.stderr
    assert "--weights FILE.safetensors" in done.stderr and "--weights random" in done.stderr
