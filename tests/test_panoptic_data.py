"""Panoptic benchmarks: generated copies in COCO's format, readers, what check finds, training images, runs."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.check.checking import check, quick_check
from ovbench.benchmarks.synth.copies import synth
from ovbench.errors import DataError, Interrupted, UsageError
from ovbench.models.base import Prediction
from ovbench.ops.panoptic import Segments, quality
from ovbench.results import image_areas, store
from ovbench.results.record import RunRecord

NAMES = benchmarks.names("panoptic")
IMAGES = 6
SIZE = (120, 160)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("copies")
    for name in NAMES:
        synth(name, out / name, images=IMAGES, train_images=2, size=SIZE)
    return out


def by_hand(name: str, root: Path, split: str = "val") -> dict[str, tuple[np.ndarray, dict[int, dict[str, Any]]]]:
    """Stem to (ids (H, W), segments by id), straight from the files."""
    layout = benchmarks.get(name).for_split(split).layout
    content = json.loads((root / layout.panoptic_file).read_text())
    found = {}
    for entry in content["annotations"]:
        r, g, b = np.moveaxis(np.array(Image.open(root / layout.label_dir / entry["file_name"])).astype(int), -1, 0)
        found[entry["file_name"][:-4]] = (r + 256 * g + 65536 * b, {one["id"]: one for one in entry["segments_info"]})
    return found


def test_things_are_those_of_the_datasets() -> None:
    assert NAMES == ["coco_panoptic", "ade20k_panoptic", "mapillary"]
    facts = {name: benchmarks.get(name).panoptic for name in NAMES}
    assert [len(one.things) for one in facts.values() if one] == [80, 100, 37]
    named = {
        name: {benchmarks.get(name).class_names[index] for index in one.things} for name, one in facts.items() if one
    }
    assert {"person", "toothbrush"} <= named["coco_panoptic"] and not {"banner", "sky"} & named["coco_panoptic"]
    assert {"bed", "flag", "fence"} <= named["ade20k_panoptic"] and not {"wall", "plant"} & named["ade20k_panoptic"]
    assert {"car", "pole", "crosswalk - plain"} <= named["mapillary"] and "on rails" not in named["mapillary"]
    coco = benchmarks.get("coco_panoptic")
    assert coco.panoptic is not None
    ids = dict(zip(coco.class_names, coco.panoptic.category_ids, strict=True))
    assert (ids["person"], ids["toothbrush"], ids["banner"], ids["rug"]) == (1, 90, 92, 200)
    assert not any("-" in word for [word] in coco.words("plain"))
    ade, semantic = benchmarks.get("ade20k_panoptic"), benchmarks.get("ade20k")
    assert (ade.class_names, ade.words("plain")) == (semantic.class_names, semantic.words("plain"))


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_in_the_true_format(name: str, copies: Path) -> None:
    benchmark, root = benchmarks.get(name), benchmarks.get(name).resolve_root(copies)
    facts = benchmark.panoptic
    assert facts is not None
    things = {facts.category_ids[index] for index in facts.things}
    several = crowds = voids = 0
    for ids, told in by_hand(name, root).values():
        present, counts = np.unique(ids, return_counts=True)
        assert dict(zip(present.tolist(), counts.tolist(), strict=True)).keys() - {0} == told.keys()
        voids += int((ids == 0).sum())
        for number, entry in told.items():
            rows, columns = np.nonzero(ids == number)
            x, y, w, h = entry["bbox"]
            assert entry["area"] == len(rows)
            assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
            assert entry["category_id"] in facts.category_ids
            assert entry["category_id"] in things or not entry["iscrowd"]
            crowds += entry["iscrowd"]
        of_things = [entry["category_id"] for entry in told.values() if entry["category_id"] in things]
        several += len(of_things) - len(set(of_things))
        stuff = [entry["category_id"] for entry in told.values() if entry["category_id"] not in things]
        assert len(stuff) == len(set(stuff))
    assert several >= 2 and crowds >= 1 and voids > 0
    assert max(max(told) for _, told in by_hand(name, root).values()) > 65535  # all three channels
    for split in ("val", "train"):
        report = check(name, root, split=split)
        assert report.ok and report.problems == () and report.checked == (IMAGES if split == "val" else 2)
        assert report.classes_present > 5 and report.ignore_share is not None and 0 < report.ignore_share < 0.1


def test_same_arguments_give_the_same_files(copies: Path, tmp_path: Path) -> None:
    root = synth("mapillary", tmp_path, images=IMAGES, train_images=2, size=SIZE)
    other = benchmarks.get("mapillary").resolve_root(copies / "mapillary")
    layout = benchmarks.get("mapillary").layout
    assert (root / layout.panoptic_file).read_bytes() == (other / layout.panoptic_file).read_bytes()
    assert benchmarks.get("mapillary").fingerprint(root) == benchmarks.get("mapillary").fingerprint(other)


def test_the_fingerprint_follows_the_json(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "mapillary", tmp_path / "copy")
    benchmark = benchmarks.get("mapillary")
    root = benchmark.resolve_root(tmp_path / "copy")
    before = benchmark.fingerprint(root)
    path = root / benchmark.layout.panoptic_file
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 1))  # of the same length
    assert benchmark.fingerprint(root) != before


@pytest.mark.parametrize("name", NAMES)
def test_readers_give_the_segments_of_the_files(name: str, copies: Path) -> None:
    from ovbench.mm import readers

    benchmark, root = benchmarks.get(name), benchmarks.get(name).resolve_root(copies)
    assert benchmark.panoptic is not None
    label_of = {category: index for index, category in enumerate(benchmark.panoptic.category_ids)}
    files = by_hand(name, root)
    dataset = readers.build(benchmark, root, short_side=64, long_side=100)
    assert list(dataset.metainfo["classes"]) == list(benchmark.class_names)
    for pair, packed in zip(benchmark.pairs(root), dataset, strict=True):
        ids, told = files[pair.stem]
        sample = packed["data_samples"]
        truth: Segments = sample.gt_panoptic
        assert packed["inputs"].shape[-2:] != truth.ids.shape == ids.shape  # the label is never resized
        assert len(truth.classes) == len(told)
        for number, entry in told.items():
            places = truth.ids[torch.from_numpy(ids == number)]
            assert len(places.unique()) == 1  # one segment here for one there
            index = int(places[0])
            assert int(truth.classes[index]) == label_of[entry["category_id"]]
            assert bool(truth.crowd[index]) == bool(entry["iscrowd"])
        assert torch.equal(truth.ids == -1, torch.from_numpy(ids == 0))
        assert torch.equal(truth.labels(), sample.gt_sem_seg.data[0])
        assert np.array_equal(benchmark.load_label(pair.label), truth.labels().numpy())


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Any], None]:
    """A fault in the json file."""

    def plant(root: Path, benchmark: Any) -> None:
        path = root / benchmark.layout.panoptic_file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return plant


def _each(change: Callable[[Path], object], what: str = "label") -> Callable[[Path, Any], None]:
    """A fault in four label files or images."""

    def plant(root: Path, benchmark: Any) -> None:
        for pair in benchmark.pairs(root)[1:5]:
            change(getattr(pair, what))

    return plant


def _repaint(path: Path) -> None:
    values = np.array(Image.open(path))
    values[:2, :2] = (9, 9, 9)
    Image.fromarray(values).save(path)


def _grey(path: Path) -> None:
    Image.open(path).convert("L").save(path)


def _palette(path: Path) -> None:
    Image.open(path).convert("P").save(path)


def _of_four(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry["segments_info"] for entry in content["annotations"][1:5]]


FAULTS: dict[str, tuple[Callable[[Path, Any], None], str, str, int]] = {
    "broken json": (
        lambda root, b: (root / b.layout.panoptic_file).write_text('{"annotations": [') and None, "broken_json", "error", 1,
    ),
    "json of another kind": (_edit(lambda c: c.pop("annotations")), "broken_json", "error", 1),
    "no entry": (_edit(lambda c: c["annotations"].__delitem__(slice(1, 5))), "no_annotation", "error", 4),
    "entries twice": (
        _edit(lambda c: c["annotations"].extend(c["annotations"][1:5])), "repeated_annotations", "error", 4,
    ),
    "images that are not there": (
        _edit(lambda c: c["annotations"].append({"file_name": "x.png", "segments_info": []})),
        "extra_annotations", "warning", 1,
    ),
    "unknown category": (
        _edit(lambda c: [s[0].update(category_id=12) for s in _of_four(c)]), "unknown_category", "error", 4,
    ),
    "other categories": (_edit(lambda c: c["categories"].pop(3)), "categories", "error", 1),
    "things exchanged": (_edit(lambda c: c["categories"][0].update(isthing=0)), "categories", "error", 1),
    "wrong area": (_edit(lambda c: [s[0].update(area=s[0]["area"] + 1) for s in _of_four(c)]), "wrong_area", "error", 4),
    "segment missing in the json": (_edit(lambda c: [s.pop() for s in _of_four(c)]), "ids_not_in_json", "error", 4),
    "segment missing in the png": (
        _edit(lambda c: [s.append({**s[0], "id": 77}) for s in _of_four(c)]), "segments_not_in_png", "error", 4,
    ),
    "segment twice": (_edit(lambda c: [s.append(s[0]) for s in _of_four(c)]), "repeated_segments", "error", 4),
    "foreign ids": (_each(_repaint), "ids_not_in_json", "error", 4),
    "grey png": (_each(_grey), "not_rgb", "error", 4),
    "palette png": (_each(_palette), "not_rgb", "error", 4),
    "cut png": (_each(lambda path: path.write_bytes(path.read_bytes()[:400])), "unreadable_label", "error", 4),
    "cut image": (_each(lambda p: p.write_bytes(p.read_bytes()[:900]), "image"), "unreadable_image", "error", 4),
    "other size": (
        _each(lambda path: Image.open(path).crop((0, 0, 50, 50)).save(path)), "size_mismatch", "error", 4,
    ),
    "jpeg labels": (_each(lambda path: Image.open(path).save(path, format="JPEG")), "lossy_label", "error", 4),
    "nothing labelled": (
        _each(lambda path: Image.new("RGB", Image.open(path).size).save(path)), "all_void", "warning", 4,
    ),
    "unpaired": (_each(lambda path: path.unlink()), "missing_labels", "error", 4),
    "no image": (_each(lambda path: path.unlink(), "image"), "extra_labels", "warning", 4),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "coco_panoptic", tmp_path / "copy")
    benchmark = benchmarks.get("coco_panoptic")
    root = benchmark.resolve_root(tmp_path / "copy")
    plant, kind, level, count = FAULTS[fault]
    plant(root, benchmark)
    report = check("coco_panoptic", root)
    found = {problem.kind: problem for problem in report.problems}
    assert kind in found, report
    problem = found[kind]
    assert (problem.level, problem.count) == (level, count) and len(problem.fix) > 10
    assert len(problem.files) == min(count, 3)
    if level == "error":
        with pytest.raises(DataError, match="cannot be used"):
            quick_check("coco_panoptic", root)


def test_a_missing_json_and_semantic_labels_are_found(copies: Path, tmp_path: Path) -> None:
    benchmark = benchmarks.get("ade20k_panoptic")
    shutil.copytree(copies / "ade20k_panoptic", tmp_path / "copy")
    root = benchmark.resolve_root(tmp_path / "copy")
    path = root / benchmark.layout.panoptic_file
    content = json.loads(path.read_text())
    for entry in content["annotations"]:  # as made from semantic labels: one segment per class
        seen: dict[int, int] = {}
        pixels = np.array(Image.open(root / benchmark.layout.label_dir / entry["file_name"]))
        for one in list(entry["segments_info"]):
            first = seen.setdefault(one["category_id"], one["id"])
            if first != one["id"]:
                mask = (pixels == [one["id"] & 255, one["id"] >> 8 & 255, one["id"] >> 16]).all(-1)
                pixels[mask] = (first & 255, first >> 8 & 255, first >> 16)
                entry["segments_info"].remove(one)
        Image.fromarray(pixels).save(root / benchmark.layout.label_dir / entry["file_name"])
    path.write_text(json.dumps(content))
    found = {problem.kind: problem.level for problem in check("ade20k_panoptic", root).problems}
    # its areas are said by the official preparation to be what they were before things were drawn over stuff
    assert found == {"no_instances": "error", "wrong_area": "warning"}
    path.unlink()
    [problem] = check("ade20k_panoptic", tmp_path / "copy").problems
    assert problem.kind == "layout" and "no file ade20k_panoptic_val.json" in problem.message
    assert "prepare_ade20k_pan_seg" in problem.message


def test_ade20k_is_scored_with_the_areas_of_its_json(copies: Path, tmp_path: Path) -> None:
    from ovbench.mm import readers

    benchmark = benchmarks.get("ade20k_panoptic")
    shutil.copytree(copies / "ade20k_panoptic", tmp_path / "copy")
    root = benchmark.resolve_root(tmp_path / "copy")

    def change(content: dict[str, Any]) -> None:
        entry = min(content["annotations"], key=lambda one: one["file_name"])
        entry["segments_info"][0]["area"] += 7
        entry["segments_info"].append({"id": 5, "category_id": 2, "iscrowd": 0, "area": 9})

    _edit(change)(root, benchmark)
    sample = readers.build(benchmark, root)[0]["data_samples"]
    counted = torch.bincount(
        sample.gt_panoptic.ids[sample.gt_panoptic.ids >= 0], minlength=len(sample.gt_panoptic.classes)
    )
    difference = sample.gt_panoptic_areas - counted
    assert difference.tolist() == [7, *[0] * (len(difference) - 2), 9]
    assert int(sample.gt_panoptic.classes[-1]) == 2
    assert "gt_panoptic_areas" not in readers.build(benchmarks.get("mapillary"), copies)[0]["data_samples"]


def recipe(**fields: Any) -> Any:
    from ovbench.train.recipe import Recipe

    return Recipe(
        **{
            "lr": 0.01,
            "weight_decay": 0.0,
            "iters": 1,
            "batch": 3,
            "crop": 96,
            "resize": (200, 100),
            "ratio_range": (0.5, 1.5),
            "flip": 0.5,
            **fields,
        }
    )


def test_training_images_keep_their_segments(copies: Path) -> None:
    from ovbench.train.data import Positions, loader, training_set

    benchmark = benchmarks.get("coco_panoptic").for_split("train")
    root = benchmark.resolve_root(copies)
    images = training_set(benchmark, root, recipe(), seed=3, segments=True)
    counts = set()
    for position in range(12):
        item = images[position % 2, position]
        found: Segments = item["segments"]
        assert item["image"].shape[-2:] == found.ids.shape == (96, 96)
        assert torch.equal(found.labels(), item["label"])  # both maps were moved alike
        assert found.ids[found.ids >= 0].unique().tolist() == list(range(len(found.classes)))
        counts.add(len(found.classes))
        again = images[position % 2, position]["segments"]
        assert torch.equal(found.ids, again.ids) and torch.equal(found.classes, again.classes)
    assert len(counts) > 1
    [batch] = [next(iter(loader(images, Positions(2, 0, 3), 0, "cpu")))]
    assert batch["image"].shape == (3, 3, 96, 96) and batch["label"].shape == (3, 96, 96)
    assert [one.ids.shape for one in batch["segments"]] == [(96, 96)] * 3
    assert set(training_set(benchmark, root, recipe(), seed=3)[0, 0]) == {"image", "label"}
    with pytest.raises(UsageError, match="Benchmarks that have: coco_panoptic"):
        training_set(benchmarks.get("ade20k").for_split("train"), root, recipe(), seed=3, segments=True)


def test_instances_stay_apart_in_training(copies: Path) -> None:
    """Without any augmentation the segments are those of the file; mirrored, they are those mirrored."""
    from ovbench.train.data import training_set

    benchmark = benchmarks.get("mapillary").for_split("train")
    root = benchmark.resolve_root(copies)
    files = by_hand("mapillary", root, "train")
    for flip in (0.0, 1.0):
        still = recipe(
            crop=160, resize=(160, 120), ratio_range=(1.0, 1.0), flip=flip, photometric=False, cat_max_ratio=1.0
        )
        images = training_set(benchmark, root, still, seed=0, segments=True)
        for index, pair in enumerate(benchmark.pairs(root)):
            ids, told = files[pair.stem]
            found: Segments = images[index, index]["segments"]
            inside = found.ids[:120].flip(1) if flip else found.ids[:120]
            assert (found.ids[120:] == -1).all()
            assert len(found.classes) == len(told)
            assert all(len(inside[torch.from_numpy(ids == number)].unique()) == 1 for number in told)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


def spec(weights: str, **fields: Any) -> dict[str, Any]:
    protocol = {"name": "common", "templates": "plain", "short_side": 64, "crop": 64, "stride": 64}
    return {"method": "clip", "dataset": "coco_panoptic", "weights": weights, "protocol": protocol, **fields}


def shifted(truth: Segments) -> Segments:
    """A prediction that is wrong in places: moved by some pixels, every fourth segment of another class."""
    classes = truth.classes.clone()
    classes[::4] = (classes[::4] + 1) % 133
    return Segments(truth.ids.roll((3, 5), (0, 1)), classes, torch.zeros_like(truth.crowd))


@pytest.fixture
def segmenting(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's model, which gives segments as a mask method's would."""
    module = importlib.import_module("ovbench.models.build")
    build = module.build

    def with_segments(*arguments: Any) -> Any:
        built = build(*arguments)
        model = built.model
        monkeypatch.setattr(type(model), "needs_truth", True)  # after the build: it is no oracle to the record
        model.gives_segments, model.set_things = True, lambda things: None

        def predict(images: Any, sizes: Any, names: Any, truths: Any) -> list[Prediction]:
            given = [shifted(truth) for truth in truths]
            assert [tuple(one.ids.shape) for one in given] == [tuple(size) for size in sizes]
            return [Prediction(one.labels(0), one) for one in given]

        model.predict = predict
        return built

    monkeypatch.setattr(module, "build", with_segments)


@pytest.mark.usefixtures("segmenting")
def test_a_run_with_segments_and_its_resumption(
    weights: str, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, options = copies / "coco_panoptic", {"workers": 0, "gallery": 0}
    record: RunRecord = ovbench.run(spec(weights), data_root=data, results=tmp_path / "one", **options)
    assert record.metrics is not None and record.metrics.panoptic is not None
    found = record.metrics.panoptic
    assert record.metrics.panoptic_reason is None
    # from the files, image by image
    benchmark = benchmarks.get("coco_panoptic")
    sums = [torch.zeros(133, dtype=torch.float64) for _ in range(4)]
    for pair in benchmark.pairs(data):
        told = benchmark.load_segments(pair.label)
        truth = Segments(*(torch.from_numpy(part).long() for part in told[:2]), torch.from_numpy(told.crowd))
        sums = [a + b for a, b in zip(sums, quality(shifted(truth), truth, 133), strict=True)]
    iou, tp, fp, fn = sums
    assert [entry.iou_sum for entry in found.classes] == iou.tolist()
    assert [(entry.tp, entry.fp, entry.fn) for entry in found.classes] == [
        tuple(map(int, entry)) for entry in zip(tp, fp, fn, strict=True)
    ]
    weight = tp + fp / 2 + fn / 2
    there = weight > 0
    assert found.pq == pytest.approx(float((100 * iou[there] / weight[there]).mean()))
    assert found.things.classes + found.stuff.classes == int(there.sum()) and int(tp.sum()) > 5 and int(fp.sum()) > 5
    path = store.record_path(record, tmp_path / "one")
    assert store.read(path) == record
    assert len(image_areas.read(image_areas.path_beside(path), record).names) == IMAGES

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        ovbench.run(spec(weights), data_root=data, results=tmp_path / "two", on_images=stop, batch=2, **options)
    again = ovbench.run(spec(weights), data_root=data, results=tmp_path / "two", resume=True, batch=3, **options)
    assert again.metrics == record.metrics

    from ovbench.cli.run import show
    from ovbench.evaluate.verify import Given, verify

    show(record, tmp_path / "one")
    printed = capsys.readouterr().out
    assert "PQ %" in printed and f"{found.pq:.2f}" in printed and f"{found.stuff.rq:.2f}" in printed
    same = verify(record, path, Given(data_root=data, weights=Path(weights), workers=0))
    assert same.equal and same.pq == (found.pq, found.pq)
    changed = record.model_copy(
        update={"metrics": record.metrics.model_copy(update={"panoptic": found.model_copy(update={"pq": 1.0})})}
    )
    assert not verify(changed, path, Given(data_root=data, weights=Path(weights), workers=0)).equal


def test_a_method_without_segments_says_so(weights: str, copies: Path, tmp_path: Path) -> None:
    record = ovbench.run(
        spec(weights, dataset="mapillary", limit=1), data_root=copies, results=tmp_path, workers=0, gallery=1
    )
    assert record.metrics is not None and record.metrics.panoptic is None
    assert record.metrics.panoptic_reason == "clip gives labels per pixel, no segments"
    assert record.metrics.miou is not None
    assert store.read(store.record_path(record, tmp_path)) == record
