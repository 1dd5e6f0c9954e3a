"""Encoders of closed-set networks: what they promise, and weights from files against the networks these came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ovbench.errors import UsageError, WeightsError
from ovbench.mm.compat import import_mmseg
from ovbench.networks import encoder_weights, encoders
from ovbench.networks.encoder_weights import build_encoder, load_encoder


def _build(config):
    torch.manual_seed(0)
    return _evaluated(import_mmseg().registry.MODELS.build(config))


def _evaluated(module):
    module.eval()  # of mmseg's backbones, this returns nothing
    return module


def _small_vit(crop: int = 64):
    return encoders._vit("small", 24, 4, 2, crop)


def _saved(tmp_path, state, name="weights.pth"):
    path = tmp_path / name
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", encoders.encoder_names())
def test_maps_have_the_promised_channels_and_strides(name):
    """With few layers, which change no shape, and on the meta device."""
    found = encoders.encoder(name)
    few = {"depths": [1, 1, 1, 1]} if "depths" in found.backbone else {}
    few = {"num_layers": 4, "out_indices": (0, 1, 2, 3)} if name == "vit-l" else few
    maps = _build({**found.backbone, **few}).to("meta")(torch.empty(1, 3, 128, 96, device="meta"))
    if found.neck is not None:
        maps = _build(found.neck).to("meta")(maps)
    assert [tuple(each.shape) for each in maps] == [
        (1, channels, 128 // stride, 96 // stride)
        for channels, stride in zip(found.channels, found.strides, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet50-v1c", "_base_/models/fcn_r50-d8.py"),
        ("resnet101-v1c", "fcn/fcn_r101-d8_4xb4-160k_ade20k-512x512.py"),
        ("resnet18-v1c", "fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py"),
        ("swin-t", "_base_/models/upernet_swin.py"),
        ("swin-s", "swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"),
        ("swin-b", "swin/swin-base-patch4-window12-in1k-384x384-pre_upernet_8xb2-160k_ade20k-512x512.py"),
        ("swin-l", "swin/swin-large-patch4-window12-in22k-384x384-pre_upernet_8xb2-160k_ade20k-512x512.py"),
        ("mscan-t", "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py"),
        ("mscan-s", "segnext/segnext_mscan-s_1xb16-adamw-160k_ade20k-512x512.py"),
        ("mscan-b", "segnext/segnext_mscan-b_1xb16-adamw-160k_ade20k-512x512.py"),
        ("mscan-l", "segnext/segnext_mscan-l_1xb16-adamw-160k_ade20k-512x512.py"),
    ],
)
def test_values_are_those_of_the_configs_of_mmseg(name, file):
    """Apart from norms, which are plain where mmseg's are synchronised, and from files to download."""
    from mmengine.config import Config

    theirs = Config.fromfile(Path(import_mmseg().__file__).parent / ".mim" / "configs" / file).model
    ours = encoders.encoder(name)
    left_out = {"norm_cfg", "init_cfg", "pretrained"}
    expected = {key: value for key, value in theirs.backbone.to_dict().items() if key not in left_out}
    found = {key: value for key, value in ours.backbone.items() if key in expected}
    defaults = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "qk_scale": None}  # not written out in ours
    assert _listed({**{key: defaults[key] for key in expected if key not in found}, **found}) == _listed(expected)
    assert list(ours.channels)[2] == theirs.get("auxiliary_head", {"in_channels": ours.channels[2]})["in_channels"]
    mine = {"stem_channels", "base_channels", "norm_cfg"}
    assert {key for key in ours.backbone if key not in expected} <= mine


def _listed(config):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50-v1c", 23.53), ("swin-t", 27.52), ("mscan-t", 3.9), ("mscan-b", 26.2)]
)
def test_parameters(name, millions):
    """ResNet-50 without classifier 23.51 M, the deep stem adds .02; Swin-T 27.52; MSCAN as in SegNeXt's paper."""
    backbone = import_mmseg().registry.MODELS.build(encoders.encoder(name).backbone)
    assert sum(parameter.numel() for parameter in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_tiny_one_computes():
    found = encoders.encoder("tiny")
    maps = _build(found.backbone)(torch.randn(1, 3, 64, 64))
    assert tuple(each.shape[1] for each in maps) == found.channels == (16, 32, 64, 128)
    assert found.strides == (4, 8, 8, 8)


def test_a_config_is_ones_own():
    config = encoders.encoder("mscan-t").backbone
    config["embed_dims"].append(1)
    assert encoders.encoder("mscan-t").backbone["embed_dims"] == [32, 64, 160, 256]
    with pytest.raises(UsageError, match="resnet50-v1c"):
        encoders.encoder("resnet50")


def test_names_load_neither_torch_nor_mmseg(run_python):
    code = (
        "from ovbench.networks import encoders; encoders.encoder_config('swin-b')\n"
        "import sys; print({'torch', 'mmseg'} & set(sys.modules))"
    )
    assert run_python("-c", code).stdout.strip() == "set()"


# --- weights from files ---


def test_own_keys_come_back(tmp_path):
    """As mmseg saves them: the backbone inside a network, beside heads."""
    source = _build(encoders.encoder("tiny").backbone)
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    path = _saved(tmp_path, {"state_dict": {**state, "decode_head.conv_seg.bias": torch.zeros(3)}})
    found = build_encoder("tiny", path).state_dict()
    assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())


def test_a_network_keeps_them_when_it_is_initialised(tmp_path):
    source = _build(encoders.encoder("tiny").backbone).state_dict()
    path = _saved(tmp_path, {key: value + 0.5 for key, value in source.items()})
    encoder_weights.register()
    parts = encoders.encoder_config("tiny", str(path))
    head = {"type": "FCNHead", "in_channels": 128, "in_index": 3, "channels": 4, "num_convs": 1, "num_classes": 3}
    head |= {"concat_input": False, "norm_cfg": {"type": "BN"}}
    network = _build({"type": "EncoderDecoder", **parts, "decode_head": head})
    network.init_weights()
    assert torch.equal(network.backbone.layer4[1].conv2.weight, source["layer4.1.conv2.weight"] + 0.5)
    assert {key for key in network.state_dict() if key.startswith("backbone.")} == {f"backbone.{key}" for key in source}


@torch.no_grad()
def test_timm_resnet_with_the_deep_stem(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = timm.create_model("resnet50c", features_only=True, output_stride=8, out_indices=(1, 2, 3, 4)).eval()
    whole = timm.create_model("resnet50c").eval()
    theirs.load_state_dict(whole.state_dict(), strict=False)
    ours = _evaluated(build_encoder("resnet50-v1c", _saved(tmp_path, whole.state_dict())))
    image = torch.randn(1, 3, 64, 64)
    for own, other in zip(ours(image), theirs(image), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


def test_a_resnet_with_the_plain_stem_is_refused(tmp_path):
    path = _saved(tmp_path, {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 2048)})
    with pytest.raises(WeightsError, match="7x7 convolution"):
        build_encoder("resnet50-v1c", path)


@pytest.mark.parametrize("naming", ["timm", "authors"])
@torch.no_grad()
def test_swin_of_others(tmp_path, naming):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = timm.create_model("swin_tiny_patch4_window7_224").eval()
    state = theirs.state_dict()
    for value in state.values():
        value.copy_(torch.randn_like(value) * 0.05) if value.is_floating_point() else None
    if naming == "authors":  # merging at the end of a stage
        state = {
            key.replace(f"layers.{n}.downsample", f"layers.{n - 1}.downsample"): value
            for key, value in state.items()
            for n in [int(key.split(".")[1]) if "downsample" in key else 0]
        }
    ours = _evaluated(build_encoder("swin-t", _saved(tmp_path, {"model": state})))
    image = torch.randn(1, 3, 224, 224)
    # C3, whose norm is new. On C4, one window, mmseg shifts where the others do not.
    expected = torch.nn.functional.layer_norm(theirs.layers[:3](theirs.patch_embed(image)), (384,))
    torch.testing.assert_close(ours(image)[2].permute(0, 2, 3, 1), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(ours.norm3.weight, theirs.norm.weight)
    merging = ours.stages[2].downsample.reduction.weight
    assert merging.shape == (768, 1536) and not torch.equal(merging, theirs.layers[3].downsample.reduction.weight)


@pytest.mark.parametrize("size", [64, 32])
@torch.no_grad()
def test_vit_of_timm(tmp_path, size):
    """Of the network's own grid, and of a smaller one, whose position embedding is resized."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=size, embed_dim=24, depth=4, num_heads=2, num_classes=5
    ).eval()
    ours = _build(_small_vit().backbone)
    load_encoder(ours, _saved(tmp_path, theirs.state_dict()))
    if size == 64:
        image = torch.randn(1, 3, 64, 64)
        expected = theirs.forward_intermediates(image, norm=False, intermediates_only=True)[-1]
        torch.testing.assert_close(ours(image)[-1], expected, rtol=1e-4, atol=1e-5)
    else:
        grid = theirs.pos_embed[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic")
        torch.testing.assert_close(ours.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
        assert torch.equal(ours.pos_embed[:, :1], theirs.pos_embed[:, :1])


def test_vit_of_mmpretrain(tmp_path):
    ours = _build(_small_vit().backbone)
    state = {
        key.replace("attn.attn.in_proj_", "attn.qkv.").replace("attn.attn.out_proj", "attn.proj"): value + 1
        for key, value in ours.state_dict().items()
    }
    load_encoder(ours, _saved(tmp_path, {"state_dict": {f"backbone.{key}": value for key, value in state.items()}}))
    assert torch.equal(ours.layers[1].attn.attn.in_proj_weight, state["layers.1.attn.qkv.weight"])


def test_swin_of_another_window(tmp_path):
    """The table of relative positions of a window of 12 from one of 7."""
    ours = _build({**encoders.encoder("swin-t").backbone, "embed_dims": 12, "window_size": 12})
    state = _build({**encoders.encoder("swin-t").backbone, "embed_dims": 12}).state_dict()
    name = "stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
    state[name] = torch.linspace(0, 1, 13).repeat(13)[:, None].repeat(1, 3)  # a slope along x
    load_encoder(ours, _saved(tmp_path, state))
    table = ours.state_dict()[name].unflatten(0, (23, 23))
    assert torch.allclose(table, table[:1].expand_as(table), atol=1e-5) and bool((table[0].diff(dim=0) > 0).all())


def test_what_does_not_fit_is_listed(tmp_path):
    state = _build(encoders.encoder("tiny").backbone).state_dict()
    del state["stem.0.weight"]
    state["layer1.0.conv1.weight"] = torch.zeros(1)
    state["layer9.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        build_encoder("tiny", _saved(tmp_path, state))
    message = str(caught.value)
    assert "missing: stem.0.weight" in message and "unknown: layer9.weight" in message
    assert "another shape: layer1.0.conv1.weight" in message
    with pytest.raises(WeightsError, match=r"no\.pth"):
        build_encoder("tiny", tmp_path / "no.pth")
    with pytest.raises(WeightsError, match="not square"):
        vit = _build(_small_vit().backbone)
        load_encoder(vit, _saved(tmp_path, {**vit.state_dict(), "pos_embed": torch.zeros(1, 7, 24)}))


def test_a_file_with_nan(tmp_path):
    state = _build(encoders.encoder("tiny").backbone).state_dict()
    state["layer1.0.conv1.weight"] = torch.full_like(state["layer1.0.conv1.weight"], float("nan"))
    with pytest.raises(WeightsError, match=r"NaN or infinity in layer1\.0\.conv1\.weight"):
        build_encoder("tiny", _saved(tmp_path, state))


def test_a_pickle_with_code_is_not_run(tmp_path):
    with pytest.raises(WeightsError, match="Cannot read"):
        build_encoder("tiny", _saved(tmp_path, {"state_dict": {"a": encoders.Encoder}}))
