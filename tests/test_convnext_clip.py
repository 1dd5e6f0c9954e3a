"""CLIP with a ConvNeXt: dense features, the head on pooled vectors, loading, text; on a small random network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_clip import photo

from ovbench.errors import UsageError, WeightsError
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.convnext_clip import ConvNextCLIP, load_convnext_clip
from ovbench.words.embeddings import embed_words

SIZES = [(64, 64), (96, 160), (101, 75)]


@pytest.fixture(scope="module", autouse=True)
def archs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small architectures known to open_clip while these tests run: both kinds of projection, and one to refuse."""
    folder = tmp_path_factory.mktemp("archs")
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    kinds = {"linear": ("test_convnext", "", "linear"), "mlp": ("test_convnext", "", "mlp")}
    kinds |= {"attention": ("test_convnext", "rot_attn", ""), "resnet": ("resnet10t", "", "linear")}
    for name, (trunk, pool, projection) in kinds.items():
        vision = {"timm_model_name": trunk, "timm_model_pretrained": False, "timm_pool": pool, "image_size": 64}
        config = {"embed_dim": 32, "vision_cfg": {**vision, "timm_proj": projection}, "text_cfg": text}
        (folder / f"tiny-{name}.json").write_text(json.dumps(config))
    patch = pytest.MonkeyPatch()
    patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(folder)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def clip() -> ConvNextCLIP:
    return load_convnext_clip("random", "tiny-mlp", seed=3)


@pytest.mark.parametrize("arch", ["tiny-linear", "tiny-mlp"])
@pytest.mark.parametrize("size", SIZES)
def test_pooling_everything_and_projecting_is_encode_image(arch: str, size: tuple[int, int]) -> None:
    clip = load_convnext_clip("random", arch)
    images = clip.normalise(torch.stack([photo(*size, seed=1), photo(*size, seed=2)]))
    with torch.inference_mode():
        features = clip.dense(images)
        pooled = features.mean(dim=(2, 3))
        whole = clip.clip.encode_image(images)
        several = clip.project(torch.stack([pooled, 2 * pooled, features[:, :, 0, 0]], dim=1))
    assert features.shape == (2, clip.width, size[0] // 32, size[1] // 32)
    torch.testing.assert_close(clip.project(pooled), whole, rtol=1e-5, atol=1e-5)
    assert (
        several.shape == (2, 3, clip.embed_dim)
        and clip.embed_dim == 32
        and clip.project(pooled[:, None][:, :0]).shape == (2, 0, 32)
    )
    torch.testing.assert_close(several[:, 0], whole, rtol=1e-5, atol=1e-5)
    # the head's norm forgets a scale, as far as its epsilon lets it
    assert F.cosine_similarity(several[:, 1], whole).min() > 0.999 > F.cosine_similarity(several[:, 2], whole).max()


def test_surface(clip: ConvNextCLIP) -> None:
    assert (clip.patch, clip.image_size, clip.arch, clip.weights, clip.activation) == (
        32,
        (64, 64),
        "tiny-mlp",
        "random",
        "gelu",
    )
    assert not any(parameter.requires_grad for parameter in clip.parameters()) and not clip.training
    image = photo(64, 64)[None]
    torch.testing.assert_close(clip.denormalise(clip.normalise(image)), image.float())
    again, other = load_convnext_clip("random", "tiny-mlp", seed=3), load_convnext_clip("random", "tiny-mlp", seed=4)
    assert again.weights_sha256 == clip.weights_sha256 != other.weights_sha256
    assert torch.equal(again.dense(again.normalise(image)), clip.dense(clip.normalise(image)))
    with pytest.raises(UsageError, match="smaller than the stride"):
        clip.dense(torch.zeros(1, 3, 31, 64))


def test_lower_precision_is_close(clip: ConvNextCLIP) -> None:
    low = load_convnext_clip("random", "tiny-mlp", seed=3)
    low.use_precision(torch.bfloat16)
    images = clip.normalise(photo(96, 96)[None])
    with torch.inference_mode():
        exact = clip.dense(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = low.dense(images)
            projected = low.project(rough.mean(dim=(2, 3)))
    assert rough.dtype == projected.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.02 * exact.norm()


def test_text_is_encoded_as_open_clip_does(clip: ConvNextCLIP) -> None:
    words = ["cat", "traffic light"]
    with torch.inference_mode():
        expected = F.normalize(clip.clip.encode_text(clip.tokenizer(words)), dim=-1)
    found = embed_words(clip, words, ["{}"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (2, clip.embed_dim)


def test_files_and_the_hub_load(clip: ConvNextCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    state = {key: value.contiguous() for key, value in clip.clip.state_dict().items()}
    save_file(state, path)
    found = load_convnext_clip(str(path), "tiny-mlp")
    image = clip.normalise(photo(64, 64)[None])
    assert torch.equal(found.dense(image), clip.dense(image)) and found.weights == str(path)
    with pytest.raises(WeightsError, match=r"does not fit tiny-linear.*missing: visual\.head\.proj"):
        load_convnext_clip(str(path), "tiny-linear")
    with pytest.raises(WeightsError, match="No weights file"):
        load_convnext_clip(str(tmp_path / "nothing.pt"))

    def fail(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", fail)
    with pytest.raises(WeightsError, match=r"'laion2b_s29b_b131k_ft_soup' for convnext_large_d_320: no network"):
        load_convnext_clip("laion2b_s29b_b131k_ft_soup")
    with pytest.raises(UsageError, match="Unknown weights tag for convnext_base_w 'openai'"):
        load_convnext_clip("openai", "convnext_base_w")


@pytest.mark.parametrize(
    ("arch", "problem"),
    [
        ("tiny-attention", "does not average"),
        ("tiny-resnet", "is a ResNet"),
        ("ViT-S-32-alt", "is a VisionTransformer"),
    ],
)
def test_other_towers_are_refused(arch: str, problem: str) -> None:
    with pytest.raises(WeightsError, match=f"{arch} is no CLIP with a ConvNeXt.*{problem}.*convnext_base_w"):
        load_convnext_clip("random", arch)


def test_each_loader_refuses_the_others_towers() -> None:
    with pytest.raises(WeightsError, match="tiny-mlp cannot give dense features here: its image tower is a TimmModel"):
        load_clip("random", "tiny-mlp")
    with pytest.raises(WeightsError, match="built-in CLIP has a ViT"):
        load_convnext_clip("builtin")
