"""``data check``: faults planted in generated copies are all found, with files and fix, and clean copies pass."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovbench import benchmarks
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.check.checking import check, quick_check
from ovbench.benchmarks.check.outcome import Problem, describe
from ovbench.benchmarks.layout import Pair
from ovbench.benchmarks.synth.copies import MARKER, synth
from ovbench.errors import DataError, UsageError

ALL = [
    name for name in benchmarks.names() if name not in benchmarks.names("panoptic")
]  # those in test_panoptic_data.py
IMAGES = 6


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated copies of all benchmarks; tests plant faults in copies of these."""
    out = tmp_path_factory.mktemp("copies")
    for name in ALL:
        synth(name, out / name, images=IMAGES)
    return out


def _values(path: Path) -> np.ndarray:
    with Image.open(path) as label:
        return np.array(label)


def _save(path: Path, values: np.ndarray) -> None:
    """8-bit PNGs and 16-bit TIFFs, as the benchmarks have them."""
    wide = path.suffix == ".tif"
    Image.fromarray(values.astype(np.uint16 if wide else np.uint8)).save(path, format="TIFF" if wide else "PNG")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _colour(pair: Pair, benchmark: Benchmark) -> None:
    Image.fromarray(_values(pair.label).astype(np.uint8)).convert("RGB").save(pair.label, format="PNG")


def _colour_alpha(pair: Pair, benchmark: Benchmark) -> None:
    Image.fromarray(_values(pair.label).astype(np.uint8)).convert("RGBA").save(pair.label, format="PNG")


def _out_of_range(pair: Pair, benchmark: Benchmark) -> None:
    values = _values(pair.label)
    values[:3, :3] = benchmark.num_classes + benchmark.reduce_zero_label
    _save(pair.label, values)


def _other_size(pair: Pair, benchmark: Benchmark) -> None:
    _save(pair.label, _values(pair.label)[:-1])


def _ignore_all(pair: Pair, benchmark: Benchmark) -> None:
    _save(pair.label, np.full_like(_values(pair.label), 0 if benchmark.reduce_zero_label else benchmark.ignore_index))


def _instance_ids(pair: Pair, benchmark: Benchmark) -> None:
    values = _values(pair.label).astype(np.int32) * 1000 + 65000
    if benchmark.wide:
        Image.fromarray(values).save(pair.label, format="TIFF")
    else:
        Image.fromarray(values.clip(0, 65535).astype(np.uint16)).save(pair.label, format="PNG")


def _eight_bit(pair: Pair, benchmark: Benchmark) -> None:
    Image.fromarray(_values(pair.label).astype(np.uint8)).save(pair.label, format="TIFF")


def _as_jpeg(pair: Pair, benchmark: Benchmark) -> None:
    Image.fromarray(np.zeros_like(_values(pair.label), np.uint8)).save(pair.label, format="JPEG")


FAULTS: dict[str, tuple[Callable[[Pair, Benchmark], None], str]] = {
    "truncated image": (lambda pair, _: _truncate(pair.image), "unreadable_image"),
    "empty image": (lambda pair, _: pair.image.write_bytes(b"") and None, "unreadable_image"),
    "web page as image": (lambda pair, _: pair.image.write_text("<html>404</html>") and None, "unreadable_image"),
    "truncated label": (lambda pair, _: _truncate(pair.label), "unreadable_label"),
    "coloured label": (_colour, "colour_label"),
    "coloured label with alpha": (_colour_alpha, "colour_label"),
    "foreign ids": (_out_of_range, "out_of_range"),
    "cut label": (_other_size, "size_mismatch"),
    "nothing labelled": (_ignore_all, "all_ignored"),
    "instance ids": (_instance_ids, "wide_ids"),
    "jpeg labels": (_as_jpeg, "lossy_label"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ALL)
def test_every_planted_fault_is_found_with_its_files(name: str, fault: str, copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    shutil.copytree(copies / name, tmp_path / name)
    pairs = benchmark.pairs(tmp_path)
    plant, kind = FAULTS[fault]
    for pair in pairs[1:5]:
        plant(pair, benchmark)
    report = check(name, tmp_path)
    found = {problem.kind: problem for problem in report.problems}
    assert kind in found, report
    problem = found[kind]
    assert problem.count == 4 and len(problem.files) == 3 and len(problem.fix) > 10
    assert all(pair.stem in file for pair, file in zip(pairs[1:4], problem.files, strict=True))
    # Some images without any counted pixel can be genuine.
    assert problem.level == ("warning" if fault == "nothing labelled" else "error")
    assert fault == "nothing labelled" or not report.ok


@pytest.mark.parametrize("name", ALL)
def test_missing_files_are_found(name: str, copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    shutil.copytree(copies / name, tmp_path / name)
    pairs = benchmark.pairs(tmp_path)
    pairs[0].label.unlink()
    pairs[1].image.unlink()
    report = check(name, tmp_path)
    kinds = {problem.kind: problem for problem in report.problems}
    assert not report.ok
    assert kinds["missing_labels"].count == 1 and pairs[0].stem in kinds["missing_labels"].files[0]
    # Without a split list an image that is not there is not known of; its label is left over.
    left = "missing_images" if benchmark.layout.split_file else "extra_labels"
    assert kinds[left].count == 1 and pairs[1].stem in kinds[left].files[0]


@pytest.mark.parametrize("name", ["ade847", "context459"])
def test_labels_of_eight_bits_are_found_where_classes_need_more(name: str, copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    shutil.copytree(copies / name, tmp_path / name)
    for pair in benchmark.pairs(tmp_path)[1:5]:
        _eight_bit(pair, benchmark)
    problem = next(problem for problem in check(name, tmp_path).problems if problem.kind == "narrow_ids")
    assert problem.level == "error" and problem.count == 4
    assert "cannot tell all classes apart" in problem.message and f"has {benchmark.num_classes}" in problem.files[0]


def test_labels_as_the_conversion_of_mmsegmentation_leaves_coco_stuff10k_are_told_from_the_raw_ones(
    tmp_path: Path,
) -> None:
    benchmark = benchmarks.get("coco_stuff10k")
    root = synth("coco_stuff10k", tmp_path, images=20)
    raw = [number for number in range(1, 183) if number not in benchmark.raw_gaps]
    table = np.zeros(256, int)
    table[1:172] = raw
    _renumber(root, benchmark, table)
    report = check("coco_stuff10k", root)
    assert not report.ok and {"out_of_range", "unconverted"} <= {problem.kind for problem in report.problems}


def test_each_split_is_checked_by_itself(tmp_path: Path) -> None:
    root = synth("context59", tmp_path, images=3, train_images=5, size=(64, 96))
    train = benchmarks.get("context59").for_split("train")
    train.pairs(root)[2].label.unlink()
    assert check("context59", root).ok
    report = check("context59", root, split="train")
    assert (report.split, report.listed, report.checked, report.expected) == ("train", 5, 4, 4998)
    assert [problem.kind for problem in report.problems] == ["missing_labels"]
    with pytest.raises(DataError, match="1 of 5 labels are missing"):
        quick_check("context59", root, split="train")
    with pytest.raises(UsageError, match="voc21 has no training split"):
        check("voc21", root, split="train")
    (tmp_path / MARKER).unlink()
    text = next(problem for problem in check("context59", root, split="train").problems if problem.kind == "count")
    assert "5 images, but the official context59 train split has 4998" in text.message


def _renumber(root: Path, benchmark: Benchmark, table: np.ndarray) -> None:
    for pair in benchmark.pairs(root):
        _save(pair.label, table[_values(pair.label)])


@pytest.mark.parametrize("name", [name for name in ALL if benchmarks.get(name).reduce_zero_label])
def test_labels_that_were_reduced_already_are_found(name: str, copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    shutil.copytree(copies / name, tmp_path / name)
    table = np.arange(256) - 1
    table[[0, 255]] = 255
    _renumber(tmp_path, benchmark, table.astype(np.uint8))
    report = check(name, tmp_path)
    kind = "no_zero" if benchmark.has_255 else "has_255"
    assert not report.ok
    problem = next(problem for problem in report.problems if problem.kind == kind)
    assert problem.level == "error" and "shifted by one" in problem.fix


@pytest.mark.parametrize("name", ["voc21", "coco_object"])
def test_background_labelled_255_is_found(name: str, copies: Path, tmp_path: Path) -> None:
    """0 = first object and 255 = the rest, which is another benchmark's numbering."""
    benchmark = benchmarks.get(name)
    shutil.copytree(copies / name, tmp_path / name)
    table = np.arange(256) - 1
    table[[0, 255]] = 255
    _renumber(tmp_path, benchmark, table.astype(np.uint8))
    assert not check(name, tmp_path).ok


def test_raw_cityscapes_ids_are_found(copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get("cityscapes")
    shutil.copytree(copies / "cityscapes", tmp_path / "cityscapes")
    table = np.full(256, 0)
    table[:19] = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    _renumber(tmp_path, benchmark, table.astype(np.uint8))
    problem = check("cityscapes", tmp_path).problems[0]
    assert problem.kind == "out_of_range" and "19" in problem.message and "csCreateTrainIdLabelImgs" in problem.fix


def _raw_coco(benchmark: Benchmark) -> np.ndarray:
    raw = [number for number in range(182) if number not in benchmark.raw_gaps]
    table = np.full(256, 255)
    table[:171] = raw
    return table.astype(np.uint8)


def test_raw_coco_stuff_ids_are_found(tmp_path: Path) -> None:
    benchmark = benchmarks.get("coco_stuff")
    root = synth("coco_stuff", tmp_path, images=20)
    _renumber(root, benchmark, _raw_coco(benchmark))
    kinds = {problem.kind for problem in check("coco_stuff", root).problems}
    assert {"out_of_range", "unconverted"} <= kinds


def test_raw_coco_stuff_ids_are_found_even_where_all_are_in_range(tmp_path: Path) -> None:
    benchmark = benchmarks.get("coco_stuff")
    root = synth("coco_stuff", tmp_path, images=20)
    table = _raw_coco(benchmark)
    table[table > 170] = 255
    _renumber(root, benchmark, table)
    report = check("coco_stuff", root)
    assert [problem.kind for problem in report.problems] == ["unconverted"] and not report.ok


def test_empty_masks_are_found(copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get("voc21")
    shutil.copytree(copies / "voc21", tmp_path / "voc21")
    _renumber(tmp_path, benchmark, np.zeros(256, np.uint8))
    errors = [problem.kind for problem in check("voc21", tmp_path).problems if problem.level == "error"]
    assert errors == ["no_ignored", "one_class"]


def test_nothing_but_ignored_pixels_in_all_files_is_an_error(copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get("cityscapes")
    shutil.copytree(copies / "cityscapes", tmp_path / "cityscapes")
    _renumber(tmp_path, benchmark, np.full(256, 255, np.uint8))
    report = check("cityscapes", tmp_path)
    assert not report.ok and report.problems[0].kind == "all_ignored" and report.ignore_share == 1


def test_palette_labels_are_fine_whatever_their_colours(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "ade20k", tmp_path / "ade20k")
    for pair in benchmarks.get("ade20k").pairs(tmp_path):
        label = Image.fromarray(_values(pair.label))
        label.putpalette(bytes(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8)))
        label.save(pair.label)
    report = check("ade20k", tmp_path)
    assert report.ok and report.problems == ()


def test_photograph_with_a_rotation_flag_counts_as_readers_turn_it(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "ade20k", tmp_path / "ade20k")
    pair = benchmarks.get("ade20k").pairs(tmp_path)[0]
    with Image.open(pair.image) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(pair.image, exif=exif)
    assert check("ade20k", tmp_path).ok
    with Image.open(pair.image) as image:
        image.transpose(Image.Transpose.ROTATE_270).save(pair.image, exif=exif)
    assert [problem.kind for problem in check("ade20k", tmp_path).problems] == ["size_mismatch"]


def test_list_faults_are_found(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "voc21", tmp_path / "voc21")
    benchmark = benchmarks.get("voc21")
    split = benchmark.resolve_root(tmp_path) / benchmark.layout.split_file
    text = split.read_text(encoding="utf-8")
    split.write_text(text.splitlines()[0] + "\n\n" + text, encoding="utf-8")
    kinds = {problem.kind: problem.level for problem in check("voc21", tmp_path).problems}
    assert kinds == {"blank_lines": "error", "repeated": "error"}
    split.write_text("", encoding="utf-8")
    assert [problem.kind for problem in check("voc21", tmp_path).problems] == ["empty"]


def test_a_partial_copy_of_photographs_is_a_warning(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "voc21", tmp_path / "voc21")
    (tmp_path / "voc21" / MARKER).unlink()
    report = check("voc21", tmp_path)
    assert report.ok and not report.synthetic
    assert [problem.kind for problem in report.problems] == ["count"]
    assert f"{IMAGES} images, but the official voc21 split has 1449" in report.problems[0].message


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_folder_is_a_problem_not_a_crash(name: str, tmp_path: Path) -> None:
    report = check(name, tmp_path)
    assert not report.ok and report.problems[0].kind == "layout" and "Looked for" in report.problems[0].message
    assert not check(name, tmp_path / "nowhere").ok


def test_report_is_json_and_counts_right(copies: Path) -> None:
    report = check("voc20", copies)
    content = json.loads(json.dumps(report.to_json()))
    assert content["ok"] is True and content["checked"] == IMAGES and content["problems"] == []
    pairs = benchmarks.get("voc20").pairs(copies)
    labels = [benchmarks.get("voc20").load_label(pair.label) for pair in pairs]
    ignored = sum(int((label == 255).sum()) for label in labels) / sum(label.size for label in labels)
    assert content["ignore_share"] == pytest.approx(ignored)
    assert content["classes_present"] == len({int(i) for label in labels for i in np.unique(label)} - {255})


def test_workers_and_progress(copies: Path) -> None:
    calls: list[tuple[int, int]] = []
    one = check("cityscapes", copies, workers=1, progress=lambda *done: calls.append(done))
    assert calls == [(done, IMAGES) for done in range(1, IMAGES + 1)]
    assert one == check("cityscapes", copies, workers=4)


def test_quick_check_raises_on_errors_in_the_first_files_only(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "ade20k", tmp_path / "ade20k")
    pairs = benchmarks.get("ade20k").pairs(tmp_path)
    _truncate(pairs[4].image)
    assert quick_check("ade20k", tmp_path, first=4).ok
    with pytest.raises(DataError, match=r"cannot be used:\nerror: 1 images are damaged.*ADE_val_00000005"):
        quick_check("ade20k", tmp_path, first=5)
    with pytest.raises(DataError, match="No voc21 data"):
        quick_check("voc21", tmp_path)
    with pytest.raises(UsageError, match="Unknown dataset 'voc'"):
        check("voc", tmp_path)


def test_describe_reads_as_a_sentence() -> None:
    problem = Problem("kind", "error", "2 labels are wrong.", "Make them again.", 2, ("a.png", "b.png"))
    assert describe(problem) == "error: 2 labels are wrong. E.g. a.png, b.png. Make them again."


@pytest.mark.parametrize("name", ["voc21", "voc20", "coco_object", "coco_stuff", "ade20k"])
def test_real_files_pass(name: str) -> None:
    shared = Path(os.environ.get("OVBENCH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (shared / "data" / "voc2012").is_dir():
        pytest.skip(f"no real images in {shared}")
    report = check(name, shared / "data")
    assert report.ok and not report.synthetic
    assert [problem.kind for problem in report.problems] == ["count"]


def test_real_unconverted_coco_stuff_is_found(tmp_path: Path) -> None:
    shared = Path(os.environ.get("OVBENCH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    source = shared / "data" / "coco_stuff164k"
    if not source.is_dir():
        pytest.skip(f"no real COCO-Stuff files in {shared}")
    shutil.copytree(source / "images" / "val2017", tmp_path / "images" / "val2017")
    (tmp_path / "annotations" / "val2017").mkdir(parents=True)
    for path in (source / "annotations" / "val2017").glob("*_labelTrainIds.png"):
        raw = path.with_name(path.name.replace("_labelTrainIds", ""))
        shutil.copy(raw, tmp_path / "annotations" / "val2017" / path.name)
    report = check("coco_stuff", tmp_path)
    assert not report.ok and report.problems[0].kind == "out_of_range"
