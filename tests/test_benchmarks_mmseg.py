"""mmseg's own dataset classes and metric read what we describe, label for label."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovbench import benchmarks
from ovbench.benchmarks.config import read_config
from ovbench.benchmarks.synth.copies import synth
from ovbench.errors import DataError
from ovbench.paths import config_dir

ALL = [
    name for name in benchmarks.names() if name not in benchmarks.names("panoptic")
]  # those in test_panoptic_data.py
IMAGES = 4


@pytest.fixture(scope="module")
def build() -> Any:
    """``readers.build``, imported late: mmseg takes seconds."""
    from ovbench.mm import readers

    return readers.build


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated copies of all benchmarks, each in a folder of its name."""
    out = tmp_path_factory.mktemp("copies")
    for name in ALL:
        synth(name, out / name, images=IMAGES)
    return out


def loaded_by_mmseg(benchmark: Any, root: Path) -> Any:
    """The same dataset with mmseg's own loading of labels; mmcv's for 16 bits, because mmseg's casts them to 8."""
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    wide = {"with_bbox": False, "with_label": False, "with_seg": True, "imdecode_backend": "pillow"}
    load = {"type": "mmcv.LoadAnnotations", **wide} if benchmark.wide else {"type": "mmseg.LoadAnnotations"}
    cfg = benchmark.dataset_cfg(root)
    cfg["pipeline"] = [load if step["type"] == "mmseg.LoadLabel" else step for step in cfg["pipeline"]]
    assert load in cfg["pipeline"]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return DATASETS.build(cfg)


def _shared_data() -> Path:
    shared = Path(os.environ.get("OVBENCH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (shared / "data" / "voc2012").is_dir():
        pytest.skip(f"no real images in {shared}")
    return shared / "data"


@pytest.mark.parametrize("name", ALL)
def test_dataset_reads_the_same_pairs_and_labels(name: str, copies: Path, build: Any) -> None:
    benchmark = benchmarks.get(name)
    pairs = benchmark.pairs(copies)
    dataset = build(benchmark, copies, short_side=100, long_side=120)
    assert len(dataset) == len(pairs) == IMAGES
    order = {old: new for new, old in enumerate(benchmark.raw_ids)}
    assert (dataset.label_map or {}) == order  # mmseg renumbers nothing but voc20b
    assert [label.strip() for label in dataset.metainfo["classes"]] == list(benchmark.class_names)
    assert dataset.reduce_zero_label is benchmark.reduce_zero_label
    for pair, packed, theirs in zip(pairs, dataset, loaded_by_mmseg(benchmark, copies), strict=True):
        sample = packed["data_samples"]
        assert (sample.img_path, sample.seg_map_path) == (str(pair.image), str(pair.label))
        with Image.open(pair.label) as label:
            raw = np.array(label)
        truth = sample.gt_sem_seg.data[0].numpy()
        assert np.array_equal(benchmark.to_train_ids(raw), truth)
        assert np.array_equal(benchmark.load_label(pair.label), truth)
        assert np.array_equal(theirs["data_samples"].gt_sem_seg.data[0].numpy(), truth)
        assert sample.ori_shape == truth.shape == raw.shape
        height, width = sample.img_shape
        assert packed["inputs"].shape == (3, height, width)
        assert min(height, width) <= 100 and max(height, width) <= 120
        assert abs(height / width - truth.shape[0] / truth.shape[1]) < 0.03
        assert sample.reduce_zero_label is benchmark.reduce_zero_label


def test_short_side_zero_leaves_the_image_as_it_is(copies: Path, build: Any) -> None:
    packed = build(benchmarks.get("ade20k"), copies)[2]
    assert packed["data_samples"].img_shape == packed["data_samples"].ori_shape == (448, 336)


@pytest.mark.parametrize("name", ALL)
def test_annotations_rule_is_ours_for_all_values(name: str, tmp_path: Path, build: Any) -> None:
    """mmseg's ``LoadAnnotations`` on a label with every value in it; ours refuses it, naming those of no class."""
    benchmark = benchmarks.get(name)
    root = synth(name, tmp_path, images=1, size=(48, 64))
    pair = benchmark.pairs(root)[0]
    values = benchmark.ignore_index + 1
    raw = np.arange(values).astype(np.uint16 if benchmark.wide else np.uint8).reshape(16, -1)
    with Image.open(pair.image) as image:
        image.resize(raw.shape[::-1]).save(pair.image)
    Image.fromarray(raw).save(pair.label)
    loaded = loaded_by_mmseg(benchmark, root)[0]["data_samples"].gt_sem_seg.data[0].numpy()
    assert np.array_equal(benchmark.to_train_ids(raw), loaded)
    if benchmark.num_classes + benchmark.reduce_zero_label < benchmark.ignore_index:
        with pytest.raises(DataError, match=f"{pair.label.name}' has ids of no class: "):
            build(benchmark, root)[0]


@pytest.mark.parametrize("name", ALL)
def test_metric_of_mmseg_knows_the_classes(name: str, copies: Path, build: Any) -> None:
    """The truth as prediction overlaps fully in every class that occurs, and no other class is counted."""
    import torch
    from mmengine.structures import PixelData
    from mmseg.evaluation import IoUMetric

    benchmark = benchmarks.get(name)
    dataset = build(benchmark, copies)
    ignored = benchmark.ignore_index
    metric = IoUMetric(iou_metrics=["mIoU"], ignore_index=ignored)
    metric.dataset_meta = dataset.metainfo
    present: set[int] = set()
    for index in range(2):
        sample = dataset[index]["data_samples"]
        truth = sample.gt_sem_seg.data
        present |= set(torch.unique(truth).tolist()) - {ignored}
        sample.pred_sem_seg = PixelData(data=torch.where(truth == ignored, 0, truth))
        metric.process({}, [sample.to_dict()])
    intersect, union = (sum(result[i] for result in metric.results) for i in range(2))
    assert len(intersect) == benchmark.num_classes
    assert torch.equal(intersect, union)
    assert {int(i) for i in torch.nonzero(union)} == present


@pytest.mark.parametrize("name", ALL)
def test_mmengine_reads_the_same_config(name: str) -> None:
    from mmengine.config import Config

    path = config_dir() / f"{name}.py"
    assert Config.fromfile(path).to_dict() == read_config(path)


@pytest.mark.parametrize("name", ALL)
def test_incomplete_data_is_a_clear_error_before_mmseg_asserts(name: str, tmp_path: Path, build: Any) -> None:
    benchmark = benchmarks.get(name)
    with pytest.raises(DataError, match=f"No {name} data"):
        build(benchmark, tmp_path)
    root = synth(name, tmp_path / "copy", images=2, size=(48, 64))
    benchmark.pairs(root)[1].label.unlink()
    with pytest.raises(DataError, match=r"1 of 2 label files are missing"):
        build(benchmark, root)


@pytest.mark.parametrize("name", [name for name in benchmarks.with_split() if name in ALL])
def test_training_images_go_through_a_given_pipeline(name: str, tmp_path: Path, build: Any) -> None:
    """Images and labels of the training split, cut and turned together."""
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    root = synth(name, tmp_path, images=1, train_images=3, size=(64, 96))
    benchmark = benchmarks.get(name).for_split("train")
    pipeline: list[dict[str, Any]] = [
        {"type": "LoadImageFromFile"},
        {"type": "mmseg.LoadAnnotations"},
        {"type": "mmseg.RandomCrop", "crop_size": (40, 40)},
        {"type": "mmseg.PackSegInputs"},
    ]
    cfg = benchmark.dataset_cfg(root, pipeline=pipeline)
    assert cfg["test_mode"] is False
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = DATASETS.build(cfg)
    pairs = benchmark.pairs(root)
    assert len(dataset) == len(pairs) == 3
    for pair, sample in zip(pairs, dataset, strict=True):
        assert sample["data_samples"].img_path == str(pair.image)
        label = sample["data_samples"].gt_sem_seg.data[0].numpy()
        assert sample["inputs"].shape[1:] == label.shape == (40, 40)
        assert set(np.unique(label)) <= set(np.unique(benchmark.load_label(pair.label)))
    assert len(build(benchmark, root)) == 3  # and through the evaluation's transforms
    assert len(build(benchmark.for_split("val"), root)) == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [("voc21", 100), ("voc20", 100), ("coco_object", 80), ("coco_stuff", 8), ("ade20k", 9), ("voc20b", 100)],
)
def test_real_files_read_as_mmseg_reads_them(name: str, count: int, build: Any) -> None:
    data = _shared_data()
    benchmark = benchmarks.get(name)
    pairs = benchmark.pairs(data)
    dataset, theirs = build(benchmark, data, short_side=336), loaded_by_mmseg(benchmark, data)
    assert len(dataset) == len(pairs) == count
    for index in range(0, count, max(1, count // 5)):
        sample = dataset[index]["data_samples"]
        assert sample.img_path == str(pairs[index].image)
        truth = sample.gt_sem_seg.data[0].numpy()
        assert np.array_equal(benchmark.load_label(pairs[index].label), truth)
        assert np.array_equal(theirs[index]["data_samples"].gt_sem_seg.data[0].numpy(), truth)
        assert min(sample.img_shape) == 336
