"""Second image encoders: SAM through transformers, DINOv2 through timm, on small random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import photo
from torch import Tensor

from ovbench.errors import UsageError, WeightsError
from ovbench.networks import sam, visual
from ovbench.networks.sam import SAMS, SamEncoder, SamRecipe, SamSizes, load_sam, random_sam
from ovbench.networks.visual import load_visual

transformers = pytest.importorskip("transformers")
TINY = SamSizes(hidden=32, layers=6, heads=2, globals_at=(0, 2, 3, 5), mlp=64, patch=8, window=3, grid=8)


@pytest.fixture(scope="module")
def tiny() -> SamEncoder:
    return random_sam("sam-b", 3, TINY)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMS, "sam-b", SamRecipe(TINY, "facebook/sam-vit-base"))


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.stack([photo(height, width, seed=1), photo(height, width, seed=2)])


def of_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of SAM's releases, with parts of SAM that are not the encoder."""
    found = {"mask_decoder.iou_token.weight": torch.zeros(1, 4), "image_encoder.neck.0.weight": torch.zeros(2, 2, 1, 1)}
    for key, value in state.items():
        parts = [{"layers": "blocks", "projection": "proj"}.get(part, part) for part in key.split(".")]
        found["image_encoder." + ".".join(part.replace("layer_norm", "norm") for part in parts)] = value
    return found


def test_maps_are_the_hidden_states_of_transformers(tiny: SamEncoder) -> None:
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, global_attn_indexes=[0, 2, 3, 5], mlp_dim=64,
        patch_size=8, window_size=3, image_size=64, output_channels=16,
    )  # fmt: skip
    reference = transformers.SamVisionModel(config).eval()
    reference.vision_encoder.load_state_dict(tiny.model.state_dict(), strict=False)
    pixels = (images().float() - tiny.mean) / tiny.std
    seen = []
    hooks = [layer.register_forward_hook(lambda *a: seen.append(a[2])) for layer in reference.vision_encoder.layers]
    with torch.inference_mode():
        reference(pixels)
        found = tiny.maps(images())
    for hook in hooks:
        hook.remove()
    assert tiny.blocks == (2, 3, 5) and len(found) == 3
    for map_, index in zip(found, tiny.blocks, strict=True):
        assert map_.shape == (2, 32, 8, 8)
        torch.testing.assert_close(map_, seen[index].permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (40, 40), (96, 56), (8, 8)])
def test_any_size_and_two_images_are_twice_one(tiny: SamEncoder, size: tuple[int, int]) -> None:
    both = images(*size)
    with torch.inference_mode():
        found = tiny.maps(both)
        single = [tiny.maps(both[row : row + 1]) for row in range(2)]
    for level, map_ in enumerate(found):
        assert map_.shape == (2, 32, size[0] // 8, size[1] // 8) and map_.isfinite().all()
        torch.testing.assert_close(map_, torch.cat([one[level] for one in single]), rtol=1e-5, atol=1e-6)
    assert size == (8, 8) or not torch.allclose(found[-1][0], found[-1][1], atol=1e-3)


def test_images_are_resized_to_whole_patches(tiny: SamEncoder) -> None:
    assert tiny.sized(images(60, 44), 0).shape[-2:] == (64, 48)  # of two as near, the even one
    assert tiny.sized(images(60, 44), 104).shape[-2:] == (104, 104)
    same = images()
    assert tiny.sized(same, 0) is same


def test_random_weights_follow_the_seed_and_change_no_generator(tiny: SamEncoder) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, other = random_sam("sam-b", 3, TINY), random_sam("sam-b", 4, TINY)
    assert torch.equal(state, torch.get_rng_state())
    assert again.weights_sha256 == tiny.weights_sha256 != other.weights_sha256
    with torch.inference_mode():
        assert torch.equal(again.maps(images())[0], tiny.maps(images())[0])
        assert not torch.allclose(other.maps(images())[0], tiny.maps(images())[0])
    assert tiny.record()["visual_random"] and not any(p.requires_grad for p in tiny.parameters())


def test_lower_precision_is_close(tiny: SamEncoder) -> None:
    low = random_sam("sam-b", 3, TINY)
    low.use_precision(torch.bfloat16)
    with torch.inference_mode():
        exact = tiny.maps(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = low.maps(images())
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("layout", ["folder", "safetensors", "release"])
def test_files_load(tiny: SamEncoder, recipe: None, tmp_path: Path, layout: str) -> None:
    state = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    if layout == "release":
        path = tmp_path / "sam_vit_b.pth"
        torch.save(of_release(state), path)
    else:
        path = tmp_path if layout == "folder" else tmp_path / "model.safetensors"
        named = {f"vision_encoder.{key}": value for key, value in state.items()}
        extra = {
            "prompt_encoder.point_embed.0.weight": torch.zeros(1, 4),
            "vision_encoder.neck.conv1.weight": torch.zeros(1),
        }
        save_file({**named, **extra}, tmp_path / "model.safetensors")
    found = load_sam("sam-b", str(path))
    with torch.inference_mode():
        assert all(map(torch.equal, found.maps(images()), tiny.maps(images())))
    assert found.weights == path.name and len(found.weights_sha256) == 64 and not found.record()["visual_random"]


def test_files_that_do_not_fit_are_refused(
    tiny: SamEncoder, recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(state: dict[str, Tensor], message: str) -> None:
        path = tmp_path / "file.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        with pytest.raises(WeightsError, match=message):
            load_sam("sam-b", str(path))

    good = {f"vision_encoder.{key}": value for key, value in tiny.model.state_dict().items()}
    position = "vision_encoder.pos_embed"
    refused({key: value for key, value in good.items() if key != position}, "missing: pos_embed")
    refused({**good, "vision_encoder.more": torch.zeros(1)}, "unknown: more")
    refused({**good, position: torch.zeros(1, 4, 4, 32)}, r"pos_embed is \(1, 4, 4, 32\), needs \(1, 8, 8, 32\)")
    refused({**good, position: torch.full((1, 8, 8, 32), torch.nan)}, "NaN or infinity in pos_embed")
    refused({"visual.proj": torch.zeros(1)}, "no image encoder of SAM")
    with pytest.raises(WeightsError, match="No weights"):
        load_sam("sam-b", str(tmp_path / "nothing.pth"))

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    for published in (None, "facebook/sam-vit-base"):  # a record has the latter
        with pytest.raises(WeightsError, match=r"sam-vit-base\): no network.*visual=none"):
            load_sam("sam-b", published)
    with pytest.raises(WeightsError, match="no network"):
        load_visual("dinov2-b", "timm/vit_base_patch14_dinov2.lvd142m")
    with pytest.raises(UsageError, match="Did you mean: sam-b"):
        load_visual("sam_b")


def test_published_weights_come_from_the_hub(
    tiny: SamEncoder, recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"vision_encoder.{key}": value for key, value in tiny.model.state_dict().items()}, path)
    asked = []

    def fetch(*args: Any) -> str:
        asked.append(args)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    found = load_sam("sam-b")
    assert asked == [("facebook/sam-vit-base", "model.safetensors")] and found.weights == "facebook/sam-vit-base"
    with torch.inference_mode():
        assert torch.equal(found.maps(images())[0], tiny.maps(images())[0])


@pytest.mark.parametrize(
    ("name", "released", "neck"), [("sam-b", 89_670_912, 787_456), ("sam-l", 308_278_272, 852_992)]
)
def test_published_sizes(name: str, released: int, neck: int) -> None:
    with torch.device("meta"):
        model: Any = sam._create(SAMS[name].sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == released - neck
    assert SAMS[name].sizes.globals_at[-3:] == ((5, 8, 11) if name == "sam-b" else (11, 17, 23))


def test_dino_shows_the_same_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(visual.DINO, "dinov2-b", "dinov2-s14")  # the same with fewer channels
    encoder = load_visual("dinov2-b", "random")
    assert isinstance(encoder, visual.DinoEncoder) and encoder.blocks == (5, 8, 11)
    seen = encoder.sized(images(), 70)
    with torch.inference_mode():
        found = encoder.maps(seen)
        last = encoder.source.features(seen)
        normed = encoder.source.norm(found[-1].permute(0, 2, 3, 1))
    assert [tuple(map_.shape) for map_ in found] == [(2, 384, 5, 5)] * 3
    torch.testing.assert_close(normed, last)
    assert not encoder.train().training  # frozen for good
    assert load_visual("none") is None
