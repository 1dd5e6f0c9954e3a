"""Benchmark definitions: configs are data, word lists are the published ones, everything is consistent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovbench import benchmarks
from ovbench.benchmarks import config
from ovbench.errors import DataError, UsageError
from ovbench.paths import config_dir

EIGHT = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")
MORE = ("coco_stuff10k", "ade847", "context459", "voc20b")
PANOPTIC = ("coco_panoptic", "ade20k_panoptic", "mapillary")
ALL = (*EIGHT, *MORE, *PANOPTIC)

# id -> (classes, official images, background class, 0 ignored), as the evaluation protocol has them
PROTOCOL = {
    "voc21": (21, 1449, True, False),
    "voc20": (20, 1449, False, True),
    "context60": (60, 5104, True, False),
    "context59": (59, 5104, False, True),
    "coco_object": (81, 5000, True, False),
    "coco_stuff": (171, 5000, False, False),
    "cityscapes": (19, 500, False, False),
    "ade20k": (150, 2000, False, True),
    "coco_stuff10k": (171, 1000, False, True),
    "ade847": (847, 2000, False, False),
    "context459": (459, 5104, False, False),
    "voc20b": (21, 1449, False, False),
    "coco_panoptic": (133, 5000, False, False),
    "ade20k_panoptic": (150, 2000, False, False),
    "mapillary": (65, 2000, False, False),
}
TRAIN = {
    "ade20k": 20210,
    "context59": 4998,
    "coco_stuff": 118287,
    "coco_stuff10k": 9000,
    "coco_panoptic": 118287,
    "ade20k_panoptic": 20210,
    "mapillary": 18000,
}


def _shared_classes() -> Path:
    shared = Path(os.environ.get("OVBENCH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (shared / "classes" / "wordings.json").is_file():
        pytest.skip(f"no published class lists in {shared}")
    return shared / "classes"


def test_the_eight_are_there_in_the_order_of_papers() -> None:
    assert tuple(benchmarks.names("eight")) == EIGHT
    assert tuple(benchmarks.names()) == ALL
    assert benchmarks.names("large-vocabulary") == ["ade847", "context459", "voc20b"]
    assert benchmarks.names("closed-set") == ["coco_stuff10k"]
    assert tuple(benchmarks.names("panoptic")) == PANOPTIC


def test_training_splits_have_their_official_sizes() -> None:
    assert {name: benchmarks.get(name).for_split("train").expected_images for name in benchmarks.with_split()} == TRAIN


@pytest.mark.parametrize("name", ALL)
def test_definition_is_that_of_the_protocol(name: str) -> None:
    benchmark = benchmarks.get(name)
    given = (
        benchmark.num_classes,
        benchmark.expected_images,
        benchmark.has_background,
        benchmark.reduce_zero_label,
    )
    assert given == PROTOCOL[name]
    assert benchmark.ignore_index == (65535 if benchmark.num_classes > 255 else 255)
    assert len(benchmark.class_names) == len(set(benchmark.class_names)) == benchmark.num_classes
    assert (benchmark.class_names[0] == "background") is benchmark.has_background
    assert all(label == label.strip() for label in benchmark.class_names)
    # An overlay in which two classes share a colour cannot be read.
    assert len(set(benchmark.palette)) == len(benchmark.palette) == benchmark.num_classes


@pytest.mark.parametrize("name", ALL)
def test_every_wording_has_words_for_every_class(name: str) -> None:
    benchmark = benchmarks.get(name)
    if name in EIGHT:
        assert benchmark.wordings[0] == "sclip"
        assert {"clearclip", "proxyclip", "plain"} <= set(benchmark.wordings)
    for wording in benchmark.wordings:
        words = benchmark.words(wording)
        assert len(words) == benchmark.num_classes
        assert all(entry and all(word.strip() for word in entry) for entry in words)
    if "plain" in benchmark.wordings:
        assert benchmark.words("plain") == [[label] for label in benchmark.class_names]


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("wording", ["sclip", "clearclip", "proxyclip"])
def test_wordings_are_the_published_ones(name: str, wording: str) -> None:
    published = json.loads((_shared_classes() / "wordings.json").read_text(encoding="utf-8"))
    expected = published[wording].get(name, published["sclip"][name])
    assert benchmarks.get(name).words(wording) == expected


@pytest.mark.parametrize("name", ["ade20k", "coco_stuff", "context59"])
def test_spaced_wordings_are_the_published_ones(name: str) -> None:
    published = json.loads((_shared_classes() / f"{name}_spaced.json").read_text(encoding="utf-8"))
    assert benchmarks.get(name).words("spaced") == [[entry.split(",")[0]] for entry in published]


def test_words_of_the_large_vocabularies_are_the_published_ones() -> None:
    published = {name: json.loads((_shared_classes() / f"{name}.json").read_text()) for name in MORE[1:]}
    synonyms = [[word.strip() for word in entry.split(",")] for entry in published["ade847"]]
    assert benchmarks.get("ade847").words("synonyms") == synonyms
    assert benchmarks.get("ade847").words("spaced") == [words[:1] for words in synonyms]
    assert benchmarks.get("context459").words("spaced") == [[word] for word in published["context459"]]
    voc20b = benchmarks.get("voc20b")
    # 59 names are predicted; the 39 that VOC has not all count as the background.
    assert [word for words in voc20b.words("spaced") for word in words] == published["voc20b"]
    assert [len(words) for words in voc20b.words("spaced")] == [1] * 20 + [39]
    assert voc20b.class_names[:20] == benchmarks.get("voc20").class_names and voc20b.class_names[20] == "background"
    assert set(published["voc20b"][20:]) <= set(benchmarks.get("context59").class_names)
    assert benchmarks.get("voc20").words("spaced") == voc20b.words("spaced")[:20]


def test_both_releases_of_coco_stuff_have_the_same_classes_and_words() -> None:
    small, large = benchmarks.get("coco_stuff10k"), benchmarks.get("coco_stuff")
    assert (small.class_names, small.palette) == (large.class_names, large.palette)
    assert all(small.words(wording) == large.words(wording) for wording in small.wordings)


def test_names_that_two_classes_of_ade847_share_get_their_synonyms() -> None:
    names = benchmarks.get("ade847").class_names
    assert {"bag", "bag, traveling bag", "bag, handbag"} <= set(names) and "building" in names


def test_word_quirks_that_move_scores() -> None:
    voc = benchmarks.get("voc21").words("sclip")
    assert len(voc[0]) == 26 and voc[4] == ["ship"] and voc[11] == ["table"] and len(voc[15]) == 7
    coco = benchmarks.get("coco_object")
    assert len(coco.words("sclip")[1]) == 8
    assert len(coco.words("proxyclip")[0]) == 17
    assert ["chestofdrawers"] in benchmarks.get("ade20k").words("sclip")
    assert benchmarks.get("context60").words("sclip")[0] == ["background"]


def test_hash_follows_words_and_not_the_name_of_the_list() -> None:
    voc = benchmarks.get("voc21")
    assert voc.words_sha256("sclip") != voc.words_sha256("clearclip")
    context = benchmarks.get("context60")
    assert context.words("sclip") == context.words("clearclip")
    assert context.words_sha256("sclip") == context.words_sha256("clearclip")
    text = json.dumps(voc.words("sclip"), ensure_ascii=False, separators=(",", ":"))
    assert voc.words_sha256("sclip") == hashlib.sha256(text.encode()).hexdigest()


def test_changing_returned_words_does_not_change_the_benchmark() -> None:
    voc = benchmarks.get("voc21")
    voc.words("sclip")[0].append("ceiling fan")
    assert len(voc.words("sclip")[0]) == 26


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"Unknown dataset 'voc'\. Did you mean: voc20, voc21, voc20b\?.*ovbench list datasets"
    ):
        benchmarks.get("voc")
    with pytest.raises(UsageError, match=r"Unknown wording of voc21 'sclipp'\. Did you mean: sclip"):
        benchmarks.get("voc21").words("sclipp")


def test_importing_and_reading_needs_no_heavy_package() -> None:
    code = (
        "import sys; from ovbench import benchmarks; [benchmarks.get(n).words('spaced') for n in benchmarks.names('large-vocabulary')];"
        "print([m for m in ('torch', 'mmengine', 'mmcv', 'mmseg', 'cv2', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ALL)
def test_configs_are_plain_data(name: str) -> None:
    source = (config_dir() / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"\b(import|lambda|def|for|if)\b.*:$|^\s*(import|from)\b", source, re.MULTILINE)
    config.validate_config(config.read_config(config_dir() / f"{name}.py"), name)


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = open('file')",
        "x = dict(a=__import__('os').getcwd())",
        "x = dict([('a', 1)])",
        "x = dict(**{'a': 1})",
        "x = [i for i in range(3)]",
        "x = y = 1",
        "x: int = 1",
        "'text' 'then code'; x.y = 2",
        "x = {**{}}",
    ],
)
def test_code_in_a_config_is_refused_and_not_run(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(f'"""Docstring."""\nfine = dict(a=[1, (2, -3)], b={{"c": None}})\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.py"):
        config.read_config(path)


def test_data_in_a_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "fine.py"
    path.write_text(
        '"""Docstring."""\nx = dict(a=[1, (2, -3)], b={"c": None}, d="e" "f", g=dict())\n', encoding="utf-8"
    )
    assert config.read_config(path) == {"x": {"a": [1, [2, -3]], "b": {"c": None}, "d": "ef", "g": {}}}


def test_a_broken_config_names_all_its_faults() -> None:
    values = config.read_config(config_dir() / "voc21.py")
    del values["benchmark"]["title"]
    values["dataset"]["reduce_zero_label"] = "no"
    values["synth"]["colour"] = 1
    values["extra"] = {}
    with pytest.raises(DataError) as caught:
        config.validate_config(values, "voc21.py")
    for part in ("unknown section 'extra'", "benchmark.title is missing", "reduce_zero_label is 'no'", "synth.colour"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("voc20b", "dataset", {"raw_ids": [1, 2, 0]}, r"raw_ids must order 0\.\.20"),
        ("voc20b", "dataset", {"raw_ids": [0] * 21}, r"dataset\.raw_ids is \[0, 0"),
        ("voc20b", "dataset", {"reduce_zero_label": True}, "cannot be combined with reduce_zero_label"),
        ("ade847", "dataset", {"reduce_zero_label": True}, "16-bit labels .* are read as they are"),
        ("ade847", "dataset", {"ignore_index": 254}, r"dataset\.ignore_index is 254"),
        ("ade20k", "dataset", {"ignore_index": 65535, "reduce_zero_label": False}, "not trained on"),
        ("ade20k", "train", {"expected_images": 0}, r"train\.expected_images is 0"),
        ("ade20k", "train", {"pattern": "x"}, r"unknown key train\.pattern"),
        ("ade20k", "dataset", {"panoptic_file": "x.json"}, r"dataset\.panoptic_file needs a section panoptic"),
        ("ade20k", "synth", {"label_mode": "RGB"}, "RGB is for labels that are segments"),
        ("mapillary", "panoptic", {"category_ids": "1-64"}, "an id for each of 65 classes"),
        ("mapillary", "panoptic", {"category_ids": "1-64, 64"}, r"panoptic\.category_ids is '1-64, 64'"),
        ("mapillary", "panoptic", {"category_ids": "a-b"}, r"panoptic\.category_ids is 'a-b'"),
        ("mapillary", "panoptic", {"things": "60-65"}, r"panoptic\.things must be labels 0\.\.64"),
        ("mapillary", "panoptic", {"exact_areas": 1}, r"panoptic\.exact_areas is 1"),
        ("mapillary", "dataset", {"type": "BaseSegDataset"}, "need type PanopticDataset"),
        ("mapillary", "dataset", {"reduce_zero_label": True}, "need type PanopticDataset"),
        ("mapillary", "dataset", {"ann_file": "val.txt"}, "neither raw_ids nor an ann_file"),
        ("mapillary", "synth", {"label_mode": "L"}, r"synth\.label_mode must be RGB"),
    ],
)
def test_contradictions_in_a_config_are_named(name: str, section: str, change: dict[str, Any], message: str) -> None:
    values = config.read_config(config_dir() / f"{name}.py")
    config.validate_config(values, name)
    values[section] |= change
    with pytest.raises(DataError, match=message):
        config.validate_config(values, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is for two version 2"),
        ({"class_names": ["a"]}, "must name 2 different classes"),
        ({"class_names": ["a", "a"]}, "must name 2 different classes"),
        ({"palette": [[0, 0, 0]]}, "2 colours"),
        ({"palette": [[0, 0, 0], [0, 0, 256]]}, "palette entry"),
        ({"wordings": {"sclip": [["a"]]}}, "must have 2 entries"),
        ({"wordings": {"sclip": [["a"], []]}}, "no words for class 1"),
        ({"wordings": {"sclip": [["a"], [" "]]}}, "no words for class 1"),
        ({"wordings": {"sclip": "plain"}}, "refers to 'plain'"),
        ({"wordings": {}}, "no wording"),
        ({"more": 1}, "exactly the keys"),
    ],
)
def test_a_broken_word_list_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {
        "benchmark": "two",
        "version": 1,
        "class_names": ["a", "b"],
        "palette": [[0, 0, 0], [1, 1, 1]],
        "wordings": {"sclip": [["a"], ["b", "c"]], "clearclip": "sclip"},
    }
    path = tmp_path / "two.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    read = config.read_words(path, name="two", version=1, num_classes=2)
    assert read["wordings"]["clearclip"] == (("a",), ("b", "c"))
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        config.read_words(path, name="two", version=1, num_classes=2)


def test_adding_a_benchmark_takes_a_config_and_a_word_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words").mkdir()
    source = (config_dir() / "coco_object.py").read_text(encoding="utf-8")
    new = source.replace("num_classes=81", "num_classes=2").replace("order=3", "order=9")
    (tmp_path / "pets.py").write_text(new, encoding="utf-8")
    words = {
        "benchmark": "pets",
        "version": 1,
        "class_names": ["background", "cat"],
        "palette": [[0, 0, 0], [1, 2, 3]],
        "wordings": {"sclip": [["wall", "floor"], ["cat", "kitten"]]},
    }
    (tmp_path / "words" / "pets.json").write_text(json.dumps(words), encoding="utf-8")
    monkeypatch.setattr(benchmarks.catalog, "config_dir", lambda: tmp_path)
    benchmarks.get.cache_clear()
    try:
        assert benchmarks.names() == ["pets"]
        assert benchmarks.get("pets").words("sclip")[1] == ["cat", "kitten"]
    finally:
        monkeypatch.undo()
        benchmarks.get.cache_clear()
    assert tuple(benchmarks.names()) == ALL
