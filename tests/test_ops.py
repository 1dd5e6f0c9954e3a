from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ovbench.ops import labels
from ovbench.ops.areas import areas
from ovbench.ops.labels import decide
from ovbench.ops.windows import patch_padding, starts, windows


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (224, 224, 112, [0]),
        (336, 224, 112, [0, 112]),
        (337, 224, 112, [0, 112, 113]),
        (100, 224, 112, [0]),
        (500, 200, 200, [0, 200, 300]),
    ],
)
def test_window_starts(length: int, crop: int, stride: int, expected: list[int]) -> None:
    assert starts(length, crop, stride) == expected


@pytest.mark.parametrize("size", [(336, 503), (503, 336), (100, 400), (90, 91), (224, 224)])
def test_windows_cover_every_pixel_and_stay_inside(size: tuple[int, int]) -> None:
    count = torch.zeros(size)
    boxes = windows(*size, 224, 112)
    for top, left, bottom, right in boxes:
        assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
        assert (bottom - top, right - left) == (min(224, size[0]), min(224, size[1]))
        count[top:bottom, left:right] += 1
    assert (count > 0).all()


def test_patch_padding() -> None:
    assert patch_padding(32, 48, 16) == (0, 0, 0, 0)
    left, right, top, bottom = patch_padding(33, 47, 16)
    assert (left, right, top, bottom) == (0, 1, 7, 8)


def naive(
    logits: torch.Tensor,
    size: tuple[int, int],
    word_class: torch.Tensor,
    scale: float,
    prob_thd: float,
    area_thd: float | None,
    rule: str,
) -> torch.Tensor:
    """The protocol, word for word, on full-size probabilities."""
    probs = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].mul(scale).softmax(0)
    classes = int(word_class.max()) + 1
    per_class = torch.stack([probs[word_class == c].max(0)[0] for c in range(classes)])
    pred = per_class.argmax(0)
    if area_thd is not None:
        foreground = int((pred > 0).sum())
        for c in range(1, classes):
            if int((pred == c).sum()) <= area_thd * foreground:
                if rule == "next-best":
                    per_class[c] = 0
                else:
                    per_class[0][pred == c] = 2
        pred = per_class.argmax(0)
    winner = per_class.max(0)[0]
    return torch.where(winner < prob_thd, 0, pred)


@pytest.mark.parametrize("rule", ["background", "next-best"])
@pytest.mark.parametrize(("prob_thd", "area_thd"), [(0.0, None), (0.25, None), (0.0, 0.2), (0.2, 0.2), (0.9, 1.0)])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_decide_equals_the_naive_protocol(
    rule: str, prob_thd: float, area_thd: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (31, 43)
    monkeypatch.setattr(labels, "CHUNK_BYTES", chunk * 4 * size[0] * size[1])
    word_class = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
    for seed in range(5):
        logits = torch.randn(8, 12, 17, generator=torch.Generator().manual_seed(seed)) * 0.1
        found = decide(logits, size, word_class, logit_scale=20, prob_thd=prob_thd, area_thd=area_thd, area_rule=rule)
        expected = naive(logits, size, word_class, 20, prob_thd, area_thd, rule)
        assert found.dtype == torch.int64
        assert (found == expected).float().mean() > 0.998  # rounding at ties and thresholds only


def test_decide_on_one_word_and_ties() -> None:
    assert torch.equal(decide(torch.zeros(1, 2, 2), (4, 4), torch.tensor([0])), torch.zeros(4, 4, dtype=torch.int64))
    tied = decide(torch.zeros(3, 2, 2), (2, 2), torch.tensor([0, 1, 2]))
    assert torch.equal(tied, torch.zeros(2, 2, dtype=torch.int64))


def test_areas_against_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(0, 5, (20, 30), generator=generator)
    label = torch.randint(0, 6, (20, 30), generator=generator)
    label[label == 5] = 255
    found = areas(pred, label, 5)
    for c in range(5):
        valid = label != 255
        assert int(found.intersect[c]) == int(((pred == c) & (label == c)).sum())
        assert int(found.pred[c]) == int(((pred == c) & valid).sum())
        assert int(found.label[c]) == int((label == c).sum())
        assert int(found.union[c]) == int((((pred == c) | (label == c)) & valid).sum())
    assert found.intersect.dtype == torch.int64
    empty = areas(pred, torch.full_like(label, 255), 5)
    assert not any(part.any() for part in empty)


def test_areas_refuse_what_does_not_fit() -> None:
    pred = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"prediction is \(4, 4\) but label is \(4, 5\)"):
        areas(pred, torch.zeros(4, 5, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"label holds \[7\], outside 0..2"):
        areas(pred, torch.full((4, 4), 7), 3)
    with pytest.raises(ValueError, match="prediction holds 3"):
        areas(pred + 3, pred, 3)
