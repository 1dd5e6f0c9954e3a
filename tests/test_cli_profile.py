"""``ovbench profile`` as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch

from ovbench.measure.profile import launch
from ovbench.measure.profile import record as report
from ovbench.measure.profile.job import profile_here
from ovbench.results.record import Efficiency

COMMAND = """
import sys
sys.path[:] = [path for path in sys.path if path]  # as the command ovbench, which does not look into the current folder
from ovbench.cli import app
status = app.run_command(sys.argv[1:])
print(sorted({"torch", "pandas", "mmseg"} & set(sys.modules)), file=sys.stderr)
raise SystemExit(status)
"""
SMALL = (
    "--weights",
    "builtin",
    "--input",
    "64x64",
    "--samples",
    "2",
    "--no-throughput",
    "--device",
    "cpu",
    "--threads",
    "1",
)


@pytest.fixture
def run_profile(run_python, tmp_path):
    """Runs ``ovbench profile ARGS`` where mmseg, mmengine, mmcv and cv2 cannot be imported."""
    barred = tmp_path / "barred"
    barred.mkdir()
    for name in ("mmseg", "mmengine", "mmcv", "cv2"):
        (barred / f"{name}.py").write_text(f"raise ImportError('{name} is barred')\n")

    def run(*args: str):
        return run_python("-c", COMMAND, "profile", *args, cwd=tmp_path, PYTHONPATH=str(barred))

    return run


def test_json_of_a_method(run_profile, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('a file in the current folder')\n")
    done = run_profile("-m", "sc-clip", "--num-classes", "4", *SMALL, "--count", "fvcore", "--json", "--save")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(Efficiency.model_fields) <= set(figures)
    assert figures["trainable_params_m"] == 0 and figures["latency_ms"]["n"] == 2
    assert figures["convention"] == "fvcore" and figures["spec"]["threads"] == figures["environment"]["threads"] == 1
    assert "2 samples are few" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"  # the work is done in a process of its own
    (stored,) = (tmp_path / "results" / "profiles").glob("*/*.json")
    assert report.read(stored).flat() == figures
    assert figures["provenance"]["command"].startswith("ovbench profile -m sc-clip")


@pytest.fixture
def profile_in_this_process(run_cli, monkeypatch):
    """Runs ``ovbench profile ARGS`` and measures here, not in a process of its own."""

    def measured(spec, command, tell):
        threads = torch.get_num_threads()
        try:
            return profile_here(spec, command=command)
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr(launch, "_in_process", measured)
    return lambda *args: run_cli("profile", *args)


def test_table_of_a_method(profile_in_this_process):
    done = profile_in_this_process("-m", "clip", "--dataset", "voc21", *SMALL)
    assert done.returncode == 0, done.stderr
    for text in (
        "clip, builtin-ViT-12x128, 21 classes",
        "clip.visual",
        "GMACs of image",
        "backbone",
        "not counted:",
        "peak MiB",
    ):
        assert text in done.stdout
    assert "images/s" not in done.stdout


def test_a_decode_head(profile_in_this_process):
    done = profile_in_this_process(
        "-m", "fcn", "--part", "decode_head", "--features", "8x8", "--samples", "2", "--no-throughput", "--json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["params_m"] == pytest.approx(11.87, rel=1e-3) and figures["spec"]["classes"] == 150
    assert figures["trainable_params_m"] == figures["params_m"]
    assert figures["input"] == "C4 1x2048x8x8, one forward"
    assert figures["forward_ms_reason"] and figures["latency_ms"]["n"] == 2


def test_a_decode_head_without_mmseg(run_profile):
    done = run_profile("-m", "psp", "--part", "decode_head", "--params-only")
    assert done.returncode == 5
    assert "mmsegmentation cannot be imported" in done.stderr or "not installed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "sc-clp"], "Did you mean: sc-clip"),
        (["-m", "psp", "--features", "64x64"], "--part decode_head"),
        (["-m", "ps", "--part", "decode_head"], "Unknown decode head 'ps'"),
        (["-m", "psp", "--part", "backbone"], "the only part is decode_head"),
        (["-m", "psp", "--part", "decode_head", "--input", "512x512"], "--features"),
        (["-m", "psp", "--part", "decode_head", "--features", "64"], "HEIGHTxWIDTH"),
        (["-m", "clip", "--features", "64x64"], "--input"),
        (["-m", "clip", "--count", "thop"], "--count"),
        (["-m", "clip", "--num-classes", "0"], "--num-classes"),
        (["-m", "clip", "--dataset", "voc21", "--classes", "voc20"], "both name"),
        (["-m", "clip", "--dtype", "int8"], "--dtype"),
        (["-m", "clip", "--crop", "100", "--stride", "200"], "stride 200 is larger"),
        ([], "--method"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_options_are_told_before_any_process(run_cli, monkeypatch, arguments, words):
    monkeypatch.setattr("ovbench.measure.profile.launch.subprocess.Popen", None)  # would raise if it were called
    done = run_cli("profile", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stdout == "" and "building" not in done.stderr


def test_an_error_of_the_process_is_one_line(run_profile):
    done = run_profile("-m", "clip", "--arch", "ViT-B-17")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1 and "ViT-B-16" in lines[0] and "Traceback" not in done.stderr


def test_help_loads_no_torch(run_profile):
    done = run_profile("--help")
    assert done.returncode == 0 and "decode_head" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"
