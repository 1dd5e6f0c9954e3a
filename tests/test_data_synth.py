"""Generated copies: true layout and encoding, deterministic, and nothing outside their folder is touched."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovbench import benchmarks
from ovbench.benchmarks.check.checking import check
from ovbench.benchmarks.frequencies import frequencies, thirds
from ovbench.benchmarks.synth import copies as module
from ovbench.benchmarks.synth.class_choice import SHOWN, number, occurrences
from ovbench.benchmarks.synth.copies import MARKER, is_synthetic, known_classes, synth
from ovbench.errors import DataError, UsageError

ALL = [
    name for name in benchmarks.names() if name not in benchmarks.names("panoptic")
]  # those in test_panoptic_data.py


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated copy of every benchmark, each in a folder of its name."""
    out = tmp_path_factory.mktemp("copies")
    for name in ALL:
        synth(name, out / name, images=8)
    return out


def _tree(folder: Path) -> dict[str, str]:
    """Content hashes of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", ALL)
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
        (
            "coco_stuff10k",
            "images/test2014/COCO_train2014_000000000001.jpg",
            "annotations/test2014/COCO_train2014_000000000001_labelTrainIds.png",
        ),
        (
            "ade847",
            "ADE20K_2021_17_01/images_detectron2/validation/ADE_val_00000001.jpg",
            "ADE20K_2021_17_01/annotations_detectron2/validation/ADE_val_00000001.tif",
        ),
        (
            "context459",
            "VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg",
            "VOCdevkit/VOC2010/annotations_detectron2/pc459_val/2008_000001.tif",
        ),
        (
            "voc20b",
            "VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg",
            "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png",
        ),
    ],
)
def test_files_are_named_and_encoded_as_the_originals(name: str, image: str, label: str, copies: Path) -> None:
    with Image.open(copies / name / image) as picture, Image.open(copies / name / label) as mask:
        assert picture.format == ("PNG" if name == "cityscapes" else "JPEG") and picture.mode == "RGB"
        wide = benchmarks.get(name).wide
        assert mask.format == ("TIFF" if wide else "PNG")
        assert mask.mode == ("I;16" if wide else "P" if name.startswith("voc") else "L")
        assert picture.size == mask.size and picture.size[0] != picture.size[1]
        if mask.mode == "P":
            palette = mask.getpalette()
            assert palette is not None and len(palette) == 768
            colours = [tuple(palette[3 * i : 3 * i + 3]) for i in range(21)]
            assert colours == list(benchmarks.get("voc21").palette)
            assert palette[-3:] == [224, 224, 192]  # the border colour of VOC


@pytest.mark.parametrize("name", ALL)
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
    assert (benchmark.ignore_index in raw_ids) is benchmark.has_255
    assert raw_ids - {benchmark.ignore_index} <= set(range(last + 1))
    if benchmark.zero_in_most:
        assert with_zero == 8
    assert shapes == (2 if name == "cityscapes" else 3)  # upright ones as well


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("voc21", 21),
        ("cityscapes", 18),
        ("ade20k", 110),
        ("coco_stuff", 120),
        ("coco_stuff10k", 120),
        ("ade847", 110),
        ("context459", 90),
        ("voc20b", 21),
    ],
)
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


# Labels (pixels) of three images each, before the generator knew of splits, tails and sizes.
BEFORE = {
    "voc21": "bde3fe5144241c19",
    "context60": "4e3a87047e340f6b",
    "coco_object": "b4a0a24dfef1c8ff",
    "voc20": "6bfc027ad5e46525",
    "context59": "054824046033e8d4",
    "coco_stuff": "46f2091b18336501",
    "cityscapes": "d7a83d91136d2254",
    "ade20k": "5acc9d912088338a",
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in BEFORE]
    + [(name, {"train_images": 3, "long_tail": 1.5}) for name in BEFORE if name in benchmarks.with_split()],
)
def test_validation_files_are_what_they_always_were(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    root = synth(name, tmp_path, images=3, **options)
    digest = hashlib.sha256()
    for pair in benchmarks.get(name).pairs(root):
        with Image.open(pair.label) as label:
            digest.update(pair.stem.encode() + np.array(label).tobytes())
    assert digest.hexdigest()[:16] == BEFORE[name]


def test_both_splits_lie_in_one_copy(tmp_path: Path) -> None:
    """Training images are other images, found by the training split alone, and go when they are not asked for."""
    root = synth("context59", tmp_path, images=2, train_images=3, size=(64, 96))
    val = benchmarks.get("context59")
    train = val.for_split("train")
    assert len(val.pairs(root)) == 2 and len(train.pairs(root)) == 3
    assert check("context59", root).problems == check("context59", root, split="train").problems == ()
    alone = {file for file in _tree(tmp_path) if "2010_" not in file and "train.txt" not in file}
    assert synth("context59", tmp_path, images=2, size=(64, 96)) == root
    assert set(_tree(tmp_path)) == alone
    synth("context59", tmp_path, images=0, train_images=3, size=(64, 96))
    assert len(train.pairs(root)) == 3 and not (root / val.layout.split_file).exists()


def test_training_images_are_deterministic_and_not_those_of_validation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"images": 3, "train_images": 6, "long_tail": 1.0, "size": (64, 96)}
    trees = []
    for folder in "ab":
        synth("ade20k", tmp_path / folder, **options)
        trees.append(_tree(tmp_path / folder))
    assert trees[0] == trees[1]
    synth("ade20k", tmp_path / "c", **{**options, "long_tail": 2.0})
    other = _tree(tmp_path / "c")
    validation = [file for file in other if "/validation/" in file]
    assert len(validation) == 6 and all(other[file] == trees[0][file] for file in validation)
    training = [file for file in other if "/training/" in file]
    assert len(training) == 12 and any(other[file] != trees[0][file] for file in training)
    images = [digest for file, digest in trees[0].items() if file.endswith(".jpg")]
    assert len(set(images)) == 9


def test_sizes_are_short_and_long_side(tmp_path: Path) -> None:
    root = synth("ade20k", tmp_path, images=3, train_images=1, size=(48, 80))
    for benchmark in (benchmarks.get("ade20k"), benchmarks.get("ade20k").for_split("train")):
        for index, pair in enumerate(benchmark.pairs(root)):
            with Image.open(pair.image) as picture, Image.open(pair.label) as label:
                assert picture.size == label.size == ((48, 80) if index == 2 else (80, 48))


def test_the_generator_knows_these_many_classes() -> None:
    known = {"ade20k": 150, "coco_stuff10k": 171, "context59": 59, "ade847": 185, "context459": 132, "voc20b": 20}
    assert {name: known_classes(name) for name in known} == known


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("classes", "images"), [(150, 400), (24, 40), (3, 10), (150, 8)])
def test_occurrences_fall_with_the_class_number(classes: int, images: int, exponent: float) -> None:
    found = occurrences(classes, images, exponent)
    assert (np.diff(found) <= 0).all() and found.max() <= images
    assert found.min() >= (1 if classes <= SHOWN * images else 0)
    assert found.sum() <= SHOWN * images
    assert found[0] == images or found.sum() > 0.9 * SHOWN * images  # as many as there is room for
    scale = found[0]
    power_law = scale * np.arange(1.0, classes + 1) ** -exponent
    assert (np.abs(found - power_law)[power_law > 1] <= 1).all()


def test_training_is_long_tailed_and_validation_covers_the_tail(tmp_path: Path) -> None:
    root = synth("ade20k", tmp_path, images=16, train_images=60, long_tail=1.0, classes=30, size=(96, 128))
    val = benchmarks.get("ade20k")
    train = val.for_split("train")
    trained, scored = frequencies(train, root), frequencies(val, root)
    assert (np.nonzero(trained.images)[0] == np.arange(30)).all()  # more than the 20 that occur in both
    assert (np.nonzero(scored.images)[0] == np.arange(30)).all()
    planned = occurrences(30, 60, 1.0)
    # Things cover each other, so that a class may be seen a little less often than it is drawn.
    assert (trained.images[:30] <= planned).all() and trained.images.sum() > 0.85 * planned.sum()
    assert trained.images[0] > 10 * trained.images[20:30].mean()
    assert scored.images[:10].mean() < 2 * scored.images[20:30].mean()
    parts = thirds(trained.pixels)
    assert [len(part) for part in parts] == [10, 10, 10]
    assert trained.pixels[list(parts.head)].sum() > 0.6 * trained.pixels.sum()
    assert np.mean(parts.head) < np.mean(parts.middle) < np.mean(parts.tail)


def test_background_is_in_every_long_tailed_image_of_context(tmp_path: Path) -> None:
    root = synth("context59", tmp_path, images=0, train_images=8, long_tail=1.0, size=(96, 128))
    assert check("context59", root, split="train").problems == ()


def test_seeds_are_held_out_from_training() -> None:
    from ovbench.networks.builtin.scenes import TRAINING_SEEDS

    for name in ALL:
        val = benchmarks.get(name)
        splits = [val.for_split(split) for split in val.splits]
        numbers = [number(split, seed, index) for split in splits for seed in (0, 7) for index in range(200)]
        assert len(set(numbers)) == len(numbers)
        assert not any(found in TRAINING_SEEDS for found in numbers)


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
    with pytest.raises(UsageError, match="number of training images is -1"):
        synth("ade20k", tmp_path, train_images=-1)
    with pytest.raises(UsageError, match="voc21 has no training split"):
        synth("voc21", tmp_path, train_images=1)
    with pytest.raises(UsageError, match="exponent of the long tail is -1"):
        synth("ade20k", tmp_path, train_images=1, long_tail=-1)
    with pytest.raises(UsageError, match="Only training images are long-tailed"):
        synth("ade20k", tmp_path, long_tail=1)
    with pytest.raises(UsageError, match="number of classes of generated ade20k images is 151; it must be 1 to 150"):
        synth("ade20k", tmp_path, classes=151)
    for size, side in (((16, 64), "short"), ((64, 48), "short"), ((64, 4096), "long")):
        with pytest.raises(UsageError, match=f"{side} side"):
            synth("ade20k", tmp_path, size=size)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="seed is -1"):
        synth("voc21", tmp_path, seed=-1)
    with pytest.raises(UsageError, match="Unknown dataset"):
        synth("voc", tmp_path)


def test_only_generated_roots_are_synthetic(copies: Path, tmp_path: Path) -> None:
    for name in ALL:
        assert is_synthetic(benchmarks.get(name).resolve_root(copies))
    (tmp_path / MARKER).write_text("{}", encoding="utf-8")
    assert not is_synthetic(tmp_path)
