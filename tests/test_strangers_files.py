"""What files from strangers may decide: never which code is run, and no place outside their folder unless told."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovbench import benchmarks, paths, registry
from ovbench.benchmarks import own
from ovbench.cli.app import run_command
from ovbench.errors import DataError, OvbenchWarning, UsageError, WeightsError
from ovbench.evaluate.verify import Given, spec_again
from ovbench.models.trained_file import options_again
from ovbench.networks.state_dict import read_state_dict
from ovbench.pictures import read_rgb

REPO = Path(__file__).resolve().parents[1]


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def own_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of one's own with two pairs beside it; a pair of the same names lies outside."""
    for folder in (tmp_path / "data", tmp_path / "outside"):
        for part, values in (("images", np.zeros((8, 9, 3), np.uint8)), ("labels", np.zeros((8, 9), np.uint8))):
            (folder / part).mkdir(parents=True)
            Image.fromarray(values).save(folder / part / "a.png")
    (tmp_path / "data/mine.txt").write_text("cat\ndog\n")

    def write(**dataset: Any) -> Path:
        prefix = {"img_path": "images", "seg_map_path": "labels"}
        given = {"data_prefix": prefix, "img_suffix": ".png", "seg_map_suffix": ".png", **dataset}
        path = tmp_path / "data/mine.py"
        path.write_text(f"benchmark = dict(title='Mine', expected_images=1)\ndataset = {given!r}\n")
        return path

    return write


LEADING_OUT = [
    {"data_prefix": {"img_path": "../outside/images", "seg_map_path": "labels"}},
    {"data_prefix": {"img_path": "images", "seg_map_path": "images/../../outside/labels"}},
    {"data_prefix": {"img_path": "/etc", "seg_map_path": "labels"}},
    {"data_prefix": {"img_path": "..\\outside\\images", "seg_map_path": "labels"}},
    {"ann_file": "../outside/list.txt"},
    {"ann_file": "/etc/passwd"},
    {"img_suffix": "/../../outside/images/a.png"},
]


@pytest.mark.parametrize("dataset", LEADING_OUT, ids=repr)
def test_a_config_cannot_leave_its_folder(dataset: dict[str, Any], own_config: Callable[..., Path]) -> None:
    path = own_config(**dataset)
    with pytest.raises(DataError, match=r"leads out of the data root.*ovbench --trust"):
        benchmarks.get(str(path))


def test_it_can_where_the_user_says_so(
    own_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_config(**LEADING_OUT[0])
    command = ["data", "check", str(path), "--data-root", str(path.parent)]
    assert run_command(command) == 3 and "--trust" in capsys.readouterr().err
    monkeypatch.setenv(paths.TRUST, "0")
    assert run_command(command) == 3
    monkeypatch.setenv(paths.TRUST, "")
    assert run_command(["--trust", *command]) == 0 and "mine: ok" in capsys.readouterr().out
    assert os.environ[paths.TRUST] == "1"


def test_a_config_cannot_name_a_module_as_its_dataset(own_config: Callable[..., Path], tmp_path: Path) -> None:
    """mmengine imports what it has no dataset of."""
    for kind in ("evil.Dataset", "os.system", "evil", "mmseg.BaseSegDataset"):
        path = own_config(type=kind)
        with pytest.raises(DataError, match=r"dataset\.type is .* it must be one of ADE20KDataset"):
            benchmarks.get(str(path))
    assert benchmarks.get(str(own_config(type="ADE20KDataset"))).dataset_type == "ADE20KDataset"


def test_the_known_types_are_mmsegs() -> None:
    spec = importlib.util.find_spec("mmseg")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "datasets/__init__.py").read_text(encoding="utf-8")
    listed = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    assert set(own.TYPES) <= set(ast.literal_eval(listed.value))
    ours = {"PanopticDataset"}  # not for configs of strangers
    assert {benchmarks.get(name).dataset_type for name in benchmarks.names()} <= set(own.TYPES) | ours


def test_split_lists_cannot_leave_the_folder(own_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "data/list.txt").write_text("a\n../../outside/images/a\n")
    benchmark = benchmarks.get(str(own_config(ann_file="list.txt")))
    assert [pair.stem for pair in benchmark.scan(tmp_path / "data").pairs] == ["a"]
    with pytest.raises(DataError, match="1 of 2 image files are missing"):
        benchmark.pairs(tmp_path / "data")


# Code


@pytest.fixture
def method_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("OVBENCH_TOLD_OF_CODE", raising=False)
    path = tmp_path / "mine.py"
    path.write_text(
        "import pathlib\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from ovbench.models.method import Method\n"
        "class Mine(Method):\n"
        "    def features(self, images):\n"
        "        return images\n"
    )
    yield path
    os.environ.pop("OVBENCH_TOLD_OF_CODE", None)


def test_a_file_is_said_to_be_run_before_it_is_and_once(method_file: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    registry.method_info(f"{method_file}:Mine")
    assert not ran.exists()
    with pytest.warns(OvbenchWarning, match=r"mine\.py' is code and is run now, with all your rights") as said:
        registry.method_class(f"{method_file}:Mine")
        registry.method_class(f"{method_file}:Mine")
    assert len(said) == 1 and ran.exists()
    ran.unlink()
    method_file.write_text("raise SystemExit('no')\nclass Mine: pass\n")
    with pytest.warns(OvbenchWarning, match="is run now"), pytest.raises(UsageError, match="cannot be run"):
        registry.method_class(f"{method_file}:Mine")


def test_the_command_says_it_on_stderr_once(method_file: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    done = run_cli(
        "profile", "--method", f"{method_file}:Mine", "--classes", "voc21", "--arch", "ViT-B-16", "--json", fresh=True
    )
    assert done.stderr.count("is code and is run now") == 1, done.stderr
    assert "is code" not in done.stdout
    assert done.stderr.index("is code and is run now") == done.stderr.index("Warning: ") + len(
        f"Warning: '{method_file}' "
    )


def test_a_record_does_not_choose_code(make_record: Callable[..., Any], method_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add --method"):
        spec_again(make_record(method=f"{method_file}:Mine"), Given())
    record = make_record()
    spec = record.spec.model_copy(update={"method_options": {"base": f"{method_file}:Mine"}})
    with pytest.raises(UsageError, match="base method, whose code would be run"):
        spec_again(record.model_copy(update={"spec": spec}), Given())
    with pytest.raises(WeightsError, match="base method"):
        options_again({"base": f"{method_file}:Mine"}, object)
    assert not (tmp_path / "ran").exists()


# Weights


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_run_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    for name, content in (
        ("a.pt", pickle.dumps({"x": Evil(trap)})),
        ("b.pth", pickle.dumps(Evil(trap), protocol=0)),
        ("c.bin", b"PK\x03\x04" + b"\0" * 100),
        ("d.pt", b""),
        ("e.safetensors", pickle.dumps(Evil(trap))),
        ("f.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
        ("g.pt", b"PK\x05\x06" + b"\xff" * 18),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="Cannot read weights"):
            read_state_dict(path)
    torch.save({"x": Evil(trap)}, tmp_path / "h.pt")
    with pytest.raises(WeightsError, match="Cannot read weights"):
        read_state_dict(tmp_path / "h.pt")
    with zipfile.ZipFile(tmp_path / "i.pt", "w") as archive:
        archive.writestr("m/constants.pkl", pickle.dumps(Evil(trap)))
    with pytest.raises(WeightsError, match="holds code"):
        read_state_dict(tmp_path / "i.pt")
    assert not trap.exists()


# Calls that can run what is in a file, and where they are allowed: with an argument that forbids it, or on purpose.
DANGEROUS = {
    "torch.load": lambda call: any(
        k.arg == "weights_only" and ast.literal_eval(k.value) is True for k in call.keywords
    ),
    "np.load": lambda call: not any(keyword.arg == "allow_pickle" for keyword in call.keywords),
    "numpy.load": lambda call: not any(keyword.arg == "allow_pickle" for keyword in call.keywords),
}
NEVER = {
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "eval",
    "os.system", "os.popen", "shelve.open", "joblib.load", "tarfile.extractall", "archive.extractall", "shutil.unpack_archive",
    "archive.extract", "pandas.read_pickle", "dill.load", "cloudpickle.load", "Config.fromfile", "exec",
}  # fmt: skip
ON_PURPOSE = {("own_file.py", "exec")}  # a method from a file: named by the user, and said before


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_in_the_package_loads_what_can_run() -> None:
    found = []
    for folder in ("ovbench", "methods", "dataset_configs"):
        for path in sorted((REPO / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                    found += [f"{path}: imports {name}" for name in names & {"pickle", "marshal", "shelve", "dill"}]
                if not isinstance(node, ast.Call):
                    continue
                name = _name(node.func)
                shell = any(keyword.arg == "shell" for keyword in node.keywords)
                remote = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
                allowed = DANGEROUS[name](node) if name in DANGEROUS else name not in NEVER
                if (not allowed and (path.name, name) not in ON_PURPOSE) or shell or remote:
                    found.append(f"{path}:{node.lineno}: {name}")
    assert found == []


# Pictures


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (65_535, 16_384)])
def test_a_huge_header_costs_no_memory(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png(*size))
    with pytest.raises(DataError, match="pixels"):
        read_rgb(path)


def test_fractions_are_no_ids(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5), 1.5, np.float32)).save(file, format="TIFF")
    path = tmp_path / "a.png"
    path.write_bytes(file.getvalue())
    with pytest.raises(DataError, match="numbers with fractions"):
        benchmarks.get("voc21").load_label(path)


# Paths


def test_the_home_of_a_user_that_is_not_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert paths.user_path("~no-such-user/x") == Path("~no-such-user/x")
    assert paths.user_path("~/x") == Path.home() / "x"
    for command in (
        ["data", "check", "~no-such-user/data"],
        ["data", "check", "voc21", "--data-root", "~no-such-user/data"],
        ["data", "prepare", "voc21", "--source", "~no-such-user/a.zip", "--out", str(tmp_path)],
    ):
        assert run_command(command) in (2, 3)
        assert "Traceback" not in capsys.readouterr().err


def test_an_unfinished_run_does_not_choose_a_path(tmp_path: Path) -> None:
    """The id in a file of areas becomes the name of a folder when the run is resumed."""
    from ovbench.evaluate.shards import SUFFIX, find_unfinished

    header = {"version": 1, "spec_hash": "s", "dataset_fingerprint": "f", "started": "2026-01-01T00:00:00+00:00"}
    path = tmp_path / f"20260101-a{SUFFIX}"
    path.write_text(json.dumps({**header, "run_id": "../../evil"}) + "\n")
    assert find_unfinished(tmp_path, "s", "f") is None
    path.write_text(json.dumps({**header, "run_id": "20260101-a"}) + "\n")
    assert find_unfinished(tmp_path, "s", "f") == path
    for broken in ("[" * 100_000, "[]", "3", ""):
        path.write_text(broken)
        assert find_unfinished(tmp_path, "s", "f") is None
