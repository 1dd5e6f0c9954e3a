"""``ovbench data prepare``: generated downloads in the true raw formats, converted and compared with plain loops."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from typer.testing import CliRunner

from ovbench import benchmarks
from ovbench.benchmarks.check.checking import check
from ovbench.benchmarks.prepare import prepare
from ovbench.benchmarks.prepare.ade847 import NUM_OBJECTS, OBJECT_IDS
from ovbench.benchmarks.prepare.convert import CONTEXT_IDS, run_lengths
from ovbench.cli.data import app
from ovbench.errors import DataError, Interrupted, RunError, UsageError

runner = CliRunner()
GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO = [value for value in range(182) if value not in GAPS]
CITYSCAPES = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19), strict=True))
SIZE = (9, 14)


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def encoded(values: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def photo(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8), "JPEG")


def drawn(ids: list[int], seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Ids of a generated label; every eighth pixel is from ``ids`` in turn, so that all occur in many files."""
    rng = np.random.default_rng(seed)
    label = rng.choice(ids, size)
    flat = label.reshape(-1)
    flat[::8] = [ids[(seed * 16 + number) % len(ids)] for number in range(len(flat[::8]))]
    return label


def stems(name: str, count: int, split: str = "val") -> list[str]:
    benchmark = benchmarks.get(name).for_split(split)
    return [benchmark.synth_rules.stems[i % len(benchmark.synth_rules.stems)].format(i=i) for i in range(count)]


def cityscapes(root: Path, count: int = 6) -> dict[str, np.ndarray]:
    wanted = {}
    for seed, stem in enumerate(stems("cityscapes", count)):
        raw = drawn(list(range(34)), seed)
        put(
            root / f"leftImg8bit/val/{stem}_leftImg8bit.png",
            encoded(np.zeros((*SIZE, 3), np.uint8), "PNG"),
        )
        put(root / f"gtFine/val/{stem}_gtFine_labelIds.png", encoded(raw.astype(np.uint8), "PNG"))
        put(root / f"gtFine/val/{stem}_gtFine_instanceIds.png", encoded((raw * 900).astype(np.uint16), "PNG"))
        wanted[stem] = np.array([[CITYSCAPES.get(int(value), 255) for value in row] for row in raw])
    return wanted


def coco(root: Path, name: str, count: int = 12, split: str = "val") -> dict[str, np.ndarray]:
    folder, wanted = f"{split}2017", {}
    for seed, stem in enumerate(stems(name, count, split)):
        raw = drawn([*COCO, 255], seed)
        put(root / f"{folder}/{stem}.jpg", photo(seed))
        put(root / f"stuffthingmaps/{folder}/{stem}.png", encoded(raw.astype(np.uint8), "PNG"))
        wanted[stem] = np.zeros(SIZE, int)
        for place, value in np.ndenumerate(raw):
            below = int(value) - sum(gap < value for gap in GAPS)
            stuff = 255 if value == 255 else below
            thing = below + 1 if value < 90 else 0
            wanted[stem][place] = stuff if name == "coco_stuff" else thing
    return wanted


def coco_stuff10k(root: Path, count: int = 12) -> dict[str, np.ndarray]:
    lists: dict[str, list[str]] = {"test": [], "train": []}
    wanted = {}
    for seed, stem in enumerate(stems("coco_stuff10k", 2 * count)):
        split = "test" if seed < count else "train"
        lists[split].append(stem)
        raw = drawn([0, *(value + 1 for value in COCO)], seed)
        put(root / f"images/{stem}.jpg", photo(seed))
        file = io.BytesIO()
        savemat(file, {"S": raw.astype(np.uint8), "captions": "none"})
        put(root / f"annotations/{stem}.mat", file.getvalue())
        if split == "test":
            wanted[stem] = np.array([[v - sum(gap + 1 < v for gap in GAPS) for v in row] for row in raw.tolist()])
    for split, names in lists.items():
        put(root / f"imageLists/{split}.txt", "\n".join(names) + "\n")
    return wanted


def context459(root: Path, count: int = 6) -> dict[str, np.ndarray]:
    wanted, names = {}, stems("context459", count)
    for seed, stem in enumerate(names):
        raw = drawn(list(range(460)), seed)
        file = io.BytesIO()
        savemat(file, {"LabelMap": raw.astype(np.uint16)})
        put(root / f"trainval/{stem}.mat", file.getvalue())
        put(root / f"JPEGImages/{stem}.jpg", photo(seed))
        wanted[stem] = np.array([[value - 1 if value else 65535 for value in row] for row in raw.tolist()])
    put(root / "JPEGImages/2009_999999.jpg", photo(99))  # of another split
    put(root / "pascalcontext_val.txt", "".join(f"{stem}\n" for stem in names))
    return wanted


def compressed(runs: list[int]) -> str:
    """COCO's text of run lengths, as its ``rleToString`` writes it."""
    text = ""
    for index, run in enumerate(runs):
        value, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            group, value = value & 31, value >> 5
            more = value != -1 if group & 16 else value != 0
            text += chr(48 + group + 32 * more)
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    runs, current = [0], 0
    for value in mask.T.ravel().tolist():
        if value != current:
            runs.append(0)
            current = value
        runs[-1] += 1
    return runs


def context(root: Path, count: int = 6) -> dict[str, np.ndarray]:
    images, regions, wanted = [], [], {}
    for seed, stem in enumerate(stems("context60", 2 * count)):
        split, rng = ("val", "train")[seed % 2], np.random.default_rng(seed)
        images.append({"image_id": seed, "file_name": f"{stem}.jpg", "height": 9, "width": 14, "phase": split})
        put(root / f"JPEGImages/{stem}.jpg", photo(seed))
        label = np.zeros(SIZE, int)
        for number in range(4):  # they overlap: the later one counts
            mask = rng.random(SIZE) < (0.5 if number else 0.05)
            index = int(rng.integers(59)) + 1
            label[mask] = index
            counts = runs_of(mask.astype(int))
            segmentation = {"size": [9, 14], "counts": counts if number == 1 else compressed(counts)}
            entry = {"id": len(regions), "image_id": seed, "category_id": CONTEXT_IDS[index - 1], "iscrowd": 0}
            regions.append({**entry, "segmentation": segmentation})
        if split == "val":
            wanted[stem] = label
    content = {"info": {}, "images": images, "categories": [], "annos_segmentation": regions, "parts": []}
    put(root / "trainval_merged.json", json.dumps(content))
    return wanted


def ade847(root: Path, count: int = 5) -> dict[str, np.ndarray]:
    wanted = {}
    labels = {value: index for index, value in enumerate(OBJECT_IDS)}
    rng = np.random.default_rng(0)
    for seed, stem in enumerate(stems("ade847", count)):
        size = [(515, 540), (540, 520), (516, 516), SIZE][min(seed, 3)]
        ids = [0, NUM_OBJECTS, *OBJECT_IDS, *(int(value) for value in rng.integers(0, NUM_OBJECTS, 40))]
        raw = drawn(ids, seed, size)
        folder = root / f"ADE20K_2021_17_01/images/ADE/validation/urban/street_{seed}"
        picture = np.stack([raw // 256 * 10, raw % 256, rng.integers(0, 255, size)], -1).astype(np.uint8)
        put(folder / f"{stem}_seg.png", encoded(picture, "PNG"))
        put(folder / f"{stem}.jpg", photo(seed, size))
        put(folder / f"{stem}/instance_000_{stem}.png", encoded(np.zeros(SIZE, np.uint8), "PNG"))
        short = min(size)
        new = tuple(512 if side == short else round(side / short * 512) for side in size) if short > 512 else size
        rows, columns = ((np.arange(after) * before // after) for before, after in zip(size, new, strict=True))
        kept = raw[rows][:, columns]
        wanted[stem] = np.array([[labels.get(value, 65535) for value in row] for row in kept.tolist()])
    return wanted


MAKERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "cityscapes": cityscapes,
    "coco_stuff": lambda root: coco(root, "coco_stuff"),
    "coco_object": lambda root: coco(root, "coco_object"),
    "coco_stuff10k": coco_stuff10k,
    "context459": context459,
    "context60": context,
    "context59": context,
    "ade847": ade847,
}


def labels_of(name: str, root: Path, split: str = "val") -> dict[str, np.ndarray]:
    pairs = benchmarks.get(name).for_split(split).pairs(root)
    return {pair.stem: np.array(Image.open(pair.label)).astype(int) for pair in pairs}


def require_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for stem, label in wanted.items():
        assert (found[stem] == label).all(), stem


def files_below(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but the journal."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and ".ovbench-prepare" not in path.parts
    }


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder).as_posix())
    return target


def tarred(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w:gz") as archive:
        archive.add(folder, "./")
    return target


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", ["in place", "folder", "zip", "tar.gz"])
def test_what_was_downloaded_becomes_what_the_benchmark_reads(name: str, how: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    wanted = MAKERS[name](raw)
    untouched = files_below(raw)
    pack = {"zip": zipped, "tar.gz": tarred}.get(how, lambda folder, target: folder)
    source = pack(raw, tmp_path / f"raw.{how}")
    out = None if how == "in place" else tmp_path / "out"
    made = prepare(name, [source], out, workers=1)
    if how == "in place":
        assert {path: facts for path, facts in files_below(raw).items() if path in untouched} == untouched
    else:
        assert made.root == out and files_below(raw) == untouched
    require_equal(labels_of(name, made.root), wanted)
    report = check(name, made.root)
    assert report.ok and [problem.kind for problem in report.problems] == ["count"]
    [val] = [split for split in made.splits if split.split == "val"]
    assert (val.images, val.labels, val.unused) == (len(wanted), len(wanted), 0)
    before = files_below(made.root)
    again = prepare(name, [source], out, workers=1)
    assert again.converted == again.copied == 0
    if how == "in place":  # what was copied within the folder may now be found where it belongs
        assert made.converted <= again.done <= made.converted + made.copied
    else:
        assert again.done == made.converted + made.copied
    assert files_below(made.root) == before
    assert not (made.root / ".ovbench-prepare/parts").exists()


def test_both_splits_and_labels_without_image(tmp_path: Path) -> None:
    coco(tmp_path, "coco_stuff", 3)
    wanted = coco(tmp_path, "coco_stuff", 4, "train")
    put(tmp_path / "stuffthingmaps/val2017/000000999999.png", encoded(np.zeros(SIZE, np.uint8), "PNG"))
    put(tmp_path / "val2017/000000999998.jpg", photo(1))
    made = prepare("coco_stuff", [tmp_path], tmp_path / "out")
    val, train = made.splits
    assert (val.split, val.images, val.labels, val.without_label) == ("val", 4, 3, ("000000999998",))
    assert (val.unused, train.images, train.expected) == (1, 4, 118287)
    require_equal(labels_of("coco_stuff", made.root, "train"), wanted)
    assert not check("coco_stuff", made.root).ok
    # The prepared folder inside the source is no second source.
    assert prepare("coco_stuff", [tmp_path], tmp_path / "out").done == made.converted + made.copied
    val_alone = prepare("coco_stuff", [tmp_path], tmp_path / "out2", split="val")
    assert [split.split for split in val_alone.splits] == ["val"] and not (tmp_path / "out2/images/train2017").exists()


@pytest.mark.parametrize(
    "name", ["voc21", "voc20", "voc20b", "ade20k", "coco_panoptic", "ade20k_panoptic", "mapillary"]
)
def test_nothing_to_convert(name: str, tmp_path: Path) -> None:
    benchmarks_synth = runner.invoke(app, ["synth", name, "--images", "4", "--out", str(tmp_path / "made")])
    assert benchmarks_synth.exit_code == 0
    result = runner.invoke(app, ["prepare", name, "--source", str(tmp_path / "made" / name)])
    assert result.exit_code == 0, result.output
    assert "nothing to convert" in result.stdout and f"{name}: ok" in result.stdout
    archive = zipped(tmp_path / "made" / name, tmp_path / "a.zip")
    made = prepare(name, [archive], tmp_path / "out")
    assert made.copied > 0 and made.converted == 0
    require_equal(labels_of(name, tmp_path / "out"), labels_of(name, tmp_path / "made"))


def test_coco_panoptic_from_its_archives(tmp_path: Path) -> None:
    """As they are fetched: images, the json in one archive, the PNGs in another that lies in it."""
    made = tmp_path / "made" / "coco_panoptic"
    assert runner.invoke(app, ["synth", "coco_panoptic", "--images", "4", "--out", str(made.parent)]).exit_code == 0
    parts = {
        "val2017": made / "val2017",
        "annotations": made / "annotations",
        "panoptic_val2017": made / "annotations/panoptic_val2017",
    }
    archives = []
    for name, folder in parts.items():
        path = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.iterdir()):
                if file.is_file():
                    archive.write(file, f"{name}/{file.name}")
        archives.append(path)
    done = prepare("coco_panoptic", archives, tmp_path / "out")
    assert (done.copied, done.converted) == (9, 0)
    assert benchmarks.get("coco_panoptic").fingerprint(tmp_path / "out") == benchmarks.get("coco_panoptic").fingerprint(
        made
    )
    with pytest.raises(DataError, match=r"no 'annotations/panoptic_val2017\.json'.*panoptic_annotations_trainval2017"):
        prepare("coco_panoptic", [archives[0], archives[2]], tmp_path / "other")


def test_the_usual_one_of_two_voc_copies(tmp_path: Path) -> None:
    wanted = context459(tmp_path / "VOCdevkit/VOC2010")
    for stem in wanted:
        put(tmp_path / f"VOCdevkit/VOC2012/JPEGImages/{stem}.jpg", photo(77))
    made = prepare("context459", [tmp_path], workers=1)
    assert made.root == tmp_path / "VOCdevkit/VOC2010"
    require_equal(labels_of("context459", tmp_path), wanted)


def test_coco_stuff10k_as_png(tmp_path: Path) -> None:
    wanted = coco_stuff10k(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        put(path.with_suffix(".png"), encoded(loadmat(path)["S"], "PNG"))
        path.unlink()
    prepare("coco_stuff10k", [tmp_path], workers=1)
    require_equal(labels_of("coco_stuff10k", tmp_path), wanted)


def test_several_sources(tmp_path: Path) -> None:
    wanted = context(tmp_path / "raw")
    json_file = (tmp_path / "raw/trainval_merged.json").rename(tmp_path / "trainval_merged.json")
    images = tarred(tmp_path / "raw", tmp_path / "VOC.tar")
    with pytest.raises(UsageError, match="--out"):
        prepare("context60", [images, json_file])
    prepare("context60", [images, json_file], tmp_path / "out")
    require_equal(labels_of("context60", tmp_path / "out"), wanted)
    with pytest.raises(DataError, match=r"no 'trainval_merged.json'"):
        prepare("context60", [images], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_run_lengths() -> None:
    assert run_lengths("52203") == [5, 2, 2, 2, 5]
    assert run_lengths("`0O") == [16, -1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        runs = rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(1, 12)).tolist()
        assert run_lengths(compressed(runs)) == runs
    for broken in ("5`", "é", " "):
        with pytest.raises(ValueError):
            run_lengths(broken)


def test_object_indices_follow_the_names() -> None:
    """The release numbers its objects alphabetically up to about 3100: a wrong digit would break the order."""
    names = [", ".join(words) for words in benchmarks.get("ade847").words("synonyms")]
    assert len(OBJECT_IDS) == len(set(OBJECT_IDS)) == len(names) == 847
    ordered = sorted((index, name) for index, name in zip(OBJECT_IDS, names, strict=True) if index < 3100)
    assert [name.lower() for _, name in ordered] == sorted(name.lower() for _, name in ordered)
    assert len(ordered) == 827 and max(OBJECT_IDS) <= NUM_OBJECTS


def test_context_categories_are_those_of_the_59_names() -> None:
    names = benchmarks.get("context459").words("plain")
    assert [names[value - 1] for value in CONTEXT_IDS] == [[one] for one in benchmarks.get("context59").class_names]


def plant(name: str, root: Path) -> tuple[Path, str]:
    """One label with an id that its format does not have, and that id."""
    if name in ("coco_stuff10k", "context459"):
        key, wrong = ("S", 183) if name == "coco_stuff10k" else ("LabelMap", 460)
        path = next(iter(sorted(root.rglob("*.mat"))))
        savemat(path, {key: np.full(SIZE, wrong, np.uint16)})
        return path, str(wrong)
    if name in ("context59", "context60"):
        path = root / "trainval_merged.json"
        content = json.loads(path.read_text())
        content["annos_segmentation"][0]["category_id"] = 1
        path.write_text(json.dumps(content))
        return path, "1"
    pattern, values, wrong = {
        "cityscapes": ("*_labelIds.png", np.full(SIZE, 34, np.uint8), "34"),
        "coco_stuff": ("*.png", np.full(SIZE, 182, np.uint8), "182"),
        "coco_object": ("*.png", np.full(SIZE, 90, np.uint8), "90"),
        "ade847": ("*_seg.png", np.full((*SIZE, 3), (140, 240, 0), np.uint8), "3824"),
    }[name]
    path = sorted(root.rglob(pattern))[-1]
    path.write_bytes(encoded(values, "PNG"))
    return path, wrong


@pytest.mark.parametrize("name", MAKERS)
def test_an_id_that_the_format_does_not_have_is_named(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / "raw")
    path, wrong = plant(name, tmp_path / "raw")
    with pytest.raises(DataError) as error:
        prepare(name, [tmp_path / "raw"], tmp_path / "out", workers=1)
    assert path.name in str(error.value) and f"does not have: {wrong} (known" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n broken", b"no image", encoded(np.zeros((9, 14, 3), np.uint8), "PNG"), photo(0)]
)
def test_a_damaged_label_is_named_and_the_others_are_kept(content: bytes, tmp_path: Path) -> None:
    wanted = coco(tmp_path, "coco_stuff")
    bad = sorted(wanted)[-1]
    path = tmp_path / f"stuffthingmaps/val2017/{bad}.png"
    good = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=bad):
        prepare("coco_stuff", [tmp_path], tmp_path / "out", workers=1)
    path.write_bytes(good)
    made = prepare("coco_stuff", [tmp_path], tmp_path / "out", workers=1)
    assert made.done == 2 * len(wanted) - 1
    require_equal(labels_of("coco_stuff", tmp_path / "out"), wanted)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"images": [{}]}', "[" * 100_000])
def test_damaged_annotations(content: str, tmp_path: Path) -> None:
    context(tmp_path)
    put(tmp_path / "trainval_merged.json", content)
    with pytest.raises(DataError, match="trainval_merged"):
        prepare("context60", [tmp_path], tmp_path / "out")


@pytest.mark.parametrize("counts", ["5", "5`", [200, 5], [-1, 127], []])
def test_damaged_regions(counts: str | list[int], tmp_path: Path) -> None:
    context(tmp_path)
    path = tmp_path / "trainval_merged.json"
    content = json.loads(path.read_text())
    content["annos_segmentation"][0]["segmentation"]["counts"] = counts
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged region"):
        prepare("context60", [tmp_path], tmp_path / "out", workers=1)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a b", "..", ""])
def test_names_in_lists_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    raw = tmp_path / "in/raw"
    context459(raw)
    put(raw / "pascalcontext_val.txt", f"{name}\n2008_000000\n")
    if name:
        with pytest.raises(DataError, match="no image name"):
            prepare("context459", [raw], tmp_path / "in/out")
        assert not (tmp_path / "in/out").exists()
    context(tmp_path / "json")
    path = tmp_path / "json/trainval_merged.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = f"{name}.jpg"
    path.write_text(json.dumps(content))
    try:
        prepare("context60", [tmp_path / "json"], tmp_path / "in/out2", workers=1)
    except DataError as error:
        assert "names an image" in str(error)
    assert not list(tmp_path.rglob("evil*"))


def _member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


BAD_TAR = {
    "absolute": _member("/abs/evil.png"),
    "parent": _member("a/../../evil.png"),
    "symlink": _member("evil", tarfile.SYMTYPE, "/etc"),
    "hardlink": _member("evil.png", tarfile.LNKTYPE, "../../secret.png"),
    "device": _member("evil", tarfile.CHRTYPE),
    "fifo": _member("evil", tarfile.FIFOTYPE),
    "drive": _member("C:\\evil.png"),
    "backslash": _member("a\\..\\..\\evil.png"),
    "directory": _member("../evil", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("kind", BAD_TAR)
@pytest.mark.parametrize("last", [True, False])
def test_a_harmful_tar_writes_nothing(kind: str, last: bool, tmp_path: Path) -> None:
    home = tmp_path / "home"
    coco(home / "raw", "coco_stuff", 2)
    archive = home / "bad.tar"
    with tarfile.open(archive, "w") as file:
        for step in (True, False) if last else (False, True):
            if step:
                file.add(home / "raw", ".")
            else:
                file.addfile(BAD_TAR[kind])
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(DataError, match=r"refused, nothing was written") as error:
        prepare("coco_stuff", [archive], home / "out", workers=1)
    assert repr(BAD_TAR[kind].name) in str(error.value)
    assert {path for path in tmp_path.rglob("*")} == before


def _zip_info(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize(
    "info",
    [
        _zip_info("/abs/evil.png"),
        _zip_info("a/../../evil.png"),
        _zip_info("..\\evil.png"),
        _zip_info("D:/evil.png"),
        _zip_info("evil", stat.S_IFLNK | 0o777),
        _zip_info("evil", stat.S_IFCHR | 0o777),
    ],
    ids=["absolute", "parent", "backslash", "drive", "symlink", "device"],
)
def test_a_harmful_zip_writes_nothing(info: zipfile.ZipInfo, tmp_path: Path) -> None:
    home = tmp_path / "home"
    coco(home / "raw", "coco_stuff", 2)
    archive = zipped(home / "raw", home / "bad.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(info, "/etc/passwd")
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(DataError, match=r"refused, nothing was written"):
        prepare("coco_stuff", [archive], home / "out", workers=1)
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("how", ["zip", "tar.gz"])
def test_damaged_archives_are_errors_for_users(how: str, tmp_path: Path) -> None:
    """Cut at, or one byte changed at, any of some places: the right labels or an error, never a traceback."""
    wanted = coco(tmp_path / "raw", "coco_stuff", 2)
    whole = (zipped if how == "zip" else tarred)(tmp_path / "raw", tmp_path / "whole").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(40):
        place = int(rng.integers(len(whole)))
        changed = whole[:place] + (b"" if number % 2 else bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        source, out = put(tmp_path / f"{number}.{how}", changed), tmp_path / f"out{number}"
        try:
            prepare("coco_stuff", [source], out, workers=1)
        except (DataError, UsageError):
            refused += 1
        else:
            found = {path.stem: path for path in (out / "annotations").rglob("*.png")}
            assert all((np.array(Image.open(path)) == wanted[stem.split("_")[0]]).all() for stem, path in found.items())
    assert refused >= 20


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cityscapes(tmp_path)
    replace, left = os.replace, [3]

    def full(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunError, match=r"No space left on device\. Finished files are kept"):
            prepare("cityscapes", [tmp_path], workers=1)
    made = prepare("cityscapes", [tmp_path], workers=1)
    assert (made.done, made.converted) == (3, len(wanted) - 3)
    require_equal(labels_of("cityscapes", tmp_path), wanted)


def test_an_interruption_keeps_what_is_done(tmp_path: Path) -> None:
    wanted = coco(tmp_path / "raw", "coco_stuff", 60)

    def stop(done: int, total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="Finished files are kept"):
        prepare("coco_stuff", [tmp_path / "raw"], tmp_path / "out", workers=2, progress=stop)
    assert 20 <= prepare("coco_stuff", [tmp_path / "raw"], tmp_path / "out", workers=1).done < 120
    require_equal(labels_of("coco_stuff", tmp_path / "out"), wanted)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    coco(tmp_path / "raw", "coco_stuff", 2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/annotations").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads out of"):
        prepare("coco_stuff", [tmp_path / "raw"], tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "out/images").exists()


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    wanted = cityscapes(tmp_path)
    first, second = sorted(wanted)[:2]
    mine = tmp_path / f"gtFine/val/{first}_gtFine_labelTrainIds.png"
    Image.fromarray(wanted[first].astype(np.uint8)).save(mine, compress_level=0)  # equal ids, other bytes
    kept = mine.read_bytes()
    theirs = put(tmp_path / f"gtFine/val/{second}_gtFine_labelTrainIds.png", encoded(np.zeros(SIZE, np.uint8), "PNG"))
    with pytest.raises(DataError, match="not made by 'ovbench data prepare'") as error:
        prepare("cityscapes", [tmp_path], workers=1)
    assert str(theirs) in str(error.value)
    theirs.unlink()
    prepare("cityscapes", [tmp_path], workers=1)
    assert mine.read_bytes() == kept
    require_equal(labels_of("cityscapes", tmp_path), wanted)


def test_changed_sources_and_damaged_outputs_are_made_again(tmp_path: Path) -> None:
    wanted = cityscapes(tmp_path)
    prepare("cityscapes", [tmp_path], workers=1)
    first, second, third = sorted(wanted)[:3]
    cut = tmp_path / f"gtFine/val/{first}_gtFine_labelTrainIds.png"
    cut.write_bytes(cut.read_bytes()[:20])
    (tmp_path / f"gtFine/val/{second}_gtFine_labelTrainIds.png").unlink()
    put(tmp_path / f"gtFine/val/{third}_gtFine_labelIds.png", encoded(np.full(SIZE, 26, np.uint8), "PNG"))
    wanted[third] = np.full(SIZE, 13)
    assert prepare("cityscapes", [tmp_path], workers=1).converted == 3
    require_equal(labels_of("cityscapes", tmp_path), wanted)


def test_a_torn_or_broken_journal_costs_only_work(tmp_path: Path) -> None:
    wanted = cityscapes(tmp_path)
    prepare("cityscapes", [tmp_path], workers=1)
    journal = tmp_path / ".ovbench-prepare/done.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], "[]", '{"a": 1}', "\xff\0", lines[1], lines[2][:-9]]))
    made = prepare("cityscapes", [tmp_path], workers=1)
    assert (made.done, made.converted) == (2, len(wanted) - 2)
    assert prepare("cityscapes", [tmp_path], workers=1).done == len(wanted)
    require_equal(labels_of("cityscapes", tmp_path), wanted)


@pytest.mark.parametrize("how", ["folder", "zip"])
def test_killed_in_the_middle_and_started_again(how: str, tmp_path: Path) -> None:
    wanted = coco(tmp_path / "raw", "coco_stuff", 150)
    source = tmp_path / "raw" if how == "folder" else zipped(tmp_path / "raw", tmp_path / "raw.zip")
    out = tmp_path / "out"
    command = ["data", "prepare", "coco_stuff", "--source", str(source), "--out", str(out), "--workers", "2"]
    journal = out / ".ovbench-prepare/done.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "ovbench", *command], start_new_session=True)
    try:
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < 500):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was too quick to be killed"
    while workers_of(process.pid):  # they end by themselves
        time.sleep(0.02)
    finished = files_below(out)
    made = prepare("coco_stuff", [source], out, workers=2)
    assert 0 < made.done < 300 and made.done + made.converted + made.copied == 300
    require_equal(labels_of("coco_stuff", out), wanted)
    labels = {path: facts for path, facts in finished.items() if path.startswith("annotations")}
    recorded = {json.loads(line)[0] for line in journal.read_text().splitlines()[: made.done]}
    now = files_below(out)
    assert all(now[path] == facts for path, facts in labels.items() if path in recorded)
    assert sorted(path.name for path in (out / ".ovbench-prepare").iterdir()) == ["done.jsonl"]


def workers_of(session: int) -> list[int]:
    """Processes that still belong to a session."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else []:
        if entry.name.isdigit():
            try:
                alive = os.getsid(int(entry.name)) == session and "(Z" not in (entry / "status").read_text()
            except OSError:
                continue
            found += [int(entry.name)] if alive and "Z (zombie)" not in (entry / "status").read_text() else []
    return found


def test_the_command_says_what_it_did_and_checks(tmp_path: Path) -> None:
    cityscapes(tmp_path / "raw", 3)
    arguments = ["prepare", "cityscapes", "--source", str(tmp_path / "raw"), "--workers", "1"]
    before = files_below(tmp_path)
    planned = runner.invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and "would be: 3 converted, 0 copied" in planned.stdout
    assert files_below(tmp_path) == before and not (tmp_path / "raw/.ovbench-prepare").exists()
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "3 images, 3 with labels (the official split has 500)" in done.stdout
    assert "3 converted, 0 copied, 0 there already" in done.stdout and "cityscapes: ok" in done.stdout
    again = runner.invoke(app, [*arguments, "--json"])
    content = json.loads(again.stdout)
    assert (content["done"], content["converted"], content["check"][0]["ok"]) == (3, 0, True)
    image = next((tmp_path / "raw/leftImg8bit").rglob("*.png"))
    image.write_bytes(b"no image")
    bad = runner.invoke(app, arguments)
    assert bad.exit_code == 3 and "1 images are damaged" in bad.stdout and "cityscapes: not usable" in bad.stdout


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("city", [], UsageError, "Did you mean: cityscapes"),
        ("./own", [], UsageError, "dataset of your own"),
        ("coco_object", ["--split", "train"], UsageError, "no training split"),
        ("coco_stuff", ["--split", "train"], DataError, "no coco_stuff images"),
        ("coco_stuff", [], DataError, "stuffthingmaps_trainval2017.zip"),
        ("cityscapes", ["--source", "missing.zip"], UsageError, "does not exist"),
        ("cityscapes", ["--source", "notes.md"], UsageError, "no folder, zip or tar"),
        ("cityscapes", ["--out", "notes.md"], UsageError, "is a file"),
    ],
)
def test_wrong_wishes_are_explained(
    name: str, options: list[str], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "empty/readme.txt", "x")
    put(tmp_path / "notes.md", "x")
    for number in range(2):
        put(tmp_path / f"own/images/{number}.png", encoded(np.zeros((*SIZE, 3), np.uint8), "PNG"))
        put(tmp_path / f"own/labels/{number}.png", encoded(np.full(SIZE, number, np.uint8), "PNG"))
    put(tmp_path / "own/classes.txt", "a\nb\n")
    before = files_below(tmp_path)
    result = runner.invoke(app, ["prepare", name, "--source", "empty", *options])
    assert isinstance(result.exception, kind) and message in str(result.exception)
    assert files_below(tmp_path) == before


def test_a_folder_of_archives_is_explained(tmp_path: Path) -> None:
    coco(tmp_path / "raw", "coco_stuff", 2)
    zipped(tmp_path / "raw", put(tmp_path / "downloads/val2017.zip", ""))
    with pytest.raises(DataError, match=r"archives \(val2017.zip\)"):
        prepare("coco_stuff", [tmp_path / "downloads"], tmp_path / "out")


def test_every_benchmark_has_a_recipe(tmp_path: Path) -> None:
    for name in benchmarks.names():
        with pytest.raises(DataError, match="The sources have no"):
            prepare(name, [tmp_path], tmp_path / "out")


def test_help_is_quick_and_has_examples(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys\nfrom ovbench.cli.app import run_command\nrun_command(['data', 'prepare', '--help'])\n"
        "assert not {'torch', 'numpy', 'PIL', 'scipy', 'cv2', 'multiprocessing.pool'} & set(sys.modules)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
