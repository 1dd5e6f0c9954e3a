"""LSMSeg: what it changes in CAT-Seg, on a small random CLIP and a small random SAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_clip import photo, tiny_state
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.evaluate.verify import options_again
from ovbench.methods.cat_seg import _as_published
from ovbench.models.build import build_model
from ovbench.models.resolve import resolve
from ovbench.models.trained_file import About, save
from ovbench.models.view_averaging import ViewModel
from ovbench.networks.clip_weights import from_openai_format
from ovbench.networks.cost_aggregation.aggregator import cosine_cost, most_similar
from ovbench.networks.cost_aggregation.filtering import kept_labels, rescaled
from ovbench.networks.cost_aggregation.fusion import KINDS, Fusion
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.sam import SAMS, SamRecipe, SamSizes
from ovbench.registry import method_class, method_info
from ovbench.spec import protocol
from ovbench.tables.published import numbers, wanted
from ovbench.words.embeddings import prompts

TINY_SAM = SamSizes(hidden=24, layers=4, heads=2, globals_at=(1, 2, 3), mlp=48, patch=16, window=3, grid=8)
SMALL = {"hidden": 16, "layers": 1, "heads": 2, "window": 4, "grid": 8, "pad_len": 6}
WITH_SAM = {"visual": "sam-b", "visual_weights": "random"}
COST = "method_options.cost_from"
WORDS = ["sky", "road", "car", "person", "tree", "dog", "boat", "chair"]


@pytest.fixture(scope="module")
def clip_state() -> dict[str, Tensor]:
    return tiny_state(layers=4)


@pytest.fixture
def clip(clip_state: dict[str, Tensor]) -> DenseCLIP:
    return _as_published(from_openai_format(clip_state, "tiny", "ab" * 32))


@pytest.fixture(autouse=True)
def _tiny_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMS, "sam-b", SamRecipe(TINY_SAM, "facebook/sam-vit-base"))


def made(clip: DenseCLIP, name: str = "lsmseg", **options: Any) -> Any:
    """A method whose trained parts are random, the same for the same options."""
    if options.get("visual", "none") != "none":
        pytest.importorskip("transformers")
    elif name == "lsmseg":
        options["visual"] = "none"
    cls = method_class(name)
    method = cls(clip, cls.configure({**SMALL, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (method.aggregator, method.upsample1, method.upsample2):
            for parameter in part.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return method


def images(clip: DenseCLIP, count: int = 2) -> Tensor:
    found = torch.stack([photo(128, 128, seed=seed) for seed in range(1, count + 1)])
    found[1:] = 255 - found[1:]  # what is similar to one is not to the other
    return clip.normalise(found)


def texts(classes: int = 8, each: int = 1) -> Tensor:
    return F.normalize(torch.randn(classes, each, 32, generator=torch.Generator().manual_seed(5)), dim=-1)


# CAT-Seg is a special case


def test_without_filter_and_second_encoder_it_is_cat_seg(clip: DenseCLIP) -> None:
    x, text = images(clip), texts()
    expected = made(clip, "cat-seg", pad_len=0).patch_logits(x, text)
    assert torch.equal(made(clip, filter_k=0, pad_len=0).patch_logits(x, text), expected)


def test_at_weight_one_it_is_cat_seg_and_below_it_is_not(clip: DenseCLIP) -> None:
    x, text = images(clip), texts()
    method = made(clip, filter_k=0, pad_len=0, **WITH_SAM)
    expected = made(clip, "cat-seg", pad_len=0).patch_logits(x, text)
    assert method.fusion.weight == 0.5
    assert (method.patch_logits(x, text) - expected).abs().max() > 1e-3
    with torch.no_grad():
        method.fusion.weight.fill_(1.0)
    assert torch.equal(method.patch_logits(x, text), expected)


# Category filtering


@pytest.mark.parametrize("visual", ["none", "sam-b"])
@pytest.mark.parametrize("classes", [1, 5, 6])
def test_no_class_is_lost_up_to_k(clip: DenseCLIP, classes: int, visual: str) -> None:
    options = {**WITH_SAM, "visual": visual}
    x, text = images(clip), texts(classes)
    filtered, every = (made(clip, filter_k=k, **options).patch_logits(x, text) for k in (6, 0))
    assert torch.equal(filtered, every)
    assert torch.equal(filtered.argmax(dim=1), every.argmax(dim=1))


def test_each_image_keeps_its_own_classes(clip: DenseCLIP) -> None:
    method = made(clip, filter_k=3, **WITH_SAM)
    x = images(clip)
    first, second = F.normalize(method.encode(x)[0].mean(dim=(2, 3)), dim=-1)
    apart = F.normalize(first - second, dim=0)
    common = F.normalize(first + second, dim=0)
    text = texts() / 20 + torch.tensor([1, 1, 1, 1, -1, -1, -1, -1])[:, None, None] * apart
    text = F.normalize(text - (text @ common)[..., None] * common, dim=-1)
    found = method.class_logits(x, text)
    assert found.kept is not None and found.kept.shape == (2, 3)
    assert not torch.equal(found.kept[0], found.kept[1])
    dense = found.dense(8)
    alone = made(clip, filter_k=0, **WITH_SAM)
    for row in range(2):
        kept = found.kept[row]
        single = method.class_logits(x[row : row + 1], text)
        assert torch.equal(single.kept[0], kept)
        torch.testing.assert_close(single.logits[0], found.logits[row], rtol=1e-4, atol=1e-5)
        # the same as a vocabulary of these classes alone
        torch.testing.assert_close(
            alone.patch_logits(x[row : row + 1], text[kept])[0], found.logits[row], rtol=1e-4, atol=1e-5
        )
        dropped = [index for index in range(8) if index not in kept.tolist()]
        assert (dense[row, dropped] < found.logits[row].min()).all()
        assert set(dense[row].argmax(dim=0).unique().tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("each", [1, 3])
def test_the_score_is_the_maximum_over_positions_and_prompts(clip: DenseCLIP, each: int) -> None:
    dense, _ = made(clip).encode(images(clip))
    text = texts(8, each)
    kept = most_similar(cosine_cost(dense, text[None]), 3)
    assert kept is not None
    for row in range(2):
        patches = F.normalize(dense[row].flatten(1), dim=0)
        scores = [max(float((patches.T @ text[n, p]).max()) for p in range(each)) for n in range(8)]
        assert kept[row].tolist() == sorted(sorted(range(8), key=scores.__getitem__)[-3:])


def test_recomputing_the_costs_of_the_kept_classes_changes_nothing(clip: DenseCLIP) -> None:
    dense, _ = made(clip).encode(images(clip, 1))
    text = texts()
    cost = cosine_cost(dense, text[None])
    kept = most_similar(cost, 3)
    assert kept is not None
    again = cosine_cost(dense, F.normalize(text[kept[0]], dim=-1)[None])
    torch.testing.assert_close(again, cost[:, :, kept[0]], rtol=1e-6, atol=1e-6)


def test_costs_may_be_spread_over_0_to_1(clip: DenseCLIP) -> None:
    cost = torch.randn(2, 1, 3, 4, 4)
    spread = rescaled(cost)
    for row in range(2):
        assert spread[row].min() == 0 and spread[row].max() == pytest.approx(1)
        torch.testing.assert_close(spread[row], (cost[row] - cost[row].min()) / (cost[row].max() - cost[row].min()))
    x, text = images(clip), texts()
    plain, other = (made(clip, filter_k=3, renormalise=how).class_logits(x, text) for how in ("text", "cost"))
    assert torch.equal(plain.kept, other.kept) and not torch.allclose(plain.logits, other.logits)
    few = texts(3)  # no filter, so nothing is spread
    assert torch.equal(*(made(clip, filter_k=3, renormalise=how).patch_logits(x, few) for how in ("text", "cost")))


# Visual fusion


def test_weighted_sum_by_hand() -> None:
    fusion = Fusion("add", 5, (4, 8))
    mine, other = (torch.randn(2, 4, 6, 6), torch.randn(2, 8, 6, 6)), (torch.randn(2, 5, 6, 6), torch.randn(2, 5, 3, 4))
    with torch.no_grad():
        fusion.weight.fill_(0.3)
        first, second = fusion(mine, other)
        weight, bias = fusion.project[0].weight, fusion.project[0].bias
        by_hand = torch.einsum("dc,bchw->bdhw", weight, other[0]) + bias[:, None, None]
        torch.testing.assert_close(first, 0.3 * mine[0] + 0.7 * by_hand)
        # bilinear resizing and a linear map may be swapped
        resized = F.interpolate(other[1], size=(6, 6), mode="bilinear")
        by_hand = F.conv2d(resized, fusion.project[1].weight[:, :, None, None], fusion.project[1].bias)
        torch.testing.assert_close(second, 0.3 * mine[1] + 0.7 * by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fusion_keeps_shapes_and_images_apart(kind: str) -> None:
    torch.manual_seed(0)
    fusion = Fusion(kind, 5, (4, 8))
    mine, other = (torch.randn(2, 4, 6, 4), torch.randn(2, 8, 6, 4)), (torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3))
    found = fusion(mine, other)
    for row in range(2):
        one = fusion([part[row : row + 1] for part in mine], [part[row : row + 1] for part in other])
        for level in range(2):
            assert found[level].shape == mine[level].shape
            torch.testing.assert_close(one[level][0], found[level][row], rtol=1e-5, atol=1e-6)
    changed = fusion(mine, [part + torch.randn(part.shape) for part in other])
    assert all(not torch.allclose(a, b) for a, b in zip(found, changed, strict=True))
    sum(part.square().sum() for part in found).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 96])
def test_costs_are_of_the_fused_features_or_of_clips(clip: DenseCLIP, kind: str, size: int) -> None:
    x, text = images(clip), texts()
    options = {"fusion": kind, "visual_size": size, **WITH_SAM}
    fused, guides = made(clip, **options).encode(x)
    dense, same_guides = made(clip, cost_from="clip", **options).encode(x)
    plain, others = made(clip).encode(x)
    assert torch.equal(dense, plain) and torch.equal(fused, guides[0])
    assert (cosine_cost(fused, text[None]) - cosine_cost(plain, text[None])).abs().max() > 1e-2
    for guide, same, other in zip(guides, same_guides, others, strict=True):
        assert torch.equal(guide, same)
        assert guide.shape == other.shape and not torch.allclose(guide, other, atol=1e-4)


def test_eqs_5_2_to_5_6_by_hand(clip: DenseCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """M = cos(E, T) chooses the classes, and is what is aggregated of them."""
    x, text = images(clip), texts()
    method = made(clip, filter_k=3, **WITH_SAM)
    seen: list[Tensor] = []
    aggregate = method.aggregator.aggregate
    monkeypatch.setattr(
        method.aggregator, "aggregate", lambda cost, *rest: (seen.append(cost), aggregate(cost, *rest))[1]
    )
    found = method.class_logits(x, text)
    e = method.encode(x)[1][0].flatten(2)
    m = torch.einsum("bdn,td->btn", e / e.norm(dim=1, keepdim=True), text[:, 0])
    for row in range(2):
        kept = m[row].amax(dim=1).topk(3).indices.sort().values
        assert torch.equal(found.kept[row], kept)
        torch.testing.assert_close(seen[0][row, 0].flatten(1), m[row, kept], rtol=1e-4, atol=1e-5)


def test_without_a_second_encoder_nothing_moves(clip: DenseCLIP) -> None:
    x, text = images(clip), texts()
    both = [made(clip, filter_k=3, cost_from=name).patch_logits(x, text) for name in ("fused", "clip")]
    assert torch.equal(*both)


def test_the_second_encoder_sees_the_same_pixels(clip: DenseCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(clip, **WITH_SAM)
    seen: list[Tensor] = []
    maps = method.visual.maps
    monkeypatch.setattr(method.visual, "maps", lambda images: (seen.append(images), maps(images))[1])
    raw = photo(128, 128)[None]
    method.patch_logits(method.clip.normalise(raw), texts())
    torch.testing.assert_close(seen[0], raw.float(), rtol=0, atol=1e-3)


def test_unknown_names_are_refused(clip: DenseCLIP) -> None:
    for option, message in (
        ("fusion", "sum"),
        ("renormalise", "class"),
        ("visual", "sam-h"),
        ("cost_from", "sam"),
    ):
        with pytest.raises(UsageError, match=f"'{message}'"):
            made(clip, **{option: message})


# Training and weights


def test_labels_of_kept_classes() -> None:
    labels = torch.tensor([[[0, 4, 255]], [[7, 3, 0]]])
    kept = torch.tensor([[1, 4, 6], [0, 3, 5]])
    assert kept_labels(labels, kept).tolist() == [[[255, 1, 255]], [[255, 1, 0]]]


def test_loss_is_over_the_kept_classes(clip: DenseCLIP) -> None:
    raw, labels = torch.stack([photo(128, 128, seed=1), photo(128, 128, seed=2)]), torch.randint(0, 8, (2, 128, 128))
    labels[:, :20] = 255
    method = made(clip, filter_k=3, pooling=1)
    method.set_training_classes(WORDS, prompts("cat-seg"))
    method.prepare_training("frozen-clip")
    found = method.class_logits(method.clip.normalise(raw), method.text_embeddings(WORDS, prompts("cat-seg")))
    logits = F.interpolate(found.logits, (128, 128), mode="bilinear")
    target = torch.stack([(labels[row] == found.kept[row][:, None, None]).float() for row in range(2)])
    expected = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(method.losses(raw, labels)["loss_bce"], expected)
    whole = made(clip, filter_k=3, filter_training=False, pooling=1)
    whole.set_training_classes(WORDS, prompts("cat-seg"))
    whole.prepare_training("frozen-clip")
    assert whole.training_logits(raw)[0].kept is None and whole.eval().training_logits(raw)[0].kept is not None


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_second_encoder_is_trained(clip: DenseCLIP, kind: str) -> None:
    method = made(clip, filter_k=4, fusion=kind, **WITH_SAM)
    method.set_training_classes(WORDS, prompts("cat-seg"))
    groups = method.prepare_training("attention")
    names = {name for group in groups for name in group["params"]}
    assert not any(name.startswith("visual.") for name in names)
    assert {name for name, _ in method.named_parameters() if name.startswith("fusion.")} <= names
    assert {group["lr_mult"] for group in groups if group["name"].startswith("fusion")} == {1.0}
    assert method.training and not method.visual.training
    raw, labels = torch.stack([photo(128, 128, seed=1)] * 2), torch.randint(0, 8, (2, 128, 128))
    method.losses(raw, labels)["loss_bce"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("fusion."):
            assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) or name.endswith(".k.bias"), name
        if name.startswith("visual."):
            assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize(
    ("policy", "tuned"), [("attention", "qv"), ("attention-qk", "qk"), ("attention-kv", "kv"), ("frozen-clip", "")]
)
def test_rows_of_table_5_10(clip: DenseCLIP, policy: str, tuned: str) -> None:
    groups = made(clip).parameter_groups(policy)
    of_clip = {name.rpartition(".")[2] for group in groups for name in group["params"] if name.startswith("clip.")}
    assert of_clip == {f"{letter}_proj_weight" for letter in tuned}


def test_recipes_are_for_benchmarks_of_the_suite() -> None:
    recipes = method_class("lsmseg").RECIPES
    assert set(recipes) == {"coco_stuff", "context59", "ade20k"} and recipes["coco_stuff"]["lr"] == 2e-4
    assert method_info("lsmseg").protocol == "lsmseg"


def test_weights_come_back_without_the_second_encoder(clip: DenseCLIP, tmp_path: Path) -> None:
    options = {**SMALL, "filter_k": 3, "fusion": "concat", **WITH_SAM}
    method = made(clip, **options)
    state = method.public_state()
    assert any(key.startswith("fusion.") for key in state)
    assert not any("visual." in key and not key.startswith("sem_seg_head.predictor.clip_model") for key in state)
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    cls = method_class("lsmseg")
    again = cls.load(str(path), None, cls.configure(options))
    x, text = images(clip), texts()
    torch.testing.assert_close(again.patch_logits(x, text), method.patch_logits(x, text), rtol=1e-5, atol=1e-5)
    with pytest.raises(WeightsError, match=r"unknown: fusion\."):
        cls.load(str(path), None, cls.configure({**options, "visual": "none"}))
    with pytest.raises(WeightsError, match=r"missing: fusion\.attend"):
        cls.load(str(path), None, cls.configure({**options, "fusion": "attention"}))


@pytest.mark.parametrize("recorded", [None, "clip", "fused"])
def test_a_trained_file_from_before_means_clips_costs(clip: DenseCLIP, tmp_path: Path, recorded: str | None) -> None:
    """Trainings of 0.1.0 knew no ``cost_from``: what they learned is on CLIP's costs, however the file is loaded."""
    options = {**SMALL, "filter_k": 3, **WITH_SAM}
    method = made(clip, **options)
    told = {**method.options(), "cost_from": recorded}
    if recorded is None:
        del told["cost_from"]
    path = tmp_path / "model.safetensors"
    about = About(
        method="lsmseg", method_options=told, arch=clip.arch, dataset="coco_stuff", class_names=WORDS, training="x",
        spec_hash="x", iterations=1, planned=1,
    )  # fmt: skip
    save(path, method.public_state(), about)
    x, text = images(clip), texts()
    meant = recorded or "clip"
    model = build_model("lsmseg", classes=WORDS, weights=str(path), method_options={"visual_weights": "random"})
    assert model.method.config.cost_from == meant and model.method.config.filter_k == 3
    expected = made(clip, **{**options, "cost_from": meant}).patch_logits(x, text)
    torch.testing.assert_close(model.method.patch_logits(x, text), expected, rtol=1e-5, atol=1e-5)
    given = resolve("lsmseg", str(path), {"cost_from": "fused"})
    assert given.config.cost_from == "fused"  # what the user says stands


def test_a_record_from_before_is_repeated_with_clips_costs(clip: DenseCLIP) -> None:
    cls = method_class("lsmseg")
    recorded = made(clip, **WITH_SAM).options()
    assert recorded["cost_from"] == "fused" and options_again(recorded, cls, {})["cost_from"] == "fused"
    del recorded["cost_from"]
    assert options_again(recorded, cls, {})["cost_from"] == "clip"
    assert options_again(recorded, cls, {"cost_from": "fused"})["cost_from"] == "fused"


def test_printed_rows_with_a_second_encoder_want_fused_costs() -> None:
    rows = [entry for entry in numbers() if entry.source == "thesis-lsmseg" and entry.metric == "mIoU"]
    fused = {(entry.table, entry.row) for entry in rows if wanted(entry).require.get(COST) == "fused"}
    assert {table for table, _ in fused} == {"5.1", "5.5", "5.6", "5.7", "5.9", "5.10", "5.11"}
    assert ("5.6", "LSMSeg(w/ SAM-L)") in fused and ("5.6", "LSMSeg(w/o SAM)") not in fused
    ours = {(entry.table, entry.row) for entry in rows if wanted(entry).method == "lsmseg"}
    assert {row for row in ours - fused if row[0] not in ("5.2", "5.3", "5.4", "5.8")} == {("5.6", "LSMSeg(w/o SAM)")}


def test_weights_of_cat_seg_load(clip: DenseCLIP, tmp_path: Path) -> None:
    base = made(clip, "cat-seg", pad_len=0)
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in base.public_state().items()}, path)
    cls = method_class("lsmseg")
    options = {**SMALL, "pad_len": 0, "filter_k": 3, "visual": "none"}
    found = cls.load(str(path), None, cls.configure(options)).class_logits(images(clip), texts())
    assert found.kept is not None and found.kept.shape == (2, 3)
    with pytest.raises(WeightsError, match=r"missing: fusion\."):
        cls.load(str(path), None, cls.configure({**options, **WITH_SAM}))


# In the suite


def test_options_tell_the_second_encoder(clip: DenseCLIP) -> None:
    found = made(clip, **WITH_SAM).options()
    assert found["visual"] == "sam-b" and found["visual_random"] and len(found["visual_weights_sha256"]) == 64
    assert found["filter_k"] == 32 and found["fusion"] == "add" and found["hidden"] == 16
    assert "visual_params" not in made(clip).options()
    cls = method_class("lsmseg")
    assert cls.configure_for({}, weights="random").visual_weights == "random"
    assert cls.configure_for({}, weights="model.safetensors").visual_weights is None
    assert cls.configure_for({}, weights="builtin", demo=True).visual == "none"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_the_protocol(clip: DenseCLIP, dtype: Any) -> None:
    method = made(clip, filter_k=3, **WITH_SAM)
    chosen = protocol("cat-seg", square=160, crop=96, stride=64)
    model = ViewModel(method, WORDS, chosen, dtype=dtype)
    pictures = [photo(100, 140, seed=1), photo(120, 90, seed=2)]
    both = model.predict_labels(pictures, [(50, 70), (60, 45)])
    assert [tuple(found.shape) for found in both] == [(50, 70), (60, 45)]
    single = [
        model.predict_labels([picture], [tuple(found.shape)])[0] for picture, found in zip(pictures, both, strict=True)
    ]
    for one, other in zip(single, both, strict=True):
        assert (one == other).float().mean() > (0.999 if dtype == "float32" else 0.95)
        assert one.min() >= 0 and one.max() < len(WORDS)
