"""The training-free family: each rule against a loop over tokens, and against the public implementations' outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_clip import photo, tiny_state
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.methods import naclip, proxyclip
from ovbench.models.method import Method
from ovbench.models.patch_model import OpenVocabModel
from ovbench.networks.attention import AttentionSource
from ovbench.networks.attention_vit import ViTSource
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP, LastBlock
from ovbench.registry import method_class
from ovbench.spec import protocol

# name in the golden files -> method, options
GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {}),
    "maskclip": ("maskclip", {}),
    "maskclip-residual": ("maskclip", {"residual": True}),
    "sclip": ("sclip", {}),
    "sclip-residual": ("sclip", {"residual": True}),
    "clearclip": ("clearclip", {}),
    "naclip": ("naclip", {}),
    "kk-reduced": ("kk", {}),
}


class Reduced(Method):
    """q-k attention without residual and MLP: no method of a paper, but NACLIP's code has it."""

    def features(self, images: Tensor) -> Tensor:
        return self.clip.dense(images, LastBlock(residual=False, mlp=False))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DenseCLIP:
    """Two heads, three blocks, and a last block with sharp, far from symmetric attention."""
    state = tiny_state(3, layers=3, width=128, grid=4)
    key = "visual.transformer.resblocks.2.attn.in_proj_weight"
    state[key][:256] *= 2.5  # queries and keys
    path = tmp_path_factory.mktemp("weights") / "sharp.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return load_clip(str(path))


@pytest.fixture(scope="module")
def pictures(clip: DenseCLIP) -> Tensor:
    return clip.normalise(torch.stack([photo(64, 112, seed=1), photo(64, 112, seed=2)]))  # 4 x 7 patches


# Rules for one head: query i, all queries, keys (T, d), values and the grid -> weights of the values (T,)
def _softmax(scores: list[Tensor]) -> Tensor:
    values = torch.stack(scores)
    exponentials = (values - values.max()).exp()
    return exponentials / exponentials.sum()


def _plain(i: int, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    return _softmax([q[i] @ k[j] / math.sqrt(k.shape[1]) for j in range(len(k))])


def _itself(i: int, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.tensor([float(j == i) for j in range(len(k))])


def _correlative(i: int, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    return _plain(i, q, q, grid) + _plain(i, k, k, grid)


def _neighbours(i: int, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    def omega(j: int) -> float:
        if i == 0 or j == 0:
            return 0.0
        (row, column), (other_row, other_column) = divmod(i - 1, grid[1]), divmod(j - 1, grid[1])
        return math.exp(-((row - other_row) ** 2 + (column - other_column) ** 2) / (2 * 5.0**2))

    return _softmax([k[i] @ k[j] / math.sqrt(k.shape[1]) + omega(j) for j in range(len(k))])


Rule = Callable[[int, Tensor, Tensor, tuple[int, int]], Tensor]
RULES: dict[str, tuple[dict[str, Any], Rule, bool]] = {
    "clip": ({}, _plain, True),
    "maskclip": ({}, _itself, False),
    "maskclip-residual": ({"residual": True}, _itself, True),
    "sclip": ({}, _correlative, True),
    "sclip-reduced": ({"residual": False}, _correlative, False),
    "clearclip": ({}, lambda i, q, k, grid: _plain(i, q, q, grid), False),
    "clearclip-residual": ({"residual": True}, lambda i, q, k, grid: _plain(i, q, q, grid), True),
    "naclip": ({}, _neighbours, False),
    "naclip-residual": ({"residual": True}, _neighbours, True),
    "kk": ({}, lambda i, q, k, grid: _plain(i, k, k, grid), False),
}


def by_loops(clip: DenseCLIP, image: Tensor, rule: Rule, whole_block: bool) -> Tensor:
    """Dense features (h, w, D) of one normalised image, the last block written out token by token."""
    tokens = clip.tokens(image[None], [clip.depth - 2])
    x: Tensor = tokens.after[clip.depth - 2][0]
    block: Any = clip.blocks[-1]
    width, heads = x.shape[1], 2
    q, k, v = (block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(width, dim=1)
    rows = []
    for i in range(1, len(x)):  # CLS itself is dropped
        out = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            weights = rule(i, q[:, part], k[:, part], tokens.grid)
            out.append(torch.stack([weights[j] * v[j, part] for j in range(len(x))]).sum(dim=0))
        row = block.attn.out_proj.weight @ torch.cat(out) + block.attn.out_proj.bias
        if whole_block:
            row = x[i] + row
            row = row + block.mlp(block.ln_2(row))
        rows.append(clip.visual.ln_post(row) @ clip.visual.proj)
    return torch.stack(rows).unflatten(0, tokens.grid)


@pytest.mark.parametrize("name", RULES)
def test_rule_is_the_loop_over_tokens(clip: DenseCLIP, pictures: Tensor, name: str) -> None:
    options, rule, whole_block = RULES[name]
    method = method_class(name.split("-")[0]).build(clip, options)
    with torch.inference_mode():
        found = method.features(pictures)
        assert found.shape == (2, 4, 7, 32)
        for row in range(2):
            expected = by_loops(clip, pictures[row], rule, whole_block)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_the_rules_differ(clip: DenseCLIP, pictures: Tensor) -> None:
    """The loops above would agree with anything if attention were flat: no two rules give nearly the same here."""
    with torch.inference_mode():
        found = {
            name: method_class(name.split("-")[0]).build(clip, options).features(pictures)
            for name, (options, _, _) in RULES.items()
        }
        found["proxyclip"] = method_class("proxyclip").build(clip, {"attention": "clip"}).features(pictures)
    names = list(found)
    for one in names:
        for other in names[names.index(one) + 1 :]:
            assert (found[one] - found[other]).abs().max() > 0.02 * found[one].abs().max(), (one, other)


def test_options_as_typed_and_recorded(clip: DenseCLIP) -> None:
    cls = method_class("naclip")
    assert cls.build(clip, {"sigma": "3", "residual": "on"}).options() == {"sigma": 3.0, "residual": True}
    assert cls.build(clip).options() == {"sigma": 5.0, "residual": False}
    assert method_class("sclip").build(clip).options() == {"residual": True}
    assert method_class("kk").build(clip).options() == {}
    for sigma in ("0", "-1", "nan"):
        with pytest.raises(UsageError, match=r"Option sigma=.*: a positive number of patches is needed"):
            cls.build(clip, {"sigma": sigma})


def test_neighbourhood_table(clip: DenseCLIP, pictures: Tensor) -> None:
    omega = naclip.neighbourhood((2, 3), 5.0)
    assert omega.shape == (7, 7) and torch.equal(omega, omega.T)
    assert not omega[0].any() and not omega[:, 0].any()
    assert torch.equal(omega.diagonal()[1:], torch.ones(6))
    # patch 0 lies at (0, 0), patch 5 at (1, 2); patch 3 is one row below patch 0
    torch.testing.assert_close(omega[1, 6].item(), math.exp(-5 / 50))
    torch.testing.assert_close(omega[1, 4].item(), math.exp(-1 / 50))
    method = method_class("naclip").build(clip)
    assert isinstance(method, naclip.NACLIP)
    with torch.inference_mode():
        method.features(pictures)
    table = method.omega((4, 7), torch.float32, pictures.device)
    assert table is method.omega((4, 7), torch.float32, pictures.device)
    torch.testing.assert_close(table, naclip.neighbourhood((4, 7), 5.0), rtol=0, atol=0)
    for side in range(1, 30):
        assert method.omega((1, side), torch.bfloat16, pictures.device).dtype == torch.bfloat16
    assert len(method._omega) <= 8


def test_compiled_naclip_keeps_no_table(clip: DenseCLIP, pictures: Tensor) -> None:
    """One graph without breaks, and nothing of it outlives the run."""
    method = method_class("naclip").build(clip)
    assert isinstance(method, naclip.NACLIP)
    compiled = torch.compile(method.features, backend="eager", fullgraph=True)
    with torch.inference_mode():
        found = compiled(pictures)
        assert not method._omega
        torch.testing.assert_close(found, method.features(pictures))
    assert method._omega


# ProxyCLIP


def proxy_by_loops(clip: DenseCLIP, image: Tensor, guide: Tensor, beta: float, gamma: float) -> Tensor:
    """Dense features (H, W, D) of one normalised image under features (C, H, W) of a second backbone, by loops."""
    tokens = clip.tokens(image[None], [clip.depth - 2])
    x: Tensor = tokens.after[clip.depth - 2][0]
    block: Any = clip.blocks[-1]
    width = x.shape[1]
    value = block.ln_1(x) @ block.attn.in_proj_weight[2 * width :].T + block.attn.in_proj_bias[2 * width :]
    (h, w), (height, length) = tokens.grid, guide.shape[1:]

    def sample(row: int, column: int) -> Tensor:
        """Bilinear, pixel centres at half integers, clamped at the border."""
        y = min(max((row + 0.5) * h / height - 0.5, 0), h - 1)
        z = min(max((column + 0.5) * w / length - 0.5, 0), w - 1)
        total = torch.zeros(width)
        for i, dy in ((int(y), 1 - y % 1), (min(int(y) + 1, h - 1), y % 1)):
            for j, dz in ((int(z), 1 - z % 1), (min(int(z) + 1, w - 1), z % 1)):
                total += dy * dz * value[1 + i * w + j]
        return total

    cells = [(row, column) for row in range(height) for column in range(length)]
    similarity = torch.tensor(
        [[float(F.cosine_similarity(guide[:, a, b], guide[:, c, d], dim=0)) for c, d in cells] for a, b in cells]
    )
    mean = float(similarity.mean())
    rows = []
    for i in range(len(cells)):
        kept = {j: (float(similarity[i, j]) - beta * mean) * gamma for j in range(len(cells))}
        kept = {j: score for j, score in kept.items() if score >= 0 or j == i}
        total = sum(math.exp(score) for score in kept.values())
        mixed = sum((math.exp(score) / total * sample(*cells[j]) for j, score in kept.items()), torch.zeros(width))
        rows.append(clip.project(block.attn.out_proj(mixed)))
    return torch.stack(rows).unflatten(0, (height, length))


@pytest.mark.parametrize("size", [(5, 9), (3, 4), (8, 7)])
def test_proxy_rule_is_the_loop(clip: DenseCLIP, pictures: Tensor, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    guide = torch.randn(2, 6, *size, generator=generator) + torch.tensor([0.3, 1.0]).view(2, 1, 1, 1)
    with torch.inference_mode():
        tokens = clip.tokens(pictures, [clip.depth - 2])
        found = proxyclip.proxy_features(clip, tokens.after[clip.depth - 2], tokens.grid, guide, 1.2, 3.0)
        assert found.shape == (2, *size, 32)
        for row in range(2):
            expected = proxy_by_loops(clip, pictures[row], guide[row], 1.2, 3.0)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_proxy_attention() -> None:
    guide = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    guide[1] += 0.8
    attention = proxyclip.proxy_attention(guide, 1.2, 3.0)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 15))
    assert 0 < (attention == 0).double().mean() < 1
    # each image has a threshold of its own
    for row in range(2):
        torch.testing.assert_close(proxyclip.proxy_attention(guide[row : row + 1], 1.2, 3.0)[0], attention[row])
    # only directions count
    torch.testing.assert_close(proxyclip.proxy_attention(guide * 7, 1.2, 3.0), attention)
    # a flat image: 1.2 x the mean similarity is above every similarity
    assert torch.equal(proxyclip.proxy_attention(torch.ones(1, 4, 3, 3), 1.2, 3.0)[0], torch.eye(9))
    assert proxyclip.proxy_attention(torch.zeros(1, 4, 2, 2), 1.2, 3.0).isfinite().all()
    before = guide.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = proxyclip.proxy_attention(guide, 1.2, 3.0)
    assert rough.dtype == torch.float32 and torch.equal(rough, attention)
    assert torch.equal(guide, before)


class Halves(AttentionSource):
    """A source that sees the left of an image as one thing and the right as another, on cells of 4 pixels."""

    name, patch, weights, weights_sha256 = "halves", 4, "none", "00"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def features(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        bright = F.avg_pool2d(images.mean(dim=1, keepdim=True), 4)[:, 0] > 128  # (B, h, w)
        return torch.stack([bright, ~bright], dim=-1).float()

    def attention(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        raise NotImplementedError


def test_proxyclip_follows_the_second_backbone(clip: DenseCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two flat regions every cell of a region gets the region's mean, at the second backbone's resolution."""
    halves = Halves()
    monkeypatch.setattr(proxyclip, "load_source", lambda name, weights, clip: halves)
    method = method_class("proxyclip").build(clip)
    image = torch.full((2, 3, 70, 100), 20, dtype=torch.uint8)  # CLIP sees 64 x 96
    image[:, :, :, 40:] = 230  # inside CLIP's third patch
    image[1] = image[1].flip(-1)
    with torch.inference_mode():
        found = method.features(clip.normalise(image))
    [seen] = halves.seen
    torch.testing.assert_close(seen, image[..., :64, :96].float(), rtol=0, atol=1e-3)  # pixels again, RGB 0..255
    assert found.shape == (2, 16, 24, 32)
    for row, edge in ((0, 10), (1, 15)):
        left, right = found[row, :, :edge].flatten(0, 1), found[row, :, edge:].flatten(0, 1)
        torch.testing.assert_close(left, left[:1].expand_as(left), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(right, right[:1].expand_as(right), rtol=1e-4, atol=1e-5)
        assert (left[0] - right[0]).abs().max() > 0.01 * found.abs().max()


def test_proxyclip_with_a_vision_transformer(clip: DenseCLIP) -> None:
    """Any size, a finer grid whose patch does not divide CLIP's, windows, and low precision of both backbones."""
    method = method_class("proxyclip").build(
        clip, {"attention": "dinov2-s14", "attention_weights": "random", "beta": "0.5"}
    )
    images = clip.normalise(torch.stack([photo(100, 150, seed=1), photo(100, 150, seed=2)]))
    with torch.inference_mode():
        both = method.features(images)
        assert both.shape == (2, 7, 10, 32)  # 96 x 144 pixels by 14
        torch.testing.assert_close(method.features(images[1:])[0], both[1], rtol=1e-4, atol=1e-5)
        x = clip.tokens(images, [clip.depth - 2])
        assert isinstance(method, proxyclip.ProxyCLIP)
        guide = method.source.features(clip.denormalise(images[..., :96, :144])).permute(0, 3, 1, 2)
        expected = proxyclip.proxy_features(clip, x.after[clip.depth - 2], x.grid, guide, 0.5, 3.0)
    torch.testing.assert_close(both, expected)
    assert not any(parameter.requires_grad for parameter in method.parameters())
    model = OpenVocabModel(method, ["sky", "road"], protocol("common", crop=64, stride=48))
    logits = model.seg_logits(photo(90, 120)[None])
    assert logits.shape == (1, 2, 90, 120) and logits.isfinite().all()


def test_proxyclip_converts_both_backbones(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in tiny_state(layers=2, grid=4).items()}, path)
    method = method_class("proxyclip").build(
        load_clip(str(path)), {"attention": "dinov2-s14", "attention_weights": "random"}
    )
    assert isinstance(method, proxyclip.ProxyCLIP) and isinstance(method.source, ViTSource)
    image = method.clip.normalise(photo(56, 84)[None])
    with torch.inference_mode():
        exact = method.features(image)
        method.use_precision(torch.bfloat16)
        assert method.source.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert method.clip.blocks[0].attn.in_proj_weight.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = method.features(image).float()
    assert F.cosine_similarity(rough, exact, dim=-1).min() > 0.999


def test_proxyclip_record_and_offline(clip: DenseCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = method_class("proxyclip")
    own = cls.build(clip, cls.OFFLINE_OPTIONS).options()
    assert own["attention"] == "clip" and own["attention_weights_sha256"] == clip.weights_sha256
    assert (own["beta"], own["gamma"], own["attention_random"]) == (1.2, 3.0, False)
    random = cls.build(clip, {"attention": "dinov2-s14", "attention_weights": "random"})
    assert random.options()["attention_random"] is True and random.options()["attention_weights"] == "random"
    assert isinstance(random, proxyclip.ProxyCLIP) and isinstance(random.source, ViTSource)
    path = tmp_path / "dinov2.safetensors"
    save_file(random.source.model.state_dict(), path)
    filed = cls.build(clip, {"attention": "dinov2-s14", "attention_weights": str(path)}).options()
    assert filed["attention_weights"] == "dinov2.safetensors" and filed["attention_random"] is False
    assert len(filed["attention_weights_sha256"]) == 64
    assert filed["attention_weights_sha256"] != random.options()["attention_weights_sha256"]
    json.dumps(filed)

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(WeightsError) as caught:
        cls.build(clip)
    for part in (
        "'dino-b8'",
        "no network",
        "-o attention_weights=FILE",
        "attention_weights=random",
        "-o attention=clip",
    ):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match=r"Unknown attention source 'dinob8'. Did you mean: dino-b8"):
        cls.build(clip, {"attention": "dinob8"})


# Agreement with the public implementations


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def public_clip(golden: Path) -> DenseCLIP:
    return load_clip(str(golden / "clip_pub.safetensors"))


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, Tensor]:
    return {
        key: value
        for name in ("naclip", "clearclip", "proxyclip")
        for key, value in load_file(golden / f"{name}_pub.safetensors").items()
    }


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def golden_method(name: str, clip: DenseCLIP) -> Method:
    if name == "vanilla-reduced":
        return Reduced(clip)
    method, options = GOLDEN[name]
    return method_class(method).build(clip, options)


@pytest.mark.parametrize("name", [*GOLDEN, "vanilla-reduced"])
def test_public_features(public_clip: DenseCLIP, vectors: dict[str, Tensor], name: str) -> None:
    sizes = [size for size in ("224", "224x336") if f"{name}.features_{size}" in vectors]
    assert sizes
    method = golden_method(name, public_clip)
    for size in sizes:
        with torch.inference_mode():
            found = method.features(vectors[f"image_{size}"][None])[0]
        assert (
            error(found.flatten(0, 1), vectors[f"{name}.features_{size}"]) <= 1e-4
        )  # 2.3e-5 on an AMD EPYC, 7e-7 elsewhere


def test_public_proxyclip_features(public_clip: DenseCLIP, vectors: dict[str, Tensor]) -> None:
    guide = vectors["second_backbone_features"][None]
    with torch.inference_mode():
        tokens = public_clip.tokens(vectors["image_224"][None], [-2])
        x = tokens.after[public_clip.depth - 2]
        found = proxyclip.proxy_features(public_clip, x, tokens.grid, guide, 1.2, 3.0)
    assert found.shape == (1, 28, 28, 64)
    assert error(found[0].flatten(0, 1), vectors["proxyclip.features_224"]) <= 1e-5


@pytest.mark.parametrize("name", ["naclip", "sclip", "kk-reduced", "vanilla-reduced"])
def test_public_slide_predictions(golden: Path, vectors: dict[str, Tensor], name: str) -> None:
    with safe_open(golden / "naclip_pub.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
    method = golden_method(name, load_clip(str(golden / "clip_pub.safetensors")))
    model = OpenVocabModel(method, names, protocol("common", crop=224, stride=112, patch_pad="none"))
    image = method.clip.denormalise(vectors["image_336x448"][None])
    assert (
        error(model.seg_logits(image, (84, 112))[0], vectors[f"{name}.slide_logits"].float()) <= 1e-3
    )  # float16 there
    labels = model.seg_logits(image, (375, 500))[0].argmax(dim=0)
    agreement = (labels == vectors[f"{name}.slide_pred"]).double().mean()
    assert agreement >= 0.999, agreement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*GOLDEN, "vanilla-reduced", "proxyclip"])
def test_rules_in_low_precision(
    public_clip: DenseCLIP, vectors: dict[str, Tensor], name: str, dtype: torch.dtype
) -> None:
    """The last block alone in low precision: the tower before it amplifies rounding, which is not the rule's doing."""
    size = "224x336" if f"{name}.features_224x336" in vectors else "224"
    with torch.inference_mode():
        tokens = public_clip.tokens(vectors[f"image_{size}"][None], [-2])
    if name == "proxyclip":
        guide = vectors["second_backbone_features"][None]
        x = tokens.after[public_clip.depth - 2]
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
            found = proxyclip.proxy_features(public_clip, x, tokens.grid, guide, 1.2, 3.0)
    else:
        patch = pytest.MonkeyPatch()
        patch.setattr(DenseCLIP, "tokens", lambda self, images, after: tokens)
        try:
            with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
                found = golden_method(name, public_clip).features(vectors[f"image_{size}"][None])
        finally:
            patch.undo()
    labels, expected = (
        (F.normalize(features.float(), dim=-1) @ vectors["text_features"].T).argmax(dim=-1)
        for features in (found[0].flatten(0, 1), vectors[f"{name}.features_{size}"])
    )
    agreement = (labels == expected).double().mean()
    assert agreement >= 0.98, agreement
