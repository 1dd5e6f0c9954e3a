"""Stable Diffusion 2 as an attention source: a tiny UNet and VAE of diffusers against computations by hand."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_clip import photo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("transformers") is None:
    pytest.skip("diffusers is not installed: pip install 'ovbench[sd2]'", allow_module_level=True)

from ovbench.errors import UsageError, WeightsError
from ovbench.networks import attention_base, attention_sd2
from ovbench.networks.attention import load_source
from ovbench.networks.attention_base import add_attention
from ovbench.networks.attention_sd2 import Recorder, SD2Source, add_upsampled, fitted
from ovbench.networks.attention_sd2_weights import HUB, TEXT, UNET, VAE, load_sd2, random_sd2

# The published architecture's classes, one level fewer: patch 2, sides are multiples of 8 pixels.
TINY_UNET: dict[str, Any] = {
    **UNET,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
TINY_VAE: dict[str, Any] = {
    **VAE,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def sharpen(source: SD2Source) -> SD2Source:
    """Queries and keys that make attention far from flat."""
    with torch.no_grad():
        for name, parameter in source.unet.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                parameter.mul_(6)
    return source


def tiny(seed: int = 0, size: int = 24) -> SD2Source:
    return sharpen(random_sd2(seed, unet=TINY_UNET, vae=TINY_VAE, size=size))


@pytest.fixture(scope="module")
def source() -> SD2Source:
    return tiny()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.stack([photo(40, 70, seed=1), photo(40, 70, seed=2)])


class Spy:
    """diffusers' own processor, keeping what each layer was given."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.ordinary = AttnProcessor2_0()
        self.seen: list[tuple[Any, Tensor]] = []

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append((attn, hidden_states))
        out: Tensor = self.ordinary(attn, hidden_states, *args, **kwargs)
        return out


def bilinear(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Matrix (H*W, h*w) of bilinear resizing from ``grid`` to twice as much, pixel centres aligned, in float64."""

    def axis(fine: int, coarse: int) -> Tensor:
        matrix = torch.zeros(fine, coarse, dtype=torch.float64)
        for row in range(fine):
            place = min(max((row + 0.5) * coarse / fine - 0.5, 0), coarse - 1)
            low = int(place)
            matrix[row, low] += 1 - (place - low)
            matrix[row, min(low + 1, coarse - 1)] += place - low
        return matrix

    return torch.kron(axis(size[0], grid[0]), axis(size[1], grid[1]))


def by_hand(source: SD2Source, images: Tensor) -> tuple[Tensor, Tensor]:
    """(attention, UNet output) with diffusers' own processors and dense matrices."""
    spies = Spy(), Spy()
    for spy, block in zip(spies, (source.unet.up_blocks[-1], source.unet.up_blocks[-2]), strict=True):
        for transformer in block.attentions:
            transformer.transformer_blocks[0].attn1.set_processor(spy)
    latents = source.latents(images)
    output = source.unet(latents, source.timestep, source.prompt.expand(len(images), -1, -1)).sample
    h, w = latents.shape[-2:]
    mean = torch.zeros(len(images), h * w, h * w, dtype=torch.float64)
    for spy, resize in zip(spies, (torch.eye(h * w).double(), bilinear((h, w), (h // 2, w // 2))), strict=True):
        maps = []
        for attn, x in spy.seen:
            q, k = attn.to_q(x).double(), attn.to_k(x).double()
            for part_q, part_k in zip(q.chunk(attn.heads, dim=-1), k.chunk(attn.heads, dim=-1), strict=True):
                maps.append((part_q @ part_k.mT / part_q.shape[-1] ** 0.5).softmax(dim=-1))
        up = resize @ torch.stack(maps).mean(dim=0) @ resize.T
        mean += 0.5 * up / up.sum(dim=-1, keepdim=True)
    return mean, output


def test_attention_by_hand(source: SD2Source, images: Tensor) -> None:
    with torch.inference_mode():
        found, grid = source.attention(images)
        expected, _ = by_hand(tiny(), images)
    assert grid == (8, 16) and found.shape == (2, 128, 128) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 128))
    assert found.std(dim=-1).median() > 0.3 / 128  # far from flat: the comparison means something


def test_the_unets_output_is_unchanged(source: SD2Source, images: Tensor) -> None:
    with torch.inference_mode():
        latents = source.latents(images)
        output = source.unet(latents, source.timestep, source.prompt.expand(2, -1, -1)).sample
        _, expected = by_hand(tiny(), images)
    assert [recorder.take()[1] for recorder in source.recorders] == [3 * 2, 3 * 4]  # layers x heads
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_only_the_two_finest_up_blocks_are_recorded(source: SD2Source) -> None:
    recorded = {name for name, processor in source.unet.attn_processors.items() if isinstance(processor, Recorder)}
    assert len(recorded) == 6
    assert all("attn1" in name and name.split(".")[:2] in (["up_blocks", "1"], ["up_blocks", "2"]) for name in recorded)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.modules())
    assert all(recorder.total is None for recorder in source.recorders)


def test_batch_repeat_and_input(source: SD2Source, images: Tensor) -> None:
    before = images.clone()
    with torch.inference_mode():
        both, _ = source.attention(images)
        again, _ = source.attention(images.float())
        single, _ = source.attention(images[1:])
    assert torch.equal(images, before)
    torch.testing.assert_close(again, both)
    torch.testing.assert_close(single[0], both[1], rtol=1e-4, atol=1e-5)  # 3e-6 on an AMD EPYC
    assert (both[0] - both[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (500, 30), (16, 16)])
def test_any_size(source: SD2Source, height: int, width: int) -> None:
    with torch.inference_mode():
        found, (h, w) = source.attention(torch.full((1, 3, height, width), 200))
    assert found.shape == (1, h * w, h * w) and found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, h * w))


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (512, 512, 512, (512, 512)),
        (375, 500, 512, (448, 576)),
        (500, 375, 512, (576, 448)),
        (1024, 2048, 512, (384, 704)),
        (30, 30, 1024, (1024, 1024)),
        (10, 4000, 512, (64, 10240)),
    ],
)
def test_fitted(height: int, width: int, size: int, expected: tuple[int, int]) -> None:
    assert fitted(height, width, size, 64) == expected


def test_area_hardly_depends_on_the_shape() -> None:
    areas = [h * w for ratio in (1, 1.2, 4 / 3, 1.5, 1.8, 2) for h, w in [fitted(1000, int(1000 * ratio), 512, 64)]]
    assert max(areas) <= 1.1 * 512**2 and min(areas) >= 0.9 * 512**2


def test_low_precision(source: SD2Source, images: Tensor) -> None:
    rough = tiny()
    rough.use_precision(torch.bfloat16)
    with torch.inference_mode():
        exact, _ = source.attention(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same, _ = source.attention(images)  # its own precision counts, not the caller's
            found, _ = rough.attention(images)
    assert torch.equal(same, exact) and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 128))
    assert (found - exact).abs().sum(dim=-1).median() < 0.2  # of 2 at most


# Streaming


class Largest(TorchDispatchMode):
    """The largest tensor that any operation allocated, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:  # else a view, or in place
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("held", [1, 700, 2**20])
def test_streamed_is_unstreamed(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(attention_base, "CPU_SCORES", held)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 60, 8, generator=generator) for _ in range(2))
    total = torch.ones(2, 60, 60)
    add_attention(total, q, k)
    torch.testing.assert_close(total, 1 + (q @ k.mT / 8**0.5).softmax(dim=-1).sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Beyond the sum itself nothing grows with N^2."""
    monkeypatch.setattr(attention_base, "CPU_SCORES", 20_000)
    monkeypatch.setattr(attention_sd2, "CPU_SCORES", 20_000)
    total = torch.zeros(2, 1024, 1024)
    q = torch.randn(2, 2, 1024, 8).to(dtype)
    with Largest() as adding:
        add_attention(total, q, q)
    assert adding.elements <= 20_000
    total = torch.zeros(2, 1024, 1024)
    with Largest() as upsampling:
        add_upsampled(total, torch.full((2, 256, 256), 1 / 256), (32, 32), (16, 16), 0.5)
    assert upsampling.elements <= 2 * 1024 * 256  # a quarter of the sum
    torch.testing.assert_close(total.sum(dim=-1), torch.full((2, 1024), 0.5))


def test_upsampling_in_strips_is_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    matrix = bilinear((6, 8), (3, 4))
    expected = matrix @ coarse.double() @ matrix.T
    expected = 1 + 0.25 * expected / expected.sum(dim=-1, keepdim=True)
    for held in (1, 500, 2**20):
        monkeypatch.setattr(attention_sd2, "CPU_SCORES", held)
        total = torch.ones(2, 48, 48)
        add_upsampled(total, coarse, (6, 8), (3, 4), 0.25)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_failed_forward_leaves_nothing(source: SD2Source, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sample: Tensor) -> Tensor:
        raise MemoryError

    with torch.inference_mode():
        before, _ = source.attention(images)
        monkeypatch.setattr(source.unet.conv_out, "forward", fail)
        with pytest.raises(MemoryError):
            source.attention(images)
        monkeypatch.undo()
        assert all(recorder.total is None for recorder in source.recorders)
        torch.testing.assert_close(source.attention(images)[0], before)


# Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 2 in diffusers' layout."""
    import diffusers
    import transformers

    path = tmp_path_factory.mktemp("sd2") / "tiny-sd2"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        diffusers.UNet2DConditionModel(**TINY_UNET).save_pretrained(path / "unet")
        diffusers.AutoencoderKL(**TINY_VAE).save_pretrained(path / "vae")
        small = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**TEXT, **small, "vocab_size": 5}))
        text.save_pretrained(path / "text_encoder")
    tokenizer = path / "tokenizer"
    tokenizer.mkdir()
    vocabulary = {"!": 0, "a</w>": 1, "b</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 77}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_a_folder(folder: Path, images: Tensor) -> None:
    import diffusers
    import transformers

    source = load_source("sd2", folder, size=24, timestep=7)
    assert isinstance(source, SD2Source)
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    with torch.inference_mode():
        prompt = text(torch.tensor([[3, 4] + [0] * 75])).last_hidden_state
        torch.testing.assert_close(source.prompt, prompt)
        parts = (
            diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
            diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        )
        expected = SD2Source(*parts, prompt, size=24, timestep=7, weights="", weights_sha256="")
        torch.testing.assert_close(source.attention(images)[0], expected.attention(images)[0])
    record = source.record()
    assert (record["attention"], record["attention_weights"], record["attention_random"]) == ("sd2", "tiny-sd2", False)
    assert (record["attention_size"], record["attention_timestep"], record["attention_patch"]) == (24, 7, 2)
    assert len(record["attention_weights_sha256"]) == 64
    assert "attention_averaged" not in record
    names = {name.split(".")[1] for name, _ in source.vae.named_parameters(prefix="vae")}
    assert names == {"encoder", "quant_conv"}  # what does not run is not kept
    assert record["attention_params"] == sum(p.numel() for m in (source.unet, source.vae) for p in m.parameters())
    assert not source.training and not any(p.requires_grad for p in source.parameters())


def test_latents_are_the_mode_scaled(folder: Path, images: Tensor) -> None:
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    source = load_sd2(folder, size=24)
    resized = F.interpolate(images.float(), (16, 32), mode="bilinear", antialias=True) / 255 * 2 - 1
    with torch.inference_mode():
        expected = vae.encode(resized).latent_dist.mean * 0.18215
        torch.testing.assert_close(source.latents(images), expected)


def test_timestep_and_size_matter(folder: Path, images: Tensor) -> None:
    with torch.inference_mode():
        one, late = (load_sd2(folder, size=24, timestep=step).attention(images)[0] for step in (1, 900))
        _, grid = load_sd2(folder, size=48).attention(images)
    assert not torch.allclose(one, late, rtol=1e-4, atol=1e-7)
    assert grid == (20, 32)


def test_half_precision_files(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "halves"
    shutil.copytree(folder, copy)
    for part in ("unet", "vae", "text_encoder"):
        [file] = (copy / part).glob("*.safetensors")
        save_file(
            {key: value.half() for key, value in load_file(file).items()},
            file.with_suffix(".fp16.safetensors"),
            {"format": "pt"},
        )
        file.unlink()
    source = load_sd2(copy, size=24)
    assert {p.dtype for p in source.parameters()} == {torch.float32}
    assert source.weights_sha256 != load_sd2(folder).weights_sha256


def test_wrong_folders_are_explained(folder: Path, tmp_path: Path) -> None:
    def complaint(change: Any = None) -> str:
        copy = tmp_path / "broken"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        if change is not None:
            change(copy)
        with pytest.raises(WeightsError) as caught:
            load_sd2(copy)
        return str(caught.value)

    def edit(path: Path, change: Any) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path, {"format": "pt"})

    unet = "unet/diffusion_pytorch_model.safetensors"
    assert "No weights" in complaint(lambda path: (path / unet).unlink())
    assert "unet, vae, text_encoder and tokenizer" in complaint(lambda path: shutil.rmtree(path / "text_encoder"))
    assert "Cannot read" in complaint(lambda path: (path / unet).write_bytes(b"nonsense"))
    assert "tokenizer" in complaint(lambda path: shutil.rmtree(path / "tokenizer"))
    drop = lambda path: edit(path / unet, lambda state: state.pop("conv_in.weight"))  # noqa: E731
    assert "does not fit the unet of 'sd2': missing: conv_in.weight" in complaint(drop)
    add = lambda path: edit(path / unet, lambda state: state.update(more=torch.ones(1)))  # noqa: E731
    assert "unknown: more" in complaint(add)
    spoil = lambda path: edit(path / unet, lambda state: state["conv_in.bias"].fill_(float("nan")))  # noqa: E731
    assert "NaN or infinity in conv_in.bias" in complaint(spoil)
    with pytest.raises(WeightsError, match="No weights"):
        load_sd2(tmp_path)


def test_parts_that_do_not_fit() -> None:
    import diffusers

    vae = {**TINY_VAE, "latent_channels": 3}
    with pytest.raises(WeightsError, match="its UNet takes 4 channels, its VAE gives 3"):
        random_sd2(unet=TINY_UNET, vae=vae)
    plain = {**TINY_UNET, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
    with pytest.raises(WeightsError, match="no self-attention"):
        random_sd2(unet=plain, vae=TINY_VAE)
    parts = diffusers.UNet2DConditionModel(**TINY_UNET), diffusers.AutoencoderKL(**TINY_VAE)
    with pytest.raises(WeightsError, match="a prompt of width 12, given is 13"):
        SD2Source(*parts, torch.zeros(1, 77, 13), weights="", weights_sha256="")


def test_options() -> None:
    for options, message in (
        ({"size": 4}, "attention_size=4: sd2 needs 8 pixels or more"),
        ({"timestep": 1000}, "attention_timestep=1000: sd2 has steps 0 .. 999"),
        ({"timestep": -1}, "attention_timestep=-1"),
    ):
        with pytest.raises(UsageError, match=message):
            random_sd2(unet=TINY_UNET, vae=TINY_VAE, **options)
    with pytest.raises(
        UsageError, match=r"'sd2' has no option attention_blocks. It has: attention_size, attention_timestep"
    ):
        load_source("sd2", "random", blocks="2")
    with pytest.raises(
        UsageError, match=r"'dinov2-s14' has no option attention_size or attention_timestep. It has: attention_blocks"
    ):
        load_source("dinov2-s14", "random", size=512, timestep=3)


def test_features_name_the_sources_that_have_them(source: SD2Source, images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"'sd2' has no patch features. Use dino-b8, .* or clip"):
        source.features(images)


def test_seeds(images: Tensor) -> None:
    state = torch.get_rng_state()
    one, same, other = tiny(0), tiny(0), tiny(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.weights_sha256 == same.weights_sha256 != other.weights_sha256
    assert one.record()["attention_random"] is True and one.weights == "random"
    assert torch.equal(one.prompt, same.prompt) and not torch.equal(one.prompt, other.prompt)
    with torch.inference_mode():
        assert torch.equal(one.attention(images)[0], same.attention(images)[0])


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for weights in ("random", None, "somewhere"):
        with pytest.raises(UsageError, match=r"needs diffusers: pip install 'ovbench\[sd2\]'"):
            load_source("sd2", weights)


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert all(
            "safetensors" in pattern or "json" in pattern or "tokenizer" in pattern for pattern in allow_patterns
        )
        if repository == "nobody/nothing":
            raise OSError("no such repository")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_sd2().weights == HUB
    assert load_sd2("somebody/a-copy").weights == "somebody/a-copy"
    with pytest.raises(WeightsError, match=r"no such repository.*unofficial copy.*attention_weights=FOLDER"):
        load_sd2("nobody/nothing")
    with pytest.raises(WeightsError, match="No weights"):
        load_sd2("./nobody/nothing")
    assert asked == [HUB, "somebody/a-copy", "nobody/nothing"]


def test_the_published_architecture() -> None:
    """Sizes of the real networks, on the meta device: 865.9 M and 34.2 M parameters, 64-pixel multiples, six layers."""
    import diffusers

    with torch.device("meta"):
        parts = diffusers.UNet2DConditionModel(**UNET), diffusers.AutoencoderKL(**VAE)
        source = SD2Source(*parts, torch.zeros(1, 77, 1024), weights="", weights_sha256="")
    assert sum(p.numel() for p in source.unet.parameters()) == 865_910_724
    assert source.params - 865_910_724 == 34_163_664
    assert (source.patch, source.multiple, source.size, source.timestep) == (8, 64, 512, 1)
    recorded = [name for name, value in source.unet.attn_processors.items() if isinstance(value, Recorder)]
    assert len(recorded) == 6 and {name[:11] for name in recorded} == {"up_blocks.2", "up_blocks.3"}
    heads = [layer.transformer_blocks[0].attn1.heads for i in (3, 2) for layer in source.unet.up_blocks[i].attentions]
    assert heads == [5] * 3 + [10] * 3
