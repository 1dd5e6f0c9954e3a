from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ovbench.ops import assemble as assembling
from ovbench.ops.areas import areas
from ovbench.ops.assemble import assemble, axis_weights, block_matrix, linear_weights, tiles
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
@pytest.mark.parametrize("strip", [1, 3, 1000])
def test_decide_equals_the_naive_protocol(
    rule: str, prob_thd: float, area_thd: float | None, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (31, 43)
    monkeypatch.setattr(assembling, "STRIP_BYTES", {"cpu": strip * 4 * size[1] * 8})
    monkeypatch.setattr(assembling, "WIDE_BYTES", 1 << 30 if strip > 1 else 0)
    monkeypatch.setattr(assembling, "TILE", min(strip, 48))
    word_class = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
    for seed in range(2):
        logits = torch.randn(8, 12, 17, generator=torch.Generator().manual_seed(seed)) * 0.1
        found = decide(
            logits.permute(1, 2, 0),
            (linear_weights(12, size[0]), linear_weights(17, size[1])),
            word_class,
            logit_scale=20,
            prob_thd=prob_thd,
            area_thd=area_thd,
            area_rule=rule,
        )
        expected = naive(logits, size, word_class, 20, prob_thd, area_thd, rule)
        assert found.dtype == torch.int64
        assert (found == expected).float().mean() > 0.998  # rounding at ties and thresholds only


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0])
def test_squares_leave_out_words_that_cannot_win_and_change_nothing(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator) + spread * torch.randn(9, 14, 300, generator=generator)
    weights = (linear_weights(9, 150), linear_weights(14, 230))
    counts = [len(tile.candidates()) for _, _, tile in tiles(values, weights)]
    assert sum(counts) < 300 * len(counts)
    if spread == 0.01:
        assert max(counts) < 60
    expected = assemble(values, weights).argmax(0)
    assert (decide(values, weights, torch.arange(300)) == expected).double().mean() > 0.9999


def test_decide_on_one_word_and_ties() -> None:
    weights = (linear_weights(2, 4), linear_weights(2, 4))
    assert torch.equal(decide(torch.zeros(2, 2, 1), weights, torch.tensor([0])), torch.zeros(4, 4, dtype=torch.int64))
    tied = decide(torch.zeros(2, 2, 3), weights, torch.tensor([0, 1, 2]))
    assert torch.equal(tied, torch.zeros(4, 4, dtype=torch.int64))


@pytest.mark.parametrize(("length", "out"), [(14, 224), (224, 14), (5, 5), (1, 7), (7, 1), (21, 40)])
def test_linear_weights_are_interpolate(length: int, out: int) -> None:
    x = torch.randn(3, 1, length, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, size=out, mode="linear", align_corners=False)
    torch.testing.assert_close(x @ linear_weights(length, out).T, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strip_bytes", [1, 10_000, 1 << 30])
@pytest.mark.parametrize("size", [(90, 110), (200, 301), (20, 17)])
def test_assemble_equals_upsampling_every_window(
    strip_bytes: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembling, "STRIP_BYTES", {"cpu": strip_bytes})
    h, w, crop, stride, patches, pad = 90, 110, 40, 25, 3, (3, 5)
    logits = torch.randn(12 + 4, 4, patches, patches, generator=torch.Generator().manual_seed(0))
    tops, lefts = tuple(starts(h, crop, stride)), tuple(starts(w, crop, stride))
    logits = logits[: len(tops) * len(lefts)]
    total, count = torch.zeros(4, h, w), torch.zeros(h, w)
    for index, (top, left) in enumerate((t, u) for t in tops for u in lefts):
        up = F.interpolate(logits[index : index + 1], (crop + 8, crop + 8), mode="bilinear", align_corners=False)[0]
        total[:, top : top + crop, left : left + crop] += up[:, 3 : 3 + crop, 3 : 3 + crop]
        count[top : top + crop, left : left + crop] += 1
    expected = F.interpolate((total / count)[None], size, mode="bilinear", align_corners=False)[0]
    found = assemble(
        block_matrix(logits, len(tops), len(lefts)),
        (axis_weights(h, tops, crop, patches, pad, size[0]), axis_weights(w, lefts, crop, patches, pad, size[1])),
    )
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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
