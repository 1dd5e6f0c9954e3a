from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovbench.errors import WeightsError
from ovbench.networks.builtin import appearances, evaluation, readouts
from ovbench.networks.builtin.corpus import normalise_images
from ovbench.networks.builtin.scenes import render
from ovbench.networks.builtin.weights import load_state_dict, metadata, weights_path

HELD_OUT = 1 << 31
WORDS = [
    ["sky", "cloud"],
    ["road"],
    ["grass"],
    ["building"],
    ["sofa", "couch"],
    ["dog"],
    ["bicycle"],
    ["traffic light"],
    ["person", "person in jeans"],
    ["boat"],
]


@pytest.fixture(scope="module")
def model() -> Any:
    return evaluation.build()


@pytest.fixture(scope="module")
def text(model: Any) -> torch.Tensor:
    return evaluation.word_embeddings(model, [group[0] for group in WORDS])


@pytest.fixture(scope="module")
def scenes(model: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens of every block for twelve held-out windows, and the labels on the patch grid's centres."""
    words = [group[0] for group in WORDS]
    drawn = [render(words, 224, 224, HELD_OUT + i) for i in range(12)]
    images = torch.from_numpy(np.stack([scene.image for scene in drawn]))
    with torch.no_grad():
        feats = readouts.visual_tokens(model.visual, normalise_images(images))
    labels = torch.from_numpy(np.stack([scene.label[8::16, 8::16].ravel() for scene in drawn])).long()
    return feats, labels


def _accuracy(model: Any, name: str, feats: list[torch.Tensor], labels: torch.Tensor, text: torch.Tensor) -> float:
    with torch.no_grad():
        embedded = readouts.project(model.visual, evaluation.READOUTS[name](model.visual, feats))
    return float(((embedded @ text.T).argmax(-1) == labels).float().mean())


def test_the_file_is_small_and_says_how_it_was_made() -> None:
    assert weights_path().stat().st_size <= 12_000_000
    facts = metadata()
    assert int(facts["steps"]) > 0 and int(facts["seconds"]) > 0 and json.loads(facts["loss"])["total"] > 0
    assert facts["command"].startswith("python -m ovbench.builtin.train ")  # its name in 0.1
    assert facts["date"].startswith("20")
    assert f"--seed {facts['seed']}" in facts["command"]


def test_the_table_still_holds_the_looks_that_were_trained() -> None:
    facts = metadata()
    assert appearances.digest(json.loads(facts["looks"])) == facts["looks_sha256"]


def test_the_state_dict_is_a_whole_openai_clip() -> None:
    from open_clip.model import build_model_from_openai_state_dict

    state = load_state_dict()
    assert state["token_embedding.weight"].shape == (49408, 64)
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in state.values())
    rebuilt = build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32)
    assert len(rebuilt.visual.transformer.resblocks) == 12 and rebuilt.visual.image_size in (224, (224, 224))
    scale = float(state["logit_scale"].exp())
    assert 39 < scale < 41


def test_loading_twice_gives_the_same_weights() -> None:
    first, second = load_state_dict(), load_state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("readout", "least"), [("vanilla", 0.5), ("value-only", 0.7), ("k-k", 0.7), ("sc-clip", 0.6)])
def test_held_out_patches_are_told_apart(
    model: Any, text: torch.Tensor, scenes: tuple[list[torch.Tensor], torch.Tensor], readout: str, least: float
) -> None:
    assert _accuracy(model, readout, *scenes, text) > least  # chance is about 0.2


@pytest.mark.parametrize("readout", ["vanilla", "sc-clip"])
def test_wrong_names_and_broken_read_outs_collapse(
    model: Any, text: torch.Tensor, scenes: tuple[list[torch.Tensor], torch.Tensor], readout: str
) -> None:
    feats, labels = scenes
    right = _accuracy(model, readout, feats, labels, text)
    assert _accuracy(model, readout, feats, labels, text.roll(1, 0)) < 0.25 * right
    # Patches in another order, as with a wrong reshape.
    mixed = torch.cat([torch.zeros(1), 1 + torch.randperm(196, generator=torch.Generator().manual_seed(0))]).long()
    assert _accuracy(model, readout, [x[:, mixed] for x in feats], labels, text) < 0.5 * right


def test_synonyms_mean_the_same_and_unknown_words_do_not_crash(model: Any) -> None:
    sofa, couch, road, unicorn = evaluation.word_embeddings(model, ["sofa", "couch", "road", "unicorn"])
    assert float(sofa @ couch) > float(sofa @ road) + 0.2
    assert bool(unicorn.isfinite().all()) and abs(float(unicorn.norm()) - 1) < 1e-4


def test_the_image_embedding_finds_its_caption(model: Any) -> None:
    pairs = [
        ("sky", "road"),
        ("grass", "dog"),
        ("building", "bicycle"),
        ("sea", "boat"),
        ("wall", "sofa"),
        ("snow", "car"),
    ]
    pictures = np.stack([render(list(pair), 224, 224, HELD_OUT + 77, include=list(pair)).image for pair in pairs])
    with torch.no_grad():
        feats = readouts.visual_tokens(model.visual, normalise_images(torch.from_numpy(pictures)))
        images = readouts.project(model.visual, feats[-1][:, 0])
        import open_clip

        ids = open_clip.tokenize([f"a photo of {first} and {second}." for first, second in pairs])
        captions = F.normalize(model.encode_text(ids), dim=-1)
    assert (images @ captions.T).argmax(-1).tolist() == list(range(len(pairs)))


def test_miou_of_a_benchmark_is_far_above_chance_and_falls_with_wrong_words(model: Any) -> None:
    from ovbench import benchmarks

    words = [group[:1] for group in benchmarks.get("voc20").words("sclip")]
    right = evaluation.miou(model, "voc20", words, 3, background=False)
    assert right.keys() == evaluation.READOUTS.keys()
    assert all(25 < value <= 100 for value in right.values())  # chance: about 3
    wrong = evaluation.miou(model, "voc20", words, 3, background=False, queries=words[1:] + words[:1])
    assert all(wrong[name] < 0.2 * right[name] for name in right)


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="built-in weights are missing"):
        load_state_dict(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(WeightsError, match="not a built-in weight file"):
        load_state_dict(tmp_path / "other.safetensors")
