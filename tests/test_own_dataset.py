"""A benchmark of one's own: a folder without any Python, a config read as data, class lists, and the tutorial."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_clip import photo, save_tiny
from tutorial import blocks, follow

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.check.checking import check
from ovbench.cli.app import run_command
from ovbench.errors import DataError, OvbenchError, UsageError
from ovbench.results import store
from ovbench.words import class_list

CLASSES = "# what is to be seen\nbackground: sky, grass\ncat\n\ndog: puppy, cat and dog\n"


def make(folder: Path, *, images: int = 3, first: int = 0, classes: str | None = CLASSES, suffix: str = ".jpg") -> Path:
    """A dataset folder with pictures of 60 x 80 pixels whose labels hold ``first``..``first + 2`` and a strip of 255."""
    (folder / "images" / "deep").mkdir(parents=True)
    (folder / "labels" / "deep").mkdir(parents=True)
    for index in range(images):
        name = f"{'deep/' if index else ''}picture {index}"
        Image.fromarray(photo(60, 80, index).permute(1, 2, 0).numpy()).save(folder / "images" / f"{name}{suffix}")
        label = np.full((60, 80), 255, dtype=np.uint8)
        label[:50] = first + np.repeat(np.arange(3), [20, 20, 10])[:, None]
        Image.fromarray(label).save(folder / "labels" / f"{name}.png")
    if classes is not None:
        (folder / "classes.txt").write_text(classes, encoding="utf-8")
    return folder


@pytest.fixture
def mydata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "mydata")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        ("sky", "sky", ["sky"]),
        (" sky , cloud ", "sky", ["sky", "cloud"]),
        ("sky: cloud, clear sky", "sky", ["sky", "cloud", "clear sky"]),
        ("sky:", "sky", ["sky"]),
        ("sky: sky, cloud", "sky", ["sky", "cloud"]),
        ("traffic light, stoplight: signal", "traffic light", ["traffic light", "stoplight", "signal"]),
        ("sky, sky", "sky", ["sky", "sky"]),  # as it always was: a word that is given twice counts twice
    ],
)
def test_lines_of_a_class_list(line: str, name: str, words: list[str]) -> None:
    [entry] = class_list.parse_lines(f"# comment\n\n{line}\n")
    assert (entry.name, list(entry.words)) == (name, words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"The class list is empty: .*list\.txt"),
        (b"# only\n\n", "The class list is empty"),
        (b"sky\n: cloud\n", r"list\.txt line 2: ': cloud' has no class name before the colon"),
        (b"sky\n , \n", r"list\.txt line 2: ',' has no word"),
        (b"\xff\xfe\x00", "it is no UTF-8 text"),
    ],
)
def test_wrong_class_lists_are_explained(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        class_list.read(str(path))


def test_class_lists_in_the_command_line(tmp_path: Path) -> None:
    assert [entry.name for entry in class_list.read("road, car,sky")] == ["road", "car", "sky"]
    assert (
        class_list.read(", ".join(f"word {i}" for i in range(500)))[499].name == "word 499"
    )  # no file name is that long
    (tmp_path / "bom.txt").write_bytes("sky\n".encode("utf-8-sig"))
    assert class_list.read(str(tmp_path / "bom.txt"))[0].name == "sky"


def test_a_folder_is_a_benchmark(mydata: Path) -> None:
    found = benchmarks.get("./mydata")
    assert isinstance(found, benchmarks.OwnBenchmark) and benchmarks.own_root(found) == mydata
    assert (found.name, found.num_classes, found.expected_images) == ("mydata", 3, 3)
    assert found.class_names == ("background", "cat", "dog") and found.has_background and not found.reduce_zero_label
    assert found.words("own") == [["background", "sky", "grass"], ["cat"], ["dog", "puppy", "cat and dog"]]
    assert found.words("plain") == [["background"], ["cat"], ["dog"]]
    assert len(set(found.palette)) == 3
    assert [pair.stem for pair in found.pairs(mydata)] == ["deep/picture 1", "deep/picture 2", "picture 0"]
    assert np.unique(found.load_label(found.pairs(mydata)[0].label)).tolist() == [0, 1, 2, 255]
    for name in ("mydata/", str(mydata), "../" + mydata.parent.name + "/mydata"):
        assert benchmarks.get(name).name == "mydata"
    assert benchmarks.own_root(benchmarks.get("voc21")) is None
    assert "mydata" not in benchmarks.names()


def test_a_folder_is_named_where_one_stands(mydata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mydata)
    assert benchmarks.get(".").name == "mydata"
    shutil.copytree(mydata, mydata.with_name("my data (2)"))
    assert benchmarks.get("../my data (2)").name == "my-data-2"


def test_zero_may_mean_unlabelled(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", first=1, classes="sky\ncat\ndog\n")
    (folder / "dataset.json").write_text('{"reduce_zero_label": true, "title": "T", "name": "n", "version": 3}')
    found = benchmarks.get(str(folder))
    assert (found.name, found.title, found.version, found.reduce_zero_label) == ("n", "T", 3, True)
    assert not found.has_background
    assert np.unique(found.load_label(found.pairs(folder)[0].label)).tolist() == [0, 1, 2, 255]
    (folder / "dataset.json").write_text('{"background": true}')
    assert benchmarks.get(str(folder)).has_background


def test_mmseg_reads_the_folder(mydata: Path) -> None:
    from ovbench.mm.readers import build

    found = benchmarks.get(str(mydata))
    dataset = build(found, mydata, short_side=30)
    assert [Path(dataset[i]["data_samples"].img_path).stem for i in range(3)] == ["picture 1", "picture 2", "picture 0"]
    assert dataset.metainfo["classes"] == ("background", "cat", "dog")
    sample = dataset[0]
    assert tuple(sample["inputs"].shape) == (3, 30, 40)
    labels = sample["data_samples"].gt_sem_seg.data[0].numpy()
    assert (labels == found.load_label(found.pairs(mydata)[0].label)).all()


def broken(folder: Path, what: str) -> None:
    """Spoils a dataset folder in one way."""
    images, labels = folder / "images", folder / "labels"
    first = images / "picture 0.jpg"
    match what:
        case "no labels":
            shutil.rmtree(labels)
        case "nothing":
            shutil.rmtree(labels), shutil.rmtree(images), (folder / "classes.txt").unlink()
        case "two kinds":
            Image.open(first).save(images / "other.PNG")
        case "no image":
            shutil.rmtree(images), images.mkdir(), (images / "notes.md").write_text("x")
        case "jpg labels":
            shutil.rmtree(labels), labels.mkdir(), Image.open(first).save(labels / "a.jpg")
        case "twice":
            (folder / "classes.txt").write_text("cat\ndog\ncat: kitten\n")
        case "empty":
            (folder / "classes.txt").write_text("\n")
        case "300":
            (folder / "classes.txt").write_text("\n".join(f"class {i}" for i in range(300)))
        case "json":
            (folder / "dataset.json").write_text("{")
        case "list":
            (folder / "dataset.json").write_text("[]")
        case "keys":
            (folder / "dataset.json").write_text('{"reduce": 1, "background": 3}')
        case "ignore":
            (folder / "dataset.json").write_text('{"ignore_index": 0}')
        case "voc21":
            (folder / "dataset.json").write_text('{"name": "voc21"}')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no labels", r"'\./mydata' has no labels/\. It needs images/, labels/ .* and classes\.txt"),
        ("nothing", r"has no images/ and no labels/ and no classes\.txt"),
        ("two kinds", r"3 \.jpg \('images/.*'\), 1 \.PNG \('images/other\.PNG'\)\. Keep one suffix"),
        ("no image", r"No \.jpg, .* files in '.*images' \(there is 'images/notes\.md'\)"),
        ("jpg labels", r"No \.png files in '.*labels' \(there is 'labels/a\.jpg'\)"),
        ("twice", r"classes\.txt' has the class 'cat' twice"),
        ("empty", "The class list is empty"),
        ("300", "has 300 classes, but 8-bit label files tell 255 apart"),
        ("json", r"dataset\.json' cannot be read"),
        ("list", "must hold an object"),
        ("keys", "unknown key 'reduce'; background is 3, not a bool or a str. Known keys: name,"),
        ("ignore", "ignore_index is always 255"),
        ("voc21", "would be called 'voc21', but that is one of ovbench's"),
    ],
)
def test_wrong_folders_are_explained(mydata: Path, what: str, message: str) -> None:
    broken(mydata, what)
    with pytest.raises(OvbenchError, match=message) as caught:
        benchmarks.get("./mydata")
    assert isinstance(caught.value, UsageError if what == "voc21" else DataError)


def test_wrong_names_are_explained(mydata: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no dataset at '\./mydta'\. Give a folder with images/"):
        benchmarks.get("./mydta")
    with pytest.raises(UsageError, match=r"Unknown dataset 'mydata'\. For the folder of that name write '\./mydata'"):
        benchmarks.get("mydata")
    with pytest.raises(UsageError, match="is a file, but neither"):
        benchmarks.get("./mydata/classes.txt")


def test_check_finds_what_is_wrong_with_the_files(mydata: Path) -> None:
    report = check("./mydata", mydata)
    assert report.ok and report.problems == () and report.benchmark == "mydata"
    assert (report.listed, report.checked, report.classes_present, report.expected) == (3, 3, 3, 3)
    label = mydata / "labels" / "picture 0.png"
    content = np.array(Image.open(label))
    content[0, 0] = 3
    Image.fromarray(content).save(label)
    (mydata / "labels" / "deep" / "picture 1.png").unlink()
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(mydata / "labels" / "deep" / "picture 2.png")
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(mydata / "labels" / "extra.png")
    found = {problem.kind: problem for problem in check("./mydata", mydata).problems}
    assert set(found) == {"missing_labels", "colour_label", "extra_labels", "out_of_range"}
    assert "needs labels/NAME.png with one class number per pixel: 0 is the first line" in found["missing_labels"].fix
    with pytest.raises(DataError, match=r"mydata: 1 of 3 label files are missing .*labels/deep/picture 1\.png"):
        benchmarks.get("./mydata").pairs(mydata)


def test_data_check_as_a_command(mydata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "check", "./mydata"]) == 0
    assert capsys.readouterr().out.startswith("mydata: ok: ")
    (mydata / "labels" / "picture 0.png").unlink()
    assert run_command(["data", "check", "./mydata"]) == 3
    assert "1 of 3 labels are missing" in capsys.readouterr().out
    assert run_command(["data", "check", "voc21"]) == 2
    assert "--data-root" in capsys.readouterr().err


def test_the_fingerprint_knows_files_and_definition(mydata: Path) -> None:
    def fingerprint() -> str:
        return benchmarks.get("./mydata").fingerprint(mydata)

    before = fingerprint()
    elsewhere = Path(shutil.copytree(mydata, mydata.parent / "away" / "mydata"))
    assert benchmarks.get(str(elsewhere)).fingerprint(elsewhere) == before
    (mydata / "classes.txt").write_text(CLASSES.replace("puppy", "poodle"))
    other = fingerprint()
    (mydata / "classes.txt").write_text(CLASSES)
    assert fingerprint() == before != other
    (mydata / "dataset.json").write_text('{"reduce_zero_label": true}')
    assert fingerprint() != before


RUN: dict[str, Any] = {"workers": 0, "gallery": 1, "results": "out", "save_predictions": True}


def test_a_run_needs_no_data_root(mydata: Path, weights: str) -> None:
    spec = {"method": "clip", "dataset": "./mydata", "weights": weights, "protocol": {"templates": "plain"}}
    record = ovbench.run(spec, **RUN)
    assert record.spec.dataset == "mydata" and not record.partial and not record.demo and record.status == "ok"
    assert record.spec.protocol.wording == "own"
    assert record.spec.protocol.wording_sha256 == benchmarks.get("./mydata").words_sha256("own")
    assert record.provenance.dataset_fingerprint == benchmarks.get("./mydata").fingerprint(mydata)
    path = store.record_path(record, "out")
    assert path.parent == Path("out/clip/mydata") and str(mydata) not in path.read_text(encoding="utf-8")
    assert record.metrics is not None and [entry.name for entry in record.metrics.classes] == [
        "background",
        "cat",
        "dog",
    ]
    areas = np.zeros((4, 3), dtype=np.int64)
    for pair in benchmarks.get("./mydata").pairs(mydata):
        pred = np.array(Image.open(path.with_suffix("") / "predictions" / f"{pair.image.stem}.png"))
        label = np.array(Image.open(pair.label))
        counted = label != 255
        for index in range(3):
            p, t = (pred == index) & counted, (label == index) & counted
            areas[:, index] += [(p & t).sum(), (p | t).sum(), p.sum(), t.sum()]
    assert [(c.intersect, c.union, c.pred, c.label) for c in record.metrics.classes] == list(map(tuple, areas.T))
    plain = ovbench.run({**spec, "protocol": {"templates": "plain", "wording": "plain"}}, **RUN)
    assert plain.spec.protocol.wording == "plain" and plain.spec_hash != record.spec_hash


def test_run_and_table_as_commands(mydata: Path, weights: str, run_cli: Callable[..., Any]) -> None:
    (mydata.parent / "words.txt").write_text("background: sky\ncat: kitten\ndog\n")
    arguments = ["run", "-m", "clip", "-d", "./mydata", "--weights", weights, "--templates", "plain", "--device", "cpu"]
    done = run_cli(*arguments, "--wording", "words.txt", "--json", "--gallery", "0")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["spec"]["dataset"] == "mydata" and record["spec"]["protocol"]["wording"] == "words.txt"
    table = run_cli("table", "--datasets", "mydata")
    assert table.returncode == 0 and "mydata" in table.stdout


def test_a_dumped_config_reads_the_folder(mydata: Path, weights: str) -> None:
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    from ovbench.evaluate.config import dump_config
    from ovbench.evaluate.run import RunOptions
    from ovbench.spec import RunSpec

    spec = RunSpec(method="clip", dataset="./mydata", weights=weights, protocol="common")  # type: ignore[arg-type]
    cfg = Config.fromfile(dump_config(spec, RunOptions(), mydata.parent / "run.py"))
    assert cfg.model.classes == [["background", "sky", "grass"], ["cat"], ["dog", "puppy", "cat and dog"]]
    with DefaultScope.overwrite_default_scope("mmseg"):
        assert len(DATASETS.build(cfg.test_dataloader.dataset)) == 3


CONFIG = """
benchmark = dict(expected_images=3)
dataset = dict(
    data_prefix=dict(img_path="images", seg_map_path="labels"), img_suffix=".jpg", seg_map_suffix=".png"
)
"""


def test_a_config_is_read_and_never_run(tmp_path: Path) -> None:
    data = make(tmp_path / "data", classes=None)
    config = tmp_path / "pets.py"
    config.write_text(CONFIG)
    (tmp_path / "pets.txt").write_text(CLASSES)
    found = benchmarks.get(str(config))
    assert (found.name, found.title, found.num_classes, found.has_background) == ("pets", "pets", 3, True)
    assert benchmarks.own_root(found) is None and found.dataset_type == "BaseSegDataset"
    assert len(found.pairs(data)) == 3 and check(str(config), data).ok
    beside = Path(shutil.copy(config, data / "pets.py"))
    shutil.copy(tmp_path / "pets.txt", data)
    assert benchmarks.own_root(benchmarks.get(str(beside))) == data
    config.write_text(CONFIG + "import os\n")
    with pytest.raises(DataError, match="a dataset config holds only 'name = data' lines"):
        benchmarks.get(str(config))


def test_a_config_may_have_a_training_split_and_16_bit_labels(tmp_path: Path) -> None:
    data = make(tmp_path / "data", classes=None)
    train = 'train = dict(data_prefix=dict(img_path="images/deep", seg_map_path="labels/deep"), expected_images=2)\n'
    (tmp_path / "pets.py").write_text(CONFIG + train)
    (tmp_path / "pets.txt").write_text(CLASSES)
    found = benchmarks.get(str(tmp_path / "pets.py"))
    assert [pair.stem for pair in found.for_split("train").pairs(data)] == ["picture 1", "picture 2"]
    assert check(str(tmp_path / "pets.py"), data, split="train").ok
    wide = CONFIG.replace('".png"', '".png", ignore_index=65535').replace("=3", "=3, num_classes=300")
    (tmp_path / "many.py").write_text(wide)
    (tmp_path / "many.txt").write_text("".join(f"class {index}\n" for index in range(300)))
    label = data / "labels" / "picture 0.png"
    Image.fromarray(np.full((60, 80), 299, np.uint16)).save(label)
    many = benchmarks.get(str(tmp_path / "many.py"))
    assert many.wide and np.unique(many.load_label(label)).tolist() == [299]
    assert not many.for_split("val").has_background and many.group == "own"


def test_a_config_with_a_full_word_list(tmp_path: Path, repo: Path) -> None:
    values = (repo / "dataset_configs" / "voc21.py").read_text(encoding="utf-8")
    words = json.loads((repo / "dataset_configs" / "words" / "voc21.json").read_text(encoding="utf-8"))
    (tmp_path / "words").mkdir()
    (tmp_path / "myvoc.py").write_text(values)
    (tmp_path / "words" / "myvoc.json").write_text(json.dumps({**words, "benchmark": "myvoc"}))
    found, voc = benchmarks.get(str(tmp_path / "myvoc.py")), benchmarks.get("voc21")
    assert found.name == "myvoc" and found.palette == voc.palette and found.wordings == voc.wordings
    assert found.layout == voc.layout and found.words("sclip") == voc.words("sclip")


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (CONFIG, None, r"has no word list beside it: looked for pets\.txt, pets\.json, words/pets\.json"),
        ("x = 1\n", "cat\n", r"needs 'benchmark = dict\(\.\.\.\)' and 'dataset"),
        (CONFIG.replace("expected_images=3", ""), "cat\n", r"benchmark\.expected_images is missing"),
        (
            CONFIG.replace("img_suffix", "suffix"),
            "cat\n",
            r"unknown key dataset\.suffix; dataset\.img_suffix is missing",
        ),
        (
            CONFIG.replace("=3", "=3, num_classes=2"),
            "cat\n",
            r"'pets\.txt' has 1 classes, but pets\.py says num_classes=2",
        ),
        (CONFIG + "synth = 3\n", "cat\n", r"section 'synth = dict\(\.\.\.\)' is missing"),
    ],
)
def test_wrong_configs_are_explained(tmp_path: Path, config: str, words: str | None, message: str) -> None:
    (tmp_path / "pets.py").write_text(config)
    if words is not None:
        (tmp_path / "pets.txt").write_text(words)
    with pytest.raises(DataError, match=message):
        benchmarks.get(str(tmp_path / "pets.py"))


def test_a_config_without_its_data_says_so(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets.py").write_text(CONFIG)
    (tmp_path / "pets.txt").write_text(CLASSES)
    arguments = ["run", "-m", "clip", "-d", "./pets.py", "--device", "cpu"]
    assert run_command([*arguments, "--weights", weights]) == 2
    assert "Where is pets? Give its folder with --data-root DIR" in capsys.readouterr().err
    assert run_command([*arguments, "--demo"]) == 2
    assert "Where is pets?" in capsys.readouterr().err
    assert run_command(["data", "synth", "./pets.py", "--images", "2", "--out", "drawn"]) == 0
    assert (tmp_path / "drawn" / "pets" / "images").is_dir()
    assert run_command(["data", "check", "./pets.py", "--data-root", "drawn/pets"]) == 0


def test_the_tutorial(repo: Path, tmp_path: Path) -> None:
    page, folder = repo / "docs" / "own-dataset.md", tmp_path / "work"
    folder.mkdir()
    files = [block.file for block in blocks(page)]
    assert files == [
        None, "mydata/classes.txt", "mydata/dataset.json", None, None, None, "my_dataset.py", "my_dataset.txt", None,
    ]  # fmt: skip
    outputs = follow(page, folder)
    [record] = store.load_all(folder / "results" / "runs")
    assert record.spec.dataset == "mydata" and record.demo and not record.partial
    assert record.metrics is not None and record.metrics.images == 6 and (record.metrics.miou or 0) > 0
    assert "mydata: ok" in outputs[2] and "my_dataset: ok" in outputs[3]
    assert len(list((folder / "pictures").glob("*-overlay.png"))) == 6
    one, other = (benchmarks.get(str(folder / name)) for name in ("mydata", "my_dataset.py"))
    assert (one.class_names, one.words("own"), one.palette) == (other.class_names, other.words("own"), other.palette)
