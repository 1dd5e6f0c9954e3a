"""The machine, the numerics and the code that a number was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# What can move a score or a timing, by distribution name.
PACKAGES = (
    "ovbench",
    "torch",
    "torchvision",
    "open_clip_torch",
    "mmsegmentation",
    "mmengine",
    "mmcv-lite",
    "mmcv",
    "timm",
    "transformers",
    "diffusers",
    "ftfy",
    "regex",
    "numpy",
    "opencv-python",
    "opencv-python-headless",
    "pillow",
    "safetensors",
)

GIB = float(2**30)


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the precision settings as they are now; fields as in :class:`ovbench.results.record.Environment`.

    Args:
        device: ``cpu`` or ``cuda`` (with or without an index); GPU fields are null on ``cpu``.
    """
    import torch

    kind = torch.device(device)
    gpu: dict[str, Any] = {"gpu": None, "gpu_memory_gib": None, "gpu_driver": None, "cudnn": None}
    if kind.type == "cuda":
        properties = torch.cuda.get_device_properties(kind)
        cudnn: int | None = torch.backends.cudnn.version()
        gpu = {
            "gpu": properties.name,
            "gpu_memory_gib": properties.total_memory / GIB,
            "gpu_driver": _gpu_driver(),
            "cudnn": None if cudnn is None else str(cudnn),
        }
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "device": kind.type,
        **gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "precision": {
            "float32_matmul": torch.get_float32_matmul_precision(),
            "cuda_matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
    }


def package_versions() -> dict[str, str]:
    """Installed versions of :data:`PACKAGES`, those that are not installed left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any]:
    """``git_commit``, ``git_dirty`` and ``git_reason`` of the checkout that this package runs from.

    The first two are None, with the reason, when ovbench is an installed copy or git cannot answer.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return _no_git("ovbench is an installed copy, not a git checkout")
    try:
        # A checkout inside another repository must not report that one.
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:
            return _no_git("ovbench is not the root of a git checkout")
        commit = _git(root, "rev-parse", "--verify", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=normal")
    except FileNotFoundError:
        return _no_git("git is not installed")
    except subprocess.TimeoutExpired:
        return _no_git("git did not answer within 10 s")
    except subprocess.CalledProcessError as error:
        if "rev-parse --verify HEAD" in " ".join(error.cmd):
            return _no_git("the checkout has no commit yet")
        first = (error.stderr or "").strip().splitlines()[:1]
        return _no_git(f"git: {first[0] if first else f'exit code {error.returncode}'}")
    return {"git_commit": commit, "git_dirty": bool(changes), "git_reason": None}


def _no_git(reason: str) -> dict[str, Any]:
    return {"git_commit": None, "git_dirty": None, "git_reason": reason}


def _git(root: Path, *arguments: str) -> str:
    # A hook or a caller inside git may have set GIT_DIR and the like, which would answer for another repository.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
        env={**clean, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:
        pass  # no Linux
    if platform.system() == "Darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


def _ram_gib() -> float | None:
    """Main memory, or a container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit_file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total / GIB


def _gpu_driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None
