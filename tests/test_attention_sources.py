"""Second backbones: loading, any image size, features and attention against timm and against loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import photo, save_tiny
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.networks.attention import AttentionSource, ClipSource, TransformerSource, load_source, source_names
from ovbench.networks.attention_base import to_whole_patches
from ovbench.networks.attention_names import VITS
from ovbench.networks.attention_vit import IMAGENET_MEAN, IMAGENET_STD, ViTSource
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP

GRID = 4  # position grid of the small weight files below


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DenseCLIP:
    return load_clip(str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")))


def timm_model(name: str, **options: Any) -> Any:
    """timm's own model of a source, three blocks deep, with positions and prefix tokens that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        recipe = VITS[name]
        options = {"img_size": GRID * recipe.patch, **options}
        model = timm.create_model(recipe.arch, pretrained=False, num_classes=0, depth=3, **options)
        for key, value in model.named_parameters():
            if key.endswith("gamma"):
                value.data.uniform_(0.5, 1)
            elif key.endswith("weight") and "qkv" in key:
                value.data.normal_(0, 0.08)
            elif key in {"pos_embed", "cls_token", "reg_token"}:
                value.data.normal_(0, 0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=list(VITS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ViTSource, Any, dict[str, Tensor]]:
    """A source loaded from a file, timm's model with the same weights, and those weights."""
    name = request.param
    model = timm_model(name)
    path = tmp_path_factory.mktemp(name) / "weights.safetensors"
    save_file(model.state_dict(), path)
    with shallow():
        source = load_source(name, path)
    assert isinstance(source, ViTSource)
    return source, model, model.state_dict()


class shallow:
    """Lets the sources build models of three blocks, which is all that the small files hold."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        create: Callable[..., Any] = timm.create_model
        self.patch.setattr(timm, "create_model", lambda arch, **options: create(arch, **{"depth": 3, **options}))

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() - mean) / std


def test_imagenet_constants() -> None:
    torch.testing.assert_close(torch.tensor(IMAGENET_MEAN) / 255, torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(torch.tensor(IMAGENET_STD) / 255, torch.tensor([0.229, 0.224, 0.225]))


def test_equals_timm_at_the_trained_size(pair: tuple[ViTSource, Any, dict[str, Tensor]]) -> None:
    source, model, _ = pair
    side = GRID * source.patch
    images = torch.stack([photo(side, side, seed=1), photo(side, side, seed=2)])
    with torch.inference_mode():
        found = source.features(images)
        expected = model.forward_features(normalised(images))[:, model.num_prefix_tokens :]
    assert found.shape == (2, GRID, GRID, expected.shape[-1]) and found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_positions_follow_the_models_own_code(pair: tuple[ViTSource, Any, dict[str, Tensor]]) -> None:
    """Any h x w: timm's model of exactly that size, given positions that were resized as the authors' code does."""
    source, model, state = pair
    h, w = 3, 7
    images = photo(h * source.patch, w * source.patch)[None]
    position, prefix = state["pos_embed"], model.pos_embed.shape[1] - GRID**2
    image = position[:, prefix:].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
    if source.name == "dinov2-b14-reg":
        resized = F.interpolate(image, (h, w), mode="bicubic", antialias=True)
    else:
        resized = F.interpolate(image, scale_factor=((h + 0.1) / GRID, (w + 0.1) / GRID), mode="bicubic")
    exact = timm_model(source.name, img_size=(h * source.patch, w * source.patch))
    exact.load_state_dict({**state, "pos_embed": torch.cat([position[:, :prefix], resized.flatten(2).mT], dim=1)})
    with torch.inference_mode():
        found = source.features(images)
        expected = exact.forward_features(normalised(images))[:, model.num_prefix_tokens :]
    assert found.shape[1:3] == (h, w)
    torch.testing.assert_close(found.flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


def attention_by_loops(source: TransformerSource, images: Tensor, last_blocks: int, qkv: Callable[..., Any]) -> Tensor:
    """Mean over heads and blocks, patches only, rows rescaled, one head and row at a time."""
    x, (h, w) = source.embed(images)
    maps = []
    for index in range(source.depth):
        q, k = qkv(index, x)
        if index >= source.depth - last_blocks:
            for head in range(q.shape[1]):
                rows = [(k[:, head] @ q[:, head, i, :, None])[..., 0] / q.shape[-1] ** 0.5 for i in range(q.shape[2])]
                maps.append(torch.stack(rows, dim=1).softmax(dim=-1))
        x = source.block(index, x)
    mean = torch.stack(maps).mean(dim=0)[:, -h * w :, -h * w :]
    return mean / mean.sum(dim=-1, keepdim=True)


def timm_query_key(model: Any, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
    block = model.blocks[index]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    return tuple(part.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2) for part in (q, k))  # type: ignore[return-value]


@pytest.mark.parametrize("last_blocks", [1, 2, 3])
def test_attention_is_the_loop(pair: tuple[ViTSource, Any, dict[str, Tensor]], last_blocks: int) -> None:
    source, model, _ = pair
    images = torch.stack([photo(2 * source.patch, 5 * source.patch, seed=seed) for seed in (1, 2)])
    source = ViTSource(source.name, source.model, source.recipe, "", "", str(last_blocks))
    with torch.inference_mode():
        found, grid = source.attention(images)
        expected = attention_by_loops(source, images, last_blocks, lambda i, x: timm_query_key(model, i, x))
        torch.testing.assert_close(source.attention(images[1:])[0][0], found[1], rtol=1e-4, atol=1e-6)
    assert grid == (2, 5) and found.shape == (2, 10, 10) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 10))
    assert found.std(dim=-1).min() > 1e-4  # not flat: the comparison means something


def test_attention_in_low_precision(pair: tuple[ViTSource, Any, dict[str, Tensor]]) -> None:
    source, _, _ = pair
    images = photo(3 * source.patch, 4 * source.patch)[None]
    with torch.inference_mode():
        exact, _ = source.attention(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, _ = source.attention(images)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.sum(dim=-1), torch.ones(1, 12))
    assert (rough - exact).abs().max() < 0.1 * exact.max()


def test_block_counts(pair: tuple[ViTSource, Any, dict[str, Tensor]]) -> None:
    source, _, _ = pair
    for blocks in ("0", "-1", "4", "2-1", "1-3", "all"):
        with pytest.raises(UsageError, match=f"attention_blocks={blocks}: {source.name} has 3 blocks, give 1 .. 3"):
            ViTSource(source.name, source.model, source.recipe, "", "", blocks)
    assert ViTSource(source.name, source.model, source.recipe, "", "", "0-1").averaged == range(2)
    assert (
        len(source.averaged) == 3 and source.record()["attention_averaged"] == f"{source.depth - 3}-{source.depth - 1}"
    )


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [((28, 42), 14, (28, 42)), ((30, 36), 14, (28, 42)), ((5, 100), 14, (14, 98)), ((336, 448), 8, (336, 448))],
)
def test_to_whole_patches(size: tuple[int, int], patch: int, expected: tuple[int, int]) -> None:
    images = photo(*size)[None].float()
    found = to_whole_patches(images, patch)
    assert found.shape == (1, 3, *expected)
    if size == expected:
        assert found is images
    else:
        torch.testing.assert_close(found, F.interpolate(images, expected, mode="bilinear"))


def test_sizes_input_and_batch(pair: tuple[ViTSource, Any, dict[str, Tensor]]) -> None:
    source, _, _ = pair
    images = torch.stack([photo(61, 100, seed=1), photo(61, 100, seed=2)])
    copy = images.clone()
    with torch.inference_mode():
        both = source.features(images)
        assert both.shape[:3] == (2, round(61 / source.patch), round(100 / source.patch))
        assert torch.equal(both, source.features(images))
        torch.testing.assert_close(source.features(images.float()), both)
        torch.testing.assert_close(source.features(images[1:])[0], both[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(images, copy)
    assert not any(parameter.requires_grad for parameter in source.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.modules())


# Loading


@pytest.mark.parametrize(("name", "params"), [("dino-b8", 85.8e6), ("dinov2-s14", 22.1e6), ("dinov2-b14-reg", 86.6e6)])
def test_random_architectures(name: str, params: float) -> None:
    source = load_source(name, "random", seed=3)
    assert source.params == pytest.approx(params, rel=0.01)
    record = source.record()
    assert (
        record["attention"] == name and record["attention_random"] is True and record["attention_weights"] == "random"
    )
    assert record["attention_patch"] == VITS[name].patch == source.patch
    with torch.inference_mode():
        features = source.features(photo(2 * source.patch, 3 * source.patch)[None])
    assert features.shape == (1, 2, 3, 384 if "s14" in name else 768) and features.isfinite().all()


def test_random_seeds() -> None:
    state = torch.get_rng_state()
    one, same, other = (load_source("dinov2-s14", "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.weights_sha256 == same.weights_sha256 != other.weights_sha256
    image = photo(28, 28)[None]
    with torch.inference_mode():
        assert torch.equal(one.features(image), same.features(image))
        assert not torch.allclose(one.features(image), other.features(image))


def test_authors_layout(tmp_path: Path) -> None:
    """DINOv2 publishes a position for CLS, other names of the registers, and a mask token; so do pickles of it."""
    model = timm_model("dinov2-b14-reg")
    state = model.state_dict()
    cls_position = torch.randn(1, 1, 768, generator=torch.Generator().manual_seed(0))
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - cls_position
    state["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 768)
    torch.save(state, tmp_path / "dinov2_vitb14_reg4_pretrain.pth")
    with shallow():
        source = load_source("dinov2-b14-reg", str(tmp_path / "dinov2_vitb14_reg4_pretrain.pth"))
    image = photo(56, 56)[None]
    with torch.inference_mode():
        expected = model.forward_features(normalised(image))[:, 5:]
        torch.testing.assert_close(source.features(image).flatten(1, 2), expected, rtol=1e-4, atol=1e-4)
    assert source.weights == "dinov2_vitb14_reg4_pretrain.pth"
    assert source.weights_sha256 == sha256_of_file(tmp_path / "dinov2_vitb14_reg4_pretrain.pth")


def test_hub_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    path = tmp_path / "model.safetensors"
    save_file(timm_model("dino-b8").state_dict(), path)

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with shallow():
        source = load_source("dino-b8")
    assert asked == [("timm/vit_base_patch8_224.dino", "model.safetensors")]
    assert source.weights == "timm/vit_base_patch8_224.dino" and source.weights_sha256 == sha256_of_file(path)
    for recipe in VITS.values():  # timm knows the same weights by the same name
        tag = recipe.hub.removeprefix("timm/")
        assert timm.get_pretrained_cfg(tag).hf_hub_id == recipe.hub and tag.split(".")[0] == recipe.arch


def test_wrong_files_are_explained(tmp_path: Path) -> None:
    state = timm_model("dinov2-s14").state_dict()
    path = tmp_path / "w.safetensors"

    def complaint(name: str, content: dict[str, Tensor] | None = None) -> str:
        if content is not None:
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        with pytest.raises(WeightsError) as caught, shallow():
            load_source(name, path)
        return str(caught.value)

    assert "No weights file" in complaint("dinov2-s14") and "timm/vit_small_patch14" in complaint("dinov2-s14")
    path.write_bytes(b"nonsense")
    assert "Cannot read weights" in complaint("dinov2-s14")
    less = {key: value for key, value in state.items() if key not in {"norm.weight", "norm.bias"}}
    found = complaint("dinov2-s14", {**less, "head.weight": torch.zeros(2, 2)})
    assert "missing: norm.weight; norm.bias" in found and "unknown: head.weight" in found
    assert "shapes differ" in complaint("dinov2-b14", state)
    assert "missing: reg_token" in complaint("dinov2-b14-reg", timm_model("dinov2-b14").state_dict())
    assert "unknown: blocks.0.ls1.gamma" in complaint("dino-b8", timm_model("dinov2-b14").state_dict())
    broken = {**state, "norm.bias": torch.full_like(state["norm.bias"], float("nan"))}
    assert "NaN or infinity in norm.bias" in complaint("dinov2-s14", broken)


def test_names(clip: DenseCLIP) -> None:
    assert source_names() == ["dino-b8", "dinov2-s14", "dinov2-b14", "dinov2-b14-reg", "sd2", "clip"]
    with pytest.raises(UsageError, match=r"Unknown attention source 'dinov2'. Did you mean: dinov2-"):
        load_source("dinov2")
    with pytest.raises(UsageError, match="'clip' is the run's own CLIP: leave attention_weights away"):
        load_source("clip", "random", clip=clip)


# CLIP as its own source


def test_clip_source(clip: DenseCLIP) -> None:
    source = load_source("clip", clip=clip, blocks="2")
    assert isinstance(source, ClipSource)
    images = torch.stack([photo(48, 80, seed=1), photo(48, 80, seed=2)])
    with torch.inference_mode():
        tokens = clip.tokens(clip.normalise(images), [-1])
        expected = clip.visual.ln_post(tokens.after[clip.depth - 1][:, 1:])
        torch.testing.assert_close(source.features(images).flatten(1, 2), expected)
        found, grid = source.attention(images)
        loops = attention_by_loops(source, images, 2, lambda i, x: clip.qkv(x, i)[:2])
    assert grid == (3, 5)
    torch.testing.assert_close(found, loops, rtol=1e-4, atol=1e-6)
    assert source.record()["attention_weights_sha256"] == clip.weights_sha256
    assert source.record()["attention_weights"] == "tiny.safetensors"
    assert source.record()["attention_averaged"] == "10-11"
    with pytest.raises(UsageError, match=r"attention_blocks=13: clip has 12 blocks, give 1 .. 12"):
        load_source("clip", clip=clip, blocks="13")
    assert source.params == sum(parameter.numel() for parameter in clip.visual.parameters())
    assert {id(p) for p in source.parameters()} == {id(p) for p in clip.parameters()}  # nothing is copied


def test_every_source_is_one_of_the_interface(clip: DenseCLIP) -> None:
    for name in set(source_names()) - {"sd2"}:  # its own tests have it: random weights of that size take a minute
        with shallow():
            source = load_source(name, None if name == "clip" else "random", clip=clip)
        assert isinstance(source, AttentionSource) and source.name == name and not source.training
        assert len(source.weights_sha256) == 64 and source.patch in {8, 14, 16}


# Real weights


def test_real_dinov2_knows_what_belongs_together(shared: Path) -> None:
    """The nearest other patch has the same class for most foreground patches of real images."""
    weights = shared / "weights" / "dinov2_vits14_fp16.safetensors"
    folder = shared / "data" / "voc2012" / "VOCdevkit" / "VOC2012"
    if not weights.is_file() or not folder.is_dir():
        pytest.skip("no DINOv2 weights or VOC images beside the checkout")
    source = load_source("dinov2-s14", weights)
    assert source.weights == weights.name and source.record()["attention_random"] is False
    same, mass, share = [], [], []
    for name in (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:4]:
        picture = Image.open(folder / "JPEGImages" / f"{name}.jpg").convert("RGB").resize((448, 336))
        label = Image.open(folder / "SegmentationClass" / f"{name}.png").resize((32, 24), Image.Resampling.NEAREST)
        classes = torch.from_numpy(np.array(label)).flatten().long()
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            features = F.normalize(source.features(image)[0].flatten(0, 1), dim=-1)
            attention, grid = source.attention(image)
        assert grid == (24, 32)
        similarity = (features @ features.T).fill_diagonal_(-1)
        inside = (classes > 0) & (classes < 255)
        equal = classes[:, None] == classes
        same.append((classes[similarity.argmax(dim=1)] == classes)[inside].double().mean())
        mass.append((attention[0] * equal).sum(dim=1)[inside].mean())
        share.append(equal.double().mean(dim=1)[inside].mean())
    assert torch.stack(same).mean() > 0.8, same
    assert torch.stack(mass).mean() > 1.2 * torch.stack(share).mean(), (mass, share)  # attention stays inside objects
