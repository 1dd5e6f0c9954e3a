"""One contract for every mask-based method, and what is special to each: FISA's and SCN's baselines, switches, policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import photo, save_tiny

from ovbench.errors import RunError, UsageError, WeightsError
from ovbench.models.mask_method import MaskMethod, Words, seen_classes
from ovbench.models.mask_model import MaskModel
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.mask_generators.generator import Proposals
from ovbench.ops.masks import NOWHERE
from ovbench.ops.panoptic import Segments, quality, segments_of_labels
from ovbench.registry import MASK_BASED, method_class, method_info, method_names
from ovbench.spec import protocol
from ovbench.train.network import choose_parameters
from ovbench.words.embeddings import Templates

CLASSES = ["sky", ["road", "street"], "car", "person"]
NAMES = method_names(MASK_BASED)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", layers=4))


@pytest.fixture(scope="module")
def clip(weights) -> DenseCLIP:
    return load_clip(weights)


def build(name: str, clip: DenseCLIP, **options: Any) -> MaskMethod:
    cls = method_class(name)
    return cls(clip, cls.configure({"generator": "grid", **options}))


def perturbed(method: MaskMethod, size: float = 0.05) -> MaskMethod:
    """The method as training might leave it: all of its own parameters moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if not name.startswith(("clip.", "generator.")):
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return method


def model_of(method: MaskMethod, classes: Any = CLASSES, **fields: Any) -> MaskModel:
    own = method_info("fisa" if hasattr(method, "mask_embeddings") else "scn").protocol
    extra = {key: fields.pop(key) for key in ("window_batch", "dtype") if key in fields}
    square = {"square": 96} if own == "fisa" and "square" not in fields else {}
    return MaskModel(method, classes, protocol(own, short_side=96, **square, **fields), **extra)


def words(count: int, dim: int, seed: int = 0, **fields: Any) -> Words:
    generator = torch.Generator().manual_seed(seed)
    text = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)
    return Words(text, torch.arange(count), count, 100.0, torch.arange(count) % 2 == 0)._replace(**fields)


def masks(count: int, size: tuple[int, int] = (24, 24), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, count, 5, 5, generator=generator) * 4
    return (
        torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") if count else coarse.new_zeros(2, 0, *size)
    )


def images(clip: DenseCLIP, size: tuple[int, int] = (96, 96)) -> torch.Tensor:
    return clip.normalise(torch.stack([photo(*size, seed=1), photo(*size, seed=2)]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_any_number_of_masks(name, count, clip):
    method = perturbed(build(name, clip))
    given = masks(count)
    if count:
        given[0, 0] = NOWHERE  # touches no patch
    seen, copy = images(clip), images(clip)
    with torch.inference_mode():
        found = method.classify(seen, given, words(7, clip.embed_dim))
    assert found.logits.shape == (2, count, 7) and found.masks.shape == (2, count, 24, 24)
    assert bool(found.logits.isfinite().all() and found.masks.isfinite().all())
    assert torch.equal(seen, copy)


@pytest.mark.parametrize("name", NAMES)
def test_two_images_are_twice_one_and_masks_do_not_see_each_other(name, clip):
    method = perturbed(build(name, clip))
    seen, given, vocabulary = images(clip), masks(6), words(7, clip.embed_dim)
    with torch.inference_mode():
        both = method.classify(seen, given, vocabulary).logits
        assert torch.equal(both, method.classify(seen, given, vocabulary).logits)
        for row in range(2):
            one = method.classify(seen[row : row + 1], given[row : row + 1], vocabulary).logits
            torch.testing.assert_close(one[0], both[row], rtol=1e-4, atol=1e-3)
        some = method.classify(seen, given[:, 2:4], vocabulary).logits
    torch.testing.assert_close(some, both[:, 2:4], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_classes_in_another_order_give_the_same(name, clip):
    method = perturbed(build(name, clip))
    vocabulary = words(9, clip.embed_dim)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    moved = vocabulary._replace(text=vocabulary.text[order], seen=vocabulary.seen[order])
    with torch.inference_mode():
        one = method.classify(images(clip), masks(5), vocabulary).logits
        other = method.classify(images(clip), masks(5), moved).logits
    torch.testing.assert_close(one[..., order], other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window_batch", [None, 2])
def test_the_model_is_batch_invariant(name, window_batch, clip):
    model = model_of(perturbed(build(name, clip)), window_batch=window_batch)
    model.set_things([2, 3])
    pictures = [photo(100, 140, seed=1), photo(140, 100, seed=2), photo(100, 140, seed=3)]
    sizes = [(50, 70), (70, 50), (60, 61)]
    together = model.predict(pictures, sizes)
    for picture, size, (labels, segments) in zip(pictures, sizes, together, strict=True):
        ((again, pieces),) = model.predict([picture], [size])
        assert labels.shape == size and labels.dtype == torch.int64 and 0 <= int(labels.min()) <= int(labels.max()) < 4
        assert segments is not None and pieces is not None and segments.ids.shape == size
        if window_batch:
            assert torch.equal(labels, again) and torch.equal(segments.ids, pieces.ids)
        assert (labels == again).float().mean() > 0.99
    assert model.predict_labels(pictures[:1], sizes[:1])[0].equal(together[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_lower_precision_are_float32_products(name, weights, monkeypatch):
    """Of the embeddings that the network gave: the last product, and pooling, are no part of it."""
    method = build(name, load_clip(weights))
    owner, part = (type(method), "embeddings") if hasattr(method, "embeddings") else (type(method), "mask_embeddings")
    own, seen = getattr(owner, part), []

    def kept(self, *args):
        seen.append(own(self, *args))
        return seen[-1]

    monkeypatch.setattr(owner, part, kept)
    vocabulary = words(5, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = method.classify(images(method.clip), masks(3), vocabulary)
    exact = torch.nn.functional.normalize(seen[0].double(), dim=-1) @ vocabulary.text.double().T
    cosines = found.logits.double() / vocabulary.logit_scale
    if name == "scn":  # logarithms of probabilities, of logits that are its base's before training
        exact = (exact * 100).log_softmax(dim=-1) / 100
    assert found.logits.dtype == torch.float32
    assert (cosines - exact).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close(name, dtype, weights):
    found = []
    for kind in ("float32", dtype):  # each its own CLIP: precision stays
        model = model_of(perturbed(build(name, load_clip(weights))), dtype=kind)
        found.append(model.seg_logits(photo(96, 96)[None]))
    exact, rough = found
    assert rough.dtype == torch.float32 and exact.shape == (1, 4, 96, 96)
    assert (exact - rough).abs().max() / exact.abs().max() < (0.25 if dtype == "bfloat16" else 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradients_and_no_hooks(name, clip):
    method = build(name, clip)
    model_of(method).predict_labels([photo(64, 64)], [(64, 64)])
    assert not any(p.requires_grad for p in method.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.modules())


def test_images_without_masks_and_with_them_in_one_batch(clip):
    model = model_of(build("fisa", clip))
    model.set_things([0])

    class Some(torch.nn.Module):
        needs_truth = needs_names = False

        def propose(self, images, truths=None):
            return [Proposals(torch.randn(index, 12, 12), None) for index, _ in enumerate(images)]

    model.method.generator = Some()
    found = model.predict([photo(80, 80, seed=i) for i in range(3)], [(40, 40)] * 3)
    assert bool((found[0][0] == 0).all()) and bool((found[0][1].ids == -1).all())
    assert all(bool(labels.ge(0).all()) for labels, _ in found)


def test_masked_attention_is_a_forward_for_each_mask(weights):
    """All masks in one pass against each mask's own pass, written with the blocks of the public model."""
    clip = load_clip(weights)
    method = build("maskclip-ding", clip)
    seen, given = images(clip)[:1], masks(3)[:1]
    visual = clip.visual
    with torch.inference_mode():
        found = method.mask_embeddings(seen, given, torch.zeros(1, clip.embed_dim))[0]
        tokens, grid = clip.embed(seen)
        size = tokens.shape[1]
        for index in range(3):
            x = torch.cat([tokens, tokens[:, :1]], dim=1)
            whole = torch.nn.functional.interpolate(given[:, index : index + 1], size=(96, 96), mode="bilinear")
            touched = torch.nn.functional.adaptive_max_pool2d(whole, grid).flatten() >= 0
            blocked = torch.ones(size + 1, size + 1, dtype=torch.bool)
            blocked[:size, :size] = False
            blocked[size, 0] = False  # CLS
            blocked[size, 1:size] = ~touched
            for block in visual.transformer.resblocks:
                normed = block.ln_1(x)
                x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=blocked)[0]
                x = x + block.mlp(block.ln_2(x))
            expected = visual.ln_post(x[:, size]) @ visual.proj
            torch.testing.assert_close(found[index], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_scope": "masks"},
        {"lora_rank": 4},
        {"adapter_layers": 0},
        {"adapter_layers": 1},
        {"adapter_layers": 3},
        {"distractor": ""},
    ],
)
def test_untrained_fisa_is_its_baseline_to_the_bit(options, clip):
    base, fisa = build("maskclip-ding", clip), build("fisa", clip, mask_sees_cls=True, **options)
    vocabulary, given = words(9, clip.embed_dim), masks(12)
    given[:, 3] = NOWHERE
    with torch.inference_mode():
        one, other = (method.classify(images(clip), given, vocabulary) for method in (base, fisa))
    if options.get("query_scope") == "masks":  # the same sums, grouped otherwise by the matrix kernel
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.masks, other.masks)


def test_fisas_mask_tokens_do_not_see_cls_unless_told(clip):
    """Eq. 5 sums over patches: a CLS token that only the image tokens' last block could change is not looked at."""
    given, vocabulary = masks(4), words(9, clip.embed_dim)
    plain, seeing = build("fisa", clip), build("fisa", clip, mask_sees_cls=True)
    grid = (96 // clip.patch,) * 2
    assert not bool(plain.visible(given, grid, (96, 96))[..., 0].any())
    assert bool(seeing.visible(given, grid, (96, 96))[..., 0].all())
    empty = torch.full((1, 1, 24, 24), NOWHERE)
    assert bool(plain.visible(empty, grid, (96, 96))[..., 1:].all())  # something for the softmax
    assert seeing.visible(empty, grid, (96, 96)).sum() == 1  # CLS alone
    with torch.inference_mode():
        one, other = (m.classify(images(clip), given, vocabulary).logits for m in (plain, seeing))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("scope", ["all", "masks"])
def test_lora_is_a_sum_of_matrices_on_all_four_projections(scope, weights):
    """Low-rank products moved into CLIP's own matrices give the same network (where image tokens use them too)."""
    method = build("fisa", load_clip(weights), lora_rank=4, seve=False, adapter_layers=0, query_scope=scope)
    assert method.lora_in.shape[:2] == (method.clip.depth, 4)
    perturbed(method, 0.02)
    with torch.no_grad():
        method.query_bias.zero_()
        if scope == "masks":
            fresh = build("fisa", method.clip, query_scope=scope)
            method.query_weight.copy_(fresh.query_weight)
    given, vocabulary = masks(4), words(9, method.clip.embed_dim)
    with torch.inference_mode():
        found = method.classify(images(method.clip), given, vocabulary).logits
    merged = build("fisa", load_clip(weights), seve=False, adapter_layers=0)
    with torch.no_grad():
        for index, block in enumerate(merged.clip.blocks):
            products = method.lora_out[index] @ method.lora_in[index]  # (4, C, C)
            block.attn.in_proj_weight += torch.cat(list(products[:3]))
            block.attn.out_proj.weight += products[3]
    with torch.inference_mode():
        expected = merged.classify(images(method.clip), given, vocabulary).logits
        plain = build("fisa", load_clip(weights)).classify(images(method.clip), given, vocabulary).logits
    assert not torch.allclose(found, plain, atol=1e-2)
    if scope == "all":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    else:  # image tokens keep CLIP's own projections
        assert not torch.allclose(found, expected, atol=1e-2)


def test_training_has_a_word_that_no_segment_has(clip):
    method, plain = build("fisa", clip), build("fisa", clip, distractor="")
    for one, count in ((method, 3), (plain, 2)):
        one.set_training_classes(["sky", "road"], Templates(("{}",)))
        assert one._training.text.shape[0] == one._training.classes == count
    method.set_training_classes(["sky", "other"], Templates(("{}",)))
    assert method._training.classes == 2


def test_fisas_recipe_is_maskclips_where_the_paper_is_silent(weights):
    recipe = method_class("fisa").RECIPES["coco_panoptic"]
    assert recipe["schedule"] == "constant" and recipe["grad_clip"] == 0.01 and recipe["amp"] == "float16"
    method = build("fisa", load_clip(weights))
    groups, parts = choose_parameters(method, "full")
    norms = {
        id(p) for module in method.modules() if isinstance(module, torch.nn.LayerNorm) for p in module.parameters()
    }
    chosen = {id(p) for group in groups for p in group.parameters}
    still = {id(p) for group in groups for p in group.undecayed}
    assert still and still == norms & chosen
    assert [part.part for part in parts].count("clip.visual") == 1


def test_a_class_is_seen_if_one_of_its_words_was_trained_by_its_exact_string():
    """FC-CLIP's rule, on the words of its public vectors' settings."""
    trained = ["cat", "coach,minibus", "people, man", "sky-other", "Dog", "couch", "window"]
    tested = [
        ["cat,kitten"],
        ["dog"],
        ["sky"],
        ["bus, coach"],
        ["grass", "lawn"],
        ["person", "man", "woman"],
        ["sofa,couch"],
    ]
    assert seen_classes(tested, trained) == [True, False, False, True, False, True, True]


def test_seen_words_are_those_that_were_trained_not_the_benchmarks_names(weights, tmp_path):
    from ovbench.models import trained_file as trained_weights

    method = build("scn", load_clip(weights))
    about = trained_weights.About(
        method="scn", method_options=method.options(), arch=method.clip.arch, dataset="coco_stuff",
        class_names=["sky-other", "road"], words=["sky", "road, route"], training="t", spec_hash="0", iterations=1, planned=1,
    )  # fmt: skip
    trained_weights.save(tmp_path / "model.safetensors", method.public_state(), about)
    again = method_class("scn").load(str(tmp_path / "model.safetensors"), None, method.config)
    model = model_of(again, [["sky-other"], ["sky", "heaven"], ["route"], ["Road"]])
    assert model.vocabulary().seen.tolist() == [False, True, True, False]


def test_the_ensemble_takes_a_classs_best_word_first(clip):
    """Two words of one class must not share its probability before the mean of both classifiers is taken."""
    scn = perturbed(build("scn", clip))
    vocabulary = words(6, clip.embed_dim)
    owner = torch.tensor([0, 0, 0, 1, 2, 2])
    several = vocabulary._replace(word_class=owner, classes=3, seen=torch.tensor([True, False, False]))
    alone = perturbed(build("scn", clip, ensemble=False))
    with torch.inference_mode():
        found = scn.classify(images(clip), masks(4), several).logits
        ours = several.best(alone.classify(images(clip), masks(4), several).logits).softmax(-1)
        clips = several.best(build("fc-clip", clip).classify(images(clip), masks(4), several).logits).softmax(-1)
    share = torch.tensor([0.4, 0.8, 0.8])
    torch.testing.assert_close(found.exp(), ours ** (1 - share) * clips**share, rtol=1e-4, atol=1e-7)


def test_an_image_is_padded_with_the_mean_colour(clip):
    """Masks and image span the same pixels, and an exact multiple changes nothing."""
    for name, colour in (("fc-clip", clip.mean.flatten()), ("maskclip-ding", torch.tensor([123.675, 116.28, 103.53]))):
        model = model_of(build(name, clip), square=0, pad=32)
        picture = photo(70, 96)[None]
        assert model.input_size((70, 96)) == (96, 96)
        found = clip.denormalise(model.network_input(picture))[0]
        torch.testing.assert_close(found[:, :70], picture[0].float(), rtol=0, atol=1e-3)
        torch.testing.assert_close(found[:, 70:], colour.view(3, 1, 1).expand(3, 26, 96), rtol=0, atol=1e-3)
        plain = model_of(build(name, clip), square=0, pad=0)
        given = photo(96, 64)
        assert torch.equal(*(m.predict_labels([given], [(96, 64)])[0] for m in (model, plain)))
        odd = photo(75, 100)
        assert [one.predict_labels([odd], [(75, 100)])[0].shape for one in (model, plain)] == [(75, 100)] * 2


def test_masks_that_the_method_corrects_come_back_without_the_padding(clip):
    model = model_of(perturbed(build("fisa", clip)), pad=64)
    (found,) = model.classified([photo(75, 100)])
    proposed = model.method.generator.propose([photo(75, 100)])[0].masks
    assert found.masks.shape == proposed.shape and not torch.equal(found.masks, proposed)
    assert ((found.masks >= 0) == (proposed >= 0)).float().mean() > 0.9
    (kept,) = model_of(build("maskclip-ding", clip), pad=64).classified([photo(75, 100)])
    assert torch.equal(kept.masks, proposed)


def test_fisa_without_a_residual_is_another_network(clip):
    base, fisa = build("maskclip-ding", clip), build("fisa", clip, seve_residual=False)
    with torch.inference_mode():
        one, other = (m.classify(images(clip), masks(4), words(9, clip.embed_dim)).logits for m in (base, fisa))
    assert not torch.allclose(one, other)


def test_seve_is_the_equation(clip):
    """(a) and (b) of one block, written out."""
    method = perturbed(build("fisa", clip))
    block, seve = clip.blocks[2], method.seve[2]
    m, text = torch.randn(1, 3, clip.width), words(5, clip.embed_dim).text
    normed, wide = block.ln_1(m), text * clip.embed_dim**0.5
    weights = torch.softmax((normed @ seve.q.weight.T) @ (wide @ seve.k.weight.T).T / 8**0.5, dim=-1)
    expected = m + (weights @ (wide @ seve.v.weight.T)) @ seve.out.weight.T
    torch.testing.assert_close(method.injected(m, text, 2), expected, rtol=1e-4, atol=1e-5)


def test_scn_is_its_base_to_the_bit_and_knows_no_number_of_classes(clip):
    base, scn = build("fc-clip", clip), build("scn", clip, ensemble=False)
    ensemble = build("scn", clip)
    with torch.inference_mode():
        for count in (1, 19, 150, 847):
            vocabulary = words(count, clip.embed_dim)
            expected = base.classify(images(clip), masks(5), vocabulary).logits
            assert torch.equal(scn.classify(images(clip), masks(5), vocabulary).logits, expected)
            assert torch.equal(
                ensemble.classify(images(clip), masks(5), vocabulary).logits, expected.log_softmax(dim=-1)
            )
    trained = perturbed(scn)
    with torch.inference_mode():
        for count in (19, 150, 847):
            found = trained.classify(images(clip), masks(5), words(count, clip.embed_dim)).logits
            assert found.shape == (2, 5, count) and bool(found.isfinite().all())


def test_an_absent_class_changes_nothing_before_training(clip):
    scn = build("scn", clip, ensemble=False)
    many = words(12, clip.embed_dim)
    few = many._replace(text=many.text[:11], word_class=many.word_class[:11], classes=11, seen=many.seen[:11])
    with torch.inference_mode():
        one, other = (scn.classify(images(clip), masks(5), found).logits for found in (many, few))
    torch.testing.assert_close(one[..., :11], other, rtol=1e-6, atol=1e-5)


def test_scn_pseudo_texts_are_torchs_attention(clip):
    scn = perturbed(build("scn", clip))
    maps, text = torch.randn(1, clip.embed_dim, 3, 4), words(5, clip.embed_dim).text
    values = scn.pseudo.project(maps.flatten(2)[0].T)
    attention = scn.pseudo.attention
    q, k, v = (
        x @ w.T + b
        for x, w, b in zip(
            (text, values, values), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    heads = []
    for head in range(8):
        part = slice(head * 4, head * 4 + 4)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / 2.0, dim=-1) @ v[:, part])
    looked = attention.out_proj(torch.cat(heads, dim=-1))
    expected = scn.pseudo.norm(text + looked) - scn.pseudo.norm(text)
    torch.testing.assert_close(scn.pseudo(text, maps)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_ensemble_is_a_geometric_mean(clip):
    scn, alone = perturbed(build("scn", clip)), perturbed(build("scn", clip, ensemble=False))
    vocabulary = words(6, clip.embed_dim)
    with torch.inference_mode():
        found = scn.classify(images(clip), masks(4), vocabulary).logits.exp()
        ours = alone.classify(images(clip), masks(4), vocabulary).logits.softmax(-1)
        clips = build("fc-clip", clip).classify(images(clip), masks(4), vocabulary).logits.softmax(-1)
    share = torch.where(vocabulary.seen, 0.4, 0.8)
    torch.testing.assert_close(found, ours ** (1 - share) * clips**share, rtol=1e-4, atol=1e-7)


POLICIES = [("fisa", policy) for policy in method_class("fisa").POLICIES if "generator" not in policy]
POLICIES.append(("scn", "heads"))


@pytest.mark.parametrize(("name", "policy"), POLICIES)
def test_a_policy_trains_what_it_says_and_the_file_gives_the_network_back(name, policy, weights, tmp_path):
    from safetensors.torch import save_file

    from ovbench.models import trained_file as trained_weights

    pytest.importorskip("scipy")
    options = {"lora_rank": 4} if policy == "lora" else {}
    method = build(name, load_clip(weights), **options, **({"training_side": 0} if name == "fisa" else {}))
    method.set_training_classes(["sky", "road", "car"], Templates(("{}",)))
    groups, parts = choose_parameters(method, policy)
    method.train()
    optimizer = torch.optim.SGD([p for group in groups for p in group.parameters], lr=1e-3)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[:, 32:], labels[:, :8] = 1, 255
    pictures = torch.stack([photo(64, 64, seed=1), photo(64, 64, seed=2)])
    for _ in range(2):  # what is zero in the beginning passes no gradient on
        losses = method.losses(pictures, labels)
        assert all(bool(value.isfinite()) for value in losses.values())
        optimizer.zero_grad()
        sum(value for key, value in losses.items() if "loss" in key).backward()
        optimizer.step()
    chosen = {id(p) for group in groups for p in group.parameters}
    moved = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    for key, parameter in method.named_parameters():
        assert (id(parameter) in chosen) or key not in moved, key
    assert {group.name for group in groups} <= {
        key.split(".")[0]
        if not key.startswith("clip.")
        else (
            "clip.queries"
            if key.endswith("q_proj_weight") and policy != "full"
            else "clip.visual"
            if ".visual." in key
            else "clip.text"
        )
        for key in moved
    } | {"lora", "clip.queries"}
    assert sum(part.trainable for part in parts) == sum(p.numel() for group in groups for p in group.parameters)

    method.eval().requires_grad_(False)
    vocabulary = words(5, method.clip.embed_dim)
    with torch.inference_mode():
        expected = method.classify(images(method.clip), masks(4), vocabulary).logits
    about = trained_weights.About(
        method=name, method_options=method.options(), arch=method.clip.arch, dataset="coco_stuff",
        class_names=["sky", "road"], training="t", spec_hash="0", iterations=2, planned=2,
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    trained_weights.save(path, method.public_state(), about)
    cls = method_class(name)
    again = cls.load(str(path), None, cls.configure({"generator": "grid", **options}))
    again.clip.pos_interp = method.clip.pos_interp  # in a run the protocol says it
    with torch.inference_mode():
        found = again.classify(images(again.clip), masks(4), vocabulary).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert again.seen_words == {"sky", "road"}
    state = {key: value for key, value in method.public_state().items() if not key.startswith(("adapter.", "pseudo."))}
    save_file(state, tmp_path / "less.safetensors", metadata={"ovbench": about.model_dump_json()})
    with pytest.raises(WeightsError, match="does not fit"):
        cls.load(str(tmp_path / "less.safetensors"), None, cls.configure({"generator": "grid", **options}))
    broken = dict(method.public_state())
    key = next(key for key in broken if key.startswith(("adapter.", "pseudo.")))
    broken[key] = torch.full_like(broken[key], float("nan"))
    trained_weights.save(tmp_path / "nan.safetensors", broken, about)
    with pytest.raises(WeightsError, match="NaN or infinity"):
        cls.load(str(tmp_path / "nan.safetensors"), None, cls.configure({"generator": "grid", **options}))


@pytest.mark.parametrize("name", ["fisa", "scn"])
def test_training_sees_what_the_methods_protocol_shows(name, weights):
    """Position embeddings as in evaluation, and crops of whole patches, which masks span as well."""
    method = build(name, load_clip(weights), **({"training_side": 0} if name == "fisa" else {}))
    method.set_training_classes(["sky", "road"], Templates(("{}",)))
    assert method.clip.pos_interp == protocol("paper", method=name).pos_interp
    assert method.training_input(torch.zeros(1, 3, 70, 90)).shape[-2:] == (64, 96)
    if name == "fisa":
        method = build(name, load_clip(weights), training_side=96)
        assert method.training_input(torch.zeros(1, 3, 70, 90)).shape[-2:] == (96, 96)


def test_the_adapter_takes_masks_in_parts(clip):
    method = perturbed(build("fisa", clip))
    given = masks(37)
    with torch.inference_mode():
        parts = method.adapter(given)
    torch.testing.assert_close(parts, method.adapter(given).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(parts, given)


def test_trained_parameters_are_the_papers(weights):
    """The printed 26 M of ViT-L/14 by the same formula that holds on a small CLIP; the profile builds the large one."""

    def expected(depth: int, width: int, dim: int, rank: int = 8) -> dict[str, int]:
        adapter = (9 * 16 + 16) + (16 * 9 + 1)
        return {
            "seve": depth * rank * 2 * (width + dim), "adapter": adapter, "clip.queries": depth * (width * width + width)
        }  # fmt: skip

    clip = load_clip(weights)
    groups, _ = choose_parameters(build("fisa", clip), "simo")
    found = {group.name: sum(p.numel() for p in group.parameters) for group in groups}
    assert found == expected(clip.depth, clip.width, clip.embed_dim)
    assert sum(expected(24, 1024, 768).values()) == pytest.approx(26e6, rel=0.05)


def test_the_generator_is_trained_where_the_policy_says_so(weights, tmp_path, monkeypatch):
    from ovbench.models import trained_file as trained_weights
    from ovbench.networks.mask_generators import mask2former_weights

    pytest.importorskip("scipy")
    pytest.importorskip("transformers")
    backbone = {
        "model_type": "swin",
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 4,
    }
    sizes = {
        "backbone_config": {**backbone, "out_features": ["stage1", "stage2", "stage3", "stage4"]}, "num_labels": 5,
        "num_queries": 7, "encoder_layers": 1, "decoder_layers": 2, "feature_size": 32, "mask_feature_size": 32,
        "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2,
    }  # fmt: skip
    name = "mask2former-swin-t"
    mask2former_weights.random_mask2former(name, 3, sizes).model.save_pretrained(tmp_path / "tiny")
    monkeypatch.setitem(mask2former_weights.RECIPES, name, mask2former_weights.Recipe(backbone, hub="owner/tiny"))
    options = {"generator": name, "generator_weights": str(tmp_path / "tiny"), "training_side": 0}
    method = build("fisa", load_clip(weights), **options)
    before = method.generator.identity()
    method.set_training_classes(["sky", "road"], Templates(("{}",)))
    groups, _ = choose_parameters(method, "simo+generator")
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[:, 32:] = 1
    losses = method.train().losses(photo(64, 64)[None], labels)
    sum(losses.values()).backward()
    [own] = [group for group in groups if group.name == "generator"]
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in own.parameters)
    torch.optim.SGD([p for p in own.parameters if p.grad is not None], lr=0.1).step()
    method.requires_grad_(False).eval()
    picture = photo(64, 64)
    expected = method.generator.propose([picture])[0].masks
    about = trained_weights.About(
        method="fisa", method_options=method.options(), arch=method.clip.arch, dataset="coco_stuff",
        class_names=["sky", "road"], training="t", spec_hash="0", iterations=1, planned=1,
    )  # fmt: skip
    trained_weights.save(tmp_path / "model.safetensors", method.public_state(), about)
    again = method_class("fisa").load(str(tmp_path / "model.safetensors"), None, method.config)
    assert torch.equal(again.generator.propose([picture])[0].masks, expected)
    assert again.generator.identity() != before
    with pytest.raises(WeightsError, match="generator"):
        method_class("fisa").load(
            str(tmp_path / "model.safetensors"), None, method_class("fisa").configure({"generator": "grid"})
        )


def test_wrong_values_are_refused(clip):
    for name, options, match in (
        ("fisa", {"generator": "sam"}, "mask generator"),
        ("fisa", {"generator": "files"}, "generator_path"),
        ("fisa", {"generator_path": "masks"}, "generator=files"),
        ("fisa", {"object_thd": 0.3}, "--object-thd"),
        ("fisa", {"classifier": "best"}, "classifier"),
        ("fisa", {"query_scope": "none"}, "query scope"),
        ("fisa", {"adapter_layers": 4}, "adapter_layers"),
        ("scn", {"heads": 5}, "divide"),
    ):
        with pytest.raises(UsageError, match=match):
            build(name, clip, **options)
    with pytest.raises(UsageError, match="rank"):
        build("fisa", clip).parameter_groups("lora")
    with pytest.raises(UsageError, match="policy"):
        build("fisa", clip).parameter_groups("all")
    for fields in ({"mode": "slide"}, {"prob_thd": 0.1}, {"pamr": 2}):
        with pytest.raises(UsageError, match="mask-based"):
            model_of(build("fisa", clip), **fields)
    with pytest.raises(UsageError, match="uncompiled"):
        MaskModel(build("fisa", clip), CLASSES, protocol("fisa"), compile_mode="default")


def test_oracles_need_the_truth(clip):
    for options in ({"generator": "oracle"}, {"classifier": "oracle"}):
        with pytest.raises(UsageError, match="oracle"):
            model_of(build("fisa", clip, **options)).predict_labels([photo(64, 64)], [(64, 64)])


def test_both_oracles_give_the_truth_back(clip):
    labels = torch.zeros(64, 96, dtype=torch.int64)
    labels[20:, 30:], labels[40:, :20] = 1, 3
    labels[:4] = 255
    truth = segments_of_labels(labels, 4)
    model = model_of(build("maskclip-ding", clip, generator="oracle", classifier="oracle"))
    model.set_things([1])
    ((found, segments),) = model.predict([photo(64, 96)], [(64, 96)], None, [truth])
    assert torch.equal(found[4:], labels[4:])
    scores = quality(segments, truth, 4)
    assert scores.tp.tolist() == [1, 1, 0, 1] and not int(scores.fp.sum() + scores.fn.sum())
    assert scores.iou.sum() == 3


def test_numbers_that_are_not_finite_are_named(clip):
    model = model_of(build("fc-clip", clip))
    model.register_buffer("text", torch.full_like(model.text, float("nan")), persistent=False)
    with pytest.raises(RunError, match=r"photo\.jpg"):
        model.predict([photo(64, 64)], [(64, 64)], ["photo.jpg"])


def test_segments_of_images_count_not_only_classes(clip):
    """Two things of one class are two segments in the loss where the data tells them apart."""
    pytest.importorskip("scipy")
    method = build("scn", clip)
    method.set_training_classes(["sky", "road"], Templates(("{}",)))
    choose_parameters(method, "heads")
    ids = torch.zeros(64, 64, dtype=torch.int64)
    ids[:, 32:] = 1
    one = Segments(ids, torch.tensor([1, 1]), torch.tensor([False, False]))
    found = method.losses(photo(64, 64)[None], torch.zeros(1, 64, 64, dtype=torch.int64), [one])
    assert set(found) == {"loss_class"} and bool(found["loss_class"].isfinite())
