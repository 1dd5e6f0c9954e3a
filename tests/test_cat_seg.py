"""CAT-Seg against outputs of the public code, and what is special to it as a method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovbench.errors import WeightsError
from ovbench.models.view_averaging import ViewModel
from ovbench.networks.cost_aggregation import checkpoint
from ovbench.networks.dense_clip import resize_position_embedding
from ovbench.registry import method_class
from ovbench.spec import protocol
from ovbench.words.embeddings import prompts

TOLERANCE = {"prob": 2e-5, "logits": 1e-4, "text": 1e-5, "loss": 1e-5}


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    found = shared / "golden" / "catseg"
    if not found.is_dir():
        pytest.skip("the shared data have no vectors of CAT-Seg")
    return found


@pytest.fixture(scope="module")
def vectors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "catseg_vectors.safetensors")


@pytest.fixture(scope="module")
def classes(folder: Path) -> list[list[str]]:
    names: list[str] = json.loads((folder / "classes.json").read_text())
    return [name.split(", ")[:1] for name in names]  # the public code takes the first synonym


def load(folder: Path, **options: Any) -> Any:
    cls = method_class("cat-seg")
    return cls.load(str(folder / "catseg_weights.safetensors"), None, cls.configure(options))


@pytest.fixture(scope="module")
def method(folder: Path) -> Any:
    return load(folder)


def dequantised(vectors: dict[str, Tensor], name: str) -> Tensor:
    return vectors[f"agg.in.{name}_i8"].float() / 32


def near(found: Tensor, expected: Tensor, tolerance: float) -> float:
    difference = float((found - expected).abs().max())
    assert found.shape == expected.shape
    assert difference <= tolerance, difference
    return difference


@pytest.mark.parametrize(
    ("name", "pool", "pad", "step"),
    [
        ("pool1.pad256", 1, 256, 1),
        ("pool1.pad8.s2", 1, 8, 2),
        ("pool1.pad0.s4", 1, 0, 4),
        ("pool2.pad256.s2", 2, 256, 2),
        ("pool2.pad8.s2", 2, 8, 2),
        ("pool2.pad0.s4", 2, 0, 4),
        ("batch2.pool1.pad8.s4", 1, 8, 4),
    ],
)
def test_aggregator(method: Any, vectors: dict[str, Tensor], name: str, pool: int, pad: int, step: int) -> None:
    image, text = dequantised(vectors, "img_feats"), dequantised(vectors, "text_feats")
    guides = [dequantised(vectors, f"res{level}") for level in (3, 4, 5)]
    if "batch2" in name:
        image = torch.cat([image, -image.flip(-1)])
        guides = [torch.cat([guide, guide.flip(-1)]) for guide in guides]
    aggregator = method.aggregator
    aggregator.set_pooling(pool)
    aggregator.set_pad_len(pad)
    aggregator.keep = pad
    try:
        with torch.inference_mode():
            found = aggregator(image, text, guides[0], guides[1:]).dense(20)
        near(found[..., ::step, ::step], vectors[f"agg.out.{name}"], TOLERANCE["logits"])
        if "batch2" in name:
            assert ((found[0] == -100) != (found[1] == -100)).any()  # images of one batch keep different classes
    finally:
        aggregator.set_pooling(1)
        aggregator.set_pad_len(256)
        aggregator.keep = 256


def test_steps_of_a_single_view(method: Any, vectors: dict[str, Tensor], classes: list[list[str]]) -> None:
    sentences = prompts("cat-seg").sentences([words[0] for words in classes])
    tokens = method.clip.tokenizer([group[0] for group in sentences])
    assert torch.equal(tokens.int(), vectors["single.tokens_i32"])
    text = method.text_embeddings([words[0] for words in classes], prompts("cat-seg"))
    near(text, vectors["single.text_embeds"], TOLERANCE["text"])
    position = resize_position_embedding(method.clip.visual.positional_embedding, (14, 14), (24, 24), "size")
    near(position[::4], vectors["single.pos_embed_24.s4"], 1e-6)

    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output})

    aggregator = method.aggregator
    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in {
            "conv1": aggregator.conv1,
            "res4": method.upsample1,
            "res5": method.upsample2,
            "decoder1": aggregator.decoder1,
            "decoder2": aggregator.decoder2,
            "layer0.swin": aggregator.layers[0].swin_block,
            "layer0.cls": aggregator.layers[0].attention,
            "layer1.swin": aggregator.layers[1].swin_block,
            "layer1.cls": aggregator.layers[1].attention,
        }.items()
    ]
    images = method.clip.normalise(vectors["image.r384_u8"][None])
    try:
        with torch.inference_mode():
            blocks = method.clip.tokens(images, [3, 7, 10]).after
            dense = method.dense_tokens(blocks[10])
            logits = method.patch_logits(images, text)
    finally:
        for hook in hooks:
            hook.remove()
    near(blocks[3][0, ::8], vectors["single.block3.s8"], 1e-4)
    near(blocks[7][0, ::8], vectors["single.block7.s8"], 1e-4)
    near(dense, vectors["single.clip_dense"], 1e-4)
    near(seen["res4"][..., ::8, ::8], vectors["single.res4.s8"], 1e-4)
    near(seen["res5"][..., ::16, ::16], vectors["single.res5.s16"], 1e-4)
    cost = F.normalize(method.features(images), dim=-1) @ text[:, 0].T
    near(cost.permute(0, 3, 1, 2)[:, None], vectors["single.corr"], 1e-5)
    near(seen["conv1"][[0, 7]], vectors["single.corr_embed.cls0_7"], 1e-4)
    for layer in (0, 1):
        for part in ("swin", "cls"):
            name = f"layer{layer}.{part}"
            found = seen[name][:, [0, 7], ::2, ::2].permute(0, 4, 1, 2, 3)
            expected = vectors[f"single.{name}.cls0_7.s2"]
            near(found, expected, 2e-5 * float(expected.abs().max()))
    near(seen["decoder1"][0, [0, 7]][..., ::4, ::4], vectors["single.decoder1.cls0_7.s4"], 1e-4)
    near(seen["decoder2"][0, [0, 7]][..., ::8, ::8], vectors["single.decoder2.cls0_7.s8"], 1e-4)
    near(logits, vectors["single.logits96"], TOLERANCE["logits"])


def model_of(folder: Path, classes: Any, pad_len: int = 256, **fields: Any) -> ViewModel:
    return ViewModel(load(folder, pad_len=pad_len), classes, protocol("cat-seg", **fields))


CASES = [
    # name, image, mode, pad_len, output size, steps of probabilities and labels
    ("single", "r384", "whole", 256, (384, 384), 8, 1),
    ("nonsliding640", "short640", "whole", 256, (375, 500), 10, 2),
    ("slide", "short640", "slide", 256, (375, 500), 5, 1),
    ("slide_raw640", "raw", "slide", 256, (640, 640), 16, 2),
    ("slide_pad8", "short640", "slide", 8, (375, 500), 10, 2),
]


@pytest.mark.parametrize(
    ("name", "image", "mode", "pad_len", "size", "coarse", "fine"), CASES, ids=[c[0] for c in CASES]
)
def test_evaluation(
    folder: Path,
    vectors: dict[str, Tensor],
    classes: list[list[str]],
    name: str,
    image: str,
    mode: str,
    pad_len: int,
    size: tuple[int, int],
    coarse: int,
    fine: int,
) -> None:
    model = model_of(folder, classes, pad_len, mode=mode)
    picture = vectors[f"image.{image}_u8"]
    found = model.patch_logits([picture])[0]
    if f"{name}.view_logits.s4" in vectors:
        every = found.of(torch.arange(20))
        near(every[..., ::4, ::4], vectors[f"{name}.view_logits.s4"], TOLERANCE["logits"])
    probabilities = found.at(size)
    near(probabilities[:, ::coarse, ::coarse], vectors[f"{name}.prob.s{coarse}"], TOLERANCE["prob"])
    expected = vectors[f"{name}.argmax_u8" if fine == 1 else f"{name}.argmax_u8.s{fine}"].long()
    labels = model.predict_labels([picture], [size])[0]
    assert torch.equal(labels, probabilities.argmax(dim=0))
    seen = expected != 255
    assert seen.double().mean() > 0.98 and torch.equal(labels[::fine, ::fine][seen], expected[seen])


def test_filter_in_a_single_view(folder: Path, vectors: dict[str, Tensor], classes: list[list[str]]) -> None:
    model = model_of(folder, classes, 8, mode="whole")
    found = model.patch_logits([vectors["image.r384_u8"]])[0]
    near(found.of(torch.arange(20))[..., ::2, ::2], vectors["single.pad8.logits96.s2"], TOLERANCE["logits"])
    assert found.candidates().tolist() == [0, 1, 2, 7, 10, 12, 16, 19]
    expected = vectors["single.pad8.argmax_u8.s2"].long()
    seen = expected != 255
    assert torch.equal(found.labels((384, 384))[::2, ::2][seen], expected[seen])


@pytest.mark.parametrize(
    ("name", "pool", "pad", "repeat"),
    [
        ("b1.pool2.pad256", 2, 256, False),
        ("b1.pool2.pad256", 2, 256, True),
        ("b1.pool1.pad256", 1, 256, False),
        ("b1.pool2.pad8", 2, 8, False),
        ("b2.pool2.pad256", 2, 256, False),
        ("b1.allignored", 2, 256, False),
    ],
)
def test_training(
    folder: Path, vectors: dict[str, Tensor], classes: list[list[str]], name: str, pool: int, pad: int, repeat: bool
) -> None:
    with_gradients = name == "b1.pool2.pad256"
    method = load(folder, pooling=pool, pad_len=pad, as_published=repeat)
    method.prepare_training("attention")
    method.set_training_classes([words[0] for words in classes], prompts("cat-seg"))
    images, labels = vectors["image.r384_u8"][None], vectors["train.labels_u8"][None].long()
    if name.startswith("b2"):
        images, labels = torch.cat([images, images.flip(-1)]), torch.cat([labels, labels.flip(-2)])
    if name == "b1.allignored":
        labels = torch.full_like(labels, 255)
    with torch.set_grad_enabled(with_gradients):
        loss = method.losses(images, labels)["loss_bce"]
    near(loss.detach()[None], vectors[f"train.loss.{name}"], TOLERANCE["loss"])
    if not with_gradients:
        return
    loss.backward()
    expected: dict[str, float] = json.loads((folder / "grad_norms.json").read_text())
    own = {
        checkpoint.CLIP + key.removeprefix("clip.clip.")
        if key.startswith("clip.")
        else checkpoint.public_name(key): value
        for key, value in method.named_parameters()
        if value.requires_grad
    }
    assert set(own) == set(expected)
    unused = "visual.transformer.resblocks.11.attn.q_proj_weight"  # of a block without attention
    largest = max(expected.values())
    for key, norm in expected.items():
        gradient = own[key].grad
        if key.endswith(unused):
            assert gradient is None and norm == 0
            continue
        assert gradient is not None, key
        # relative: 1.0e-3 on an AMD EPYC, 1.1e-4 elsewhere
        assert abs(float(gradient.norm()) - norm) <= 2e-3 * norm + 1e-7 * largest, key
    of_clip, of_head = checkpoint.CLIP, checkpoint.AGGREGATOR
    for key, name in {
        "aggregator_conv1_weight": f"{of_head}conv1.weight",
        "upsample1_bias": "upsample1.bias",
        "padding_tokens0": f"{of_head}layers.0.attention.padding_tokens",
        "text_block0_q_proj": f"{of_clip}transformer.resblocks.0.attn.q_proj_weight",
        "visual_block0_v_proj": f"{of_clip}visual.transformer.resblocks.0.attn.v_proj_weight",
    }.items():
        reference = vectors[f"train.grad.{key}"]
        gradient = own[name].grad
        assert gradient is not None
        near(gradient.view_as(reference), reference, 1e-3 * float(reference.abs().max()))  # 4.6e-4 on an AMD EPYC


@pytest.mark.parametrize("change", ["missing", "unknown", "apart", "shape", "clip", "nan"])
def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    state = load_file(folder / "catseg_weights.safetensors")
    place = f"{checkpoint.CLIP}transformer.resblocks.0.attn"
    if change == "nan":
        key = next(key for key in state if key.startswith(checkpoint.AGGREGATOR))
        state[key] = torch.full_like(state[key], float("nan"))
    elif change == "missing":
        del state[f"{checkpoint.AGGREGATOR}head.bias"]
    elif change == "unknown":
        state["backbone.stem.weight"] = torch.zeros(1)
    elif change == "apart":
        del state[f"{place}.k_proj_weight"]
    elif change == "shape":
        state["upsample1.bias"] = torch.zeros(3)
    else:
        del state[f"{checkpoint.CLIP}ln_final.bias"]
    named = {
        "missing": f"missing: {checkpoint.AGGREGATOR}head.bias",
        "unknown": "unknown: backbone.stem.weight",
        "apart": f"missing: {place}.k_proj_weight",
        "shape": "of another shape: upsample1.bias",
        "clip": "missing: ln_final.bias",
        "nan": "NaN or infinity",
    }[change]
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=named.replace(".", r"\.")):
        method_class("cat-seg").load(str(tmp_path / "bad.safetensors"), None, None)
