from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovbench.networks.builtin import corpus, readouts, train
from ovbench.networks.builtin.corpus import Prompts, Scenes, patch_shares
from ovbench.networks.builtin.weights import export, load_state_dict, metadata


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SIDES", {112: (8, 0.7), 160: (8, 0.3)})


def test_patch_shares_count_pixels_per_class() -> None:
    label = np.zeros((32, 48), np.int32)
    label[:16, 8:16] = 2  # half of the first patch
    label[16:, 32:] = 1  # all of the last
    shares = patch_shares(label, 3)
    assert shares.shape == (6, 3)
    assert (
        np.allclose(shares[0], [0.5, 0, 0.5]) and np.allclose(shares[5], [0, 1, 0]) and np.allclose(shares[1:5, 0], 1)
    )


def test_batches_follow_from_seed_and_step(few_images: None) -> None:
    first, again, other = Scenes(9, 3)[4], Scenes(5, 3)[4], Scenes(9, 4)[4]
    assert torch.equal(first.images, again.images) and torch.equal(first.shares, again.shares)
    assert first.corner == again.corner and first.step == 4
    assert first.images.shape != other.images.shape or not torch.equal(first.images, other.images)
    side = first.images.shape[1] // 16
    assert first.shares.shape == (8, side * side, 262)
    assert torch.allclose(first.shares.sum(-1), torch.ones(8, side * side), atol=1e-5)
    assert 0 <= first.corner[0] <= 14 - side and 0 <= first.corner[1] <= 14 - side


def test_prompts_use_every_synonym_and_only_stored_tokens(prompts: Prompts) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    sofas = {text for _ in range(60) for text in [prompts.classes(rng)[prompts.words.index(("sofa", "couch"))]]}
    assert any("sofa" in text for text in sofas) and any("couch" in text for text in sofas)
    ids, ends = prompts.batch(["a photo of a sofa.", "sky"])
    eot = prompts.rows.index(49407)
    assert ids[0, ends[0]] == eot and ids[1, ends[1]] == eot and int(ends[1]) == 2
    with pytest.raises(KeyError):
        prompts.ids("a photo of a unicorn")


def test_captions_name_what_covers_the_image(prompts: Prompts) -> None:
    shares = torch.zeros(2, 4, len(prompts.words))
    shares[0, :, 5] = 1.0
    shares[1, :2, 5], shares[1, 2:, 9] = 1.0, 1.0
    rng = np.random.Generator(np.random.PCG64(1))
    seen = [prompts.captions(rng, shares) for _ in range(30)]
    assert all(any(word in one for word in prompts.words[5]) for one, _ in seen)
    assert {" and " in two for _, two in seen} == {True, False}


def test_the_network_is_open_clips(prompts: Prompts) -> None:
    # The short forms here must be the very CLIP that open_clip (and so the suite) runs from the same weights.
    import open_clip

    model: Any = readouts.small_clip(49408, 0).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = open_clip.tokenize(["a photo of a traffic light.", "sky"])
    with torch.no_grad():
        feats = readouts.visual_tokens(model.visual, images)
        ours = readouts.project(model.visual, feats[-1][:, 0])
        theirs = model.encode_image(images, normalize=True)
        ends = ids.argmax(-1)
        text = readouts.encode_text(model, ids[:, : int(ends.max()) + 1], ends)
        their_text = model.encode_text(ids, normalize=True)
    assert len(feats) == 12 and feats[0].shape == (2, 197, 128)
    assert torch.allclose(ours, theirs, atol=1e-5) and torch.allclose(text, their_text, atol=1e-5)


def test_smaller_images_take_a_window_of_the_position_grid() -> None:
    model: Any = readouts.small_clip(10, 0)
    image = torch.zeros(1, 3, 112, 112)
    here, there = (readouts.visual_tokens(model.visual, image, corner)[0] for corner in ((0, 0), (7, 3)))
    grid = model.visual.positional_embedding[1:].view(14, 14, -1)
    model.visual.positional_embedding.data[1:] = grid.roll((-7, -3), (0, 1)).reshape(196, -1)
    rolled = readouts.visual_tokens(model.visual, image, (0, 0))[0]
    assert torch.allclose(there, rolled, atol=1e-6) and not torch.allclose(there, here, atol=1e-3)


def test_sc_readout_keeps_regions_apart() -> None:
    # Two regions with orthogonal tokens: adjusting by a similarity cut at beta mixes within a region only.
    model: Any = readouts.small_clip(10, 0)
    feats = [torch.zeros(1, 5, 128) for _ in range(12)]
    for x in feats:
        x[0, 1:3, 0], x[0, 3:, 1] = 1.0, 1.0
    out = readouts.sc(model.visual, feats)
    assert out.shape == (1, 4, 128)
    assert torch.allclose(out[0, 0], out[0, 1], atol=1e-5) and torch.allclose(out[0, 2], out[0, 3], atol=1e-5)
    assert not torch.allclose(out[0, 0], out[0, 2], atol=1e-4)


def test_losses_reward_the_right_answer() -> None:
    text = torch.eye(4)
    target = torch.tensor([[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]]])
    right = torch.nn.functional.normalize(target, dim=-1)
    wrong = right.roll(1, -1)
    ones = torch.ones(1, 2)
    assert train.soft_cross_entropy(right, text, target, ones) < train.soft_cross_entropy(wrong, text, target, ones) - 5
    shares = torch.tensor([[[1.0, 0], [1.0, 0], [0, 1.0]]])
    apart = torch.tensor([[[1.0, 0], [1.0, 0], [0, 1.0]]])
    alike = torch.ones(1, 3, 2)
    assert train.separation(apart, shares) == 0 and train.separation(alike, shares) > 0.2
    weight = train.balance(torch.tensor([[[1.0, 0]] * 9 + [[0, 1.0]]]))
    assert weight[0, -1] > weight[0, 0] and abs(float(weight.mean()) - 1) < 1e-6


def test_the_rate_warms_up_falls_and_ends_early_on_demand() -> None:
    schedule = train.Schedule(1.0, 1000, 100)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] < 0.01 and max(rates) > 0.9 and rates[-1] < 1e-4
    schedule.cool(400)
    schedule.cool(450)  # a second signal changes nothing
    assert schedule.end() == 500 and schedule.rate(399 + 1) == pytest.approx(rates[400])
    assert schedule.rate(450) == pytest.approx(rates[400] / 2) and schedule.rate(500) == pytest.approx(0)
    late = train.Schedule(1.0, 1000, 100)
    late.cool(950)
    assert late.end() == 1000 and late.rate(980) <= rates[980]


def test_training_learns_resumes_and_exports(few_images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "WARM_UP", 1)
    whole = train.train(tmp_path / "whole", steps=2, minutes=0, seed=1, peak=1e-3, cooldown=1, threads=1)
    interrupted = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(train.Schedule, "end", lambda self: 1)
        train.train(interrupted, steps=2, minutes=0, seed=1, peak=1e-3, cooldown=1, threads=1)
    parts = train.train(interrupted, steps=2, minutes=0, seed=1, peak=1e-3, cooldown=1, threads=1)
    one, two = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert one["step"] == two["step"] == 2
    assert all(torch.allclose(one["model"][name], two["model"][name], atol=1e-6) for name in one["model"])
    start = readouts.small_clip(len(one["rows"]), 1).state_dict()
    moved = [name for name in start if not torch.equal(start[name], one["model"][name])]
    assert len(moved) > 0.9 * len(start)

    path = export(whole, tmp_path / "weights.safetensors")
    state, facts = load_state_dict(path), metadata(path)
    assert facts["steps"] == "2" and facts["seed"] == "1" and json.loads(facts["loss"])["total"] > 0
    rows = torch.tensor(one["rows"])
    assert torch.equal(state["token_embedding.weight"][rows], one["model"]["token_embedding.weight"].half().float())
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_the_script_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([])
    assert "--out is needed" in capsys.readouterr().err
