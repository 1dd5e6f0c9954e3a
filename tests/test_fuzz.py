"""Files of strangers, random and hostile: only errors that are meant for users come out, and nothing outside is written."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovbench import benchmarks
from ovbench.benchmarks.check.checking import check
from ovbench.benchmarks.prepare import prepare, sources
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import OvbenchError, OvbenchWarning
from ovbench.results import image_areas, profiles, store
from ovbench.train import recipe
from ovbench.words import class_list as classlist
from ovbench.words.prompts import descriptions

MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
FEW = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
DEEP = "[" * 100_000


def harmless(call: Callable[[], object]) -> None:
    """Runs it; lets pass that it works, and errors meant for users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except OvbenchError as error:
            assert error.exit_code in (2, 3, 4, 5)
            assert str(error)


def ends_well(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    """The exit code of a command: 0, or 2 to 5 with a message and without a traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run_command(list(arguments))
    shown = capsys.readouterr()
    assert code in (0, 2, 3, 4, 5), (code, arguments)
    assert "Traceback" not in shown.err
    # a report of faults is data, and goes to stdout
    assert code == 0 or "Error: " in shown.err or "not usable" in shown.out
    return code


def state_of(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content, and every folder and link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


words = st.text(max_size=30)
nasty = st.one_of(
    words,
    st.sampled_from(
        ["", "..", "../..", "../../etc/passwd", "/etc/passwd", "~nobody-here", "a\0b", "x" * 5000, "\ud800"]
    ),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | nasty,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(nasty, inner, max_size=4),
    max_leaves=12,
)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A value with one entry somewhere in it replaced, dropped or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value, key=str)))
        if not draw(st.integers(0, 6)):
            return {name: entry for name, entry in value.items() if name != key}
        if not draw(st.integers(0, 8)):
            return {**value, draw(nasty): draw(values)}
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutated(draw, value[index]), *value[index + 1 :]]
    return draw(values)


# Texts


@MANY
@given(st.binary(max_size=300) | words.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_class_lists(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "classes.txt")
        path.write_bytes(content)
        harmless(lambda: classlist.read_file(path))


@MANY
@given(nasty)
@example("~nobody-here/classes.txt")
@example("a, " * 4000)
def test_classes_as_typed(text: str) -> None:
    harmless(lambda: classlist.read(text))


RECIPE = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.0, "batch": 4, "crop": 64, "iters": 10, "resize": [64, 32]}
ALIASES = "a: &a [x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)


@MANY
@given(st.data(), st.sampled_from([".json", ".yaml"]))
def test_recipes(data: st.DataObject, suffix: str) -> None:
    content = data.draw(st.binary(max_size=200) | st.composite(lambda draw: as_json(mutated(draw, RECIPE)))())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"recipe{suffix}")
        path.write_bytes(content)
        harmless(lambda: recipe.recipe({}, "ade20k", path)[0].iterations(1000))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "lr: !!python/name:os.system",
        ALIASES + "lr: *g",
        DEEP,
        "{" * 5000,
        "? [1, 2]\n: 3",
        "lr: 2020-13-45",
        "lr: .inf",
        "epochs: .inf\niters: null",
        f"lr: {'1' * 5000}",
        "lr: 1:60:99",
        "\0",
        "<<: 3",
        "lr: !!float x",
        "lr: !!int ''",
        "lr: !!timestamp x",
    ],
)
def test_recipes_that_are_known_to_hurt(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    declared = {"*": {**RECIPE, "iters": None, "epochs": 1.0}}
    for suffix in (".yaml", ".json"):
        path = tmp_path / f"recipe{suffix}"
        path.write_text(text)
        harmless(lambda path=path: recipe.recipe(declared, "ade20k", path)[0].iterations(1000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json", "recipe.yaml"]


PROMPTS = {
    "format": "ovbench-prompts",
    "version": 1,
    "classes": {"cat": {"colour": "grey", "called": ["a cat"]}, "dog": ["a dog"]},
}


@MANY
@given(st.composite(lambda draw: as_json(mutated(draw, PROMPTS)))() | st.binary(max_size=100))
@example(DEEP.encode())
@example(as_json({**PROMPTS, "attributes": 5}))
@example(as_json({**PROMPTS, "attributes": "colour"}))
def test_descriptions(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.json")
        path.write_bytes(content)
        harmless(lambda: descriptions.read(path))


# Records


@MANY
@given(data=st.data())
def test_records(make_record: Callable[..., Any], data: st.DataObject) -> None:
    whole = json.loads(make_record().to_json())
    content = data.draw(st.composite(lambda draw: as_json(mutated(draw, whole)))() | st.binary(max_size=100))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m", "d", "run.json")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        before = state_of(Path(folder))

        def read_and_write() -> None:
            record = store.read(path)
            record.spec.spec_hash()
            results = Path(folder, "out")
            if record.spec_hash == record.spec.spec_hash():
                written = store.write(record, results)
                assert written.resolve().is_relative_to(results.resolve())

        harmless(read_and_write)
        harmless(lambda: profiles.read(path))
        assert before.items() <= state_of(Path(folder)).items()
        assert {name.split("/")[0] for name in state_of(Path(folder))} <= {"m", "out"}


@pytest.mark.parametrize("run_id", ["../../evil", "/tmp/evil", "..", "a/b", ".hidden", "a\0b", "x" * 300])
def test_a_record_does_not_choose_a_path(run_id: str, make_record: Callable[..., Any], tmp_path: Path) -> None:
    content = json.loads(make_record().to_json())
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**content, "run_id": run_id}))
    with pytest.raises(OvbenchError, match="run_id"):
        store.read(path)
    for name in ("method", "dataset"):
        spec = {**content["spec"], name: "../../../evil"}
        path.write_text(json.dumps({**content, "spec": spec}))
        harmless(lambda: store.record_path(store.read(path), tmp_path).relative_to(tmp_path))
        place = store.record_path(store.read(path), tmp_path)
        assert ".." not in place.relative_to(tmp_path).parts


@FEW
@given(data=st.data())
def test_areas_beside_a_record(make_record: Callable[..., Any], data: st.DataObject) -> None:
    record = make_record()
    header = {"version": 1, "dataset_fingerprint": record.provenance.dataset_fingerprint}
    entry = {"index": 0, "name": "a", "classes": [0], "intersect": [1], "pred": [1], "label": [1], "times_ms": {}}
    lines = [data.draw(st.composite(lambda draw, one=one: as_json(mutated(draw, one)))()) for one in (header, entry)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.areas.jsonl")
        for content in (b"\n".join(lines), b"\n".join([as_json(header), lines[1]]), DEEP.encode(), b"[]\n[]", b"\xff"):
            path.write_bytes(content)
            harmless(lambda: image_areas.read(path, record))


@pytest.mark.parametrize(
    "content", [DEEP, "[]", "{}", "\0", '{"schema_version": 1e999}', "9" * 5000, '{"schema_version": true}']
)
def test_commands_on_broken_records(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs/m/d/run.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = state_of(tmp_path)
    assert ends_well(capsys, "verify", str(path)) in (2, 3)
    ends_well(capsys, "table", "--results", str(tmp_path / "runs"))
    ends_well(capsys, "compare", str(path), str(path), "--results", str(tmp_path / "runs"))
    assert state_of(tmp_path) == before


# Datasets of one's own


def own_folder(folder: Path) -> Path:
    for number in range(2):
        for part, values in (("images", np.zeros((8, 9, 3), np.uint8)), ("labels", np.full((8, 9), number, np.uint8))):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / part / f"{number}.png")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


FACTS = {"name": "mine", "title": "Mine", "version": 1, "background": False, "reduce_zero_label": False}


@MANY
@given(st.composite(lambda draw: as_json(mutated(draw, FACTS)))() | st.binary(max_size=100))
@example(DEEP.encode())
def test_own_dataset_facts(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = own_folder(Path(home, "data"))
        (folder / "dataset.json").write_bytes(content)
        before = state_of(Path(home))
        harmless(lambda: benchmarks.get(str(folder)).pairs(folder))
        assert state_of(Path(home)) == before


CONFIG: dict[str, dict[str, Any]] = {
    "benchmark": {"title": "Mine", "homes": [""], "expected_images": 2},
    "dataset": {
        "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
        "ann_file": "",
        "img_suffix": ".png",
        "seg_map_suffix": ".png",
    },
    "synth": {"home": "", "stems": ["{i:03d}"]},
}


def as_config(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in values.items())


@MANY
@given(data=st.data())
def test_own_dataset_configs(data: st.DataObject) -> None:
    text = data.draw(
        st.composite(lambda draw: as_config({key: mutated(draw, part) for key, part in CONFIG.items()}))() | words
    )
    with tempfile.TemporaryDirectory() as home:
        folder = own_folder(Path(home, "data"))
        path = folder / "mine.py"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        (folder / "mine.txt").write_text("cat\ndog\n")
        before = state_of(Path(home))

        def use() -> None:
            found = benchmarks.get(str(path))
            for layout in (found.layout, *(split.layout for split in found.splits.values())):
                for place in (layout.image_dir, layout.label_dir, layout.split_file):
                    assert ".." not in place.split("/") and not place.startswith("/")
            found.pairs(folder)

        harmless(use)
        assert state_of(Path(home)) == before


@pytest.mark.parametrize(
    "text",
    ["x = " + "(" * 100_000, "x = " + "[" * 90 + "]" * 90, "x = 1+" * 30_000 + "1", "import os", "benchmark = dict(**{})",
     "benchmark = __import__('os').system('true')", "benchmark = dict(a=[i for i in ()])", "\0", "x = '\\ud800'"],
)  # fmt: skip
def test_configs_that_are_known_to_hurt(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert ends_well(capsys, "data", "check", str(path), "--data-root", str(tmp_path)) in (2, 3)


# Pictures


def png(width: int, height: int, depth: int = 8, colour: int = 0, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def encoded(values: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format=kind)
    return file.getvalue()


GOOD = [
    encoded(np.zeros((8, 9), np.uint8), "PNG"),
    encoded(np.zeros((8, 9), np.uint16), "PNG"),
    encoded(np.zeros((8, 9), np.uint16), "TIFF"),
    encoded(np.zeros((8, 9), np.int32), "TIFF"),
    encoded(np.zeros((8, 9), np.float32), "TIFF"),
    encoded(np.zeros((8, 9, 3), np.uint8), "PNG"),
    encoded(np.zeros((8, 9, 4), np.uint8), "PNG"),
    encoded(np.zeros((8, 9), bool), "PNG"),
    encoded(np.zeros((8, 9, 3), np.uint8), "JPEG"),
    encoded(np.zeros((8, 9, 3), np.uint8), "GIF"),
    encoded(np.zeros((8, 9, 3), np.uint8), "BMP"),
    encoded(np.zeros((8, 9, 3), np.uint8), "WEBP"),
    encoded(np.zeros((8, 9), np.uint8), "PPM"),
]
HUGE = [
    png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), png(0, 0), png(2**31 - 1, 1), png(1, 1, 16, 6), png(3, 3, 1, 3), png(9, 8, 7),
    png(12_000, 12_000),
]  # fmt: skip


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from([*GOOD, *HUGE])))
    how = draw(st.sampled_from(["cut", "flip", "both", "random", "whole"]))
    if how == "random":
        return draw(st.binary(max_size=200))
    if how in ("flip", "both"):
        for _ in range(draw(st.integers(1, 6))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    if how in ("cut", "both"):
        content = content[: draw(st.integers(0, len(content)))]
    return bytes(content)


def with_label(folder: Path, name: str, content: bytes, part: str = "label") -> Path:
    """A data root with one pair, whose label (or image) has this content."""
    layout = benchmarks.get(name).layout
    for path, body in ((layout.image("x"), GOOD[8]), (layout.label("x"), GOOD[2 if name == "ade847" else 0])):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if path == (layout.label("x") if part == "label" else layout.image("x")) else body)
    return folder


@MANY
@given(pictures(), st.sampled_from(["ade20k", "ade847"]), st.sampled_from(["label", "image"]))
@example(HUGE[0], "ade20k", "label")
@example(HUGE[1], "ade847", "image")
def test_labels_and_images(content: bytes, name: str, part: str) -> None:
    from ovbench.pictures import read_rgb

    with tempfile.TemporaryDirectory() as home:
        root = with_label(Path(home), name, content, part)
        before = state_of(root)
        harmless(lambda: check(name, root, workers=1).to_json())
        [pair] = benchmarks.get(name).pairs(root)
        harmless(lambda: benchmarks.get(name).load_label(pair.label))
        harmless(lambda: read_rgb(pair.image))
        assert state_of(root) == before


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", HUGE[0], HUGE[1], GOOD[5], GOOD[4], b"II*\0" + b"\xff" * 90]
)
def test_commands_on_broken_labels(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = with_label(tmp_path / "d", "ade20k", content)
    assert ends_well(capsys, "data", "check", "ade20k", "--data-root", str(root)) == 3
    assert ends_well(capsys, "data", "frequencies", "ade20k", "--data-root", str(root), "--split", "val") == 3


# Archives

TARGETS = st.one_of(
    st.text(alphabet="ab./\\:~ \0\nCé", min_size=1, max_size=24),
    st.sampled_from(
        ["../evil", "a/../../evil", "/tmp/evil", "\\\\host\\evil", "C:\\evil", "c:evil", "a\0b", "x" * 300, "d/" * 200 + "x", ".",
         "images/validation/ADE_val_1.jpg", "annotations/validation/ADE_val_1.png", "annotations/validation/../../../evil.png",
         "images/validation/" + "y" * 300 + ".jpg", "annotations/validation/ADE_val_1.png/", "~/evil", "images\\validation\\a.jpg",
         "images/validation/a\nb.jpg"]
    ),
)  # fmt: skip
KINDS = st.sampled_from(["file", "folder", "link", "hard link", "device", "fifo"])
MEMBERS = st.lists(st.tuples(TARGETS, KINDS, st.sampled_from(["../../evil", "/etc/passwd", "x"])), max_size=6)
# What every archive holds besides: enough for a preparation to write something.
REAL = {
    "ADE/images/validation/ADE_val_00000001.jpg": GOOD[8],
    "ADE/annotations/validation/ADE_val_00000001.png": GOOD[0],
}


def tarred(path: Path, members: list[tuple[str, str, str]], mode: str = "w") -> None:
    types = {
        "file": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE,
    }  # fmt: skip
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for name, body in REAL.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = types[kind], target if "link" in kind else ""
            info.size = len(GOOD[0]) if kind == "file" else 0
            archive.addfile(info, io.BytesIO(GOOD[0]))


def zipped(path: Path, members: list[tuple[str, str, str]]) -> None:
    modes = {"file": 0o100644, "folder": 0o40755, "link": 0o120777, "hard link": 0, "device": 0o20644, "fifo": 0o10644}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, body in REAL.items():
            archive.writestr(name, body)
        for name, kind, target in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.external_attr = modes[kind] << 16
            archive.writestr(info, target if kind == "link" else GOOD[0])


@FEW
@given(MEMBERS, st.sampled_from(["zip", "tar", "tar.gz"]), st.booleans())
@example([("../evil", "file", "")], "zip", False)
@example([("\0", "file", "")], "zip", False)
@example([(".", "file", "")], "zip", False)
@example([("ADE/images/validation/ADE_val_00000001.jpg", "file", "")], "tar", False)
@example([("ADE/images/validation", "link", "/tmp")], "tar", False)
def test_archives(members: list[tuple[str, str, str]], kind: str, in_place: bool) -> None:
    with tempfile.TemporaryDirectory() as home:
        surroundings = Path(home, "a", "b")
        surroundings.mkdir(parents=True)
        (surroundings / "mine.txt").write_text("keep")
        source = surroundings / f"source.{kind}"
        try:
            if kind == "zip":
                zipped(source, members)
            else:
                tarred(source, members, "w:gz" if kind == "tar.gz" else "w")
        except (ValueError, UnicodeError, OSError):
            return  # what Python's writer refuses cannot be tried this way
        out = surroundings / "out"
        if in_place:
            out.mkdir()
        before = state_of(Path(home))
        harmless(lambda: prepare("ade20k", [source], out, workers=1))
        after = state_of(Path(home))
        outside = {name: what for name, what in after.items() if name != "a/b/out" and not name.startswith("a/b/out/")}
        assert outside == {name: what for name, what in before.items() if name != "a/b/out"}
        assert not any(what.startswith("link") for what in after.values())
        for name in ("/tmp/evil", "/evil"):
            assert not Path(name).exists()


@FEW
@given(st.data(), st.sampled_from(["zip", "tar", "tar.gz"]))
def test_damaged_archives(data: st.DataObject, kind: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        source = Path(home, f"source.{kind}")
        if kind == "zip":
            zipped(source, [])
        else:
            tarred(source, [], "w:gz" if kind == "tar.gz" else "w")
        content = bytearray(source.read_bytes())
        for _ in range(data.draw(st.integers(1, 12))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        source.write_bytes(
            bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
        )
        before = state_of(Path(home))

        def read_all() -> None:
            files = sources.list_files(source)
            assert sum(len(content) for _, content in sources.read(files)) >= 0

        harmless(read_all)
        assert state_of(Path(home)) == before


@pytest.mark.parametrize(
    "member",
    [
        ("../evil.png", "file", ""),
        ("/evil.png", "file", ""),
        ("a", "link", "/etc"),
        ("C:\\a", "file", ""),
        ("a", "fifo", ""),
    ],
)
def test_a_hostile_archive_ends_the_command_with_3(
    member: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, make in (("zip", zipped), ("tar", tarred)):
        source = tmp_path / f"source.{kind}"
        make(source, [member])
        before = state_of(tmp_path)
        arguments = ["data", "prepare", "ade20k", "--source", str(source), "--out", str(tmp_path / "out")]
        assert ends_well(capsys, *arguments) == 3
        assert state_of(tmp_path) == before


def test_generated_copies_stay_in_their_folder(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "data")
    (folder / "mine.txt").write_text("cat\ndog\n")
    (folder / "mine.py").write_text(as_config(CONFIG))
    assert synth(str(folder / "mine.py"), tmp_path / "out", images=1).is_dir()
    for number, (section, change) in enumerate(
        [("synth", {"home": "../../evil"}), ("synth", {"stems": ["../../evil_{i}"]}), ("synth", {"stems": ["{i.real.__class__}"]}),
         ("dataset", {"data_prefix": {"img_path": "../evil", "seg_map_path": "labels"}}), ("synth", {"stems": ["{i:99999999d}"]})]
    ):  # fmt: skip
        values = {key: {**part, **(change if key == section else {})} for key, part in CONFIG.items()}
        (folder / "mine.py").write_text(as_config(values))
        before = state_of(tmp_path)
        with pytest.raises(OvbenchError):
            synth(str(folder / "mine.py"), tmp_path / f"out{number}" / "deep", images=1)
        after = state_of(tmp_path)
        assert not any("evil" in name for name in after)
        assert {name for name in after if not name.startswith(f"out{number}")} == set(before)


def test_warnings_are_ours(tmp_path: Path) -> None:
    """Records that are left out are said to be, as ovbench's own warnings."""
    (tmp_path / "m/d").mkdir(parents=True)
    (tmp_path / "m/d/run.json").write_text(DEEP)
    with pytest.warns(OvbenchWarning, match="Left out"):
        assert store.load_all(tmp_path) == []
