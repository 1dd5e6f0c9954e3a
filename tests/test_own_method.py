"""A method of one's own: from a file, from an installed package, and the tutorial."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import photo, save_tiny
from tutorial import blocks, follow

import ovbench
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import RunError, UsageError
from ovbench.models.own_file import own_frame
from ovbench.registry import method_class, method_info
from ovbench.results import store

# As methods/kk.py does it, with an option, under "from __future__ import annotations" (which dataclasses must survive).
OWN = """
from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from ovbench.networks.dense_clip import LastBlock
from ovbench.models.method import Method

METHODS = {"anything": {"cls": "Mine", "summary": "mine", "paper": "me", "protocol": "naclip"}}


@dataclass(frozen=True)
class Options:
    scale: float = 1.0


def key_key(q, k, v, grid):
    return F.scaled_dot_product_attention(k, k, v)


class Mine(Method):
    Config = Options

    def features(self, images):
        return self.config.scale * self.clip.dense(images, LastBlock(key_key, residual=False, mlp=False))


class Plain(Mine):
    pass


class Broken(Method):
    def features(self, images):
        return images.view(3)


class Bare(Method):
    pass


class Other:
    pass


number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "folder" / "my_method.py"
    path.parent.mkdir()
    path.write_text(OWN, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


def test_info_needs_no_import(own: Path) -> None:
    info = method_info("folder/my_method.py:Mine")
    assert (info.name, info.summary, info.paper, info.protocol) == ("my_method:Mine", "mine", "me", "naclip")
    assert info.source == own and info.source_sha256 == hashlib.sha256(own.read_bytes()).hexdigest()
    assert info.recorded() == {"source_sha256": info.source_sha256}
    assert method_info("./folder/my_method.py:Plain").protocol == "common"
    assert method_info(f"{own}:Mine").name == "my_method:Mine"
    assert method_info("clip").recorded() == {}
    own.write_text("raise SystemExit\nclass Mine: pass\n", encoding="utf-8")
    assert method_info("folder/my_method.py:Mine").protocol == "common"  # nothing was run


def test_the_class_is_run_once_per_content(own: Path) -> None:
    first = method_class("folder/my_method.py:Mine")
    assert method_class(str(own) + ":Mine") is first and first.__name__ == "Mine"
    own.write_text(OWN.replace("1.0", "2.0"), encoding="utf-8")  # same size, same second
    second = method_class("folder/my_method.py:Mine")
    assert (first.Config().scale, second.Config().scale) == (1.0, 2.0)
    assert sorted(path.name for path in own.parent.iterdir()) == ["my_method.py"]  # no cache beside it


def test_it_gives_what_the_same_method_of_ovbench_gives(own: Path, weights: str) -> None:
    images = torch.stack([photo(90, 120, seed) for seed in (0, 1)])
    settings: dict[str, Any] = {"weights": weights, "classes": ["a", ["b", "c"]], "templates": "plain"}
    mine = ovbench.build_segmentor("folder/my_method.py:Mine", **settings)
    theirs = ovbench.build_segmentor("kk", **settings)
    assert torch.equal(mine.seg_logits(images), theirs.seg_logits(images))
    assert type(mine.model.method).__name__ == "Mine"
    assert mine.model.protocol == theirs.model.protocol  # "paper" is the table's naclip
    scaled = ovbench.build_segmentor("folder/my_method.py:Mine", method_options={"scale": "2"}, **settings)
    assert scaled.model.method.options() == {"scale": 2.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.py:Mine", None, r"'none\.py' does not exist.*\./my_method\.py:MyMethod"),
        ("folder/none:Mine", None, r"'folder/none' does not exist"),
        ("./folder:Mine", None, r"'\./folder' is a folder"),
        ("folder/my_method.py", None, r"Which class of 'folder/my_method\.py'.*my_method\.py:"),
        ("folder/my_method.py:Mime", None, r"Unknown class 'Mime'\. Did you mean: Mine\?.*folder/my_method\.py"),
        ("folder/my_method.py:Other", None, r"'Other' .*is not a method: derive it from ovbench\.models\.method\.Method"),
        ("folder/my_method.py:number", None, r"'number' .*is not a method"),
        ("folder/my_method.py:Method", None, r"'Method' .*does not override features\(\)"),
        ("folder/my_method.py:Bare", None, r"'Bare' .*does not override features\(\)"),
        ("my_method:Mine", None, r"how a record names a method from a file: .*\./my_method\.py:Mine"),
        ("a.py:A", "class A(:\n", r"'a\.py' is not Python: .*\(line 1\)"),
        ("a.py:A", "x = 1\n", r"Unknown class 'A': there is none"),
        ("a.py:A", "\nimport nothing_such\nclass A: pass\n", r"No module named 'nothing_such' \(a\.py line 2, in <module>\)"),
        ("a.py:A", "class A: pass\ndef f():\n    return 1 / 0\nf()\n", r"ZeroDivisionError: .*\(a\.py line 3, in f\)"),
        ("a.py:A", "class A: pass\nraise SystemExit(1)\n", r"SystemExit: 1 \(a\.py line 2"),
        ("a.py:A", "import beside\nclass A: pass\n", r"No module named 'beside' .*neighbours are not searched"),
        ("a.py:A", "METHODS = make()\nclass A: pass\n", r"METHODS in 'a\.py' must be a literal"),
    ],
)  # fmt: skip
def test_wrong_files_are_explained(own: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        Path("a.py").write_text(content, encoding="utf-8")
        Path("beside.py").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=f"(?s){message}"):
        method_class(name)


def test_an_error_in_the_method_is_shown_with_its_line(
    own: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = OWN.splitlines().index("        return images.view(3)") + 1
    place = rf"my_method\.py line {line}, in features"
    seg = ovbench.build_segmentor("folder/my_method.py:Broken", weights=weights, classes=["a"], templates="plain")
    with pytest.raises(RuntimeError) as caught:
        seg.seg_logits(photo(64, 64)[None])
    assert own_frame(caught.value) == place.replace("\\", "")
    data = synth("voc20", Path("data"), images=2)
    spec = {"method": "folder/my_method.py:Broken", "dataset": "voc20", "weights": weights}
    with pytest.raises(RunError, match=place):
        ovbench.run(spec, data_root=data, workers=0, gallery=0)
    arguments = ["predict", str(next(data.rglob("*.jpg"))), "-m", "folder/my_method.py:Broken", "--weights", weights]
    assert run_command([*arguments, "--classes", "a", "--templates", "plain", "--device", "cpu"]) == 5
    assert place.replace("\\", "") in capsys.readouterr().err


def test_the_record_names_class_and_content_but_no_place(own: Path, weights: str) -> None:
    data = synth("voc20", Path("data"), images=2)
    spec: dict[str, Any] = {"dataset": "voc20", "weights": weights, "protocol": {"templates": "plain"}}
    options: dict[str, Any] = {"data_root": data, "workers": 0, "gallery": 0, "results": "out"}
    record = ovbench.run({**spec, "method": "folder/my_method.py:Mine"}, **options)
    assert record.spec.method == "my_method:Mine"
    assert record.spec.method_options == {"scale": 1.0, "source_sha256": hashlib.sha256(own.read_bytes()).hexdigest()}
    path = store.record_path(record, "out")
    assert path.is_file() and path.parent == Path("out/my_method-Mine/voc20")
    assert str(own.parent) not in path.read_text(encoding="utf-8")
    elsewhere = shutil.copytree(own.parent, own.parent.with_name("elsewhere")) / own.name
    again = ovbench.run({**spec, "method": f"{elsewhere}:Mine"}, **options)
    assert again.spec_hash == record.spec_hash and again.metrics == record.metrics
    own.write_text(OWN + "\n# changed\n", encoding="utf-8")
    changed = ovbench.run({**spec, "method": "folder/my_method.py:Mine"}, **options)
    assert changed.spec_hash != record.spec_hash


def test_a_dumped_config_builds_the_method(own: Path, weights: str) -> None:
    from mmengine.config import Config

    from ovbench.evaluate.config import dump_config
    from ovbench.evaluate.state import RunOptions
    from ovbench.mm.segmentor import MODELS
    from ovbench.spec import RunSpec

    data = synth("voc20", Path("data"), images=2)
    spec = RunSpec(method="folder/my_method.py:Mine", dataset="voc20", weights=weights, protocol="common")  # type: ignore[arg-type]
    cfg = Config.fromfile(dump_config(spec, RunOptions(data_root=data), Path("run.py")))
    assert type(MODELS.build(cfg.model).model.method).__name__ == "Mine"


def install(site: Path, *, entry: str = "their-method = their_package.inner.methods:Mine", source: str = OWN) -> None:
    """A little package as pip leaves it: modules, and a dist-info with entry points."""
    package = site / "their_package" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("import sys; sys.stderr.write('IMPORTED\\n')\n")
    (package / "__init__.py").write_text("")
    (package / "methods.py").write_text(source)
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ovbench.methods]\n{entry}\n")


def test_a_package_registers_a_method(
    tmp_path: Path, weights: str, run_cli: Callable[..., Any], run_python: Callable[..., Any]
) -> None:
    install(tmp_path / "site")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    listed = run_cli("list", "methods", "--json", fresh=True, **path)
    assert listed.returncode == 0 and "IMPORTED" not in listed.stderr
    [entry] = [entry for entry in json.loads(listed.stdout) if entry["name"] == "their-method"]
    own = {"name": "their-method", "summary": "mine", "paper": "me", "protocol": "naclip"}
    assert entry == {**own, "track": "open-vocabulary"}
    data = synth("voc20", tmp_path / "data", images=2)
    arguments = [
        "-d",
        "voc20",
        "--data-root",
        str(data),
        "--weights",
        weights,
        "--templates",
        "plain",
        "--device",
        "cpu",
    ]
    code = (
        "from ovbench.cli.app import run_command; from ovbench.mm.segmentor import MODELS; from ovbench import build_segmentor\n"
        f"assert run_command({['run', '-m', 'their-method', *arguments, '--gallery', '0', '--json']}) == 0\n"
        f"seg = build_segmentor('their-method', weights={weights!r}, classes=['a'], templates='plain')\n"
        "assert type(seg.model.method).__name__ == 'Mine' and MODELS.get('their-method') is not None"
    )
    done = run_python("-c", code, cwd=tmp_path, **path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["spec"]["method"] == "their-method"
    assert record["spec"]["method_options"] == {"scale": 1.0, "source_sha256": hashlib.sha256(OWN.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("arguments", "source", "message"),
    [
        ({"entry": "clip = their_package.inner.methods:Mine"}, OWN, "that name is taken by 'ovbench.methods.clip'"),
        ({"entry": "x = their_package.inner.methods:Mime"}, OWN, "should be 'Mime' in 'their_package.inner.methods'"),
        ({"entry": "x = their_package.inner.methods:Other"}, OWN, "is not a method: derive it"),
        ({"entry": "x = their_package.nowhere:Mine"}, OWN, "of an installed package cannot be imported: ModuleNotFoundError"),
        ({"entry": "x = their_package.inner.methods:Mine"}, "import gone\n", "ModuleNotFoundError: No module named 'gone'"),
    ],
)  # fmt: skip
def test_wrong_packages_are_explained(
    tmp_path: Path, run_python: Callable[..., Any], arguments: dict[str, str], source: str, message: str
) -> None:
    install(tmp_path / "site", source=source, **arguments)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    code = f"from ovbench.registry import method_class; method_class({arguments['entry'].split(' ')[0]!r})"
    done = run_python("-c", code, **path)
    assert done.returncode == 1 and message in done.stderr


def test_the_tutorial(repo: Path, tmp_path: Path) -> None:
    page, folder = repo / "docs" / "own-method.md", tmp_path / "work"
    folder.mkdir()
    assert [block.language for block in blocks(page)] == ["python", "sh", "python", "sh", "toml"]
    outputs = follow(page, folder)
    records = store.load_all(folder / "results" / "runs")
    assert [record.spec.method for record in records] == ["my_method:MyMethod"] * 2
    assert {record.spec.method_options["mix"] for record in records} == {0.5, 0.2}
    digest = hashlib.sha256((folder / "my_method.py").read_bytes()).hexdigest()
    assert {record.spec.method_options["source_sha256"] for record in records} == {digest}
    assert all(record.metrics is not None and np.isfinite(record.metrics.miou or np.nan) for record in records)
    assert "mix=0.2" in outputs[0] and "my_method:MyMethod" in outputs[0]
    assert len(list((folder / "pictures").glob("*-overlay.png"))) == 2


def test_a_file_of_the_version_before_is_told_where_modules_are_now(tmp_path):
    old = tmp_path / "old.py"
    old.write_text("from ovbench.method import Method\n\n\nclass Mine(Method):\n    pass\n")
    with pytest.raises(UsageError, match=r"'ovbench\.method' is 'ovbench\.models\.method' since ovbench 0\.2.*line 1"):
        method_class(f"{old}:Mine")


@pytest.mark.parametrize(("old", "new"), ovbench._MOVED.items())
def test_every_moved_name_says_a_module_that_there_is(old, new):
    assert importlib.util.find_spec(f"ovbench.{new}") is not None
    with pytest.raises(ImportError, match=f"is 'ovbench.{new}'"):
        importlib.import_module(f"ovbench.{old}")
