"""Panoptic quality against a reference of loops, and against torchmetrics where the rules are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ovbench.ops.panoptic import Quality, Segments, quality, segments_of_labels

CLASSES = 5


def looped(pred: Segments, truth: Segments, num_classes: int) -> list[dict[str, float]]:
    """COCO's rule, written down pixel by pixel and segment by segment."""
    result = [{"iou": 0.0, "tp": 0, "fp": 0, "fn": 0} for _ in range(num_classes)]
    pixels: dict[tuple[int, int], int] = {}
    area_p: dict[int, int] = {}
    area_t: dict[int, int] = {}
    for p, t in zip(pred.ids.flatten().tolist(), truth.ids.flatten().tolist(), strict=True):
        pixels[t, p] = pixels.get((t, p), 0) + 1
        area_p[p] = area_p.get(p, 0) + 1
        area_t[t] = area_t.get(t, 0) + 1
    matched_p, matched_t = set(), set()
    for (t, p), shared in pixels.items():
        if t < 0 or p < 0 or truth.crowd[t] or truth.classes[t] != pred.classes[p]:
            continue
        iou = shared / (area_p[p] + area_t[t] - shared - pixels.get((-1, p), 0))
        if iou > 0.5:
            entry = result[int(truth.classes[t])]
            entry["tp"] += 1
            entry["iou"] += iou
            matched_p.add(p)
            matched_t.add(t)
    for t in area_t:
        if t >= 0 and t not in matched_t and not truth.crowd[t]:
            result[int(truth.classes[t])]["fn"] += 1
    for p, size in area_p.items():
        if p < 0 or p in matched_p:
            continue
        excused = pixels.get((-1, p), 0)
        for t in area_t:
            if t >= 0 and truth.crowd[t] and truth.classes[t] == pred.classes[p]:
                excused += pixels.get((t, p), 0)
        if not excused / size > 0.5:
            result[int(pred.classes[p])]["fp"] += 1
    return result


def blocks(rng: np.random.Generator, size: tuple[int, int], segments: int, void: float, crowd: float) -> Segments:
    """Rectangles over each other, so that segments have all sizes and some none."""
    ids = np.full(size, -1)
    for number in range(segments):
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        h, w = rng.integers(1, size[0] + 1), rng.integers(1, size[1] + 1)
        ids[y : y + h, x : x + w] = number
    ids[rng.random(size) < void] = -1
    return Segments(
        torch.from_numpy(ids),
        torch.from_numpy(rng.integers(0, CLASSES, segments)),
        torch.from_numpy(rng.random(segments) < crowd),
    )


def nearly(rng: np.random.Generator, truth: Segments) -> Segments:
    """The truth moved by a pixel or two with some classes and pixels changed, so that there are matches."""
    ids = np.roll(truth.ids.numpy(), (int(rng.integers(0, 3)), int(rng.integers(0, 3))), (0, 1)).copy()
    if len(truth.classes):
        noisy = rng.random(ids.shape) < 0.15
        ids[noisy] = rng.integers(-1, len(truth.classes), int(noisy.sum()))
    classes = truth.classes.clone()
    wrong = torch.from_numpy(rng.random(len(classes)) < 0.2)
    classes[wrong] = (classes[wrong] + 1) % CLASSES
    return Segments(torch.from_numpy(ids), classes, torch.zeros(len(classes), dtype=torch.bool))


def cases() -> list[tuple[Segments, Segments]]:
    rng = np.random.Generator(np.random.PCG64(7))
    found = []
    for number in range(200):
        size = (int(rng.integers(1, 20)), int(rng.integers(1, 20)))
        count = (0, 1, 4, 9)[number % 4]
        truth = blocks(rng, size, count, void=(0.0, 0.2)[number % 2], crowd=(0.0, 0.3)[number // 4 % 2])
        other = nearly(rng, truth) if number % 3 else blocks(rng, size, int(rng.integers(0, 6)), 0.1, 0.0)
        found.append((other, truth))
    return found


def test_equal_to_the_loops() -> None:
    seen = {"tp": 0, "fp": 0, "fn": 0}
    for pred, truth in cases():
        found, expected = quality(pred, truth, CLASSES), looped(pred, truth, CLASSES)
        assert found.iou.dtype == torch.float64 and found.tp.dtype == torch.int64
        for key in seen:
            assert getattr(found, key).tolist() == [entry[key] for entry in expected]
            seen[key] += int(getattr(found, key).sum())
        assert found.iou.tolist() == pytest.approx([entry["iou"] for entry in expected], abs=1e-9)
    assert min(seen.values()) > 50  # the cases show every outcome


def strips(*widths: tuple[int, int], size: int = 10) -> torch.Tensor:
    """(1, size) ids from (id, width) runs."""
    row = [number for number, width in widths for _ in range(width)]
    assert len(row) == size
    return torch.tensor([row])


def test_iou_of_exactly_a_half_is_no_match() -> None:
    truth = Segments(strips((0, 9), (-1, 1)), torch.tensor([2]), torch.tensor([False]))
    half = Segments(strips((0, 3), (-1, 7)), torch.tensor([2]), torch.tensor([False]))
    more = half._replace(ids=strips((0, 5), (-1, 5)))
    assert quality(half, truth, 3).tp.tolist() == [0, 0, 0]
    assert quality(more, truth, 3).iou.tolist() == [0, 0, pytest.approx(5 / 9)]
    exact = Segments(strips((0, 8), (1, 2)), torch.tensor([2, 0]), torch.tensor([False, False]))
    even = Segments(strips((0, 4), (1, 6)), torch.tensor([2, 0]), torch.tensor([False, False]))
    assert quality(even, exact, 3).tp.tolist() == [0, 0, 0]  # 4 of 8


def test_void_and_crowd() -> None:
    no = torch.tensor([False])
    truth = Segments(strips((0, 3), (-1, 7)), torch.tensor([1]), no)
    # three pixels in the segment and six in void: the void ones are no part of the union
    assert quality(Segments(strips((0, 9), (-1, 1)), torch.tensor([1]), no), truth, 2).iou.tolist() == [0, 1]
    crowd = Segments(strips((0, 10)), torch.tensor([1]), torch.tensor([True]))
    for cls, fp in ((1, [0, 0]), (0, [1, 0])):  # in the crowd of its class, and in that of another
        found = quality(Segments(strips((0, 10)), torch.tensor([cls]), no), crowd, 2)
        assert (found.tp.tolist(), found.fp.tolist(), found.fn.tolist()) == ([0, 0], fp, [0, 0])
    # exactly half in void still counts
    halved = Segments(strips((0, 5), (-1, 5)), torch.tensor([0]), no)
    assert quality(Segments(strips((0, 10)), torch.tensor([1]), no), halved, 2).fp.tolist() == [0, 1]


def test_areas_of_the_json_file_count_where_they_are_given() -> None:
    """As in panopticapi: a segment that something was drawn over is larger than its pixels, or has none at all."""
    no = torch.zeros(3, dtype=torch.bool)
    truth = Segments(strips((0, 6), (1, 4)), torch.tensor([0, 1, 2]), no)  # the third was drawn over
    pred = Segments(strips((0, 6), (1, 4)), torch.tensor([0, 1]), no[:2])
    plain = quality(pred, truth, 3)
    assert plain.iou.tolist() == [1, 1, 0] and plain.fn.tolist() == [0, 0, 0]
    stored = quality(pred, truth, 3, torch.tensor([8, 12, 5]))
    assert stored.iou.tolist() == [6 / 8, 0, 0]  # 4 of 12 is no match
    assert (stored.tp.tolist(), stored.fp.tolist(), stored.fn.tolist()) == ([1, 0, 0], [0, 1, 0], [0, 1, 1])


def test_same_as_torchmetrics() -> None:
    """Its rule is the same where there is neither crowd nor void in the truth and every prediction has one segment."""
    detection = pytest.importorskip("torchmetrics.detection", reason="torchmetrics is not installed")
    things, stuffs = {0, 1, 2}, {3, 4}
    metric = detection.PanopticQuality(things=things, stuffs=stuffs, return_per_class=True, return_sq_and_rq=True)
    rng = np.random.Generator(np.random.PCG64(3))
    total = [torch.zeros(CLASSES, dtype=torch.float64) for _ in range(4)]

    def paired(segments: Segments) -> torch.Tensor:  # (class, instance), stuff being one instance
        classes = segments.classes[segments.ids]
        number = torch.where(classes < 3, segments.ids, 0)
        return torch.stack([classes, number], dim=-1)[None]

    def whole(segments: Segments) -> Segments:
        """One segment per stuff class, and no void."""
        ids = segments.ids.clamp(min=0)
        first = torch.arange(len(segments.classes))
        for cls in stuffs:
            same = (segments.classes == cls).nonzero()[:, 0]
            first[same] = same.min() if len(same) else first[same]
        return segments._replace(ids=first[ids], crowd=torch.zeros(len(first), dtype=torch.bool))

    for _ in range(20):
        truth = whole(blocks(rng, (16, 16), 8, 0.0, 0.0))
        pred = whole(nearly(rng, truth))
        metric.update(paired(pred), paired(truth))
        total = [a + b for a, b in zip(total, quality(pred, truth, CLASSES), strict=True)]
    iou, tp, fp, fn = total
    ours = torch.stack([iou / (tp + fp / 2 + fn / 2), iou / tp, tp / (tp + fp / 2 + fn / 2)], dim=-1)
    assert int(tp.min()) > 0 and torch.allclose(metric.compute().double(), ours, atol=1e-6)


def test_labels_and_segments_of_labels() -> None:
    label = torch.tensor([[3, 3, 255], [0, 1, 255]])
    segments = segments_of_labels(label, 4)
    assert segments.classes.tolist() == [0, 1, 3] and not segments.crowd.any()
    assert segments.ids.tolist() == [[2, 2, -1], [0, 1, -1]]
    assert torch.equal(segments.labels(), label)
    empty = segments_of_labels(torch.full((2, 2), 255), 4)
    assert empty.ids.tolist() == [[-1, -1], [-1, -1]] and torch.equal(empty.labels(), torch.full((2, 2), 255))
    assert all(int(part.sum()) == 0 for part in quality(empty, empty, 4))
    assert isinstance(quality(segments, segments, 4), Quality)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, 3, dtype=torch.int64)}, "but truth is"),
        ({"classes": torch.tensor([0, 9])}, r"classes 0\.\.9"),
        ({"ids": torch.full((2, 2), 5)}, r"ids 5\.\.5"),
        ({"crowd": torch.tensor([False])}, "1 crowd flags"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = Segments(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([False, False]))
    with pytest.raises(ValueError, match=message):
        quality(good._replace(**change), good, 4)
