"""A wheel of the tree works where only it is installed, away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovbench.networks.builtin.scenes import render


def test_wheel_in_a_bare_folder(repo: Path, tmp_path: Path) -> None:
    if not (repo / ".git").exists():
        pytest.skip("not a git checkout: cannot tell which files belong to the tree")
    source = tmp_path / "source"  # setuptools leaves build/ in the tree it builds from
    files = subprocess.run(
        ["git", "-C", str(repo), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (repo / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repo / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = tmp_path.glob("ovbench-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    bare = tmp_path / "bare"
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(bare), str(wheel)], check=True
    )

    # the editable install's finder must not answer for the bare folder
    code = (
        "import sys; sys.path.insert(0, {bare!r}); sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import ovbench; assert ovbench.__file__.startswith({bare!r}), ovbench.__file__\n"
        "from ovbench.cli.app import run_command; sys.exit(run_command({arguments!r}))"
    )

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code.format(bare=str(bare), arguments=list(arguments))]
            if sys.version_info >= (3, 11)
            else [sys.executable, "-c", code.format(bare=str(bare), arguments=list(arguments))],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {"clip", "sc-clip"} <= {entry["name"] for entry in json.loads(run("list", "methods", "--json"))}
    assert {entry["name"] for entry in json.loads(run("list", "datasets", "--json"))} >= {"voc21", "ade20k"}
    scene = render(["sky", "grass", "dog"], 224, 288, seed=10**6)
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    report = json.loads(
        run(
            "predict",
            "scene.png",
            "--weights",
            "builtin",
            "--classes",
            "sky, grass, dog",
            "--overlay",
            "o.png",
            "--json",
        )
    )
    assert report["demo"] and (tmp_path / "o.png").is_file()
    shares = np.array([entry["share"] for entry in report["classes"]])
    truth = np.bincount(scene.label.ravel(), minlength=3) / scene.label.size
    assert np.abs(shares - truth).max() < 0.25  # the weights came along and mean something
