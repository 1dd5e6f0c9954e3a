from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]

# A job that runs in the background of a shell has Ctrl-C ignored, and so would everything that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: parallel test processes must not each take all cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is imported by now stays: full collections, of which mmengine asks one per dataset, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors, real images and class lists that lies beside the checkout."""
    folder = Path(os.environ.get("OVBENCH_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at '{folder}' (OVBENCH_SHARED names another place)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the user's cache or settings, or reaches the network."""
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("OVBENCH_") and name != "OVBENCH_SHARED"]:
        patch.delenv(name)
    patch.setenv("OVBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("NO_COLOR", "1")
    patch.delenv("FORCE_COLOR", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python ARGS`` in a fresh process outside the checkout."""

    def run(*args: str, cwd: Path | str = "/", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **env},
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def run_cli(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``ovbench ARGS`` in an empty folder: in this process, or in a ``fresh`` one as a user does."""
    from ovbench.cli.app import run_command

    def run(
        *args: str, cwd: Path | str = tmp_path, fresh: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        if fresh:
            return run_python("-m", "ovbench", *args, cwd=cwd, **env)
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["ovbench", *args])
            for name, value in env.items():
                patch.setenv(name, value)
            capsys.readouterr()
            status = run_command(args)
        return subprocess.CompletedProcess(args, status, *capsys.readouterr())

    return run


@pytest.fixture
def make_record() -> Callable[..., Any]:
    """Makes a valid record; every call is one minute later than the one before."""
    from ovbench.results.record import RunRecord, metrics_from_areas, new_run_id
    from ovbench.spec import RunSpec

    clock = [datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)]
    environment = {
        "python": "3.11.7",
        "os": "Linux 6.1 x86_64",
        "cpu": "CPU one",
        "cores": 2,
        "threads": 2,
        "ram_gib": 16.0,
        "device": "cpu",
        "gpu": None,
        "gpu_memory_gib": None,
        "gpu_driver": None,
        "cuda": None,
        "cudnn": None,
        "torch": "2.15.0",
        "precision": {
            "float32_matmul": "highest",
            "cuda_matmul_tf32": False,
            "cudnn_tf32": True,
            "cudnn_benchmark": False,
            "deterministic": False,
        },
    }

    def make(
        *,
        method: str = "sc-clip",
        dataset: str = "voc21",
        intersect: tuple[int, ...] = (50, 10),
        images: int = 3,
        spec: dict[str, Any] | None = None,
        environment_fields: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        **fields: Any,
    ) -> RunRecord:
        clock[0] += timedelta(minutes=1)
        label = (60, 40)
        wrong = [known - inter for known, inter in zip(label, intersect, strict=True)]
        pred = (intersect[0] + wrong[1], intersect[1] + wrong[0])
        union = tuple(p + q - inter for p, q, inter in zip(pred, label, intersect, strict=True))
        run_spec = RunSpec(**{"method": method, "dataset": dataset, "weights": "openai", **(spec or {})})
        samples = (10.0, 11.0, 12.0)
        data: dict[str, Any] = {
            "run_id": new_run_id(run_spec.spec_hash(), clock[0]),
            "spec": run_spec,
            "spec_hash": run_spec.spec_hash(),
            "metrics": metrics_from_areas(("sky", "road"), intersect, union, pred, label, images=images),
            "efficiency": {
                "params_m": 149.6,
                "trainable_params_m": 0.0,
                "gmacs": 17.5,
                "gflops": 35.0,
                "forwards": 4,
                "image_gmacs": 70.0,
                "input": "1x3x224x224",
                "tool": "counter",
                "latency_ms": {"median": 11.0, "iqr": 1.0, "p95": 11.9, "n": 3, "samples": samples},
                "stages_ms": {"encode": {"median": 11.0, "iqr": 1.0, "p95": 11.9, "n": 3, "samples": samples}},
                "images_per_s": 80.0,
                "peak_memory_mib": 900.0,
                "peak_memory_kind": "process-rss",
            },
            "environment": {**environment, **(environment_fields or {})},
            "provenance": {
                "git_commit": None,
                "git_dirty": None,
                "git_reason": "a test",
                "weights_sha256": "ab" * 32,
                "dataset_fingerprint": "cd" * 32,
                "command": "ovbench run",
                "started": clock[0],
                "finished": clock[0] + timedelta(seconds=30),
                "package_versions": {"torch": "2.15.0"},
                **(provenance or {}),
            },
            "status": "ok",
            "partial": False,
            "demo": run_spec.demo,
            "reason": None,
            **fields,
        }
        return RunRecord(**data)

    return make
