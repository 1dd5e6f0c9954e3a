"""Operations against closed forms, timings against a clock that is set by hand, memory against known allocations."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from ovbench.measure import environment as env
from ovbench.measure import flops, timing

N, D, HEADS = 197, 768, 12
ATTENTION = 2 * N * N * D  # MAC of all heads: queries with keys, weights with values
PROJECTIONS = 4 * N * D * D


def _macs(fn) -> float:
    return flops.count(fn).gmacs * 1e9


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(N, N, dtype=torch.bool)}])
def test_scaled_dot_product_attention_is_counted_on_a_cpu(grad, dtype, arguments):
    q = torch.randn(1, HEADS, N, D // HEADS, dtype=dtype)

    def attend() -> None:
        with grad():
            functional.scaled_dot_product_attention(q, q, q, **arguments)

    assert _macs(attend) == ATTENTION


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_fast_path_of_multihead_attention_is_counted(need_weights):
    x = torch.randn(1, N, D)
    layer = nn.MultiheadAttention(D, HEADS, batch_first=True).eval()
    assert _macs(lambda: layer(x, x, x, need_weights=need_weights)) == PROJECTIONS + ATTENTION


def test_the_fast_path_of_an_encoder_layer_is_counted():
    layer = nn.TransformerEncoderLayer(D, HEADS, dim_feedforward=4 * D, batch_first=True).eval()
    assert _macs(lambda: layer(torch.randn(1, N, D))) == PROJECTIONS + ATTENTION + 8 * N * D * D


def test_settings_are_as_before_after_counting():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(ZeroDivisionError):
        flops.count(lambda: 1 / 0)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_products_and_convolutions_by_closed_form():
    x, y = torch.randn(2, 5, 7), torch.randn(11, 7)
    assert _macs(lambda: torch.einsum("bnd,qd->bnq", x, y)) == 2 * 5 * 7 * 11
    assert _macs(lambda: functional.linear(x, y)) == 2 * 5 * 7 * 11
    assert _macs(lambda: functional.conv2d(torch.randn(1, 3, 32, 48), torch.randn(8, 3, 16, 16), stride=16)) == (
        2 * 3 * 8 * 3 * 16 * 16
    )
    grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert _macs(lambda: grouped(torch.randn(1, 8, 10, 10))) == 100 * 8 * 9


def test_products_with_a_vector_are_counted():
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    assert _macs(lambda: matrix @ vector) == 35
    assert _macs(lambda: torch.addmv(torch.zeros(5), matrix, vector)) == 35
    assert _macs(lambda: torch.dot(vector, vector)) == 7
    assert _macs(lambda: torch.addbmm(torch.zeros(5, 5), matrix.expand(3, 5, 7), matrix.T.expand(3, 7, 5))) == 3 * 175


def test_one_mac_is_two_flop_and_operators_add_up():
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 6, 5), nn.Softmax(-1))
    counted = flops.count(lambda: layers(torch.randn(1, 3, 2, 3)))
    assert counted.by_op == {"addmm": 2 * 24 * 5, "convolution": 2 * 6 * 3 * 4}
    assert counted.gflops == 2 * counted.gmacs == sum(counted.by_op.values()) / 1e9
    assert torch.__version__ in counted.tool and "1 MAC = 2 FLOP" in counted.tool


def test_nothing_to_count():
    counted = flops.count(lambda: torch.ones(3).relu())
    assert (counted.gmacs, counted.by_op) == (0.0, {})


@pytest.fixture
def clock(monkeypatch):
    now = [0]
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    return now


def test_a_stage_is_timed_in_milliseconds(clock):
    watch = timing.Stopwatch()
    for milliseconds in (3, 5):
        with watch.stage("image"):
            clock[0] += 1_000_000
            with watch.stage("encode"):
                clock[0] += milliseconds * 1_000_000
    assert watch.samples == {"encode": [3.0, 5.0], "image": [4.0, 6.0]}
    assert watch.summaries()["image"]["median"] == 5.0
    watch.discard()
    assert watch.samples == {}


def test_a_failed_stage_leaves_no_sample(clock):
    watch = timing.Stopwatch()
    with pytest.raises(KeyError), watch.stage("encode"):
        raise KeyError
    assert watch.samples == {}


def test_cuda_is_waited_for_at_both_ends_of_a_stage(monkeypatch, clock):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append((str(device), clock[0])))
    watch = timing.Stopwatch("cuda:1")
    with watch.stage("encode"):
        clock[0] += 2_000_000
    assert events == [("cuda:1", 0), ("cuda:1", 2_000_000)]
    assert watch.samples == {"encode": [2.0]}


def test_statistics_by_hand_and_as_numpy():
    import numpy as np

    assert timing.summary([4.0, 1.0, 3.0, 2.0]) == {
        "median": 2.5, "iqr": 1.5, "p95": pytest.approx(3.85), "n": 4, "samples": [4.0, 1.0, 3.0, 2.0],
    }  # fmt: skip
    samples = np.random.default_rng(0).gamma(2.0, 10.0, 101).round(4)
    found = timing.summary(samples.tolist())
    quartiles = np.percentile(samples, [25, 50, 75, 95])
    assert (found["median"], found["p95"]) == pytest.approx((quartiles[1], quartiles[3]), rel=1e-12)
    assert found["iqr"] == pytest.approx(quartiles[2] - quartiles[0], rel=1e-12)


def test_one_sample_and_none():
    assert timing.summary([7.00004]) == {"median": 7.0, "iqr": 0.0, "p95": 7.0, "n": 1, "samples": [7.0]}
    with pytest.raises(ValueError, match="No samples"):
        timing.summary([])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_memory_sees_an_allocation_and_can_be_reset(run_python):
    """In a fresh process: one that ran other tests takes the block from memory that it already holds."""
    code = """
import torch
from ovbench.measure import timing
assert timing.reset_peak_memory()
before, kind = timing.peak_memory()
block = torch.ones(64 * 2**20 // 4)
held = timing.peak_memory()[0]
del block
assert kind == "process-rss"
assert 60 < held - before < 80, (before, held)
assert abs(timing.peak_memory()[0] - held) < 2  # the peak outlives the block
assert timing.reset_peak_memory()
assert timing.peak_memory()[0] < held - 40
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_peak_memory_of_a_gpu_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    assert timing.peak_memory("cuda") == (3.0, "cuda-allocated")


def test_the_environment_of_a_cpu_run():
    found = env.environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1 and found["cpu"]
    assert found["gpu"] is None and found["gpu_driver"] is None


def test_the_environment_of_a_gpu_run(monkeypatch):
    gpu = types.SimpleNamespace(name="GPU one", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(env, "_gpu_driver", lambda: "580.1")
    found = env.environment("cuda:0")
    assert {key: found[key] for key in ("device", "gpu", "gpu_memory_gib", "gpu_driver", "cudnn")} == {
        "device": "cuda", "gpu": "GPU one", "gpu_memory_gib": 8.0, "gpu_driver": "580.1", "cudnn": "91002",
    }  # fmt: skip


def test_precision_settings_are_read_when_asked():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert env.environment()["precision"]["float32_matmul"] == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_versions_of_what_is_installed():
    versions = env.package_versions()
    assert versions["mmsegmentation"] == "1.2.2"
    assert "diffusers" not in versions or versions["diffusers"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with this package's layout, in which the package believes to be."""

    def git(*arguments: str, cwd=tmp_path) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, "-C", str(cwd), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "ovbench" / "measure" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(env, "__file__", str(module))
    git("init", "--quiet")
    return git


def test_the_commit_and_whether_there_are_changes(checkout, tmp_path):
    assert env.git_state()["git_reason"] == "the checkout has no commit yet"
    checkout("add", ".")
    checkout("commit", "--quiet", "-m", "one")
    commit = checkout("rev-parse", "HEAD")
    assert env.git_state() == {"git_commit": commit, "git_dirty": False, "git_reason": None}
    (tmp_path / "new.py").write_text("")
    assert env.git_state()["git_dirty"] is True


def test_variables_of_another_repository_do_not_mislead(checkout, tmp_path, monkeypatch):
    checkout("add", ".")
    checkout("commit", "--quiet", "-m", "one")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert env.git_state()["git_reason"] is None


def test_an_installed_copy_does_not_report_the_repository_around_it(checkout, tmp_path, monkeypatch):
    inside = tmp_path / "venv" / "ovbench" / "measure" / "environment.py"
    monkeypatch.setattr(env, "__file__", str(inside))
    assert env.git_state() == {
        "git_commit": None, "git_dirty": None, "git_reason": "ovbench is an installed copy, not a git checkout",
    }  # fmt: skip
    inside.parent.mkdir(parents=True)
    (tmp_path / "venv" / "pyproject.toml").write_text("")
    assert env.git_state()["git_reason"] == "ovbench is not the root of a git checkout"


def test_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert env.git_state()["git_reason"] == "git is not installed"
