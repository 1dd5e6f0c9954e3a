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
}


def _shared_classes() -> Path:
    shared = Path(os.environ.get("OVBENCH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (shared / "classes" / "wordings.json").is_file():
        pytest.skip(f"no published class lists in {shared}")
    return shared / "classes"


def test_the_eight_are_there_in_the_order_of_papers() -> None:
    assert tuple(benchmarks.names()) == EIGHT


@pytest.mark.parametrize("name", EIGHT)
def test_definition_is_that_of_the_protocol(name: str) -> None:
    benchmark = benchmarks.get(name)
    given = (
        benchmark.num_classes,
        benchmark.expected_images,
        benchmark.has_background,
        benchmark.reduce_zero_label,
    )
    assert given == PROTOCOL[name]
    assert benchmark.ignore_index == 255
    assert len(benchmark.class_names) == len(set(benchmark.class_names)) == benchmark.num_classes
    assert (benchmark.class_names[0] == "background") is benchmark.has_background
    assert all(label == label.strip() for label in benchmark.class_names)
    # An overlay in which two classes share a colour cannot be read.
    assert len(set(benchmark.palette)) == len(benchmark.palette) == benchmark.num_classes


@pytest.mark.parametrize("name", EIGHT)
def test_every_wording_has_words_for_every_class(name: str) -> None:
    benchmark = benchmarks.get(name)
    assert benchmark.wordings[0] == "sclip"
    assert {"clearclip", "proxyclip", "plain"} <= set(benchmark.wordings)
    for wording in benchmark.wordings:
        words = benchmark.words(wording)
        assert len(words) == benchmark.num_classes
        assert all(entry and all(word.strip() for word in entry) for entry in words)
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
        UsageError, match=r"Unknown dataset 'voc'\. Did you mean: voc20, voc21\?.*ovbench list datasets"
    ):
        benchmarks.get("voc")
    with pytest.raises(UsageError, match=r"Unknown wording of voc21 'sclipp'\. Did you mean: sclip"):
        benchmarks.get("voc21").words("sclipp")


def test_importing_and_reading_needs_no_heavy_package() -> None:
    code = (
        "import sys; from ovbench import benchmarks; [benchmarks.get(n).words('sclip') for n in benchmarks.names()];"
        "print([m for m in ('torch', 'mmengine', 'mmcv', 'mmseg', 'cv2', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", EIGHT)
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
    monkeypatch.setattr(benchmarks, "config_dir", lambda: tmp_path)
    benchmarks._configs.cache_clear()
    benchmarks.get.cache_clear()
    try:
        assert benchmarks.names() == ["pets"]
        assert benchmarks.get("pets").words("sclip")[1] == ["cat", "kitten"]
    finally:
        monkeypatch.undo()
        benchmarks._configs.cache_clear()
        benchmarks.get.cache_clear()
    assert tuple(benchmarks.names()) == EIGHT
