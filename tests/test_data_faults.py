"""``data check`` on every benchmark: each planted fault is found and named, and a clean copy has none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ovbench import benchmarks
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.check.checking import check
from ovbench.benchmarks.layout import Pair
from ovbench.benchmarks.synth.copies import MARKER, synth
from ovbench.cli.data import app

ALL = [name for name in benchmarks.names() if benchmarks.get(name).panoptic is None]  # others: test_panoptic_data
# Rules about a numbering need to see many of its ids.
IMAGES = {"coco_stuff": 24, "coco_object": 24, "coco_stuff10k": 24}
PLANTED = 3  # the place of the faulty pair

Pairs = list[Pair]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small clean copies of all benchmarks; tests plant faults in copies of these."""
    out = tmp_path_factory.mktemp("copies")
    for name in ALL:
        synth(name, out / name, images=IMAGES.get(name, 8), size=(48, 64))
    return out


def ids_of(path: Path) -> np.ndarray:
    with Image.open(path) as label:
        return np.array(label)


def put(path: Path, values: np.ndarray) -> None:
    """Writes a label as the benchmarks have them: 8-bit PNG, 16-bit TIFF."""
    wide = path.suffix == ".tif"
    Image.fromarray(values.astype(np.uint16 if wide else np.uint8)).save(path, format="TIFF" if wide else "PNG")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def list_of(pairs: Pairs, benchmark: Benchmark) -> Path:
    root = benchmark.resolve_root(pairs[0].image.parent)
    return root / benchmark.layout.split_file


def changed(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def coloured(pair: Pair, benchmark: Benchmark) -> None:
    colours = np.array([*benchmark.palette, (0, 0, 0)], np.uint8)
    Image.fromarray(colours[np.minimum(ids_of(pair.label), benchmark.num_classes)]).save(pair.label, format="PNG")


def foreign(pair: Pair, benchmark: Benchmark) -> None:
    values = ids_of(pair.label)
    values[:3, :3] = benchmark.num_classes + benchmark.reduce_zero_label
    put(pair.label, values)


def unlabelled(pair: Pair, benchmark: Benchmark) -> None:
    put(pair.label, np.full_like(ids_of(pair.label), 0 if benchmark.reduce_zero_label else benchmark.ignore_index))


def instances(pair: Pair, benchmark: Benchmark) -> None:
    values = ids_of(pair.label).astype(np.int32) * 1000 + 66_000
    if benchmark.wide:
        Image.fromarray(values).save(pair.label, format="TIFF")
    else:
        Image.fromarray((values % 60_000 + 300).astype(np.uint16)).save(pair.label, format="PNG")


def negative(pair: Pair, benchmark: Benchmark) -> None:
    values = ids_of(pair.label).astype(np.int32)
    values[:4] = -1
    Image.fromarray(values).save(pair.label, format="TIFF")


# One file is faulty: the kind of problem that must name it.
ONE_FILE: dict[str, tuple[Callable[[Pair, Benchmark], object], str]] = {
    "missing label": (lambda pair, _: pair.label.unlink(), "missing_labels"),
    "missing image": (lambda pair, _: pair.image.unlink(), "missing_images"),
    "truncated image": (lambda pair, _: cut(pair.image), "unreadable_image"),
    "truncated label": (lambda pair, _: cut(pair.label), "unreadable_label"),
    "empty image file": (lambda pair, _: pair.image.write_bytes(b""), "unreadable_image"),
    "empty label file": (lambda pair, _: pair.label.write_bytes(b""), "unreadable_label"),
    "RGB label": (coloured, "colour_label"),
    "id out of range": (foreign, "out_of_range"),
    "size mismatch": (lambda pair, _: put(pair.label, ids_of(pair.label)[:-1]), "size_mismatch"),
    "nothing labelled": (unlabelled, "all_ignored"),
    "instance ids": (instances, "wide_ids"),
    "negative ids": (negative, "wide_ids"),
    "label as JPEG": (
        lambda pair, _: Image.fromarray(ids_of(pair.label).astype(np.uint8)).save(pair.label, format="JPEG"),
        "lossy_label",
    ),
}


def renumbered(pairs: Pairs, table: np.ndarray) -> None:
    for pair in pairs:
        put(pair.label, table[ids_of(pair.label)])


def reduced(pairs: Pairs, benchmark: Benchmark) -> None:
    """0 was taken for unlabelled, and the classes moved down."""
    table = np.arange(256) - 1
    table[[0, 255]] = 255
    renumbered(pairs, table)


def not_reduced(pairs: Pairs, benchmark: Benchmark) -> None:
    """0 is unlabelled, and the classes begin with 1."""
    table = np.arange(65536) + 1
    table[[65534, 65535]] = 65535, 0
    renumbered(pairs, table)


def raw_cityscapes(pairs: Pairs, benchmark: Benchmark) -> None:
    table = np.zeros(256, int)
    table[:19] = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    renumbered(pairs, table)


def with_gaps(pairs: Pairs, benchmark: Benchmark) -> None:
    """The numbering before the conversion: with unused ids."""
    gaps = benchmark.raw_gaps
    first = int(benchmark.reduce_zero_label or benchmark.has_background)
    raw = [value for value in range(first, 256) if value not in gaps][
        : benchmark.num_classes - benchmark.has_background
    ]
    table = np.arange(256)
    table[first : first + len(raw)] = raw
    renumbered(pairs, table)


def eight_bits(pairs: Pairs, benchmark: Benchmark) -> None:
    """Labels of the benchmark with fewer classes."""
    for pair in pairs:
        Image.fromarray((ids_of(pair.label) % 150).astype(np.uint8)).save(pair.label, format="TIFF")


def objects(pairs: Pairs, benchmark: Benchmark) -> None:
    """Objects numbered in each image: VOC's SegmentationObject, and the like of others."""
    for pair in pairs:
        values = ids_of(pair.label)
        found = [value for value in np.unique(values) if value not in (0, 255)]
        for number, value in enumerate(found, 1):
            values[values == value] = number
        put(pair.label, values)


def voc_labels(pairs: Pairs, benchmark: Benchmark) -> None:
    """VOC's SegmentationClass: 0..20 and borders of 255."""
    for pair in pairs:
        values = ids_of(pair.label) % 21
        values[:, ::9] = 255
        put(pair.label, values)


def stuff_labels(pairs: Pairs, benchmark: Benchmark) -> None:
    """COCO-Stuff's *_labelTrainIds.png: 0..170, 255."""
    rng = np.random.default_rng(0)
    for pair in pairs:
        values = rng.choice([*range(171), 255], ids_of(pair.label).shape)
        put(pair.label, values)


def object_labels(pairs: Pairs, benchmark: Benchmark) -> None:
    """COCO Object's *_instanceTrainIds.png: 0 is background, nothing is ignored."""
    for pair in pairs:
        values = ids_of(pair.label).astype(int)
        put(pair.label, np.where(values > 80, 0, values))


def palette_lost(pairs: Pairs, benchmark: Benchmark) -> None:
    """Palette PNGs that a program saved as grey: the brightness of the colours."""
    for pair in pairs:
        with Image.open(pair.label) as label:
            label.convert("RGB").convert("L").save(pair.label, format="PNG")


def colour_folder(pairs: Pairs, benchmark: Benchmark) -> None:
    for pair in pairs:
        coloured(pair, benchmark)


Plant = Callable[[Pairs, Benchmark], None]
SHIFTED = {
    **dict.fromkeys(("voc21", "voc20", "voc20b"), ("no_zero",)),
    **dict.fromkeys(("context60", "coco_object", "context59", "ade20k", "coco_stuff10k"), ("has_255",)),
}
VOC = ("voc21", "voc20", "voc20b")
# The whole copy is of another numbering or from another folder: the kinds of which one must be an error.
WHOLE: dict[str, dict[str, tuple[Plant, tuple[str, ...]]]] = {
    "reduced already": {name: (reduced, kinds) for name, kinds in SHIFTED.items()},
    "not reduced": {"ade847": (not_reduced, ("no_ignored",))},
    "raw ids": {
        "cityscapes": (raw_cityscapes, ("out_of_range",)),
        **dict.fromkeys(("coco_stuff", "coco_stuff10k", "coco_object"), (with_gaps, ("unconverted", "out_of_range"))),
    },
    "wrong label folder": {
        **dict.fromkeys((*VOC, "ade20k"), (objects, ("numbered",))),
        **dict.fromkeys(("context60", "context59"), (voc_labels, ("has_255",))),
        **dict.fromkeys(("ade847", "context459"), (eight_bits, ("narrow_ids",))),
        "cityscapes": (colour_folder, ("colour_label",)),
        "coco_object": (stuff_labels, ("out_of_range",)),
        "coco_stuff": (object_labels, ("no_ignored",)),
        "coco_stuff10k": (stuff_labels, ("has_255",)),
    },
    "palette lost": dict.fromkeys(VOC, (palette_lost, ("out_of_range",))),
}
LISTED = [name for name in ALL if benchmarks.get(name).layout.split_file]
LIST_FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "stem listed twice": (lambda text: text + text.splitlines()[0] + "\n", "repeated"),
    "unknown stem listed": (lambda text: text + "2099_000001\n", "missing_images"),
    "empty line listed": (lambda text: "\n" + text, "blank_lines"),
    "stem that leads out": (lambda text: text + "../../../../etc/hostname\n", "missing_images"),
}


def planned() -> Iterator[tuple[str, str]]:
    for name in ALL:
        yield from ((name, fault) for fault in ONE_FILE)
        yield from ((name, fault) for fault, by_name in WHOLE.items() if name in by_name)
        yield from ((name, fault) for fault in LIST_FAULTS if name in LISTED)


def test_ten_faults_or_more_are_planned_for_every_benchmark() -> None:
    for name in ALL:
        assert len([fault for one, fault in planned() if one == name]) >= 10, name


@pytest.mark.parametrize("name", ALL)
def test_a_clean_copy_has_no_fault(name: str, copies: Path, tmp_path: Path) -> None:
    report = check(name, copies / name)
    assert report.ok and report.problems == (), report
    shutil.copytree(copies / name, tmp_path / name)
    next((tmp_path / name).rglob(MARKER)).unlink()
    # Rules that generated copies are spared find nothing either; only that it is incomplete.
    assert [problem.kind for problem in check(name, tmp_path / name).problems] == ["count"]


@pytest.mark.parametrize(("name", "fault"), list(planned()), ids=lambda value: value)
def test_every_planted_fault_is_found(name: str, fault: str, copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    shutil.copytree(copies / name, tmp_path / name)
    next((tmp_path / name).rglob(MARKER)).unlink()  # it is to be judged like a copy of the real data
    pairs = benchmark.pairs(tmp_path)
    if fault in ONE_FILE:
        plant, kind = ONE_FILE[fault]
        plant(pairs[PLANTED], benchmark)
        if fault == "missing image" and name not in LISTED:
            kind = "extra_labels"  # without a split list nothing says that there should be an image
        kinds: tuple[str, ...] = (kind,)
    elif fault in LIST_FAULTS:
        change, kind = LIST_FAULTS[fault]
        changed(list_of(pairs, benchmark), change)
        kinds = (kind,)
    else:
        whole, kinds = WHOLE[fault][name]
        whole(pairs, benchmark)
    report = check(name, tmp_path)
    found = [problem for problem in report.problems if problem.kind in kinds]
    assert found, report
    genuine = fault == "nothing labelled" or kinds == ("extra_labels",)  # real copies can have these
    assert any(problem.level == ("warning" if genuine else "error") for problem in found), report
    assert report.ok == genuine
    assert all(problem.message and problem.fix for problem in found)
    if fault in ONE_FILE:
        [problem] = found
        assert problem.count == 1 and pairs[PLANTED].stem in problem.files[0]
        others = {problem.kind for problem in report.problems} - {*kinds, "count", "colour_label", "lossy_label"}
        # a JPEG is also changed, an instance map has foreign ids
        assert others <= {"out_of_range", "narrow_ids", "has_255"}, report


def test_the_command_names_three_files_and_the_fix_and_ends_with_3(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "cityscapes", tmp_path / "cityscapes")
    pairs = benchmarks.get("cityscapes").pairs(tmp_path)
    for pair in pairs[:4]:
        cut(pair.label)
    result = CliRunner().invoke(app, ["check", "cityscapes", "--data-root", str(tmp_path)])
    assert result.exit_code == 3 and "4 label files are damaged" in result.stdout
    assert sum(pair.label.name in result.stdout for pair in pairs) == 3
    assert "csCreateTrainIdLabelImgs" in result.stdout
