"""One strict reader of label files: what it refuses, every door refuses, naming the label; what it reads, mmseg reads alike."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_clip import save_tiny

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.check.checking import check
from ovbench.benchmarks.labels import KINDS, LabelFault, LabelRule, decode_label
from ovbench.benchmarks.synth.copies import synth
from ovbench.errors import DataError
from ovbench.train.recipe import Recipe

SIZE = (12, 20)  # height, width
BAD = 9  # the file after the eighth, where the quick look has ended
IDS = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 3


def grey_png(path: Path, bits: int) -> None:
    """A grey PNG with fewer than 8 bits per pixel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = SIZE
    row = b"\0" + bytes([0x11]) * (width * bits // 8)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def tiff(path: Path, values: np.ndarray, sample_format: int, photometric: int = 1) -> None:
    """An uncompressed TIFF with any kind of numbers: 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape
    data, bits = values.tobytes(), values.dtype.itemsize * 8
    entries = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height,
        279: len(data), 339: sample_format,
    }  # fmt: skip
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    path.write_bytes(head + struct.pack("<I", 0) + data)


def with_one(value: float, dtype: Any) -> np.ndarray:
    found = IDS.astype(dtype)
    found[0, 0] = value
    return found


def save(values: np.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path, **{"format": "PNG", **options})


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def colour(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(IDS.astype(np.uint8)).convert(mode).save(path, format="PNG")


def cut(path: Path) -> None:
    save(np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8))(path)
    path.write_bytes(path.read_bytes()[:60])


def pages(path: Path) -> None:
    one = Image.fromarray(IDS.astype(np.uint8))
    one.save(path, format="TIFF", save_all=True, append_images=[one])


U8 = IDS.astype(np.uint8)
# What is written -> kind of fault, what the message says beside the file.
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "16 bits, 256 + k": (save(with_one(257, np.uint16)), "wide_ids", "257 (classes are 0..2; 255 is not counted)"),
    "16 bits, 65535": (save(with_one(65535, np.uint16)), "wide_ids", "65535 (classes are 0..2; 255 is not counted)"),
    "32 bits, 256": (save(with_one(256, np.int32), format="TIFF"), "wide_ids", "256 (classes"),
    "32 bits, -1": (save(with_one(-1, np.int32), format="TIFF"), "wide_ids", "-1 (classes"),
    "unsigned, 2**32 - 1": (lambda p: tiff(p, with_one(2**32 - 1, np.uint32), 1), "wide_ids", "4294967295 (classes"),
    "signed byte, -1": (lambda p: tiff(p, with_one(-1, np.int8), 2), "wide_ids", "-1 (classes"),
    "signed short, -1": (lambda p: tiff(p, with_one(-1, np.int16), 2), "wide_ids", "-1 (classes"),
    "float, 1.9": (save(with_one(1.9, np.float32), format="TIFF"), "fractions", "0..2"),
    "white is 0": (lambda p: tiff(p, U8, 1, photometric=0), "scaled_label", "white is 0"),
    "id of no class": (save(with_one(3, np.uint8)), "out_of_range", "3, which"),
    "RGB": (colour("RGB"), "colour_label", "RGB"),
    "RGBA": (colour("RGBA"), "colour_label", "RGBA"),
    "grey with transparency": (colour("LA"), "colour_label", "grey with transparency"),
    "grey of 4 bits": (lambda p: grey_png(p, 4), "scaled_label", "grey of 4 bits"),
    "grey of 2 bits": (lambda p: grey_png(p, 2), "scaled_label", "grey of 2 bits"),
    "JPEG": (save(U8, format="JPEG"), "lossy_label", "is JPEG data"),
    "JPEG in TIFF": (save(U8, format="TIFF", compression="jpeg"), "lossy_label", "is JPEG data"),
    "pages": (pages, "several_pictures", "there are 2"),
    "frames": (save(U8, save_all=True, append_images=[Image.fromarray(2 - U8)]), "several_pictures", "there are 2"),
    "EXIF rotation": (save(U8, exif=exif(6)), "turned_label", "orientation 6"),
    "TIFF rotation": (save(U8, format="TIFF", tiffinfo={274: 3}), "turned_label", "orientation 3"),
    "PostScript": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n"), "unreadable_label", ""),
    "cut": (cut, "unreadable_label", "is damaged or no image"),
    "empty": (lambda p: p.write_bytes(b""), "unreadable_label", "is damaged or no image"),
    "other size": (save(U8[:-1]), "size_mismatch", "20 x 11 pixels"),
    "turned": (save(np.ascontiguousarray(U8.T)), "size_mismatch", "12 x 20 pixels"),
}  # fmt: skip
# What is written -> the ids that it stands for.
READ: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "grey": (save(U8), IDS),
    "palette": (lambda p: Image.fromarray(U8).convert("P").save(p, format="PNG"), IDS),
    "palette of 2 bits": (lambda p: Image.fromarray(U8).convert("P").save(p, format="PNG", bits=2), IDS),
    "1 bit": (save(U8 > 0), IDS > 0),
    "16 bits": (save(IDS.astype(np.uint16)), IDS),
    "32 bits": (save(IDS.astype(np.int32), format="TIFF"), IDS),
    "ignored": (save(with_one(255, np.uint8)), with_one(255, np.int64)),
    "ignored, 16 bits": (save(with_one(255, np.uint16)), with_one(255, np.int64)),
}


def folder(home: Path, images: int = BAD + 1) -> Path:
    """A dataset of one's own whose labels are in order."""
    for part in ("images", "labels"):
        (home / part).mkdir(parents=True)
    (home / "classes.txt").write_text("background\ncat\ndog\n")
    for index in range(images):
        pixels = np.random.default_rng(index).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"images/i{index:02d}.png")
        save(U8)(home / f"labels/i{index:02d}.png")
    return home


def recipe() -> Recipe:
    return Recipe(lr=0.01, weight_decay=0.0, iters=1, batch=1, crop=8, resize=(20, 12), ratio_range=(1.0, 1.0))


@pytest.mark.parametrize("what", REFUSED)
def test_every_door_refuses_and_names_the_label(what: str, tmp_path: Path) -> None:
    from ovbench.evaluate.loop import Failed, Images
    from ovbench.evaluate.session import build_dataset
    from ovbench.mm import readers
    from ovbench.train.data import training_set

    write, kind, said = REFUSED[what]
    home = folder(tmp_path / "data")
    path = home / f"labels/i{BAD:02d}.png"
    write(path)
    benchmark = benchmarks.get(str(home))
    doors: dict[str, Callable[[], Any]] = {
        "mmseg": lambda: readers.build(benchmark, home)[BAD],
        "training": lambda: training_set(benchmark, home, recipe(), seed=0)[BAD, 0],
    }
    if kind != "size_mismatch":
        doors["Python"] = lambda: benchmark.load_label(path)
    for door, read in doors.items():
        with pytest.raises(LabelFault) as caught:
            read()
        text = str(caught.value)
        assert caught.value.kind == kind, door
        assert text.startswith(f"The label '{path}'") and said in text and text.count(". ") >= 1, door
    failed = Images(build_dataset(benchmark, home, 0, 2048))[BAD]
    assert isinstance(failed, Failed) and failed.path == str(path) and failed.name == f"labels/{path.name}"
    again = pickle.loads(pickle.dumps(failed))  # readers are processes of their own
    assert (again.error.kind, again.error.path, str(again.error)) == (kind, path, str(failed.error))
    [problem] = [found for found in check(str(home), home).problems if found.level == "error"]
    assert problem.kind == kind and problem.count == 1 and path.name in problem.files[0]


@pytest.mark.parametrize("what", READ)
def test_labels_in_order_are_read_as_mmseg_reads_them(what: str, tmp_path: Path) -> None:
    from mmengine.registry import DefaultScope

    from ovbench.mm import readers
    from ovbench.mm.compat import import_mmseg

    write, wanted = READ[what]
    home = folder(tmp_path / "data", 1)
    write(home / "labels/i00.png")
    benchmark = benchmarks.get(str(home))
    ours = readers.build(benchmark, home)[0]["data_samples"].gt_sem_seg.data[0].numpy()
    assert np.array_equal(ours, wanted)
    cfg = benchmark.dataset_cfg(home)
    cfg["pipeline"][-2] = {"type": "mmseg.LoadAnnotations"}
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = import_mmseg().registry.DATASETS.build(cfg)[0]["data_samples"].gt_sem_seg.data[0].numpy()
    assert np.array_equal(theirs, wanted)
    assert check(str(home), home).ok


def test_zero_is_reduced_in_16_bits_too(tmp_path: Path) -> None:
    rule = LabelRule("x", 3, reduce_zero_label=True)
    values = np.array([[0, 1, 3, 255]])
    for dtype in (np.uint8, np.uint16):
        save(values.astype(dtype))(tmp_path / "label.png")
        assert rule.load(tmp_path / "label.png").tolist() == [[255, 0, 2, 255]]
    save(np.array([[4, 1]], np.uint16))(tmp_path / "label.png")
    with pytest.raises(LabelFault, match=r"4, which x does not have \(classes are 1..3; 0 and 255 are not counted\)"):
        rule.load(tmp_path / "label.png")
    save(np.array([[256, 1]], np.uint16))(tmp_path / "label.png")
    with pytest.raises(LabelFault, match="256"):
        rule.load(tmp_path / "label.png")


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "context459", "voc20b"])
def test_a_class_and_the_ignored_value_pass_and_all_else_is_named(name: str) -> None:
    """Whichever way the range is looked at: the whole table at once, and each value that is no class alone."""
    benchmark = benchmarks.get(name)
    rule, dtype = benchmark.label_rule, benchmark.id_table.dtype
    fine = np.array([*range(rule.num_classes), rule.ignore_index], dtype)
    rule.require_classes(fine[None], "fine.png")
    rule.require_classes(fine[None].astype(np.int64), "fine.png")
    for wrong in (rule.num_classes, rule.ignore_index - 1):
        with pytest.raises(LabelFault, match=rf"wrong\.png' has ids of no class: {wrong + rule.reduce_zero_label}, "):
            rule.require_classes(np.append(fine, np.array(wrong, dtype))[None], "wrong.png")


def test_eight_bits_are_refused_where_ids_need_sixteen(tmp_path: Path) -> None:
    rule = LabelRule("many", 300, ignore_index=65535)
    save(U8)(tmp_path / "label.png")
    with pytest.raises(LabelFault, match="has 8 bits"):
        rule.load(tmp_path / "label.png")
    save(with_one(65535, np.uint16))(tmp_path / "label.png")
    assert np.array_equal(rule.load(tmp_path / "label.png"), with_one(65535, np.uint16))


def test_smaller_copies_in_a_map_are_no_second_picture(tmp_path: Path) -> None:
    whole, small = Image.fromarray(U8), Image.fromarray(np.ascontiguousarray(U8[::2, ::2]))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    whole.save(tmp_path / "map.tif", save_all=True, append_images=[small])
    assert Image.open(tmp_path / "map.tif").n_frames == 2
    assert np.array_equal(decode_label(tmp_path / "map.tif"), U8)


def test_what_helps_is_said_of_every_kind() -> None:
    values = np.array([[-1, 7]], np.int32)
    with pytest.raises(LabelFault, match=r"-1 .* write 255 there"):
        LabelRule("x", 3).train_ids(values)
    with pytest.raises(LabelFault, match=r"26001 .* instance ids"):
        LabelRule("x", 3).train_ids(np.array([[26001]]))
    told = {kind for kind, known in KINDS.items() if known.fix}
    assert set(KINDS) - told == {"missing_labels", "wide_ids", "out_of_range"}  # the rule says more of these
    with pytest.raises(DataError, match=r"nowhere.png' does not exist"):
        decode_label(Path("nowhere.png"))


def test_the_order_of_classes_counts_for_every_type(tmp_path: Path) -> None:
    """A config with ``raw_ids`` over mmseg's plain type: 'data check' renumbered, a run did not."""
    from ovbench.mm import readers

    home = folder(tmp_path / "data", 1)
    config = tmp_path / "own.py"
    config.write_text(
        "benchmark = dict(title='t', expected_images=1)\ndataset = dict(data_prefix=dict(img_path='data/images', "
        "seg_map_path='data/labels'), img_suffix='.png', seg_map_suffix='.png', raw_ids=[2, 0, 1])\n"
    )
    config.with_suffix(".txt").write_text("dog\nbackground\ncat\n")
    benchmark = benchmarks.get(str(config))
    read = readers.build(benchmark, tmp_path)[0]["data_samples"].gt_sem_seg.data[0].numpy()
    assert np.array_equal(read, benchmark.load_label(home / "labels/i00.png"))
    assert np.array_equal(read, np.array([1, 2, 0])[IDS])


@pytest.mark.parametrize("training", [False, True])
def test_labels_of_the_training_split_are_read_the_same_way(training: bool, tmp_path: Path) -> None:
    from ovbench.mm import readers
    from ovbench.train.data import training_set

    root = synth("ade20k", tmp_path, images=1, train_images=2, size=(32, 48))
    benchmark = benchmarks.get("ade20k").for_split("train")
    path = benchmark.pairs(root)[1].label
    values = np.array(Image.open(path)).astype(np.uint16)
    values[0, 0] = 256
    save(values)(path)
    read = training_set(benchmark, root, recipe(), seed=0) if training else readers.build(benchmark, root)
    with pytest.raises(LabelFault, match=f"{path.name}' has values that are no ids: 256"):
        read[(1, 0) if training else 1]


def panoptic_16_bits(path: Path) -> None:
    height, width = np.array(Image.open(path)).shape[:2]
    raw = (b"\0" + bytes(6 * width)) * height

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (panoptic_16_bits, "not_rgb"),
        (lambda path: Image.open(path).convert("L").save(path), "not_rgb"),
        (lambda path: Image.open(path).convert("RGB").save(path, format="JPEG"), "lossy_label"),
        (lambda path: Image.open(path).crop((0, 0, 30, 20)).save(path), "size_mismatch"),
    ],
)
def test_panoptic_labels_are_read_by_the_same_reader(damage: Any, kind: str, tmp_path: Path) -> None:
    from ovbench.mm import readers

    root = synth("coco_panoptic", tmp_path, images=2, size=(32, 48))
    benchmark = benchmarks.get("coco_panoptic")
    path = benchmark.pairs(root)[1].label
    damage(path)
    with pytest.raises(LabelFault, match=path.name) as caught:
        readers.build(benchmark, root)[1]
    assert caught.value.kind == kind
    assert kind in {problem.kind for problem in check("coco_panoptic", root).problems}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


def spec(weights: str, home: Path) -> dict[str, Any]:
    protocol = {"name": "common", "templates": "plain", "short_side": 32, "crop": 32, "stride": 32}
    return {"method": "clip", "dataset": str(home), "weights": weights, "protocol": protocol}


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_one_pixel_high_or_wide_is_evaluated(size: tuple[int, int], weights: str, tmp_path: Path) -> None:
    home = folder(tmp_path / "data", 2)
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(home / "images/i01.png")
    save(np.ones(size, np.uint8))(home / "labels/i01.png")
    record = ovbench.run(spec(weights, home), data_root=home, results=tmp_path / "r", workers=0, gallery=0)
    assert record.metrics is not None and record.status == "ok"
    assert sum(one.label for one in record.metrics.classes) == IDS.size + size[0] * size[1]


def test_a_run_stops_at_such_a_label_or_skips_it_by_its_name(weights: str, tmp_path: Path) -> None:
    home = folder(tmp_path / "data")
    path = home / f"labels/i{BAD:02d}.png"
    save(with_one(65535, np.uint16))(path)
    options: dict[str, Any] = {"data_root": home, "results": tmp_path / "r", "workers": 0, "gallery": 0}
    for looked in (True, False):
        with pytest.raises(DataError, match=f"The label '{path}' .* 65535 .* not counted"):
            ovbench.run(spec(weights, home), **options, check=looked)
    told: list[str] = []
    record = ovbench.run(spec(weights, home), **options, on_error="skip", on_message=told.append)
    [failure] = record.failures
    assert record.partial and failure.name == f"labels/{path.name}" and str(path) in failure.reason
    assert f"labels/{path.name}" in str(record.reason) and str(home / "images") not in failure.reason
    assert any(text.startswith(f"Skipped: The label '{path}'") for text in told)
