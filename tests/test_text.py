from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import save_tiny

from ovbench.errors import UsageError
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.words import embeddings as text


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DenseCLIP:
    return load_clip(str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")))


def test_equals_the_plain_recipe_at_full_context(clip: DenseCLIP) -> None:
    words = ["cat", "a very long and winding name of a class", "dog", "cat"]
    prompts = text.templates("imagenet80")[:5]
    found = text.embed_words(clip, words, prompts)
    for row, word in enumerate(words):
        with torch.inference_mode():
            features = clip.clip.encode_text(clip.tokenizer([prompt.replace("{}", word) for prompt in prompts]))
            expected = F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[3])


def test_templates(tmp_path: Path) -> None:
    assert len(text.templates("imagenet80")) == 80
    assert all(template.count("{}") == 1 for template in text.templates("imagenet80"))
    assert text.templates("plain") == ["{}"]
    (tmp_path / "mine.txt").write_text("a {}.\n\nthe {} there\n")
    assert text.templates(str(tmp_path / "mine.txt")) == ["a {}.", "the {} there"]
    (tmp_path / "bad.txt").write_text("no place for a word\n")
    with pytest.raises(UsageError, match="every line needs exactly one"):
        text.templates(str(tmp_path / "bad.txt"))
    with pytest.raises(UsageError, match="Unknown prompts 'imagenet'"):
        text.templates("imagenet")


def test_cache_is_keyed_by_content(
    clip: DenseCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("OVBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "_memory", {})
    calls: list[list[str]] = []
    embed = text._embed

    def counted(clip: DenseCLIP, words: list[str], prompts: list[str]) -> torch.Tensor:
        calls.append(list(words))
        return embed(clip, words, prompts)

    monkeypatch.setattr(text, "_embed", counted)
    first = text.embed_words(clip, ["cat", "dog"], ["{}"])
    assert torch.equal(text.embed_words(clip, ["cat", "dog"], ["{}"]), first)
    assert len(calls) == 1
    monkeypatch.setattr(text, "_memory", {})  # a new process finds the file
    assert torch.equal(text.embed_words(clip, ["cat", "dog"], ["{}"]), first)
    assert len(calls) == 1
    text.embed_words(clip, ["dog", "cat"], ["{}"])  # another order, other words, other templates, other weights
    text.embed_words(clip, ["cat", "dog"], ["a {}"])
    other = load_clip(str(save_tiny(tmp_path_factory.mktemp("other") / "tiny.safetensors", seed=1)))
    assert not torch.equal(text.embed_words(other, ["cat", "dog"], ["{}"]), first)
    assert len(calls) == 4

    monkeypatch.setattr(text, "_memory", {})
    for file in (tmp_path / "text").iterdir():
        file.write_bytes(b"broken")
    assert torch.equal(text.embed_words(clip, ["cat", "dog"], ["{}"]), first)
    assert len(calls) == 5


def test_a_cache_that_cannot_be_written_is_no_error(
    clip: DenseCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OVBENCH_CACHE", str(tmp_path / "file"))
    assert text.embed_words(clip, ["zebra"], ["{}"]).shape == (1, 32)
