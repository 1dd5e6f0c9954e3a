"""EVA-CLIP's plain towers as a CLIP ViT: the same numbers, what is refused, and methods on it; on a small random network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from timm.layers import RmsNorm
from timm.models.eva import Eva
from tiny_clip import photo
from torch import nn

from ovbench.errors import WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.models import trained_file
from ovbench.models.mask_method import Words
from ovbench.models.mask_model import MaskModel
from ovbench.models.patch_model import OpenVocabModel
from ovbench.networks.clip_weights import load_any_clip, load_clip
from ovbench.networks.dense_clip import DenseCLIP, resize_position_embedding
from ovbench.networks.eva_clip import is_eva, plain_vit
from ovbench.ops.masks import touched_patches
from ovbench.registry import method_class
from ovbench.spec import protocol

ARCH = "tiny-eva"
# heads 24 wide and an MLP of 314: neither is what a CLIP of OpenAI has
SIZES: dict[str, Any] = {
    "img_size": 56, "patch_size": 14, "embed_dim": 72, "depth": 3, "num_heads": 3, "mlp_ratio": 6144 / 1408,
    "num_classes": 32, "global_pool": "token",
}  # fmt: skip
CLASSES = ["sky", ["road", "street"], "car"]


@pytest.fixture(scope="module", autouse=True)
def archs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small architectures known to open_clip while these tests run: a plain EVA and one with rotary positions."""
    folder = tmp_path_factory.mktemp("archs")
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    vision = {"timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None, "image_size": 56}
    for name in (ARCH, "tiny-eva-rope"):
        config = {
            "embed_dim": 32,
            "vision_cfg": {**vision, "timm_model_name": name},
            "text_cfg": text,
            "custom_text": True,
        }
        (folder / f"{name}.json").write_text(json.dumps(config))

    def create(name: str, *, pretrained: bool, **given: Any) -> Eva:
        assert not pretrained
        return Eva(**{**SIZES, **given, "use_rot_pos_emb": name == "tiny-eva-rope"})

    patch = pytest.MonkeyPatch()
    patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    patch.setattr(timm, "create_model", create)
    open_clip.add_model_config(folder)
    yield
    patch.undo()


def moved(module: nn.Module, size: float = 0.05) -> nn.Module:
    """The module with all of its parameters moved, so that no bias is zero and no scale is one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture(scope="module")
def weights(archs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "eva.safetensors"
    model = moved(load_any_clip("random", ARCH).clip)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def original(weights: Path) -> Any:
    return load_any_clip(str(weights), ARCH).clip.eval()


@pytest.fixture(scope="module")
def clip(weights: Path) -> DenseCLIP:
    return load_clip(str(weights), ARCH)


def pictures(clip: DenseCLIP, size: tuple[int, int] = (56, 56)) -> torch.Tensor:
    return clip.normalise(torch.stack([photo(*size, seed=1), photo(*size, seed=2)]))


def test_same_embeddings_as_the_original(original: Any, clip: DenseCLIP) -> None:
    images = pictures(clip)
    with torch.inference_mode():
        expected = original.encode_image(images)
        tokens = clip.tokens(images, [-1]).after[2]
        own = clip.clip.encode_image(images)
        everywhere = original.visual.trunk.head(original.visual.trunk.forward_features(images))
        words = clip.tokenizer(["cat", "traffic light"])
        texts = original.encode_text(words), clip.clip.encode_text(words)
    assert isinstance(clip.visual, VisionTransformer) and expected.std() > 0.1
    assert original.visual.trunk.head.bias.abs().max() > 0.05 < original.visual.trunk.patch_embed.proj.bias.abs().max()
    torch.testing.assert_close(clip.project(tokens[:, 0]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.project(tokens), everywhere, rtol=0, atol=1e-5)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(*texts, rtol=1e-5, atol=1e-5)


def test_queries_keys_and_values_are_the_originals(original: Any, clip: DenseCLIP) -> None:
    """Dense methods read them apart, so equal embeddings are not enough."""
    block = original.visual.trunk.blocks[1]
    tokens = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        bias = torch.cat([block.attn.q_bias, torch.zeros(72), block.attn.v_bias])
        expected = nn.functional.linear(block.norm1(tokens), block.attn.qkv.weight, bias).unflatten(-1, (3, 3, 24))
        found = torch.stack(clip.qkv(tokens, 1)).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(84, 70), (28, 112)])
def test_other_sizes_resize_the_positions_alone(original: Any, clip: DenseCLIP, size: tuple[int, int]) -> None:
    """An Eva made for that size, its positions resized: the folded bias passes through the resizing as it is."""
    other = Eva(**{**SIZES, "img_size": size}).eval()
    state = original.visual.trunk.state_dict()
    grid = (size[0] // 14, size[1] // 14)
    state["pos_embed"] = resize_position_embedding(state["pos_embed"][0], (4, 4), grid)[None]
    other.load_state_dict(state)
    images = pictures(clip, size)
    with torch.inference_mode():
        found = clip.tokens(images, [-1])
        torch.testing.assert_close(clip.project(found.after[2][:, 0]), other(images), rtol=0, atol=1e-5)
    assert found.grid == grid


def test_the_record_is_that_of_the_file(weights: Path, clip: DenseCLIP) -> None:
    assert (clip.arch, clip.weights, clip.weights_sha256) == (ARCH, str(weights), sha256_of_file(weights))
    assert (clip.activation, clip.embed_dim, clip.width, clip.heads) == ("gelu", 32, 72, 3)
    assert (clip.depth, clip.patch, clip.image_size) == (3, 14, (56, 56))
    assert not any(parameter.requires_grad for parameter in clip.parameters()) and not clip.training
    assert all(parameter.is_contiguous() and not parameter.is_meta for parameter in clip.parameters())
    again, other = load_clip("random", ARCH), load_clip("random", ARCH, seed=1)
    assert again.weights_sha256 == load_any_clip("random", ARCH).weights_sha256 != other.weights_sha256


def _swap(**options: Any) -> Callable[[Any], None]:
    def change(visual: Any) -> None:
        visual.trunk = Eva(**{**SIZES, **options})

    return change


def _head_outside(visual: Any) -> None:
    visual.trunk = Eva(**{**SIZES, "num_classes": 0})
    visual.head = nn.Sequential(nn.Linear(72, 32))


def _other_activation(visual: Any) -> None:
    for block in visual.trunk.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swap(use_rot_pos_emb=True), "has rotary position embeddings"),
        (_swap(swiglu_mlp=True), r"has a gated MLP \(SwiGLU\)"),
        (_swap(swiglu_mlp=True, scale_mlp=True), r"has a gated MLP \(SwiGLU\), norms inside"),
        (_swap(scale_mlp=True), "norms inside attention or MLP"),
        (_swap(scale_attn_inner=True), "norms inside attention or MLP"),
        (_swap(init_values=0.1), "has layer scale"),
        (_swap(use_post_norm=True), "norms behind attention and MLP"),
        (_swap(global_pool="avg"), "has 'avg' pooling instead of CLS, no layer norm"),
        (_swap(num_classes=0), "no linear projection"),
        (_head_outside, "no linear projection"),
        (_other_activation, "activation other than GELU"),
        (_swap(use_abs_pos_emb=False), "no position embeddings"),
        (_swap(num_reg_tokens=2), "other tensors than a CLIP ViT: .*reg_token"),
        (_swap(no_embed_class=True), "other tensors than a CLIP ViT: positional_embedding"),
        (_swap(use_fc_norm=True), "no layer norm behind its blocks"),
        (_swap(use_pre_transformer_norm=True), "a norm before its blocks"),
        (_swap(qkv_fused=False), "other tensors than a CLIP ViT: .*q_proj"),
        (_swap(qkv_bias=False), "other tensors than a CLIP ViT: .*in_proj_bias"),
        (_swap(norm_layer=partial(RmsNorm, eps=1e-6)), "no layer norm behind its blocks"),
    ],
)
def test_what_cannot_be_exact_is_refused(change: Callable[[Any], None], reason: str) -> None:
    visual = load_any_clip("random", ARCH).clip.visual
    change(visual)
    with pytest.raises(WeightsError, match=rf"{ARCH} cannot give dense features.*{reason}.*EVA01-g-14-plus can"):
        plain_vit(visual, ARCH)


def test_a_bias_outside_the_projection_is_refused() -> None:
    """More outputs than inputs: most biases are no projection of anything."""
    visual = load_any_clip("random", ARCH).clip.visual
    visual.trunk = moved(Eva(**{**SIZES, "num_classes": 96}))
    with pytest.raises(WeightsError, match="bias behind its projection"):
        plain_vit(visual, ARCH)
    nn.init.zeros_(visual.trunk.head.bias)
    assert plain_vit(visual, ARCH).proj.shape == (72, 96)


def test_loading_refuses_other_towers_by_name() -> None:
    with pytest.raises(WeightsError, match=r"tiny-eva-rope cannot give dense features here: .*rotary"):
        load_clip("random", "tiny-eva-rope")
    plain = open_clip.create_model("ViT-S-32-alt", pretrained_text=False)
    assert not is_eva(plain.visual)
    with pytest.raises(WeightsError, match="is a VisionTransformer"):
        plain_vit(plain.visual, "ViT-S-32-alt")
    with pytest.raises(WeightsError, match="or EVA01-g-14-plus"):
        DenseCLIP(**vars(load_any_clip("random", ARCH)))


@pytest.mark.parametrize("name", ["clip", "kk", "maskclip", "clearclip", "naclip", "sclip", "sc-clip"])
def test_dense_methods_run(name: str, clip: DenseCLIP) -> None:
    method = method_class(name).build(clip, {})
    with torch.inference_mode():
        features = method.features(pictures(clip, (70, 98)))
    assert features.shape == (2, 5, 7, 32) and bool(features.isfinite().all())
    model = OpenVocabModel(method, CLASSES, protocol("common", short_side=84, crop=56, stride=28))
    (labels,) = model.predict_labels([photo(60, 80)], [(60, 80)])
    assert labels.shape == (60, 80) and 0 <= int(labels.min()) <= int(labels.max()) < 3


def test_clip_method_gives_the_original_patches(original: Any, clip: DenseCLIP) -> None:
    images = pictures(clip)
    with torch.inference_mode():
        trunk = original.visual.trunk
        expected = trunk.head(trunk.forward_features(images))[:, 1:].unflatten(1, (4, 4))
        found = method_class("clip").build(clip, {}).features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["maskclip-ding", "fisa"])
def test_mask_methods_run(name: str, clip: DenseCLIP) -> None:
    cls = method_class(name)
    model = MaskModel(
        cls(clip, cls.configure({"generator": "grid"})), CLASSES, protocol("fisa", short_side=84, square=84)
    )
    (labels,) = model.predict_labels([photo(60, 80)], [(60, 80)])
    assert labels.shape == (60, 80) and 0 <= int(labels.min()) <= int(labels.max()) < 3


def test_a_mask_token_starts_as_the_originals_cls(original: Any, clip: DenseCLIP) -> None:
    """A mask token is the CLS in block 0; there it attends to CLS and the mask's patches with the original's queries."""
    cls = method_class("maskclip-ding")
    method = cls(clip, cls.configure({"generator": "grid"}))
    images, trunk = pictures(clip)[:1], original.visual.trunk
    masks = torch.full((1, 2, 4, 4), -5.0)
    masks[0, 0, :2], masks[0, 1, 1:, 2:] = 5.0, 5.0
    with torch.inference_mode():
        found = method.mask_embeddings(images, masks, torch.zeros(1, 32))[0]
        for index in range(2):
            x, _ = trunk._pos_embed(trunk.patch_embed(images))
            x = torch.cat([x, x[:, :1]], dim=1)
            allowed = torch.ones(18, 18, dtype=torch.bool)
            allowed[:, 17] = False  # image tokens do not see it, nor does it see itself
            allowed[17, 1:17] = touched_patches(masks, (4, 4), (images.shape[-2], images.shape[-1]))[0, index]
            for block in trunk.blocks:
                x = block(x, attn_mask=torch.zeros(18, 18).masked_fill(~allowed, float("-inf")))
            torch.testing.assert_close(found[index], trunk.head(trunk.norm(x[0, 17])), rtol=0, atol=1e-5)


def test_a_trained_fisa_on_it_comes_back(clip: DenseCLIP, tmp_path: Path) -> None:
    cls = method_class("fisa")
    config = cls.configure({"generator": "grid"})
    method = cls(clip, config)
    moved(method.seve)
    about = trained_file.About(
        method="fisa", method_options=method.options(), arch=clip.arch, dataset="coco_stuff", class_names=["sky"],
        training="t", spec_hash="0", iterations=2, planned=2,
    )  # fmt: skip
    path = tmp_path / "trained.safetensors"
    trained_file.save(path, method.public_state(), about)
    again = cls.load(str(path), None, config)
    assert (again.clip.arch, again.clip.heads, again.clip.activation) == (ARCH, 3, "gelu")
    text = nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    words = Words(text, torch.arange(4), 4, 100.0, torch.ones(4, dtype=torch.bool))
    masks = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        one, other = (found.classify(pictures(clip), masks, words).logits for found in (method, again))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    state = dict(method.public_state())
    state.pop("clip_model.visual.proj")
    trained_file.save(tmp_path / "less.safetensors", state, about)
    with pytest.raises(WeightsError, match=r"does not fit tiny-eva.*missing: visual\.proj"):
        cls.load(str(tmp_path / "less.safetensors"), None, config)
