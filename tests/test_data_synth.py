"""Generated copies: true layout and encoding, deterministic, and nothing outside their folder is touched."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovbench import benchmarks
from ovbench.benchmarks import synth as module
from ovbench.benchmarks.check import check
from ovbench.benchmarks.synth import MARKER, is_synthetic, synth
from ovbench.errors import DataError, UsageError

EIGHT = benchmarks.names()


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated copy of every benchmark, each in a folder of its name."""
    out = tmp_path_factory.mktemp("copies")
    for name in EIGHT:
        synth(name, out / name, images=8)
    return out


def _tree(folder: Path) -> dict[str, str]:
    """Content hashes of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", EIGHT)
def test_copy_is_found_paired_and_clean(name: str, copies: Path) -> None:
    benchmark = benchmarks.get(name)
    root = benchmark.resolve_root(copies)
    assert root.is_relative_to(copies / name)
    assert len(benchmark.pairs(root)) == 8
    report = check(name, root)
    assert report.ok and report.problems == () and report.synthetic
    assert report.listed == report.checked == 8


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        (
            "voc21",
            "VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg",
            "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png",
        ),
        (
            "voc20",
            "VOCdevkit/VOC2012/JPEGImages/2008_000002.jpg",
            "VOCdevkit/VOC2012/SegmentationClass/2008_000002.png",
        ),
        (
            "context60",
            "VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg",
            "VOCdevkit/VOC2010/SegmentationClassContext/2008_000001.png",
        ),
        (
            "context59",
            "VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg",
            "VOCdevkit/VOC2010/SegmentationClassContext/2008_000001.png",
        ),
        ("coco_object", "images/val2017/000000000001.jpg", "annotations/val2017/000000000001_instanceTrainIds.png"),
        ("coco_stuff", "images/val2017/000000000001.jpg", "annotations/val2017/000000000001_labelTrainIds.png"),
        (
            "cityscapes",
            "leftImg8bit/val/lindau/lindau_000002_000019_leftImg8bit.png",
            "gtFine/val/lindau/lindau_000002_000019_gtFine_labelTrainIds.png",
        ),
        (
            "ade20k",
            "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg",
            "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
        ),
    ],
)
def test_files_are_named_and_encoded_as_the_originals(name: str, image: str, label: str, copies: Path) -> None:
    with Image.open(copies / name / image) as picture, Image.open(copies / name / label) as mask:
        assert picture.format == ("PNG" if name == "cityscapes" else "JPEG") and picture.mode == "RGB"
        assert mask.format == "PNG" and mask.mode == ("P" if name.startswith("voc") else "L")
        assert picture.size == mask.size and picture.size[0] != picture.size[1]
        if mask.mode == "P":
            palette = mask.getpalette()
            assert palette is not None and len(palette) == 768
            colours = [tuple(palette[3 * i : 3 * i + 3]) for i in range(21)]
            assert colours == list(benchmarks.get("voc21").palette)
            assert palette[-3:] == [224, 224, 192]  # the border colour of VOC


@pytest.mark.parametrize("name", EIGHT)
def test_labels_keep_the_benchmark_s_conventions(name: str, copies: Path) -> None:
    benchmark = benchmarks.get(name)
    raw_ids: set[int] = set()
    with_zero = shapes = 0
    for pair in benchmark.pairs(copies):
        with Image.open(pair.label) as mask:
            raw = np.array(mask)
        raw_ids |= set(np.unique(raw).tolist())
        with_zero += bool((raw == 0).any())
        shapes |= 1 if raw.shape[0] > raw.shape[1] else 2
    last = benchmark.num_classes - 1 + benchmark.reduce_zero_label
    assert (255 in raw_ids) is benchmark.has_255
    assert raw_ids - {255} <= set(range(last + 1))
    if benchmark.zero_in_most:
        assert with_zero == 8
    assert shapes == (2 if name == "cityscapes" else 3)  # upright ones as well


@pytest.mark.parametrize(("name", "least"), [("voc21", 21), ("cityscapes", 18), ("ade20k", 110), ("coco_stuff", 120)])
def test_two_dozen_images_cover_most_classes(name: str, least: int, tmp_path: Path) -> None:
    assert check(name, synth(name, tmp_path, images=24)).classes_present >= least


def test_image_shows_what_the_label_says(copies: Path) -> None:
    """A class has one look: the mean colour of its pixels is nearest to that of the same class in the other images."""
    benchmark = benchmarks.get("cityscapes")
    means: dict[int, list[np.ndarray]] = {}
    for pair in benchmark.pairs(copies):
        with Image.open(pair.image) as picture:
            image = np.array(picture).astype(float)
        label = benchmark.load_label(pair.label)
        for index in np.unique(label[label != 255]).tolist():
            if (label == index).sum() > 500:
                means.setdefault(index, []).append(image[label == index].mean(0))
    centre = {index: np.mean(values, 0) for index, values in means.items()}
    hits = [
        index == min(centre, key=lambda other: float(np.linalg.norm(value - centre[other])))
        for index, values in means.items()
        for value in values
    ]
    assert len(hits) > 30 and np.mean(hits) > 0.8


def test_same_arguments_same_files_other_seed_other_files(tmp_path: Path) -> None:
    synth("voc21", tmp_path / "a", images=3, seed=5)
    synth("voc21", tmp_path / "b", images=3, seed=5)
    synth("voc21", tmp_path / "c", images=3, seed=6)
    first, second, third = (_tree(tmp_path / name) for name in "abc")
    assert first == second
    assert set(first) == set(third)
    assert all(first[name] != third[name] for name in first if name.endswith((".jpg", ".png")))


def test_seeds_are_held_out_from_training() -> None:
    from ovbench.builtin.scenes import TRAINING_SEEDS

    for name in EIGHT:
        numbers = [module._number(benchmarks.get(name), seed, index) for seed in (0, 7) for index in range(200)]
        assert len(set(numbers)) == len(numbers)
        assert not any(number in TRAINING_SEEDS for number in numbers)


def test_second_call_writes_nothing(tmp_path: Path) -> None:
    root = synth("context59", tmp_path, images=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    calls: list[tuple[int, int]] = []
    assert synth("context59", tmp_path, images=3, progress=lambda *done: calls.append(done)) == root
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert calls == [(3, 3)]


def test_damaged_and_interrupted_copies_are_made_whole(tmp_path: Path) -> None:
    root = synth("coco_object", tmp_path, images=3)
    whole = _tree(tmp_path)
    benchmarks.get("coco_object").pairs(root)[1].label.write_bytes(b"cut")
    synth("coco_object", tmp_path, images=3)
    assert _tree(tmp_path) == whole

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth("coco_object", tmp_path, images=3, seed=1, progress=stop)
    synth("coco_object", tmp_path, images=3)
    assert _tree(tmp_path) == whole


def test_other_arguments_replace_the_copy_and_keep_foreign_files(tmp_path: Path) -> None:
    root = synth("voc21", tmp_path, images=4)
    (root / "notes.txt").write_text("mine", encoding="utf-8")
    synth("voc21", tmp_path, images=2)
    assert len(benchmarks.get("voc21").pairs(root)) == 2
    assert len(list(root.glob("JPEGImages/*"))) == 2
    assert (root / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_changed_generator_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synth("voc21", tmp_path, images=1)
    marker = json.loads((tmp_path / MARKER).read_text(encoding="utf-8"))
    monkeypatch.setattr(module, "GENERATOR_VERSION", marker["generator"] + 1)
    done: list[int] = []
    synth("voc21", tmp_path, images=1, progress=lambda count, _: done.append(count))
    assert json.loads((tmp_path / MARKER).read_text(encoding="utf-8"))["generator"] == marker["generator"] + 1


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="not empty and was not made by"):
        synth("voc21", tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not empty and was not made by"):
        synth("voc21", tmp_path / "file")
    assert _tree(tmp_path / "photos") == {"cat.jpg": hashlib.sha256(b"mine").hexdigest()}


def test_links_and_forged_markers_do_not_lead_out(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "keep.txt").touch()
    root = synth("coco_stuff", out, images=1)
    for path in (root / "images" / "val2017").iterdir():
        path.unlink()
    (root / "images" / "val2017").rmdir()
    (root / "images" / "val2017").symlink_to(other)
    with pytest.raises(DataError, match="leads out of"):
        synth("coco_stuff", out, images=1)
    (root / "images" / "val2017").unlink()
    marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    marker["files"]["../other/keep.txt"] = 0
    (out / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    with pytest.raises(DataError, match="leads out of"):
        synth("coco_stuff", out, images=1)
    assert [path.name for path in other.iterdir()] == ["keep.txt"]


def test_a_full_or_closed_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"cannot be written to .*: No space left on device"):
        synth("voc21", tmp_path / "new", images=1)
    assert not list((tmp_path / "new").rglob("*.part"))


@pytest.mark.parametrize("images", [0, -1, 5001])
def test_wrong_numbers_are_refused(images: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"number of images is {images}; it must be 1 to 5000"):
        synth("voc21", tmp_path, images=images)
    with pytest.raises(UsageError, match="seed is -1"):
        synth("voc21", tmp_path, seed=-1)
    with pytest.raises(UsageError, match="Unknown dataset"):
        synth("voc", tmp_path)


def test_only_generated_roots_are_synthetic(copies: Path, tmp_path: Path) -> None:
    for name in EIGHT:
        assert is_synthetic(benchmarks.get(name).resolve_root(copies))
    (tmp_path / MARKER).write_text("{}", encoding="utf-8")
    assert not is_synthetic(tmp_path)
