"""Mask generators: the interface, Mask2Former on small random networks, and masks from the truth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import photo
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.networks.builtin.scenes import render
from ovbench.networks.mask_generators import mask2former_weights
from ovbench.networks.mask_generators.generator import truth_masks
from ovbench.networks.mask_generators.grid import Grid, rectangles
from ovbench.networks.mask_generators.load import MASK2FORMERS, generator_names, load_generator
from ovbench.networks.mask_generators.mask2former import Mask2Former, without_padding
from ovbench.networks.mask_generators.mask2former_weights import RECIPES, Recipe, load_mask2former, random_mask2former
from ovbench.networks.mask_generators.oracle import NoisyOracle, Oracle
from ovbench.networks.mask_generators.regions import colour_regions, merge_tree

transformers = pytest.importorskip("transformers")
BACKBONE = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
TINY: dict[str, Any] = {
    "backbone_config": {**BACKBONE, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "num_labels": 5,
    "num_queries": 7,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "num_attention_heads": 2,
}
SIZES = [(96, 64), (50, 71), (96, 64), (33, 40), (7, 130)]


@pytest.fixture(scope="module")
def tiny() -> Mask2Former:
    return random_mask2former("mask2former-swin-t", 3, TINY)


@pytest.fixture(scope="module")
def saved(tiny: Mask2Former, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "mask2former-swin-t", Recipe(BACKBONE, hub="owner/tiny"))


def images() -> list[Tensor]:
    return [photo(*size, seed=index) for index, size in enumerate(SIZES)]


def truth() -> Tensor:
    """Segments 2, 5 and 9 of a map with an empty strip."""
    found = torch.full((60, 80), 2)
    found[10:40, 20:60] = 5
    found[40:, 50:] = 9
    found[:3] = -1
    return found


def iou(first: Tensor, second: Tensor) -> Tensor:
    """(M, N) of masks (M, H, W) and (N, H, W), bool."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    inter = a @ b.T
    return inter / (a.sum(1)[:, None] + b.sum(1) - inter)


@pytest.mark.parametrize("name", ["tiny", "grid", "oracle", "noisy-oracle"])
def test_a_batch_is_its_images_one_by_one(tiny: Mask2Former, name: str) -> None:
    generator = tiny if name == "tiny" else load_generator(name)
    truths = [truth()] * len(SIZES) if generator.needs_truth else None
    before = images()
    found = generator.propose(before, truths)
    for index, (image, proposals) in enumerate(zip(images(), found, strict=True)):
        [alone] = generator.propose([image], None if truths is None else truths[:1])
        torch.testing.assert_close(proposals.masks, alone.masks, rtol=1e-4, atol=1e-5)
        assert torch.equal(before[index], image)
        assert proposals.masks.dtype == torch.float32 and proposals.masks.isfinite().all()
        assert proposals.masks.ndim == 3 and len(proposals.masks) > 0 and not proposals.masks.requires_grad
    assert generator.propose([], [] if truths else None) == []
    assert not generator.train().training and len(generator.identity()) == 64


def test_masks_and_objectness_are_those_of_transformers(saved: Path, recipe: None) -> None:
    generator = load_mask2former("mask2former-swin-t", str(saved))
    reference = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(saved).eval()
    image = photo(96, 64, seed=4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (image.float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        out = reference(pixel_values=pixels[None], pixel_mask=torch.ones(1, 96, 64))
    [found] = generator.propose([image])
    assert found.masks.shape == (7, 24, 16) and found.objectness is not None
    torch.testing.assert_close(found.masks, out.masks_queries_logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.objectness, 1 - out.class_queries_logits[0].softmax(-1)[:, -1])
    assert found.masks.std() > 1e-3 and generator.weights == "tiny" and len(str(generator.weights_sha256)) == 64
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_images_are_padded_with_the_mean_and_masks_cut_back(tiny: Mask2Former) -> None:
    image = photo(60, 44, seed=4)
    pixels = torch.nn.functional.pad((image[None].float() - tiny.mean) / tiny.std, (0, 20, 0, 4))
    with torch.no_grad():
        out = tiny.model(pixels).masks_queries_logits
    [found] = tiny.propose([image])
    torch.testing.assert_close(found.masks, out[0, :, :15, :11], rtol=1e-4, atol=1e-5)
    assert tiny.propose([photo(61, 45)])[0].masks.shape == (7, 16, 12)


def test_masks_of_sides_that_are_no_multiples_of_the_stride_span_the_image() -> None:
    x = (torch.arange(16) + 0.5) * 4  # pixel of each sample of a padded image of 64 x 32
    ramp = x[:, None].expand(16, 8)[None, None]
    found = without_padding(ramp, (64, 32), (42, 30))
    assert found.shape == (1, 1, 11, 8)
    expected = ((torch.arange(11) + 0.5) / 11 * 42).clamp(min=2)  # the first sample's
    torch.testing.assert_close(found[0, 0, :, 3], expected)


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "derived buffers"])
def test_other_files_load(tiny: Mask2Former, saved: Path, recipe: None, tmp_path: Path, kind: str) -> None:
    state = load_file(saved / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    if kind == "pytorch_model.bin":
        torch.save(state, tmp_path / kind)
    else:
        state.pop("criterion.empty_weight", None)
        extra = {"model.pixel_level_module.encoder.relative_position_index": torch.zeros(1)}
        save_file({**state, **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_mask2former("mask2former-swin-t", str(tmp_path))
    image = photo(64, 64)
    assert torch.equal(found.propose([image])[0].masks, tiny.propose([image])[0].masks)


def test_files_that_do_not_fit_are_refused(saved: Path, recipe: None, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    config = (saved / "config.json").read_text()

    def refused(message: str, tensors: dict[str, Tensor] | None = None, text: str = config) -> None:
        (tmp_path / "config.json").write_text(text)
        save_file(state if tensors is None else tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=message):
            load_mask2former("mask2former-swin-t", str(tmp_path))

    key = "class_predictor.bias"
    refused(f"missing: {key}", {name: value for name, value in state.items() if name != key})
    refused("unknown: more", {**state, "more": torch.zeros(1)})
    refused(f"of another shape: .*{key}", {**state, key: torch.zeros(3)})
    refused(f"NaN or infinity in {key}", {**state, key: torch.full((6,), torch.nan)})
    refused("needed is model_type swin, embed_dim 16", text=config.replace('"embed_dim": 16', '"embed_dim": 32'))
    refused("it has model_type detr", text='{"model_type": "detr"}')
    refused("Cannot read.*config.json", text="{")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(WeightsError, match=r"missing|Cannot read"):
        load_mask2former("mask2former-swin-t", str(tmp_path))
    with pytest.raises(WeightsError, match=r"must be a folder.*or leave the weights away to fetch owner/tiny"):
        load_mask2former("mask2former-swin-t", str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state": sys.exit}, tmp_path / "pytorch_model.bin")  # a pickle that would run code
    with pytest.raises(WeightsError, match="Cannot read"):
        load_mask2former("mask2former-swin-t", str(tmp_path))


def test_published_weights_come_from_the_hub(
    tiny: Mask2Former, saved: Path, recipe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append(file)
        if asked.count("model.safetensors") == 1 and file == "model.safetensors" and missing:
            raise EntryNotFoundError("404")
        return str(saved / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    missing = False
    found = load_mask2former("mask2former-swin-t")
    assert asked == ["config.json", "model.safetensors"] and found.weights == "owner/tiny"
    assert torch.equal(found.propose([photo(64, 64)])[0].masks, tiny.propose([photo(64, 64)])[0].masks)
    missing = True
    asked.clear()
    load_mask2former("mask2former-swin-t", "some-one/else")
    assert asked == ["config.json", "model.safetensors", "pytorch_model.bin"]

    def fail(*args: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(WeightsError, match=r"owner/tiny\): no network.*e\.g\. grid"):
        load_generator("mask2former-swin-t")
    with pytest.raises(WeightsError, match="No COCO panoptic weights of 'mask2former-r50'"):
        load_generator("mask2former-r50")


def test_random_weights_follow_the_seed_and_change_no_generator(tiny: Mask2Former) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, other = (random_mask2former("mask2former-swin-t", seed, TINY) for seed in (3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert again.identity() == tiny.identity() != other.identity() and tiny.weights == "random"
    image = photo(64, 64)
    assert torch.equal(again.propose([image])[0].masks, tiny.propose([image])[0].masks)
    assert not torch.allclose(other.propose([image])[0].masks, tiny.propose([image])[0].masks)


@pytest.mark.parametrize(
    ("name", "parameters"),  # in millions, as Mask2Former's Table 1 prints them
    [("r50", 44), ("swin-t", 47), ("swin-s", 69), ("swin-b", 107), ("swin-l", 216)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = random_mask2former(f"mask2former-{name}").model
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == parameters
    assert model.config.num_queries == (200 if name == "swin-l" else 100) and tuple(RECIPES) == MASK2FORMERS


def test_names() -> None:
    with pytest.raises(UsageError, match="Did you mean: mask2former-swin-b"):
        load_generator("mask2former-swinb")
    with pytest.raises(UsageError, match="'grid' has no weights; 'file' was given"):
        load_generator("grid", "file")
    assert generator_names()[-3:] == ["grid", "oracle", "noisy-oracle"]
    assert mask2former_weights.FILES[0] == "model.safetensors"


@pytest.mark.parametrize("name", ["oracle", "noisy-oracle"])
def test_no_truth_is_an_error(name: str) -> None:
    generator = load_generator(name)
    for truths in (None, [None]):
        with pytest.raises(UsageError, match=f"'{name}' makes its masks from the true segments.*e.g. grid"):
            generator.propose([photo(32, 32)], truths)


def test_the_oracle_has_every_segment() -> None:
    [found, none] = Oracle().propose([photo(30, 40), photo(30, 40)], [truth(), torch.full((4, 5), -1)])
    assert found.masks.unique().tolist() == [-10, 10] and found.objectness is None
    assert torch.equal(found.masks > 0, torch.stack([truth() == index for index in (2, 5, 9)]))
    assert none.masks.shape == (0, 4, 5)


def test_the_noisy_oracle_is_as_far_off_as_it_is_told() -> None:
    image, segments = photo(60, 80), truth_masks(truth())
    [exact] = NoisyOracle(0, 0).propose([image], [truth()])
    assert iou(segments, exact.masks > 0).amax(1).tolist() == [1, 1, 1] and len(exact.masks) == 3
    best = []
    for strength in (0.2, 0.5, 1.0):
        many = [NoisyOracle(strength, 0, seed).propose([image], [truth()])[0].masks > 0 for seed in range(12)]
        best.append(float(torch.stack([iou(segments, masks).amax(1).mean() for masks in many]).mean()))
    assert 1 > best[0] > best[1] > best[2] > 0.4
    [first, second] = NoisyOracle(0.5, 6).propose([image, photo(60, 80, seed=9)], [truth(), truth()])
    assert len(first.masks) >= 9 and (
        first.masks.shape != second.masks.shape or not torch.equal(*(x.masks for x in (first, second)))
    )
    assert torch.equal(first.masks, NoisyOracle(0.5, 6).propose([image], [truth()])[0].masks)
    with pytest.raises(UsageError, match="strength 2"):
        NoisyOracle(2)


def test_rectangles_cover_the_image_at_every_scale() -> None:
    found = rectangles((12, 16), 2)
    assert found.shape == (1 + 9 + 49, 12, 16) and bool(found.any(dim=0).all())
    assert found[0].all() and found[1].sum() == 12 * 16 / 4 and found[10].sum() == 12 * 16 / 16
    assert len({tuple(mask.flatten().tolist()) for mask in found}) == 59
    assert rectangles((3, 2), 2).shape == (59, 3, 2)  # smaller than the smallest


def test_the_tree_merges_what_is_alike_first() -> None:
    """Three cells of one histogram, then two of another, in a row: the clearest nodes are those."""
    counts = np.array([[9.0, 0, 0], [8, 1, 0], [9, 0, 0], [0, 1, 8], [0, 0, 9]])
    nodes = sorted(merge_tree(counts, (1, 5)), key=lambda node: -node.cost)
    assert [sorted(node.cells.tolist()) for node in nodes[:2]] in ([[0, 1, 2], [3, 4]], [[3, 4], [0, 1, 2]])
    joint, parts = np.array([26.0, 2, 17]), (np.array([26.0, 1, 0]), np.array([0, 1, 17.0]))
    surprise = [-(c[c > 0] * np.log(c[c > 0] / c.sum())).sum() for c in (joint, *parts)]
    assert nodes[0].cost == pytest.approx(surprise[0] - surprise[1] - surprise[2]) == nodes[1].cost


def test_regions_follow_textures_of_generated_scenes() -> None:
    """Of six scenes: most segments have a region, and rectangles alone are far behind."""
    words = ["cat", "dog", "bus", "sky", "grass", "road", "sea", "sand", "chair"]
    better = []
    for seed in range(6):
        scene = render(words, 120, 160, seed)
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        segments = truth_masks(torch.from_numpy(scene.label).long())
        best = []
        for generator in (Grid(), Grid(regions=0)):
            [found] = generator.propose([image])
            logits = torch.nn.functional.interpolate(found.masks[None], size=(120, 160), mode="bilinear")[0]
            best.append(iou(segments, logits >= 0).amax(1))
        better.append(torch.stack(best))
    with_regions, rectangles_alone = torch.cat(better, dim=1).mean(dim=1).tolist()
    assert with_regions > 0.75 > 0.6 > rectangles_alone


def test_a_grid_is_deterministic_and_has_the_masks_it_is_told() -> None:
    image = photo(90, 120)
    before = torch.get_rng_state()
    [first], [second] = Grid(12, 1).propose([image]), Grid(12, 1).propose([image])
    assert torch.equal(first.masks, second.masks) and torch.equal(before, torch.get_rng_state())
    assert first.masks.shape == (12 + 10, 90, 120) and first.masks.abs().max() == 10
    assert Grid(12, 1).propose([photo(300, 400)])[0].masks.shape[1:] == (96, 128)
    flat = torch.full((3, 40, 40), 77, dtype=torch.uint8)
    assert Grid(12, 0).propose([flat])[0].masks.isfinite().all() and colour_regions(flat.float(), 12).isfinite().all()
    with pytest.raises(UsageError, match="levels 9"):
        Grid(levels=9)
