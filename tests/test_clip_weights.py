from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import save_tiny, tiny_state

from ovbench.errors import OvbenchWarning, UsageError, WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.networks.activation import is_quick
from ovbench.networks.clip_weights import from_openai_format, load_clip, openai_config
from ovbench.networks.dense_clip import LastBlock


def test_openai_format_loads_by_itself(tmp_path: Path) -> None:
    clip = load_clip(str(save_tiny(tmp_path / "tiny.safetensors")))
    assert (clip.depth, clip.heads, clip.width, clip.embed_dim, clip.patch) == (12, 1, 64, 32, 16)
    assert clip.activation == "quickgelu"
    assert type(clip.blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert clip.image_size == (224, 224)
    assert len(clip.weights_sha256) == 64
    assert not any(p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_pt_files_with_openais_extras_and_fp16(tmp_path: Path, wrapper: str | None) -> None:
    state: dict[str, Any] = {key: value.half() for key, value in tiny_state().items()}
    state |= {
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    content = {f"module.{key}": value for key, value in state.items()} if wrapper else state
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "tiny.pt")
    clip = load_clip(str(tmp_path / "tiny.pt"))
    assert clip.blocks[0].ln_1.weight.dtype == torch.float32
    torch.testing.assert_close(clip.visual.proj, tiny_state()["visual.proj"].half().float())


def test_open_clip_state_dict_with_its_architecture(tmp_path: Path) -> None:
    state = open_clip.create_model("ViT-S-32-alt").state_dict()
    torch.save(state, tmp_path / "small.pt")
    clip = load_clip(str(tmp_path / "small.pt"), "ViT-S-32-alt")
    assert clip.activation == "gelu"
    assert torch.equal(clip.visual.proj, state["visual.proj"])
    assert load_clip(str(tmp_path / "small.pt"), "ViT-S-32-alt", activation="quickgelu").activation == "quickgelu"


def test_activation_of_openais_own_archives_wins_over_the_architectures(tmp_path: Path) -> None:
    state = {**open_clip.create_model("ViT-S-32-alt").state_dict(), "input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "openai.pt")
    assert load_clip(str(tmp_path / "openai.pt"), "ViT-S-32-alt").activation == "quickgelu"


def test_a_file_that_does_not_tell_its_activation_is_warned_of_or_refused(tmp_path: Path) -> None:
    exact = {key: value.contiguous() for key, value in tiny_state().items()}
    save_file({key: value * 1.001 for key, value in exact.items()}, tmp_path / "bare.safetensors")
    with pytest.warns(OvbenchWarning, match="Nothing in '.*bare.safetensors' says whether .* --activation gelu"):
        assert load_clip(str(tmp_path / "bare.safetensors")).activation == "quickgelu"
    assert load_clip(str(tmp_path / "bare.safetensors"), activation="gelu").activation == "gelu"
    half = {key: value.half() for key, value in open_clip.create_model("ViT-S-32-alt").state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    with pytest.raises(WeightsError, match=r"float16 values as OpenAI's releases do.*--activation quickgelu or"):
        load_clip(str(tmp_path / "half.pt"), "ViT-S-32-alt")
    assert load_clip(str(tmp_path / "half.pt"), "ViT-S-32-alt", activation="gelu").activation == "gelu"


def test_what_lies_beside_a_file_and_its_name_tell_its_activation(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in tiny_state().items()}
    save_file(state, tmp_path / "vit_b_16.safetensors")
    assert load_clip(str(tmp_path / "vit_b_16.safetensors")).activation == "quickgelu"
    torch.save(state, tmp_path / "vit_b_16-laion400m_e32-55e67d44.pt")  # the name of a release trained with GELU
    assert load_clip(str(tmp_path / "vit_b_16-laion400m_e32-55e67d44.pt")).activation == "gelu"
    assert is_quick(tmp_path / "x.pt", "d867053b" + 56 * "0", state, "auto", None, None)  # a release's hash
    assert not is_quick(tmp_path / "x.pt", "55e67d44" + 56 * "0", state, "auto", None, None)
    with pytest.raises(WeightsError, match=r"trained with GELU .* use --arch ViT-B-16, or force"):
        is_quick(tmp_path / "x.pt", "55e67d44" + 56 * "0", state, "auto", "ViT-B-16-quickgelu", True)
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 32}}', encoding="utf-8")
    assert load_clip(str(folder / "open_clip_model.safetensors")).activation == "gelu"
    (folder / "open_clip_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"Cannot read '.*open_clip_config.json'"):
        load_clip(str(folder / "open_clip_model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "not a CLIP ViT in OpenAI's format: it lacks visual.proj"),
        ({"visual.ln_post.weight": None}, "missing: visual.ln_post.weight"),
        ({"visual.ln_post.weight": torch.ones(7)}, r"visual.ln_post.weight is \(7,\), needs \(64,\)"),
        ({"extra": torch.ones(7)}, "unknown: extra"),
        ({"visual.ln_post.weight": torch.full((64,), float("nan"))}, "NaN or infinity in visual.ln_post.weight"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {**tiny_state(), **change}
    save_file(
        {key: value.contiguous() for key, value in state.items() if value is not None}, tmp_path / "bad.safetensors"
    )
    with pytest.raises(WeightsError, match=message):
        load_clip(str(tmp_path / "bad.safetensors"))


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit ViT-B-16: shapes differ: .* is .*, needs .*--arch"):
        load_clip(str(path), "ViT-B-16")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No weights file"):
        load_clip(str(tmp_path / "none.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(save_tiny(tmp_path / "tiny.safetensors").read_bytes()[:1000])
    with pytest.raises(WeightsError, match="Cannot read weights"):
        load_clip(str(tmp_path / "cut.safetensors"))
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "openai.pt"))
    with pytest.raises(WeightsError, match="TorchScript archive"):
        load_clip(str(tmp_path / "openai.pt"))


def test_foreign_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"visual.proj": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="Cannot read weights"):
        load_clip(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_random_weights_are_seeded_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (load_clip("random", "ViT-S-32-alt", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.visual.proj, second.visual.proj)
    assert not torch.equal(first.visual.proj, other.visual.proj)
    assert first.weights_sha256 == second.weights_sha256 != other.weights_sha256
    assert load_clip("random", "ViT-B-32-quickgelu").activation == "quickgelu"


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"Unknown architecture 'ViT-B16'. Did you mean: .*ViT-B-16"):
        load_clip("random", "ViT-B16")
    with pytest.raises(UsageError, match=r"Unknown weights tag for ViT-B-16 'opena'. Did you mean: openai"):
        load_clip("opena", "ViT-B-16")


def test_openai_tag_goes_through_open_clip_with_quickgelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path of ``--pretrained openai`` with the hub replaced by a local file."""
    import open_clip.factory

    state = open_clip.create_model("ViT-B-32", force_quick_gelu=True).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "hub.safetensors")
    asked: list[dict[str, Any]] = []

    def download(entry: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        asked.append(entry)
        return str(tmp_path / "hub.safetensors")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    clip = load_clip("openai", "ViT-B-32")
    assert asked[0]["quick_gelu"] is True
    assert clip.activation == "quickgelu"
    assert type(clip.blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert torch.equal(clip.visual.proj, state["visual.proj"])
    assert clip.weights_sha256 == sha256_of_file(tmp_path / "hub.safetensors")
    assert load_clip("laion2b_s34b_b79k", "ViT-B-32").activation == "gelu"
    with pytest.raises(UsageError, match="is a QuickGELU architecture"):
        open_clip_entry = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: open_clip_entry)
        load_clip("laion2b_s34b_b79k", "ViT-B-32-quickgelu")


def test_hub_models_bring_their_own_architecture_and_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip.factory

    config = {**open_clip.get_model_config("ViT-S-32-alt"), "quick_gelu": True}
    state = open_clip.create_model("ViT-S-32-alt").state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *a, **k: {"model_cfg": dict(config)})
    for module in (open_clip.factory, open_clip.pretrained):
        monkeypatch.setattr(module, "download_pretrained_from_hf", lambda *a, **k: str(tmp_path / "model.safetensors"))
    clip = load_clip("hf-hub:someone/small")
    assert clip.activation == "quickgelu" and clip.arch == "hf-hub:someone/small"
    assert torch.equal(clip.visual.proj, state["visual.proj"])


def test_offline_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    with pytest.raises(
        WeightsError, match=r"Could not get the weights 'openai' for ViT-B-16: cannot reach the hub .*--weights"
    ):
        load_clip("openai")


def test_openai_config_reads_the_shapes() -> None:
    config = openai_config(tiny_state(layers=5, width=128, grid=7), "tiny")
    assert config["vision_cfg"] == {"layers": 5, "width": 128, "head_width": 64, "patch_size": 16, "image_size": 112}
    assert config["text_cfg"] == {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


# Heads, which no shape tells


def wide(width: int = 1280, layers: int = 32, patch: int = 14, text: int = 1024) -> dict[str, torch.Tensor]:
    """A state dict of these shapes, without content: on the meta device."""
    with torch.device("meta"):
        model = open_clip.model.CLIP(
            64,
            vision_cfg={
                "layers": layers,
                "width": width,
                "head_width": 64,
                "patch_size": patch,
                "image_size": patch * 2,
            },
            text_cfg={"context_length": 77, "vocab_size": 100, "width": text, "heads": text // 64, "layers": 1},
        )
    return {key: value for key, value in model.state_dict().items() if key != "attn_mask"}


def heads(state: dict[str, torch.Tensor], **evidence: Any) -> tuple[int, int]:
    found = openai_config(state, "file.pt", **evidence)
    return found["vision_cfg"]["width"] // found["vision_cfg"]["head_width"], found["text_cfg"]["heads"]


@pytest.mark.parametrize("arch", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-B-16", "ViT-L-14-336", "ViT-S-32-alt"])
def test_heads_of_open_clips_shapes_are_its_own(arch: str) -> None:
    config = open_clip.get_model_config(arch)
    vision, text = config["vision_cfg"], config["text_cfg"]
    expected = vision["width"] // vision.get("head_width", 64), text["heads"]
    assert heads(wide(vision["width"], vision["layers"], vision["patch_size"], text["width"])) == expected


def test_heads_of_unknown_shapes_are_known_up_to_what_openai_has(tmp_path: Path) -> None:
    assert heads(wide(128, 5, 16, 64)) == (2, 1)
    assert heads(wide(1024, 5, 14, 512)) == (16, 8)
    for state in (wide(1280, 2, 14, 64), wide(1280, 32, 14, 768), wide(96, 12, 16, 64)):
        with pytest.raises(
            WeightsError, match=r"does not tell how many heads .* --arch, or put its open_clip_config.json"
        ):
            openai_config(state, "file.pt")
    with pytest.raises(WeightsError, match=r"of this width it has ViT-H-14, "):
        openai_config(wide(1280, 2, 14, 64), "file.pt")
    # OpenAI's own archives, and what a training wrote
    assert heads({**wide(1280, 2, 14, 64), "input_resolution": torch.tensor(28)}) == (20, 1)
    assert heads(wide(1280, 2, 14, 64), known="openai-format-ViT-2x1280-14-16heads") == (16, 1)
    assert heads(wide(1280, 2, 14, 1024), known="ViT-H-14") == (16, 16)
    with pytest.raises(WeightsError, match=r"ViT-H-14 says towers of width 1280 and 1024, but 'file.pt' has 1408"):
        heads(wide(1408, 2, 14, 1024), known="ViT-H-14")


def test_two_architectures_with_these_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-H-14", "ViT-H-14-narrow"])

    def config(name: str) -> Any:
        found = own("ViT-H-14")
        return found if name == "ViT-H-14" else {**found, "vision_cfg": {**found["vision_cfg"], "head_width": 64}}

    monkeypatch.setattr(open_clip, "get_model_config", config)
    with pytest.raises(WeightsError, match=r"shapes: 16 in ViT-H-14; 20 in ViT-H-14-narrow. Please name .*--arch"):
        heads(wide())
    assert heads(wide(), known="ViT-H-14-narrow") == (20, 16)


def test_a_config_beside_the_file_tells_its_heads(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in tiny_state(width=160).items()}
    path = tmp_path / "open_clip_model.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"width 160 .* --arch"):
        load_clip(str(path))
    beside = tmp_path / "open_clip_config.json"
    config = {"model_cfg": {"vision_cfg": {"width": 160, "head_width": 80}, "text_cfg": {"width": 64, "heads": 2}}}
    beside.write_text(json.dumps(config), encoding="utf-8")
    clip = load_clip(str(path))
    assert clip.heads == 2 and clip.clip.transformer.resblocks[0].attn.num_heads == 2
    assert clip.arch == "openai-format-ViT-12x160-16-2heads"  # not that of a record which took another number
    config["model_cfg"]["vision_cfg"]["width"] = 768
    beside.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"says towers of width 768 and 64, but .* has 160 and 64"):
        load_clip(str(path))


def test_the_number_of_heads_moves_the_features(tmp_path: Path) -> None:
    """Why it matters: the same tensors give other features, without any error."""
    state = tiny_state(width=128)
    found = []
    for count in (2, 4):
        clip = from_openai_format(dict(state), "tiny", "ab" * 32, known=f"openai-format-ViT-12x128-16-{count}heads")
        assert clip.heads == count
        found.append(clip.dense(torch.ones(1, 3, 64, 64), LastBlock()))
    assert not torch.allclose(*found, atol=1e-3)


def test_the_command_line_refuses_and_the_foretold_run_knows_them(
    tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    from ovbench.evaluate.expected import _clip_file
    from ovbench.spec import RunSpec, validated

    path = tmp_path / "w" / "odd.safetensors"
    path.parent.mkdir()
    save_file({key: value.contiguous() for key, value in tiny_state(layers=2, width=160, grid=2).items()}, path)
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    done = run_cli("predict", "a.png", "-m", "clip", "--weights", str(path), "--classes", "sky, road", "--out", "b.png")
    assert done.returncode == 4, done.stderr
    assert "does not tell how many heads" in done.stderr and "--arch" in done.stderr
    spec = validated(RunSpec, {"method": "clip", "dataset": "voc21", "weights": str(path)})
    with pytest.raises(WeightsError, match="does not tell how many heads"):
        _clip_file(spec, path)
    config = {"model_cfg": {"vision_cfg": {"width": 160, "head_width": 80}, "text_cfg": {"width": 64, "heads": 1}}}
    (path.parent / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert _clip_file(spec, path).fields["arch"] == load_clip(str(path)).arch == "openai-format-ViT-2x160-16-2heads"


def test_trained_files_tell_their_heads(tmp_path: Path) -> None:
    """Of CAT-Seg by its header or the config beside it, of a mask method by the name of the architecture."""
    from ovbench.methods.cat_seg import CATSeg, CATSegConfig
    from ovbench.methods.fisa import FISA
    from ovbench.models.trained_file import About, save

    arch = "openai-format-ViT-12x160-16-2heads"
    clip = from_openai_format(tiny_state(width=160), "tiny", "ab" * 32, arch=arch)
    config = CATSegConfig(hidden=32, layers=1, grid=12, window=6)
    told: dict[str, Any] = {
        "arch": arch, "dataset": "coco_stuff", "class_names": ["a"], "training": "x", "spec_hash": "ab" * 32,
        "iterations": 1, "planned": 1,
    }  # fmt: skip
    trained = CATSeg(clip, config)
    about = About(method="cat-seg", method_options=trained.options(), **told)
    save(tmp_path / "cat.safetensors", trained.public_state(), about)
    assert CATSeg.load(str(tmp_path / "cat.safetensors"), None, config).clip.heads == 2
    save_file({key: value.contiguous() for key, value in trained.public_state().items()}, tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match=r"does not tell how many heads .*Please put the open_clip_config.json of"):
        CATSeg.load(str(tmp_path / "bare.safetensors"), None, config)
    fisa = FISA(clip, FISA.configure({"generator": "grid"}))
    about = About(method="fisa", method_options=fisa.options(), **told)
    save(tmp_path / "fisa.safetensors", fisa.public_state(), about)
    again = FISA.load(str(tmp_path / "fisa.safetensors"), None, FISA.configure({"generator": "grid"}))
    assert again.clip.heads == 2 and again.clip.arch == arch
