"""The parts of cost aggregation and the model of views, on small random networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from tiny_clip import photo, tiny_state
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.models.patch_model import OpenVocabModel
from ovbench.models.view_averaging import ImageViews, ViewModel
from ovbench.networks.clip_weights import OPENAI_MEAN, OPENAI_STD, from_openai_format
from ovbench.networks.cost_aggregation.aggregator import Aggregator, AggregatorConfig, cosine_cost, most_similar
from ovbench.networks.cost_aggregation.class_attention import ClassTransformer
from ovbench.networks.cost_aggregation.guidance import MAPS
from ovbench.networks.cost_aggregation.losses import binary_cross_entropy
from ovbench.networks.cost_aggregation.swin import SwinPair, shift_mask, unwindowed, windowed
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.registry import method_class
from ovbench.spec import ADDED_LATER, Protocol, RunSpec, protocol
from ovbench.words.embeddings import prompts

SIZES = AggregatorConfig(
    text_dim=16,
    image_dim=16,
    text_proj=8,
    image_proj=8,
    decoder_dims=(16, 16),
    decoder_guidance=(12, 10),
    decoder_proj=(4, 4),
    hidden=16,
    layers=2,
    heads=2,
    window=4,
    pad_len=12,
    keep=12,
)
WORDS = ["sky", "road", "car", "person"]
OPTIONS = {"hidden": 16, "layers": 1, "heads": 2, "window": 4, "grid": 8, "pad_len": 6}
SMALL = {"square": 160, "crop": 96, "stride": 64}  # 2 x 2 windows


def randomised(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.requires_grad_(False)


def inputs(batch: int = 2, classes: int = 5, prompts_each: int = 1) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = made(1, 16, 8, 8)
    image = torch.cat([image, -image])[:batch]  # what is similar to one is not to the other
    return image, made(1, classes, prompts_each, 16), image, [made(batch, 12, 16, 16), made(batch, 10, 32, 32)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_windows_come_back() -> None:
    x = torch.randn(2, 3, 8, 12, 5)
    parts = windowed(x, 4)
    assert parts.shape == (2, 3, 6, 16, 5)
    assert torch.equal(parts[:, :, 1].view(2, 3, 4, 4, 5), x[:, :, :4, 4:8])
    assert torch.equal(unwindowed(parts, 4, 8, 12), x)


def test_shift_mask_separates_what_the_shift_brought_together() -> None:
    mask = shift_mask(8, 8, 4, 2)
    place = torch.arange(64).view(8, 8).roll((-2, -2), dims=(0, 1))
    rows, columns = place // 8, place % 8
    for window, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        r = rows[top : top + 4, left : left + 4].flatten()
        c = columns[top : top + 4, left : left + 4].flatten()
        # neighbours on the image are at most 3 apart; what came around the border is further away
        together = ((r[:, None] - r).abs() < 4) & ((c[:, None] - c).abs() < 4)
        assert torch.equal(mask[window] == 0, together)
        assert set(mask[window].unique().tolist()) <= {0.0, -100.0}


def test_one_window_that_covers_the_grid_is_not_shifted() -> None:
    pair = randomised(SwinPair(16, 8, 2, 12))
    x, guidance = torch.randn(1, 2, 8, 8, 16), torch.randn(1, 8, 8, 8)
    order = torch.randperm(64)

    def shuffled(t: Tensor) -> Tensor:
        return t.flatten(-3, -2)[..., order, :].view_as(t)

    close(pair(shuffled(x), shuffled(guidance)), shuffled(pair(x, guidance)))
    with pytest.raises(UsageError, match="A grid of 10 x 8 does not divide into windows of 4"):
        SwinPair(16, 8, 2, 4)(torch.zeros(1, 1, 10, 8, 16), torch.zeros(1, 10, 8, 8))


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("pad_len", [0, 12])
@pytest.mark.parametrize("prompts_each", [1, 3])
def test_ways_of_computing_agree(pooling: int, pad_len: int, prompts_each: int) -> None:
    """Sharing what classes have in common, and padding in closed form, against the public code's steps."""
    aggregator = randomised(Aggregator(replace(SIZES, pad_len=pad_len, keep=0, prompts=prompts_each)))
    aggregator.set_pooling(pooling)
    image, text, guidance, finer = inputs(prompts_each=prompts_each)
    with torch.inference_mode():
        fast = aggregator(image, text, guidance, finer).logits
        aggregator.as_published()
        plain = aggregator(image, text, guidance, finer).logits
    assert fast.shape == (2, 5, 32, 32)
    close(fast, plain)


def test_padding_moves_the_result() -> None:
    block = randomised(ClassTransformer(16, 8, 2, 12))
    x, text = torch.randn(1, 3, 4, 4, 16), torch.randn(1, 3, 8)
    padded = block(x, text)
    block.pad_len = 3
    assert (block(x, text) - padded).abs().max() > 1e-3


def test_two_images_are_twice_one_and_classes_may_be_permuted() -> None:
    aggregator = randomised(Aggregator(replace(SIZES, keep=3)))
    image, text, guidance, finer = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.inference_mode():
        both = aggregator(image, text, guidance, finer)
        for row in range(2):
            one = slice(row, row + 1)
            alone = aggregator(image[one], text, guidance[one], [part[one] for part in finer])
            close(alone.dense(5)[0], both.dense(5)[row])
        moved = aggregator(image, text[:, order], guidance, finer).dense(5)
        close(moved, both.dense(5)[:, order])
        assert both.kept is not None and not torch.equal(both.kept[0], both.kept[1])


def test_portions_of_classes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = randomised(Aggregator(SIZES))
    parts = inputs()
    with torch.inference_mode():
        whole = aggregator(*parts).logits
        monkeypatch.setitem(MAPS, "cpu", 4)
        close(aggregator(*parts).logits, whole)


def test_the_filter_keeps_the_most_similar_and_nothing_changes_below_its_number() -> None:
    image, text, guidance, finer = inputs(classes=7)
    cost = cosine_cost(image, text)
    kept = most_similar(cost, 4)
    assert kept is not None and kept.shape == (2, 4)
    best = cost.amax(dim=(1, 3, 4))
    for row in range(2):
        dropped = [index for index in range(7) if index not in kept[row].tolist()]
        assert best[row, kept[row]].min() > best[row, dropped].max()
        assert kept[row].tolist() == sorted(kept[row].tolist())
    assert most_similar(cost, 7) is None and most_similar(cost, 0) is None
    aggregator = randomised(Aggregator(replace(SIZES, pad_len=7, keep=7)))
    with torch.inference_mode():
        full = aggregator(image, text, guidance, finer)
        aggregator.keep = 0
        assert full.kept is None and torch.equal(full.logits, aggregator(image, text, guidance, finer).logits)
        # of more classes than are kept, the others are as if they had not been asked for
        aggregator.keep = 4
        some = aggregator(image, text, guidance, finer)
        aggregator.keep = 0
        alone = aggregator(image[:1], text[:, kept[0]], guidance[:1], [part[:1] for part in finer])
        close(some.logits[:1], alone.logits)
        assert (some.dense(7)[0, [index for index in range(7) if index not in kept[0].tolist()]] == -100).all()


def test_cost_of_several_prompts() -> None:
    image, text, _, _ = inputs(prompts_each=3)
    cost = cosine_cost(image, text)
    assert cost.shape == (2, 3, 5, 8, 8)
    expected = F.cosine_similarity(image[1, :, 2, 5], text[0, 4, 1], dim=0)
    assert abs(float(cost[1, 1, 4, 2, 5] - expected)) < 1e-6


def test_loss_is_the_mean_of_binary_cross_entropies() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True) * 5
    labels = torch.randint(0, 3, (2, 8, 8))
    labels[:, :3] = 255
    resized = F.interpolate(logits, (8, 8), mode="bilinear")
    target = F.one_hot(labels.where(labels != 255, 0), 3).permute(0, 3, 1, 2) * (labels != 255)[:, None]
    every = F.binary_cross_entropy_with_logits(resized, target.float(), reduction="none")
    close(binary_cross_entropy(logits, labels), every.mean())
    close(binary_cross_entropy(logits, labels, ignored_as_negative=False), every[:, :, 3:].mean())
    assert binary_cross_entropy(logits, torch.full_like(labels, 255), ignored_as_negative=False) == 0


# The method


@pytest.fixture(scope="module")
def clip_state() -> dict[str, Tensor]:
    return tiny_state(layers=6)


def method_of(state: dict[str, Tensor], **options: Any) -> Any:
    clip = from_openai_format({key: value.clone() for key, value in state.items()}, "tiny", "ab" * 32)
    clip.pos_interp = "size"
    cls = method_class("cat-seg")
    method = cls(clip, cls.configure({**OPTIONS, **options}))
    for part in (method.aggregator, method.upsample1, method.upsample2):
        randomised(part)
    return method


def model_of(state: dict[str, Tensor], classes: Any = WORDS, **fields: Any) -> ViewModel:
    window_batch, options = fields.pop("window_batch", None), fields.pop("options", {})
    chosen = protocol("cat-seg", **{**SMALL, **fields})
    return ViewModel(method_of(state, **options), classes, chosen, window_batch=window_batch)


def plain_probabilities(method: Any, model: ViewModel, image: Tensor) -> Tensor:
    """The published protocol in its own words, one view after the other."""
    raw = image[None].float()
    square = F.interpolate(raw, (160, 160), mode="bilinear")
    total, count = torch.zeros(1, len(model.words), 160, 160), torch.zeros(160, 160)

    def view(pixels: Tensor) -> Tensor:
        logits = method.patch_logits(method.clip.normalise(pixels), model.text)
        return F.interpolate(logits, (96, 96), mode="bilinear").sigmoid()

    for top in (0, 64):
        for left in (0, 64):
            total[..., top : top + 96, left : left + 96] += view(square[..., top : top + 96, left : left + 96])
            count[top : top + 96, left : left + 96] += 1
    whole = F.interpolate(view(F.interpolate(raw, (96, 96), mode="bilinear")), (160, 160), mode="bilinear")
    return (total / count + whole) / 2


@pytest.mark.parametrize("pad_len", [6, 2])
def test_views_are_averaged_as_published(clip_state: dict[str, Tensor], pad_len: int) -> None:
    model = model_of(clip_state, options={"pad_len": pad_len})
    images, sizes = [photo(90, 120, seed=1), photo(120, 90, seed=2)], [(45, 60), (77, 50)]
    found, labels = model.patch_logits(images), model.predict_labels(images, sizes)
    assert model.views((90, 120)) == [(96, 96)] * 5
    for image, views, size, label in zip(images, found, sizes, labels, strict=True):
        with torch.inference_mode():
            expected = F.interpolate(plain_probabilities(model.method, model, image), size, mode="bilinear")[0]
        close(views.at(size), expected)
        assert label.shape == size and label.dtype == torch.int64
        best = expected.topk(2, dim=0).values
        decided = best[0] - best[1] > 1e-6  # rounding decides ties, and differs between releases of torch
        assert torch.equal(label[decided], expected.argmax(dim=0)[decided]) and decided.double().mean() > 0.9
        assert torch.equal(label, views.at(size).argmax(dim=0))
    close(model.seg_logits(images[0][None])[0], found[0].at((90, 120)))


def test_views_of_other_protocols(clip_state: dict[str, Tensor]) -> None:
    image = photo(90, 120, seed=1)
    without = model_of(clip_state, global_view=False)
    assert len(without.patch_logits([image])[0].logits) == 4
    as_it_is = model_of(clip_state, square=0, stride=48)
    assert as_it_is.views((90, 120)) == [(90, 96)] * 2 + [(96, 96)]  # two sizes in one image
    assert as_it_is.predict_labels([image], [(30, 40)])[0].shape == (30, 40)
    whole = model_of(clip_state, mode="whole")
    found = whole.patch_logits([image])[0]
    assert found.logits.shape == (1, 4, 32, 32) and whole.views((90, 120)) == [(96, 96)]
    # padded to 96 x 128 with the mean colour, which stays in the map
    mean: Any = whole.clip.mean
    padded = mean[0].expand(3, 96, 128).clone()
    padded[:, :90, :120] = image
    close(found.logits, whole.patch_logits([padded])[0].logits)


def test_batches_and_memory(clip_state: dict[str, Tensor]) -> None:
    images = [photo(90, 120, seed=seed) for seed in (1, 2, 3)]
    fixed = model_of(clip_state, window_batch=4)
    together = fixed.patch_logits(images)
    for image, views in zip(images, together, strict=True):
        assert torch.equal(fixed.patch_logits([image])[0].logits, views.logits)  # to the bit: the tail is padded
    free = model_of(clip_state)
    network, batches = free.network, []

    def scarce(batch: Tensor, text: Tensor) -> Any:
        batches.append(len(batch))
        if len(batch) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return network(batch, text)

    free.network = scarce
    for views, expected in zip(free.patch_logits(images), together, strict=True):
        close(views.logits, expected.logits)
    assert batches == [15, 7, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_correlation_is_float32_under_autocast(dtype: torch.dtype) -> None:
    image, text = torch.randn(2, 32, 5, 7), torch.randn(1, 9, 1, 32)
    with torch.autocast("cpu", dtype):
        found = cosine_cost(image.to(dtype), text)
    assert found.dtype == torch.float32
    assert torch.equal(found, cosine_cost(image.to(dtype).float(), text))


def test_lower_precision_is_close(clip_state: dict[str, Tensor]) -> None:
    image = photo(90, 120, seed=1)
    exact = model_of(clip_state).patch_logits([image])[0]
    rough = ViewModel(method_of(clip_state), WORDS, protocol("cat-seg", **SMALL), dtype="bfloat16").patch_logits(
        [image]
    )[0]
    assert rough.logits.dtype == torch.float32
    assert (rough.at((45, 60)) - exact.at((45, 60))).abs().max() < 0.02


def test_portions_of_classes_keep_the_first_of_equals() -> None:
    logits = torch.randn(5, 3, 8, 8)
    kept = torch.tensor([[0, 2, 40], [1, 2, 40], [2, 40, 41], [0, 1, 2], [40, 41, 42]])
    views = ImageViews(logits, kept, 50, (640, 640), tuple((0, 0, 320, 320) for _ in range(0)), False)
    assert views.candidates().tolist() == [0, 1, 2, 40, 41, 42]
    every = views.of(torch.arange(50))
    for row in range(5):
        assert torch.equal(every[row, kept[row]], logits[row])
        assert (every[row].amax(dim=(1, 2)) == -100).sum() == 47
    same = ImageViews(torch.ones(1, 300, 4, 4), None, 300, (2000, 2000), (), False)
    assert len(same.portions(same.candidates())) > 3
    assert (same.labels((6, 7)) == 0).all()


def test_new_words_are_never_answered_with_old_texts(clip_state: dict[str, Tensor]) -> None:
    model = model_of(clip_state)
    assert model.query_words == ["sky", "road", "car", "person"] and model.text.shape == (4, 1, 32)
    before = model.text.clone()
    model.set_classes(["dog", "cat"])
    assert model.num_classes == 2 and model.text.shape == (2, 1, 32)
    model.set_classes(WORDS)
    assert torch.equal(model.text, before)
    method = model.method
    method.prepare_training("attention")
    with torch.no_grad():
        method.clip.clip.transformer.resblocks[0].attn.v_proj_weight.mul_(1.5)
    model.set_classes(WORDS)
    assert (model.text - before).abs().max() > 1e-4


def test_several_prompts_are_kept_apart(clip_state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("a {}\na photo of a {}\n")
    method = method_of(clip_state, prompts=2)
    text = method.text_embeddings(["sky", "car"], prompts(str(tmp_path / "two.txt")))
    assert text.shape == (2, 2, 32)
    close(text[1, 0], method.text_embeddings(["sky", "car"], prompts(str(tmp_path / "two.txt")))[1, 0])
    single = method_of(clip_state).text_embeddings(["a car"], prompts("plain"))
    close(text[1, 0], single[0, 0])
    logits = method.patch_logits(torch.randn(1, 3, 128, 128), text)
    assert logits.shape == (1, 2, 32, 32)
    with pytest.raises(UsageError, match="2 prompts per class"):
        method.text_embeddings(["sky"], prompts("cat-seg"))


@pytest.mark.parametrize("policy", ["attention", "attention+position", "frozen-clip", "full"])
def test_a_step_moves_what_the_policy_says(clip_state: dict[str, Tensor], policy: str) -> None:
    method = method_of(clip_state)
    groups = method.prepare_training(policy)
    method.set_training_classes(["sky", "road", "car"], prompts("cat-seg"))
    named = dict(method.named_parameters())
    before = {name: value.detach().clone() for name, value in named.items()}
    listed = [name for group in groups for name in group["params"]]
    assert len(listed) == len(set(listed)) and {name for name, value in named.items() if value.requires_grad} == set(
        listed
    )
    for group in groups:
        assert group["lr_mult"] == (0.01 if group["name"].startswith("clip") else 1.0)
        norms = all(".norm" in name or "guidance_norm" in name or ".ln_" in name or "double_conv" in name or
                    "token_embedding" in name for name in group["params"])  # fmt: skip
        assert (group["weight_decay_mult"] == 0.0) == norms
    optimizer = torch.optim.AdamW(
        [{"params": [named[name] for name in group["params"]], "lr": 0.1} for group in groups], weight_decay=0.5
    )
    images = torch.stack([photo(128, 128, seed=1), photo(128, 128, seed=2)])
    labels = torch.randint(0, 3, (2, 128, 128))
    losses = method.losses(images, labels)
    assert list(losses) == ["loss_bce"]
    losses["loss_bce"].backward()
    optimizer.step()
    moved = {name for name, value in named.items() if not torch.equal(value, before[name])}
    assert moved <= set(listed)
    text, visual = "clip.clip.transformer.resblocks.0.attn", "clip.clip.visual.transformer.resblocks.0.attn"
    if policy.startswith("attention"):
        for place in (text, visual):
            assert {f"{place}.q_proj_weight", f"{place}.v_proj_weight"} <= moved
            assert f"{place}.k_proj_weight" in named and f"{place}.k_proj_weight" not in moved  # nor by weight decay
            assert f"{place}.in_proj_bias" not in moved
    position = {"clip.clip.positional_embedding", "clip.clip.visual.positional_embedding"}
    assert (position <= moved) == (policy in ("attention+position", "full"))
    assert any(name.startswith("clip.") for name in moved) == (policy != "frozen-clip")
    assert "aggregator.conv1.weight" in moved and "upsample2.weight" in moved
    second = method.losses(images, labels)["loss_bce"]  # with positions that were not kept from before
    assert second.isfinite() and second != losses["loss_bce"]


def test_splitting_changes_no_output_and_can_be_undone(clip_state: dict[str, Tensor]) -> None:
    method = method_of(clip_state)
    images, words = torch.randn(1, 3, 128, 128), ["sky", "car"]
    names = set(method.state_dict())
    with torch.inference_mode():
        text = method.text_embeddings(words, prompts("cat-seg"))
        expected = method.patch_logits(images, text)
        method.clip.split_projections()
        method.changed = True
        close(method.text_embeddings(words, prompts("cat-seg")), text)
        close(method.patch_logits(images, text), expected)
        method.clip.join_projections()
        assert torch.equal(method.patch_logits(images, text), expected)
    assert set(method.state_dict()) == names and not any(value.requires_grad for value in method.parameters())


def test_weights_go_out_and_come_back(clip_state: dict[str, Tensor], tmp_path: Path) -> None:
    method = method_of(clip_state)
    method.prepare_training("attention")  # split, as a training leaves it
    method.eval()
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in method.public_state().items()}, path)
    cls = method_class("cat-seg")
    again = cls.load(str(path), None, cls.configure({"heads": 2, "window": 4, "grid": 8, "pad_len": 6}))
    assert again.aggregator.config == method.aggregator.config
    assert again.options()["hidden"] == 16 and again.clip.weights_sha256 != method.clip.weights_sha256
    images, text = torch.randn(1, 3, 128, 128), F.normalize(torch.randn(3, 32), dim=-1)
    with torch.inference_mode():
        close(again.patch_logits(images, text), method.patch_logits(images, text))
    with pytest.raises(UsageError, match="leave --arch away"):
        cls.load(str(path), "ViT-B-16", None)
    torch.save(
        {"model": method.public_state(), "iteration": 80_000}, tmp_path / "model_final.pth"
    )  # as detectron2 does
    pickled = cls.load(str(tmp_path / "model_final.pth"), None, again.config)
    with torch.inference_mode():
        assert torch.equal(pickled.patch_logits(images, text), again.patch_logits(images, text))


def test_clip_alone_is_no_cat_seg(clip_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in clip_state.items()}, path)
    cls = method_class("cat-seg")
    with pytest.raises(WeightsError, match="holds CLIP alone"):
        cls.load(str(path), None, cls.configure(OPTIONS))
    method = cls.load(str(path), None, cls.configure(OPTIONS), training=True)
    assert float(method.clip.mean.flatten()[0]) == pytest.approx(122.7709383)


def test_the_seed_makes_the_random_weights() -> None:
    cls = method_class("cat-seg")
    config = cls.configure({**OPTIONS, "grid": 4})
    one, same, other = (cls.load("random", "ViT-S-32-alt", config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.aggregator.conv1.weight, same.aggregator.conv1.weight)
    assert not torch.equal(one.aggregator.conv1.weight, other.aggregator.conv1.weight)


def test_thresholds_and_other_models_are_refused(clip_state: dict[str, Tensor]) -> None:
    for fields in ({"prob_thd": 0.1}, {"area_thd": 0.1}, {"pamr": 2}, {"upsample": "jbu"}):
        with pytest.raises(UsageError, match="averaged as probabilities"):
            model_of(clip_state, **fields)
    clip = from_openai_format(dict(clip_state), "tiny", "ab" * 32)
    with pytest.raises(UsageError, match="averages probabilities of views"):
        OpenVocabModel(method_class("clip").build(clip), WORDS, protocol("cat-seg"))
    assert method_class("cat-seg").model_class() is ViewModel and method_class("clip").model_class() is OpenVocabModel


def test_new_protocol_fields_leave_old_hashes_as_they_were() -> None:
    spec = RunSpec(method="clip", dataset="voc21", weights="openai")
    content = json.loads(spec.model_dump_json())
    for name in ADDED_LATER:
        assert content["protocol"].pop(name) == json.loads(json.dumps(Protocol.model_fields[name].get_default()))
    assert content.pop("arithmetic") == 1
    from ovbench.hashing import sha256_of

    assert spec.spec_hash() == sha256_of(content)
    assert {"square", "global_view"} <= set(ADDED_LATER)
    fields = {"name": "common", "square": 640}
    assert RunSpec(method="clip", dataset="voc21", weights="openai", protocol=fields).spec_hash() != spec.spec_hash()


@pytest.mark.parametrize(
    ("vision", "text", "total", "trained"),
    [
        (
            {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224},
            {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
            154.289,
            25.116,
        ),
        (
            {"layers": 24, "width": 1024, "head_width": 64, "patch_size": 14, "image_size": 336},
            {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
            433.727,
            70.270,
        ),
    ],
    ids=["B/16", "L/14"],
)
def test_parameters_are_those_of_the_public_code(
    vision: dict[str, int], text: dict[str, int], total: float, trained: float
) -> None:
    cls = method_class("cat-seg")
    with torch.device("meta"):
        model = CLIP(512 if vision["layers"] == 12 else 768, vision_cfg=vision, text_cfg=text, quick_gelu=True)
        clip = DenseCLIP(
            model,
            tokenizer=lambda texts: torch.zeros(len(texts), 77, dtype=torch.int64),
            arch="meta",
            weights="random",
            weights_sha256="",
            activation="quickgelu",
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
        )
        method = cls(clip)
        assert method.side == (384 if vision["layers"] == 12 else 336)
        assert method.guides == ((3, 7) if vision["layers"] == 12 else (7, 15))
        method.prepare_training("attention")
    sizes = [(value.numel() / 1e6, value.requires_grad) for value in method.parameters()]
    assert sum(size for size, _ in sizes) == pytest.approx(total, abs=6e-4)
    assert sum(size for size, trains in sizes if trains) == pytest.approx(trained, abs=6e-4)


def test_a_class_of_several_words_has_the_pixels_of_all(clip_state: dict[str, Tensor]) -> None:
    """As in voc20b, where one class has 39 words."""
    apart = model_of(clip_state)
    together = model_of(clip_state, [["sky"], ["road", "car", "person"]])
    image = torch.randint(0, 256, (3, 40, 56), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    single, merged = (model.predict_labels([image], [(40, 56)])[0] for model in (apart, together))
    assert together.num_classes == 2 and len(together.query_words) == 4
    assert torch.equal(merged, single.clamp(max=1)) and len(single.unique()) > 2
