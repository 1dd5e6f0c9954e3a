"""Masks as tensors: which patches they touch, pooling, label maps, segments, losses; each against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ovbench.models.mask_model import example_masks, oracle_classes
from ovbench.ops.mask_losses import LossWeights, bce_cost, coverage, dice_cost, mask_losses, match, without_crowds
from ovbench.ops.masks import (
    NOWHERE,
    geometric_ensemble,
    mask_iou,
    mask_pool,
    padded,
    panoptic_ids,
    resized,
    semantic_labels,
    touched_patches,
    with_padding,
    without_padding,
)
from ovbench.ops.panoptic import Segments


def some_masks(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 5, generator=generator) * 4
    return F.interpolate(coarse, size=size, mode="bicubic")[:, 0]


@pytest.mark.parametrize(
    ("own", "size", "grid"),
    [((16, 16), (16, 16), (4, 4)), ((15, 22), (15, 22), (7, 5)), ((4, 4), (4, 4), (8, 6)), ((7, 9), (32, 48), (4, 6))],
)
def test_patches_that_a_mask_touches(own, size, grid):
    masks = torch.stack([some_masks(13, own, 1), some_masks(13, own, 2)])
    masks[0, 0] = NOWHERE
    found = touched_patches(masks, grid, size).unflatten(2, grid)
    masks = torch.stack([resized(row, size) for row in masks])  # decided at the size of CLIP's input
    for b, m in ((b, m) for b in range(2) for m in (0, 1, 12)):
        expected = torch.zeros(grid, dtype=torch.bool)
        for y, x in (masks[b, m] >= 0).nonzero().tolist():
            for j in range(grid[0]):
                for i in range(grid[1]):
                    # in exact halves of pixels: the pixel and the patch share area
                    rows = y * grid[0] < (j + 1) * size[0] and (y + 1) * grid[0] > j * size[0]
                    columns = x * grid[1] < (i + 1) * size[1] and (x + 1) * grid[1] > i * size[1]
                    expected[j, i] |= rows and columns
        assert torch.equal(found[b, m], expected)


def test_pooling_is_the_mean_inside():
    features, masks = torch.randn(2, 5, 6, 8), torch.stack([some_masks(4, (6, 8), 1), some_masks(4, (6, 8), 2)])
    masks[1, 2] = NOWHERE
    masks[1, 1, 0, :3] = 0  # on the edge is outside, as in the public code
    found = mask_pool(features, masks)
    for b, m in ((b, m) for b in range(2) for m in range(4)):
        places = [features[b, :, y, x] for y, x in (masks[b, m] > 0).nonzero().tolist()]
        expected = torch.stack(places).mean(0) if places else torch.zeros(5)
        torch.testing.assert_close(found[b, m], expected)


@pytest.mark.parametrize("size", [(37, 53), (12, 16), (200, 150)])
def test_labels_are_the_largest_sum_over_masks(size):
    masks, probabilities = some_masks(7, (12, 16)), torch.rand(7, 9)
    inside = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0].sigmoid()
    expected = torch.einsum("mk,mhw->khw", probabilities, inside)
    found = semantic_labels(probabilities, masks, size)
    best, second = expected.topk(2, dim=0).values
    clear = best - second > 1e-5
    assert torch.equal(found[clear], expected.argmax(0)[clear]) and clear.float().mean() > 0.99
    assert torch.equal(semantic_labels(probabilities[:0], masks[:0], size), torch.zeros(size, dtype=torch.int64))


def naive_segments(probabilities, masks, size, things, object_thd, overlap_thd):
    """Mask2Former's inference, written as a loop: list of (class, bool map)."""
    scores, classes = probabilities.max(-1)
    keep = scores > object_thd
    scores, classes = scores[keep], classes[keep]
    inside = F.interpolate(masks[keep][None], size=size, mode="bilinear", align_corners=False)[0].sigmoid()
    if not len(scores):
        return []
    winner = (scores[:, None, None] * inside).argmax(0)
    found: list[tuple[int, torch.Tensor]] = []
    for k in range(len(scores)):
        own = inside[k] >= 0.5
        mask = (winner == k) & own
        if not mask.any() or (winner == k).sum().item() / own.sum().item() < overlap_thd:
            continue
        same = [i for i, (cls, _) in enumerate(found) if cls == int(classes[k]) and not things[int(classes[k])]]
        if same:
            found[same[0]] = (found[same[0]][0], found[same[0]][1] | mask)
        else:
            found.append((int(classes[k]), mask))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_segments_are_those_of_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = some_masks(12, (12, 16), seed)
    probabilities = (torch.randn(12, 4, generator=generator) * 3).softmax(-1)
    things = torch.tensor([True, False, True, False])
    size, object_thd, overlap_thd = (41, 57), 0.5 * (seed % 2), (0.0, 0.4, 0.8)[seed % 3]
    ids, classes = panoptic_ids(probabilities, masks, size, things, object_thd=object_thd, overlap_thd=overlap_thd)
    expected = naive_segments(probabilities, masks, size, things, object_thd, overlap_thd)
    assert classes.tolist() == [cls for cls, _ in expected]
    for index, (_, mask) in enumerate(expected):
        assert ((ids == index) != mask).float().mean() < 1e-3  # rounding at the borders of masks
    assert set(ids.unique().tolist()) <= {-1, *range(len(expected))}


def test_no_masks_no_segments():
    ids, classes = panoptic_ids(torch.zeros(0, 3), torch.zeros(0, 4, 4), (5, 6), torch.ones(3, dtype=torch.bool))
    assert bool((ids == -1).all()) and ids.shape == (5, 6) and not len(classes)
    weak = torch.full((2, 3), 0.2)
    ids, classes = panoptic_ids(weak, torch.ones(2, 4, 4), (5, 6), torch.ones(3, dtype=torch.bool), object_thd=0.5)
    assert bool((ids == -1).all()) and not len(classes)


@pytest.mark.parametrize(
    ("grid", "size", "whole"),
    [((20, 30), (80, 120), (96, 128)), ((19, 31), (75, 121), (96, 128)), ((75, 121), (75, 121), (96, 128))],
)
def test_masks_of_a_padded_image(grid, size, whole):
    """Inside where the image is, outside in the padding; and back to what they were."""
    masks = some_masks(5, grid)
    found = with_padding(masks, size, whole)
    pixels = resized(found, whole)
    assert bool((pixels[:, size[0] + 4 :] < 0).all()) and bool((pixels[:, :, size[1] + 4 :] < 0).all())
    expected = resized(masks, size) >= 0
    inner = (slice(None), slice(size[0] - 4), slice(size[1] - 4))
    assert (pixels[:, : size[0], : size[1]] >= 0)[inner].eq(expected[inner]).float().mean() > 0.98
    back = without_padding(found, grid, size, whole)
    assert back.shape == masks.shape and ((back >= 0) == (masks >= 0)).float().mean() > 0.97
    assert with_padding(masks, size, size) is masks and with_padding(masks[:0], size, whole).shape[0] == 0
    if grid[0] * 4 == size[0]:
        assert torch.equal(back, masks)


def test_the_ensemble_by_hand():
    inner, outer = torch.randn(3, 5), torch.randn(3, 4)
    seen = torch.tensor([True, False, True, False])
    ours, clips, void = inner[:, :4].softmax(-1), outer.softmax(-1), inner.softmax(-1)[:, 4:]
    share = torch.tensor([0.4, 0.8, 0.4, 0.8])
    mixed = ours ** (1 - share) * clips**share
    mixed = mixed / mixed.sum(-1, keepdim=True)
    found = geometric_ensemble(inner, outer, seen)
    torch.testing.assert_close(found.exp(), torch.cat([mixed * (1 - void), void], -1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(geometric_ensemble(inner[:, :4], outer, seen).softmax(-1), mixed)
    alone = geometric_ensemble(inner, outer, seen, valid=torch.tensor([True, False, True]))
    torch.testing.assert_close(alone[1].exp(), inner[1].softmax(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(alone[0], found[0])
    with pytest.raises(ValueError, match="columns"):
        geometric_ensemble(inner[:, :3], outer, seen)


def test_padding_is_inside_nowhere():
    masks = [some_masks(3, (6, 8)), some_masks(0, (6, 8)), some_masks(2, (12, 16))]
    found = padded(masks, 5)
    assert found.shape == (3, 5, 6, 8)
    assert torch.equal(found[0, :3], masks[0]) and bool((found[0, 3:] == NOWHERE).all() and (found[1] == NOWHERE).all())
    torch.testing.assert_close(found[2, :2], resized(masks[2], (6, 8)))


def test_overlap_of_masks():
    one, other = torch.rand(4, 50) > 0.5, torch.rand(3, 50) > 0.5
    one[0], other[0] = False, False
    found = mask_iou(one, other)
    for i in range(4):
        for j in range(3):
            union = int((one[i] | other[j]).sum())
            assert float(found[i, j]) == (int((one[i] & other[j]).sum()) / union if union else 0)


def test_oracle_takes_the_class_of_the_largest_overlap():
    ids = torch.full((8, 8), -1)
    ids[:4], ids[4:, :4] = 0, 1
    truth = Segments(ids, torch.tensor([2, 0]), torch.zeros(2, dtype=torch.bool))
    masks = torch.full((3, 8, 8), -10.0)
    masks[0, :5], masks[1, 4:, 4:], masks[2, 5:, :4] = 10, 10, 10
    assert oracle_classes(masks, truth, 4).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_masks_for_measuring_are_all_there():
    masks = example_masks(100, (64, 64))
    assert masks.shape == (100, 64, 64) and bool(((masks > 0).flatten(1).sum(1) > 0).all())


def test_segments_that_masks_learn():
    ids = torch.tensor([[0, 0, -1], [1, 1, 2]])
    given = Segments(ids, torch.tensor([3, 7, 3]), torch.tensor([False, True, False]))
    found = without_crowds(given)
    assert found.classes.tolist() == [3, 3] and found.ids.tolist() == [[0, 0, -1], [-1, -1, 1]]
    assert coverage(found, (2, 3)).sum(dim=(1, 2)).tolist() == [2, 1]
    assert coverage(found, (1, 1)).flatten().tolist() == pytest.approx([2 / 6, 1 / 6])
    nothing = Segments(torch.full((4, 4), -1), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    assert coverage(nothing, (2, 2)).shape == (0, 2, 2) and without_crowds(nothing).ids.equal(nothing.ids)


def test_costs_are_the_losses_of_every_pair():
    masks, truth = torch.randn(5, 40), (torch.rand(3, 40) > 0.5).float()
    for i in range(5):
        for j in range(3):
            inside = masks[i].sigmoid()
            dice = 1 - (2 * (inside * truth[j]).sum() + 1) / (inside.sum() + truth[j].sum() + 1)
            torch.testing.assert_close(dice_cost(masks, truth)[i, j], dice)
            expected = F.binary_cross_entropy_with_logits(masks[i], truth[j])
            torch.testing.assert_close(bce_cost(masks, truth)[i, j], expected)


def test_matching_finds_its_own_segment_and_losses_have_gradients():
    pytest.importorskip("scipy")
    ids = torch.full((16, 16), -1)
    ids[:8, :8], ids[8:, :], ids[:8, 8:] = 0, 1, 2
    truth = Segments(ids, torch.tensor([1, 0, 1]), torch.zeros(3, dtype=torch.bool))
    masks = torch.full((5, 16, 16), -8.0)
    for proposal, segment in ((4, 0), (1, 1), (2, 2)):
        masks[proposal][ids == segment] = 8
    masks.requires_grad_()
    logits = torch.zeros(5, 3, requires_grad=True)
    rows, columns = match(masks, logits, truth, LossWeights())
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 1), (2, 2), (4, 0)]
    losses = mask_losses(masks, logits, truth, (rows, columns), LossWeights())
    assert set(losses) == {"loss_class", "loss_dice", "loss_bce"}
    torch.testing.assert_close(losses["loss_class"], 2 * torch.tensor(3.0).log())
    sum(losses.values()).backward()
    assert bool((logits.grad[[0, 3]] == 0).all()) and bool((logits.grad[1] != 0).any())
    frozen = mask_losses(masks.detach(), logits, truth, (rows, columns), LossWeights())
    assert set(frozen) == {"loss_class"}
    empty = Segments(torch.full((16, 16), -1), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    none = match(masks, logits, empty, LossWeights())
    assert not len(none[0])
    assert all(float(v.detach()) == 0 for v in mask_losses(masks, logits, empty, none, LossWeights()).values())
