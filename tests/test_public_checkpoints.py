"""Public checkpoints of mmsegmentation: recognised, loaded, and computing what mmseg's own network computes with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ovbench import benchmarks
from ovbench.cli.app import run_command
from ovbench.errors import WeightsError
from ovbench.methods import closed_set, public, segnext
from ovbench.mm.compat import import_mmseg
from ovbench.models.build import ModelSpec, build
from ovbench.models.closed_set_start import arch_of, start_from
from ovbench.models.closed_set_weights import build_network, configured_method, segmentor_state
from ovbench.networks import encoders
from ovbench.spec import protocol

NAMES = ["road", "sidewalk", "building", "wall", "fence", "pole"]
ADE = benchmarks.get("ade20k").class_names


def published(file):
    """A config of mmseg with plain batch norms and nothing to download, and its text as mmseg keeps it in a checkpoint."""
    from mmengine.config import Config

    config = Config.fromfile(Path(import_mmseg().__file__).parent / ".mim" / "configs" / file)

    def plain(part):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key == "type" and value == "SyncBN":
                part[key] = "BN"
            elif isinstance(value, (dict, list)):
                plain(value)

    plain(config.model)
    config.model.pretrained = config.model.backbone.init_cfg = config.model.data_preprocessor = None
    return config


def mmseg_network(config, device="cpu"):
    from mmengine.registry import init_default_scope

    closed_set.register()
    init_default_scope("mmseg")
    with torch.device(device):
        return import_mmseg().registry.MODELS.build(copy.deepcopy(config.model))


def on_meta(config, monkeypatch):
    """Without storage; MSCAN's constructor reads numbers of a linspace, which must have some."""
    linspace = torch.linspace
    with monkeypatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"}))
        return mmseg_network(config, "meta")


def told(content, monkeypatch, name="x.pth"):
    """What is read of a file with such a content."""
    monkeypatch.setattr(public, "read_content", lambda path: content)
    public._read.cache_clear()
    try:
        return public._read(Path(name), 0, 0)
    finally:
        public._read.cache_clear()


BASE = {
    "pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py": ("psp", ("resnet50-v1c",), {}),
    "fcn/fcn_r101-d8_4xb4-160k_ade20k-512x512.py": ("fcn", ("resnet101-v1c",), {"concat_input": True}),
    "ccnet/ccnet_r50-d8_4xb4-160k_ade20k-512x512.py": ("ccnet", ("resnet50-v1c",), {}),
    "deeplabv3/deeplabv3_r101-d8_4xb4-160k_ade20k-512x512.py": ("deeplabv3", ("resnet101-v1c",), {}),
    "deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py": ("deeplabv3plus", ("resnet50-v1c",), {}),
    "upernet/upernet_r50_4xb4-160k_ade20k-512x512.py": ("uper", ("resnet50-v1c-d32",), {}),
    "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py": ("uper", ("swin-t",), {}),
    "swin/swin-base-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py": ("uper", ("swin-b-w7",), {}),
    "swin/swin-base-patch4-window12-in1k-384x384-pre_upernet_8xb2-160k_ade20k-512x512.py": ("uper", ("swin-b",), {}),
    "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py": ("segnext", ("mscan-t",), {}),
    "segnext/segnext_mscan-l_1xb16-adamw-160k_ade20k-512x512.py": ("segnext", ("mscan-l",), {}),
}


@pytest.mark.parametrize("file", BASE)
def test_keys_and_shapes_of_the_published_networks(file, monkeypatch):
    """Every published file has its config's keys; ours has the same and nothing else, but for the auxiliary head."""
    config = published(file)
    state = on_meta(config, monkeypatch).state_dict()
    found = told({"state_dict": state, "meta": {"config": config.pretty_text}}, monkeypatch)
    assert (found.method, found.arches, dict(found.options)) == BASE[file]
    assert found.num_classes == 150 and found.dataset == "ade20k" and list(found.class_names) == list(ADE)
    method = configured_method(found.method, dict(found.options))
    ours = type(config)({"model": method.model_config(found.arches[0], 150)})
    own = {f"segmentor.{key}": value.shape for key, value in on_meta(ours, monkeypatch).state_dict().items()}
    theirs = {key: value.shape for key, value in segmentor_state(state).items() if "auxiliary" not in key}
    assert own == theirs
    if (
        "resnet" in found.arches[0]
    ):  # without its config the file may be of either stride: what mmseg's host has comes first
        bare = told({"state_dict": state}, monkeypatch)
        assert bare.arches[0] == found.arches[0] and len(bare.arches) == 2 and bare.class_names is None
        if found.method != "uper":
            assert told({"state_dict": state}, monkeypatch, "a_r50-d8_512x512_b.pth").arches == found.arches


REFUSED = {
    "fcn/fcn-d6_r50-d16_4xb2-40k_cityscapes-512x1024.py": ("strides=", "output stride of 16"),
    "deeplabv3/deeplabv3_r101-d16-mg124_4xb2-40k_cityscapes-512x1024.py": ("multi_grid=", "output stride of 16"),
    "pspnet/pspnet_r50-d32_4xb2-80k_cityscapes-512x1024.py": ("strides=", "output stride of 32"),
    "pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-769x769.py": ("align_corners=True", "align_corners=True"),
    "pspnet/pspnet_r50b-d8_4xb2-80k_cityscapes-512x1024.py": ("7x7 convolution", "7x7 convolution"),
    "danet/danet_r50-d8_4xb4-160k_ade20k-512x512.py": ("none of the hosts", "none of the hosts"),
}


@pytest.mark.parametrize("file", REFUSED)
def test_what_this_network_would_compute_otherwise_is_refused(file, monkeypatch):
    """With the config that mmseg keeps in the file, and by the published name alone."""
    config = published(file)
    state = on_meta(config, monkeypatch).state_dict()
    name = file.rpartition("/")[2].replace(".py", ".pth")
    with pytest.raises(WeightsError, match=REFUSED[file][0]):
        told({"state_dict": state, "meta": {"cfg": config.pretty_text}}, monkeypatch)
    with pytest.raises(WeightsError, match=REFUSED[file][1]):
        told({"state_dict": state}, monkeypatch, name)


# --- values: mmseg's own classes at small widths, through real files ---

SMALL = {
    "small-d32": encoders._resnet("small-d32", 18, base=16, stride=32),
    "small-swin": encoders._swin("small-swin", 12, (1, 1, 1, 1), 1, 7, 224),
    "small-mscan": encoders._mscan("small-mscan", (8, 16, 24, 32), (1, 1, 1, 1), 0.1),
}


@pytest.fixture(autouse=True)
def _small_encoders(monkeypatch):
    monkeypatch.setattr(encoders, "_ENCODERS", {**encoders._ENCODERS, **SMALL})


HOSTS = {
    "psp": ("pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py", "tiny"),
    "fcn": ("fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py", "tiny"),
    "ccnet": ("ccnet/ccnet_r50-d8_4xb4-160k_ade20k-512x512.py", "tiny"),
    "deeplabv3": ("deeplabv3/deeplabv3_r50-d8_4xb4-160k_ade20k-512x512.py", "tiny"),
    "deeplabv3plus": ("deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py", "tiny"),
    "uper": ("upernet/upernet_r50_4xb4-160k_ade20k-512x512.py", "small-d32"),
    "uper-swin": ("swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py", "small-swin"),
    "segnext": ("segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py", "small-mscan"),
}


def small(name):
    """mmseg's network of a published config with small widths, weights at random, and the config."""
    file, arch = HOSTS[name]
    config, sizes = published(file), encoders.encoder(arch)
    model, widths = config.model, sizes.channels
    for key in ("depth", "stem_channels", "base_channels", "embed_dims", "depths", "num_heads"):
        if key in sizes.backbone:
            model.backbone[key] = sizes.backbone[key]
    for head in ("decode_head", "auxiliary_head"):
        if head in model:
            part = model[head]
            at = part.in_index
            part.update(channels=32, num_classes=len(NAMES))
            part.in_channels = [widths[i] for i in at] if isinstance(at, list) else widths[at]
    if name == "deeplabv3plus":
        model.decode_head.c1_in_channels = widths[0]
    if name == "segnext":
        model.decode_head.ham_channels = 32
    torch.manual_seed(5)
    network = mmseg_network(config).train(False)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.dtype.is_floating_point:
                value.normal_(0, 0.2)
            if key.endswith(("running_var", "bn.weight", "norm1.weight", "norm2.weight", "gn.weight", "gamma.scale")):
                value.abs_().add_(0.5)
    if name == "segnext":  # mmseg draws new bases at every call; ours are drawn once
        network.decode_head.hamburger.ham._build_bases = lambda b, s, d, r, device=None: segnext.fixed_bases(b, s, d, r)
    return network, config


def save(path, network, config, *, version=0, names=NAMES, **extra):
    """As mmseg 0.x publishes it (the old format of torch), or as 1.x does, with its log buffers."""
    state = network.state_dict()
    if version == 0:
        meta = {"mmseg_version": "0.5", "config": config.pretty_text, "CLASSES": tuple(names), "PALETTE": [[1, 2, 3]]}
        torch.save({"meta": meta, "state_dict": state, **extra}, path, _use_new_zipfile_serialization=False)
        return path
    import numpy as np
    from mmengine.logging import MessageHub

    hub = MessageHub("a-training")
    hub.update_scalar("train/loss", 0.5)
    hub.update_info("best", np.float64(3.0))
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": list(names), "palette": [[1, 2, 3]]}}
    torch.save({"meta": meta, "state_dict": state, "message_hub": hub.state_dict(), **extra}, path)
    return path


def model_of(method, path, names=NAMES, **fields):
    return build(ModelSpec(method, names, protocol("closed-set"), weights=str(path), **fields))


@pytest.mark.parametrize("name", HOSTS)
def test_the_logits_are_those_of_mmseg(name, tmp_path):
    network, config = small(name)
    path = save(tmp_path / "x.pth", network, config, version=name in ("segnext", "psp"))
    built = model_of(name.partition("-")[0], path)
    assert built.arch == HOSTS[name][1] and built.model.trunk.segmentor is not network
    image = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0)).float()
    with torch.inference_mode():
        batch = built.model.normalise(image)
        meta = {"ori_shape": (64, 96), "img_shape": (64, 96), "pad_shape": (64, 96), "padding_size": [0] * 4}
        expected = network.inference(batch, [meta])
        found = built.model.seg_logits(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def psp(tmp_path_factory):
    """A small public PSPNet on the six classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "_ENCODERS", {**encoders._ENCODERS, **SMALL})
        network, config = small("psp")
    return save(tmp_path_factory.mktemp("public") / "psp.pth", network, config)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("fcn", {}, "is of 'psp' on tiny, not of 'fcn': use --method psp"),
        ("caa-psp", {}, "without what 'caa-psp' puts around it: evaluate it with --method psp"),
        ("psp", {"arch": "resnet50-v1c"}, "have the encoder 'tiny': leave '--arch resnet50-v1c' away"),
        ("psp", {"names": NAMES[:5]}, "tells 6 classes apart, not 5"),
        ("psp", {"names": [*NAMES[:4], "pole", "fence"]}, "Class 4 of 'psp.pth' is 'fence', here it is 'pole'"),
        ("psp", {"method_options": {"channels": "16"}}, "trained with channels=32: leave '-o channels=16' away"),
    ],
)
def test_a_public_file_of_something_else(psp, method, fields, message):
    with pytest.raises(WeightsError, match=message):
        model_of(method, psp, **fields)


def test_a_file_names_the_benchmark_that_has_its_classes(monkeypatch):
    config = published("pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py")
    state = on_meta(config, monkeypatch).state_dict()
    mmseg = import_mmseg()
    classes = mmseg.datasets.ADE20KDataset.METAINFO["classes"]
    found = told({"state_dict": state, "meta": {"dataset_meta": {"classes": classes}}}, monkeypatch)
    found.require_classes(ADE)  # one of mmseg's names has a blank at its end
    with pytest.raises(WeightsError, match=r"150 classes apart, not 19.*--dataset ade20k has them"):
        found.require_classes(benchmarks.get("cityscapes").class_names)
    with pytest.raises(WeightsError, match="names 2 classes, but its classifier has 150"):
        told({"state_dict": state, "meta": {"CLASSES": ("a", "b")}}, monkeypatch)


def test_foreign_objects_of_other_kinds_are_refused_by_name(psp, tmp_path):
    from datetime import timedelta

    content = torch.load(psp, weights_only=True)
    torch.save({**content, "when": timedelta(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"holds an object of datetime\.timedelta"):
        model_of("psp", tmp_path / "x.pth")


def test_records_of_fcn_say_what_they_said_before():
    assert "concat_input" not in configured_method("fcn", {}).options()
    assert configured_method("fcn", {"concat_input": True}).options()["concat_input"] is True


# --- trainings that start from one ---


def network_of(name, **options):
    method = configured_method(name, {"channels": 32, **options})
    frequencies = [1] * 6 if method.needs_class_frequencies() else None
    return build_network(method, "tiny", 6, seed=1, training=True, class_frequencies=frequencies), method


@pytest.mark.parametrize("name", ["psp", "caa-psp", "ecac-psp"])
def test_a_training_starts_from_the_host(psp, name):
    network, method = network_of(name)
    start = start_from(psp, network, method, "tiny", NAMES)
    network.load_state_dict(start.state, strict=False)
    theirs = torch.load(psp, weights_only=True)["state_dict"]
    head = network.segmentor.decode_head
    host = getattr(head, "host", head)
    assert torch.equal(host.bottleneck.conv.weight, theirs["decode_head.bottleneck.conv.weight"])
    assert torch.equal(host.conv_seg.weight, theirs["decode_head.conv_seg.weight"])
    assert torch.equal(
        network.segmentor.backbone.layer4[1].bn2.running_var, theirs["backbone.layer4.1.bn2.running_var"]
    )
    assert start.method == "psp" and set(start.taken) >= {"encoder", "host" if name != "psp" else "decode head"}
    if name == "caa-psp":
        assert torch.equal(head.conv_seg.weight, theirs["decode_head.conv_seg.weight"]) and "decode head" in start.fresh
    assert "auxiliary head" in start.taken and not start.left
    assert "start from 'psp'" in start.told()


def test_a_training_starts_from_a_training_of_the_host(psp, tmp_path):
    from ovbench.models import trained_file

    network, method = network_of("psp")
    about = trained_file.About(
        method="psp", method_options=method.options(), arch="tiny", dataset="cityscapes", class_names=NAMES, training="t",
        spec_hash="0", iterations=1, planned=1,
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    state = network.state_dict()
    trained_file.save(path, {key: value for key, value in state.items() if "auxiliary" not in key}, about)
    ours, caa = network_of("caa-psp")
    start = start_from(path, ours, caa, "tiny", NAMES)
    key = "psp_modules.1.1.conv.weight"
    assert torch.equal(start.state[f"segmentor.decode_head.host.{key}"], state[f"segmentor.decode_head.{key}"])
    assert "auxiliary head" in start.fresh and not start.left


def test_a_training_on_other_classes_starts_from_the_rest(psp):
    network, method = network_of("ecac-psp")
    names = NAMES[::-1]
    with pytest.raises(WeightsError, match="With --new-classes"):
        start_from(psp, network, method, "tiny", names)
    start = start_from(psp, network, method, "tiny", names, new_classes=True)
    assert arch_of(psp, method) == "tiny" and not any("conv_seg" in key for key in start.state)
    assert "segmentor.decode_head.host.bottleneck.conv.weight" in start.state and start.left["host"] == 2


@pytest.mark.parametrize(
    ("name", "options", "arch", "names", "message"),
    [
        ("caa-fcn", {}, "tiny", NAMES, "is of 'psp', which 'caa-fcn' cannot start from: it fits --method psp"),
        ("caa-psp", {"channels": 16}, "tiny", NAMES, "host with channels=32: give -o channels=32"),
        ("caa-psp", {}, "swin-t", NAMES, "has the encoder tiny, not swin-t: give --arch tiny"),
        ("caa-psp", {}, "tiny", NAMES[::-1], "Class 0 of 'psp.pth' is 'road', here it is 'pole'"),
    ],
)
def test_a_start_that_does_not_fit(psp, name, options, arch, names, message):
    network, method = network_of(name, **options)
    with pytest.raises(WeightsError, match=message):
        start_from(psp, network, method, arch, names)


# --- ovbench predict: the file tells method, encoder, options and classes ---


@pytest.fixture
def picture(tmp_path, monkeypatch):
    from PIL import Image
    from tiny_clip import photo

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(64, 96, 1).permute(1, 2, 0).numpy()).save("photo.png")
    return "photo.png"


def predicted(picture, capsys, *arguments):
    import json

    code = run_command(
        ["predict", picture, "--device", "cpu", "--short-side", "64", "--out", "l.png", "--json", *arguments]
    )
    found = capsys.readouterr()
    return code, json.loads(found.out) if code == 0 else None, " ".join(found.err.split())


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """A small public FCN on Cityscapes' classes, with the concatenation that public FCNs have, and a training of ours."""
    from ovbench.models import trained_file

    folder = tmp_path_factory.mktemp("predict")
    names = list(benchmarks.get("cityscapes").class_names)
    method = configured_method("fcn", {"concat_input": True, "channels": 32})
    network = build_network(method, "tiny", 19, seed=3)
    meta = {"CLASSES": tuple(names), "PALETTE": [[0, 0, 0]] * 19}
    state = network.segmentor.state_dict()
    torch.save({"meta": meta, "state_dict": state}, folder / "fcn_r18-d8_512x1024_80k_cityscapes.pth")
    torch.save({"state_dict": state}, folder / "fcn_r18-d8_nameless.pth")
    about = trained_file.About(
        method="fcn", method_options={"channels": 32, "concat_input": True}, arch="tiny", dataset="cityscapes",
        class_names=names, training="t", spec_hash="0", iterations=1, planned=1,
    )  # fmt: skip
    trained_file.save(folder / "model.safetensors", dict(network.state_dict()), about)
    return folder


@pytest.mark.parametrize("file", ["fcn_r18-d8_512x1024_80k_cityscapes.pth", "model.safetensors"])
@pytest.mark.parametrize("named", [("-m", "fcn"), ()], ids=["with -m", "without"])
def test_predict_needs_no_classes(cityscapes, picture, capsys, file, named):
    from PIL import Image

    code, report, err = predicted(picture, capsys, *named, "--weights", str(cityscapes / file))
    assert code == 0, err
    benchmark = benchmarks.get("cityscapes")
    assert [entry["name"] for entry in report["classes"]] == list(benchmark.class_names) and report["method"] == "fcn"
    assert "Classes: the 19 of the weights, those of cityscapes." in err
    with Image.open("l.png") as label:
        palette = label.getpalette()
    assert palette[:57] == [value for colour in benchmark.palette for value in colour]


def test_predict_says_what_is_missing(cityscapes, picture, capsys):
    weights = str(cityscapes / "fcn_r18-d8_nameless.pth")
    code, _, err = predicted(picture, capsys, "--weights", weights)
    assert code == 2 and "does not say on which classes 'fcn' was trained" in err and "--classes ade20k" in err
    code, report, err = predicted(picture, capsys, "--weights", weights, "--classes", "cityscapes")
    assert code == 0 and len(report["classes"]) == 19, err
    code, _, err = predicted(picture, capsys, "--weights", weights, "--classes", "voc21")
    assert code == 3 and "tells 19 classes apart, not 21" in err
    code, _, err = predicted(picture, capsys, "-m", "clip", "--weights", "random")
    assert code == 2 and "'clip' reads words: give --classes" in err
