"""Data roots are found in customary folders, pairs come in mmseg's order, and what is missing is named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from ovbench import benchmarks
from ovbench.benchmarks import Benchmark, labels
from ovbench.errors import DataError, UsageError

ALL = benchmarks.names()


def _make(root: Path, name: str, stems: tuple[str, ...] = ("a", "b")) -> Path:
    """Empty files in the layout of a benchmark."""
    return _make_split(root, benchmarks.get(name), stems)


def _make_split(root: Path, benchmark: Benchmark, stems: tuple[str, ...]) -> Path:
    layout = benchmark.layout
    for stem in stems:
        for relative in (layout.image(stem), layout.label(stem)):
            (root / relative).parent.mkdir(parents=True, exist_ok=True)
            (root / relative).touch()
    if layout.split_file:
        (root / layout.split_file).parent.mkdir(parents=True, exist_ok=True)
        (root / layout.split_file).write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    if layout.panoptic_file:
        (root / layout.panoptic_file).touch()
    return root


@pytest.mark.parametrize("name", ALL)
def test_root_is_found_at_every_customary_place(name: str, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    for number, home in enumerate(benchmark.layout.homes):
        for middle in ("", name, "some_folder"):
            start = tmp_path / f"{number}{middle}"
            root = _make(start / middle / home, name)
            assert benchmark.resolve_root(start) == root
            assert benchmark.resolve_root(str(root)) == root
            assert [pair.stem for pair in benchmark.pairs(start)] == ["a", "b"]


@pytest.mark.parametrize("name", ALL)
def test_root_is_found_from_inside(name: str, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    root = _make(tmp_path / "data", name)
    assert benchmark.resolve_root(root / benchmark.layout.image_dir) == root
    assert benchmark.resolve_root(root / benchmark.layout.label_dir) == root


def test_relative_roots_and_home_folders_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / "VOCdevkit" / "VOC2012", "voc21")
    monkeypatch.chdir(tmp_path)
    assert benchmarks.get("voc21").resolve_root(".") == Path("VOCdevkit/VOC2012")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert benchmarks.get("voc21").resolve_root("~/VOCdevkit") == tmp_path / "VOCdevkit" / "VOC2012"


def test_coco_copies_are_told_apart_by_their_label_files(tmp_path: Path) -> None:
    _make(tmp_path / "first", "coco_object")
    _make(tmp_path / "second", "coco_stuff")
    assert benchmarks.get("coco_object").resolve_root(tmp_path) == tmp_path / "first"
    assert benchmarks.get("coco_stuff").resolve_root(tmp_path) == tmp_path / "second"
    both = _make(_make(tmp_path / "both", "coco_stuff"), "coco_object")
    assert benchmarks.get("coco_object").resolve_root(both) == both


def test_two_copies_are_not_chosen_between(tmp_path: Path) -> None:
    _make(tmp_path / "old", "ade20k")
    _make(tmp_path / "new", "ade20k")
    with pytest.raises(DataError, match=r"Several copies of ade20k.*new.*old"):
        benchmarks.get("ade20k").resolve_root(tmp_path)


def test_the_same_copy_under_a_link_is_one_copy(tmp_path: Path) -> None:
    root = _make(tmp_path / "old", "ade20k")
    (tmp_path / "new").symlink_to(root)
    assert benchmarks.get("ade20k").resolve_root(tmp_path).resolve() == root.resolve()


@pytest.mark.parametrize("name", ALL)
def test_missing_and_empty_folders_are_explained(name: str, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    with pytest.raises(DataError, match=rf"'.*nowhere' does not exist.*--data-root.*ovbench data synth {name}"):
        benchmark.resolve_root(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=rf"No {name} data in.*Looked for {benchmark.layout.image_dir}.*ovbench data synth"
    ):
        benchmark.resolve_root(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        benchmark.resolve_root(tmp_path / "file")


@pytest.mark.parametrize("name", ALL)
def test_labels_of_another_kind_are_named(name: str, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    root = _make(tmp_path, name)
    for path in list((root / benchmark.layout.label_dir).rglob(f"*{benchmark.layout.label_suffix}")):
        path.rename(path.with_suffix(".mat"))
    with pytest.raises(DataError, match=r"incomplete: no \*.*\.(png|tif) in .*there is '.*\.mat'\)"):
        benchmark.resolve_root(tmp_path)


def test_cityscapes_with_label_ids_only_says_how_to_make_train_ids(tmp_path: Path) -> None:
    root = _make(tmp_path, "cityscapes", ("ulm/ulm_1",))
    path = root / "gtFine/val/ulm/ulm_1_gtFine_labelTrainIds.png"
    path.rename(path.with_name("ulm_1_gtFine_labelIds.png"))
    with pytest.raises(DataError, match=r"labelIds\.png'\).*cityscapesScripts"):
        benchmarks.get("cityscapes").resolve_root(root)


def test_a_missing_split_list_is_named(tmp_path: Path) -> None:
    root = _make(tmp_path, "context60")
    (root / "ImageSets/SegmentationContext/val.txt").unlink()
    with pytest.raises(DataError, match=r"no file ImageSets/SegmentationContext/val\.txt"):
        benchmarks.get("context60").resolve_root(root)


def test_pairs_follow_the_split_list(tmp_path: Path) -> None:
    root = _make(tmp_path, "voc21", ("z", "a", "m"))
    (root / "JPEGImages" / "unlisted.jpg").touch()
    assert [pair.stem for pair in benchmarks.get("voc21").pairs(root)] == ["z", "a", "m"]


def test_pairs_without_a_list_are_sorted_by_whole_path_and_skip_hidden_files(tmp_path: Path) -> None:
    root = _make(tmp_path, "coco_stuff", ("b", "a-1", "a", "deep/er/c"))
    (root / "images/val2017/._a.jpg").touch()  # what macOS leaves on foreign disks
    assert [pair.stem for pair in benchmarks.get("coco_stuff").pairs(root)] == ["a-1", "a", "b", "deep/er/c"]


@pytest.mark.parametrize("name", ALL)
def test_missing_files_are_counted_and_named(name: str, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    root = _make(tmp_path, name, ("a", "b", "c"))
    (root / benchmark.layout.label("b")).unlink()
    with pytest.raises(DataError, match=r"1 of 3 label files are missing.*b.*\.(png|tif)"):
        benchmark.pairs(root)
    if benchmark.layout.split_file:
        (root / benchmark.layout.image("c")).unlink()
        with pytest.raises(DataError, match=r"1 of 3 image files are missing.*c\.jpg"):
            benchmark.pairs(root)


def test_empty_lists_and_empty_lines_are_errors(tmp_path: Path) -> None:
    root = _make(tmp_path, "voc21")
    split = root / "ImageSets/Segmentation/val.txt"
    split.write_text("a\n\nb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty line \(2\)"):
        benchmarks.get("voc21").pairs(root)
    split.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        benchmarks.get("voc21").pairs(root)
    split.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        benchmarks.get("voc21").pairs(root)
    split.write_text("a\r\nb\r\n", encoding="utf-8")  # Windows line ends
    assert [pair.stem for pair in benchmarks.get("voc21").pairs(root)] == ["a", "b"]


def test_unreadable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, because the superuser may read everything.
    root = _make(tmp_path, "ade20k")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "validation":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"'.*validation' cannot be read: Permission denied"):
        benchmarks.get("ade20k").pairs(root)


def test_fingerprint_follows_names_sizes_order_and_benchmark(tmp_path: Path) -> None:
    voc21, voc20 = benchmarks.get("voc21"), benchmarks.get("voc20")
    root = _make(tmp_path / "a", "voc21", ("a", "b"))
    first = voc21.fingerprint(root)
    assert first == voc21.fingerprint(_make(tmp_path / "same", "voc21", ("a", "b")))
    assert first != voc20.fingerprint(root)
    assert first != voc21.fingerprint(_make(tmp_path / "order", "voc21", ("b", "a")))
    assert first != voc21.fingerprint(_make(tmp_path / "fewer", "voc21", ("a",)))
    (root / "SegmentationClass" / "b.png").write_bytes(b"longer")
    assert first != voc21.fingerprint(root)


@pytest.mark.parametrize("name", benchmarks.with_split())
def test_the_training_split_has_images_and_labels_of_its_own(name: str, tmp_path: Path) -> None:
    val = benchmarks.get(name)
    train = val.for_split("train")
    assert (val.split, train.split) == ("val", "train") and train.for_split("val") == val == val.for_split("val")
    assert train.expected_images > val.expected_images or name == "context59"
    assert (train.num_classes, train.words("plain")) == (val.num_classes, val.words("plain"))
    root = _make(tmp_path, name, ("a", "b"))
    with pytest.raises(DataError, match=rf"{name} data in .*incomplete|No {name} data in"):
        train.pairs(root)
    before = val.fingerprint(root)
    _make_split(tmp_path, train, ("c", "d", "e"))
    assert [pair.stem for pair in val.pairs(root)] == ["a", "b"] and val.fingerprint(root) == before
    assert [pair.stem for pair in train.pairs(root)] == ["c", "d", "e"]
    assert train.fingerprint(root) != before
    (root / train.layout.label("d")).unlink()
    with pytest.raises(DataError, match=r"1 of 3 label files are missing"):
        train.pairs(root)


def test_equal_files_in_another_split_are_other_data(tmp_path: Path) -> None:
    """The fingerprint of a training split is not that of the same names and sizes in validation."""
    val = benchmarks.get("ade20k")
    train = val.for_split("train")
    root = _make_split(_make(tmp_path, "ade20k"), train, ("a", "b"))
    assert [pair.stem for pair in val.pairs(root)] == [pair.stem for pair in train.pairs(root)]
    assert val.fingerprint(root) != train.fingerprint(root)


def test_fingerprints_of_validation_are_those_of_earlier_records(tmp_path: Path) -> None:
    root = _make(tmp_path, "ade20k")
    (root / benchmarks.get("ade20k").layout.label("b")).write_bytes(b"longer")
    known = "ade20k\n1\na\t0\t0\nb\t0\t6\n"
    assert benchmarks.get("ade20k").fingerprint(root) == hashlib.sha256(known.encode()).hexdigest()


def test_a_split_that_is_not_there_is_explained() -> None:
    with pytest.raises(UsageError, match=r"voc21 has no training split here\. .*context59, coco_stuff, ade20k"):
        benchmarks.get("voc21").for_split("train")
    with pytest.raises(UsageError, match=r"Unknown split 'test'"):
        benchmarks.get("ade20k").for_split("test")
    assert benchmarks.with_split("val") == ALL
    assert benchmarks.with_split() == [
        "context59", "coco_stuff", "ade20k", "coco_stuff10k", "coco_panoptic", "ade20k_panoptic", "mapillary"
    ]  # fmt: skip


def test_train_ids_with_and_without_a_reduced_zero() -> None:
    raw = np.array([[0, 1, 2], [19, 20, 255]], np.uint8)
    assert benchmarks.get("voc21").to_train_ids(raw).tolist() == raw.tolist()
    reduced = benchmarks.get("voc20").to_train_ids(raw)
    assert reduced.tolist() == [[255, 0, 1], [18, 19, 255]] and reduced.dtype == np.uint8
    assert raw[0, 0] == 0  # the input is left alone


@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 4, 4), (4, 4, 2), (4,)])
def test_coloured_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="coloured picture"):
        benchmarks.get("voc21").to_train_ids(np.zeros(shape, np.uint8))


def test_ids_out_of_range_name_the_file_and_the_stored_ids() -> None:
    voc20 = benchmarks.get("voc20")
    ids = voc20.to_train_ids(np.array([[0, 20, 21, 22, 30, 255]], np.uint8))
    with pytest.raises(
        DataError, match=r"'some/label\.png' has ids of no class: 21-22, 30.*classes are 1\.\.20; 0 and 255"
    ):
        voc20.require_in_range(ids, "some/label.png")
    voc20.require_in_range(voc20.to_train_ids(np.array([[0, 1, 20, 255]], np.uint8)), "fine.png")


def test_sixteen_bit_ids_above_255_are_refused_instead_of_wrapped() -> None:
    with pytest.raises(DataError, match=r"26001 \(classes are 0\.\.18; 255 is not counted\).*instance ids"):
        benchmarks.get("cityscapes").to_train_ids(np.array([[0, 26001]], np.uint16))
    assert benchmarks.get("cityscapes").to_train_ids(np.array([[0, 18]], np.uint16)).tolist() == [[0, 18]]


def test_sixteen_bit_benchmarks_keep_ids_above_255() -> None:
    ade = benchmarks.get("ade847")
    assert ade.wide and ade.ignore_index == 65535 and not benchmarks.get("ade20k").wide
    raw = np.array([[0, 255, 256, 846, 65535]], np.uint16)
    ids = ade.to_train_ids(raw)
    assert ids.dtype == np.uint16 and ids.tolist() == raw.tolist()
    ade.require_in_range(ids, "fine.tif")
    with pytest.raises(
        DataError, match=r"ids of no class: 847, 65534, which ade847 does not have \(classes are 0\.\.846; 65535"
    ):
        ade.require_in_range(ade.to_train_ids(np.array([[846, 847, 65534]], np.int32)), "wrong.tif")
    with pytest.raises(DataError, match=r"no ids: 65536 \(classes are 0\.\.846; 65535 is not counted\)"):
        ade.to_train_ids(np.array([[0, 65536]], np.int32))


def test_the_background_of_voc20b_is_its_last_class() -> None:
    voc = benchmarks.get("voc20b")
    raw = np.array([[0, 1, 20, 21, 255]], np.uint8)
    assert voc.to_train_ids(raw).tolist() == [[20, 0, 19, 21, 255]]
    assert voc.stored_ids == (*range(1, 21), 0)
    with pytest.raises(DataError, match=r"ids of no class: 21, which voc20b does not have \(classes are 0\.\.20;"):
        voc.require_in_range(voc.to_train_ids(raw), "wrong.png")


def test_id_ranges() -> None:
    assert labels.id_ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert labels.id_ranges(range(0, 40, 2), most=3) == "0, 2, 4, ..."
