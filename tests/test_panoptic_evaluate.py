"""Segments from a model's prediction to the record: the adapter, the shard file, the sums and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ovbench.evaluate.shard_lines import ImageResult
from ovbench.evaluate.shards import Shard
from ovbench.ops.areas import Areas
from ovbench.ops.panoptic import Quality, Segments, quality
from ovbench.results.panoptic_quality import PanopticMetrics, panoptic_from_sums
from ovbench.results.record import Metrics, metrics_from_areas

K = 4
HEADER = {"run_id": "r", "spec_hash": "s", "dataset_fingerprint": "f", "started": "2026-01-01T00:00:00+00:00"}


class Oracle(torch.nn.Module):
    """A model that gives back the true segments, turned upside down for images called so."""

    gives_segments = needs_truth = True
    num_classes = K
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def predict(self, images: Any, sizes: Any, names: Any, truths: Any) -> list[tuple[torch.Tensor, Segments | None]]:
        self.seen.extend(zip(sizes, names, truths, strict=True))
        found = []
        for size, name, truth in zip(sizes, names, truths, strict=True):
            if truth is None:
                found.append((torch.zeros(size, dtype=torch.int64), None))
                continue
            given = truth._replace(ids=truth.ids.flip(0)) if "turned" in name else truth
            found.append((given.labels(0), given))
        return found


def example() -> Segments:
    ids = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, -1]])
    return Segments(ids, torch.tensor([3, 3, 1]), torch.zeros(3, dtype=torch.bool))


def sample(name: str, **data: Any) -> Any:
    from ovbench.mm.segmentor import PixelData, SegDataSample

    found = SegDataSample(metainfo={"img_path": name, "ori_shape": (3, 4)})
    labels = data.pop("labels", None)
    if labels is not None:
        data["gt_sem_seg"] = PixelData(data=labels[None])
    found.set_data(data)
    return found


def test_the_adapter_hands_truths_over_and_sets_segments() -> None:
    from ovbench.mm.segmentor import OpenVocabSegmentor

    model, truth = Oracle(), example()
    segmentor = OpenVocabSegmentor(model=model)
    samples = [
        sample("a.png", gt_panoptic=truth, labels=truth.labels()),
        sample("b.png", labels=torch.tensor([[2, 2, 255, 0]] * 3)),
        sample("c.png"),
    ]
    inputs = [torch.zeros(3, 6, 8, dtype=torch.uint8)] * 3
    done = segmentor.test_step({"inputs": inputs, "data_samples": samples})
    sizes, names, truths = zip(*model.seen, strict=True)
    assert sizes == ((3, 4),) * 3 and names == ("a.png", "b.png", "c.png")
    assert all(torch.equal(one, two) for one, two in zip(truths[0], truth, strict=True))
    assert truths[1].ids[0].tolist() == [1, 1, -1, 0] and truths[1].classes.tolist() == [0, 2] and truths[2] is None
    assert torch.equal(done[0].pred_sem_seg.data[0], truth.labels(0))
    assert torch.equal(done[0].pred_panoptic.ids, truth.ids)
    assert "pred_panoptic" in done[1] and "pred_panoptic" not in done[2]
    # as the metric gets it
    assert isinstance(done[0].to_dict()["pred_panoptic"], Segments)
    assert done[0].to("cpu").gt_panoptic.classes.tolist() == [3, 3, 1]


def result(index: int, found: Quality | None) -> ImageResult:
    zero = torch.zeros(K, dtype=torch.int64)
    return ImageResult(index, f"{index}.png", Areas(zero, zero, zero), {"total": 1.0}, found)


def qualities(count: int) -> list[Quality]:
    """Parts whose sums depend on the order of adding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        counts = [torch.randint(0, 3, (K,), generator=generator) for _ in range(3)]
        iou = torch.rand(K, generator=generator, dtype=torch.float64) * counts[0]
        found.append(Quality(iou, *counts))
    return found


def test_shard_keeps_quality_to_the_bit_whatever_the_order(tmp_path: Path) -> None:
    parts = qualities(40)
    straight, resumed = (Shard(tmp_path / name, HEADER, K) for name in ("a.jsonl", "b.jsonl"))
    straight.append([result(index, part) for index, part in enumerate(parts)])
    resumed.append([result(index, parts[index]) for index in (*range(39, 20, -1), *range(10))])
    resumed.close()
    resumed = Shard(tmp_path / "b.jsonl", HEADER, K)  # read back, then gone on with
    resumed.append([result(index, parts[index]) for index in range(10, 21)])
    one, two = straight.total_quality(), resumed.total_quality()
    assert one is not None and two is not None
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.iou.tolist() == pytest.approx(torch.stack([part.iou for part in parts]).sum(0).tolist())
    backwards = torch.zeros(K, dtype=torch.float64)
    for part in reversed(parts):
        backwards = backwards + part.iou
    assert not torch.equal(backwards, one.iou)  # the order does matter
    straight.append([result(40, None)])
    assert straight.total_quality() is None  # an image without segments: no sum that would stand for all
    straight.close()
    resumed.close()
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1])
    assert set(line["panoptic"]) == {"classes", "iou", "tp", "fp", "fn"}
    assert len(line["panoptic"]["classes"]) == int((parts[0].tp + parts[0].fp + parts[0].fn > 0).sum())


def test_figures_from_sums() -> None:
    found = panoptic_from_sums(
        ["a", "b", "c", "d"], [0, 2], iou=[1.6, 0.0, 0.9, 0.0], tp=[2, 0, 1, 0], fp=[1, 3, 0, 0], fn=[1, 0, 0, 0]
    )
    pq = [100 * 1.6 / 3, 0.0, 90.0]  # d has no segment at all
    assert [entry.pq for entry in found.classes] == [*pq, None]
    assert found.pq == pytest.approx(sum(pq) / 3)
    assert found.sq == pytest.approx((80 + 0 + 90) / 3) and found.rq == pytest.approx((100 * 2 / 3 + 0 + 100) / 3)
    assert (found.things.classes, found.stuff.classes) == (2, 1)
    assert found.things.pq == pytest.approx((pq[0] + pq[2]) / 2) and found.stuff.pq == 0.0
    empty = panoptic_from_sums(["a"], [], [0.0], [0], [0], [0])
    assert empty.pq is None and empty.stuff.classes == 0
    assert PanopticMetrics.model_validate_json(found.model_dump_json()) == found


def test_old_metrics_are_read_and_new_ones_come_back() -> None:
    old = metrics_from_areas(["a"], [1], [2], [1], [2], images=1).model_dump(mode="json")
    del old["panoptic"], old["panoptic_reason"]
    assert Metrics.model_validate(old).panoptic is None
    new = metrics_from_areas(
        ["a"], [1], [2], [1], [2], images=1, panoptic=panoptic_from_sums(["a"], [0], [0.75], [1], [0], [0])
    )
    assert Metrics.model_validate_json(new.model_dump_json()) == new


def test_a_perfect_prediction_scores_a_hundred() -> None:
    truth = example()
    parts = quality(truth, truth, K)
    found = panoptic_from_sums(list("abcd"), [3], *(part.tolist() for part in parts))
    assert (found.pq, found.sq, found.rq) == (100.0, 100.0, 100.0)
