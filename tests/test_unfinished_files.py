"""One file that is not finished yet stops nobody who works with the others."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ovbench import benchmarks, registry
from ovbench.cli.app import run_command
from ovbench.errors import DataError, OvbenchError, OvbenchWarning, UsageError
from ovbench.paths import config_dir, methods_dir

VOC = (config_dir() / "voc21.py").read_text(encoding="utf-8")
WORDS = (config_dir() / "words" / "voc21.json").read_text(encoding="utf-8").replace('"voc21"', '"mine"')


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of the dataset configs that may be spoilt."""
    folder = tmp_path / "dataset_configs"
    shutil.copytree(config_dir(), folder, ignore=shutil.ignore_patterns("prompts", "__pycache__"))
    monkeypatch.setattr("ovbench.benchmarks.catalog.config_dir", lambda: folder)
    benchmarks.get.cache_clear()
    yield folder
    monkeypatch.undo()
    benchmarks.get.cache_clear()


UNFINISHED = {
    "syntax": ("benchmark = dict(", WORDS, "mine.py"),
    "half": (VOC[: len(VOC) // 2], WORDS, "mine.py"),
    "no data": (VOC + "\nimport os\n", WORDS, "mine.py"),
    "empty": ("", WORDS, "mine.py"),
    "no words": (VOC, None, "mine.json"),
    "half the words": (VOC, WORDS[: len(WORDS) // 2], "mine.json"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_an_unfinished_benchmark_stops_no_other(configs, case, capsys):
    config, words, file = UNFINISHED[case]
    (configs / "mine.py").write_text(config, encoding="utf-8")
    if words is not None:
        (configs / "words" / "mine.json").write_text(words, encoding="utf-8")
    assert run_command(["list", "datasets", "--json"]) == 0
    said = capsys.readouterr()
    assert {"voc21", "ade20k"} <= {entry["name"] for entry in json.loads(said.out)}
    [line] = [line for line in said.err.splitlines() if "mine" in line]
    assert line.startswith("Warning: The benchmark 'mine' is left out") and file in line
    assert "mine" not in benchmarks.names() and "mine" not in benchmarks.with_split("train")
    with pytest.raises(DataError, match=file):
        benchmarks.get("mine")


def test_a_run_on_another_benchmark_goes_through(configs, tmp_path, capsys):
    (configs / "mine.py").write_text("benchmark = dict(", encoding="utf-8")
    asked = ["run", "--demo", "-m", "clip", "--limit", "1", "--gallery", "0", "--results", str(tmp_path / "runs")]
    assert run_command([*asked, "-d", "voc21"]) == 0
    assert capsys.readouterr().err.count("mine.py") == 1
    assert run_command([*asked, "-d", "mine"]) == DataError.exit_code
    assert "mine.py' cannot be read" in capsys.readouterr().err


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """A copy of the method modules that may be spoilt."""
    folder = tmp_path / "methods"
    shutil.copytree(methods_dir(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(registry, "methods_dir", lambda: folder)
    registry._read.cache_clear()
    yield folder
    monkeypatch.undo()
    registry._read.cache_clear()


@pytest.mark.parametrize(
    "source",
    [
        "METHODS = {",
        "METHODS = {'mine': make()}",
        "METHODS = ['mine']",
        "METHODS = {'mine': {'summary': 'no class'}}",
        "METHODS = {'mine': {'cls': 'Mine', 'summary': '', 'colour': 'red'}}",
        "METHODS = {'mine': 'Mine'}",
        "\0",
        b"METHODS = {'mine': '\xff'}",
    ],
)
def test_an_unfinished_method_module_stops_no_other(methods, source, capsys):
    (methods / "mine.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    assert run_command(["list", "methods", "--json"]) == 0
    said = capsys.readouterr()
    names = {entry["name"] for entry in json.loads(said.out)}
    assert {"clip", "sc-clip", "fcn"} <= names and "mine" not in names
    [line] = [line for line in said.err.splitlines() if "mine.py" in line]
    assert line.startswith("Warning: ") and line.endswith("They are left out.")
    assert registry.method_class("clip").__name__
    with pytest.raises(OvbenchError, match=r"mine\.py' cannot be read"):
        registry.method_info("mine")
    with pytest.raises(UsageError, match=r"Unknown method 'my-other'.*mine\.py' cannot be read"):
        registry.method_info("my-other")


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("theirs", "METHODS = {'theirs': make()}", "must be a literal dict"),
        ("theirs", "class Theirs(", "must be a literal dict"),
        ("clip", "class Theirs: pass", "that name is taken"),
    ],
)
def test_a_broken_entry_point_stops_no_other(methods, tmp_path, monkeypatch, name, source, message):
    assert methods.is_dir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "their_broken_package.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    point = EntryPoint(name, "their_broken_package:Theirs", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.warns(OvbenchWarning, match=message):
        assert "sc-clip" in registry.method_names()
    assert registry.method_info("sc-clip").cls == "SCCLIP"
    with warnings.catch_warnings(), pytest.raises(OvbenchError, match=message):
        warnings.simplefilter("error")  # said once
        registry.method_info(name)


def test_no_file_of_ours_is_unfinished():
    with warnings.catch_warnings():
        warnings.simplefilter("error", OvbenchWarning)
        benchmarks.get.cache_clear()
        registry._read.cache_clear()
        assert len(benchmarks.names()) == len(list(Path(config_dir()).glob("[!_]*.py")))
        assert "fisa" in registry.method_names(None)
