"""The closed-set networks as a whole: every host bare, with CAA and with ECAC; what trains, what is left out, what is saved."""

from __future__ import annotations

import csv
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import warm

from ovbench.errors import UsageError
from ovbench.measure.counters import count
from ovbench.measure.parameters import count_parameters
from ovbench.measure.profile.record import ProfileSpec
from ovbench.measure.profile.subject import build_subject
from ovbench.methods import closed_set, ecac, hosts, isnet, segnext
from ovbench.mm.compat import import_mmseg
from ovbench.models.trained_file import options_again
from ovbench.registry import closed_set_class, method_info
from ovbench.tables.method_defaults import changed_options
from ovbench.train.recipe import Recipe

K = 6
SMALL = {
    "": {"channels": 16},
    "caa": {"channels": 16, "center_channels": 12, "affinity_channels": 5},
    "ecac": {"channels": 16, "hidden": 12, "memory_loss_start": 0, "iv_start": 0},
}
IDS = list(closed_set.METHODS)


def _method(name: str, **options):
    cls = closed_set_class(name)
    addon = hosts.addon_and_host(name)[0] or ""
    return cls(name, cls.configure({**SMALL[addon], **options}))


def _network(name: str, *, training: bool = True, seed: int = 0, **options):
    """On the tiny encoder with narrow heads, and with every branch switched on that begins at a factor of 0.

    These are the residual branches, which ``init_weights`` would switch off, and CCNet's attention.
    """
    torch.manual_seed(seed)
    config = _method(name, **options).model_config(
        "tiny", K, training=training, class_frequencies=[9, 5, 4, 3, 2, 1] if training else None
    )
    network = _models().build(config)
    for module in network.modules():
        if type(module).__name__ == "CrissCrossAttention":
            torch.nn.init.ones_(module.gamma.scale)
    network.train(training)
    return network


@cache
def _models():
    closed_set.register()
    return import_mmseg().registry.MODELS


def _batch(batch: int = 2):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(batch, 3, 64, 64, generator=generator)
    labels = torch.randint(0, K, (batch, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :8] = 255
    return images, labels


def _losses(network):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    images, labels = _batch()
    found = network.loss(images, [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels])
    return {name: value for name, value in found.items() if "loss" in name}


def _logits(network, images):
    network.eval()
    with torch.no_grad():
        return network.decode_head(network.extract_feat(images))


def test_24_methods():
    assert len(IDS) == 24 and set(hosts.host_names()) <= set(IDS)
    for name in IDS:
        info, cls = method_info(name), closed_set_class(name)
        assert info.track == "closed-set" and info.protocol == "closed-set"
        assert hosts.default_encoder(hosts.addon_and_host(name)[1]) == cls.DEFAULT_ARCH
        assert changed_options(name, cls(name).options(), None) == {}  # tables read the defaults as text


@pytest.mark.parametrize("name", IDS)
def test_training_reaches_every_parameter(name):
    network = _network(name, auxiliary_head=True)
    if name.startswith("caa"):  # its contexts start at 0
        torch.nn.init.ones_(network.decode_head.caa.fusion[1].weight)
    losses = _losses(network)
    expected = {"decode.loss_ce", "aux.loss_ce"}
    if name.startswith("caa"):
        expected |= {"decode.coarse.loss_ce", "decode.loss_affinity"}
    if name.startswith("ecac"):
        own = {f"decode.loss_{each}" for each in ("rce_student", "rce_teacher", "rce_coarse", "kl", "iv", "memory")}
        expected = {"aux.loss_ce"} | own
    if name.endswith("isnet"):
        expected |= {"decode.loss_semantic"}
    assert set(losses) == expected and all(bool(value.isfinite()) for value in losses.values())
    sum(losses.values()).backward()
    parameters = dict(network.named_parameters())
    assert all(each.requires_grad for each in parameters.values())
    assert [key for key, each in parameters.items() if each.grad is None or not bool(each.grad.any())] == []
    assert all(bool(each.grad.isfinite().all()) for each in parameters.values())


@pytest.mark.parametrize("name", IDS)
def test_evaluation(name):
    """A network for evaluation takes what training saved, less what only training needs, and gives the same logits."""
    trained = _network(name)
    _losses(trained)  # norms and memory have seen a batch
    images = _batch(3)[0]
    expected = _logits(trained, images)
    bare = _network(name, training=False, seed=7)
    assert not bare.with_auxiliary_head
    state = trained.state_dict()
    extra = set(state) - set(bare.state_dict())
    assert all(key.startswith(("auxiliary_head.", "decode_head.teacher.")) for key in extra)
    assert any(key.startswith("decode_head.teacher.") for key in extra) == name.startswith("ecac")
    bare.load_state_dict({key: value for key, value in state.items() if not key.startswith("auxiliary_head.")})
    found = _logits(bare, images)
    assert torch.equal(found, expected) and found.shape[:2] == (3, K)
    assert torch.equal(_logits(bare, images), found)  # nothing is random, nothing is remembered
    for index in range(3):
        torch.testing.assert_close(_logits(bare, images[index : index + 1])[0], found[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["swin-t", "mscan-t"])
def test_heads_fit_other_encoders(arch):
    """On the meta device: shapes alone."""
    for name in IDS:
        config = _method(name).head_config(arch, K, training=False)
        head = _models().build(config).eval().to("meta")
        shapes = hosts.feature_shapes(((16, 16), (8, 8), (4, 4), (2, 2)), 2, arch)
        found = head([torch.empty(shape, device="meta") for shape in shapes])
        assert found.shape[:2] == (2, K)


@pytest.mark.parametrize("name", ["caa-psp", "ecac-psp", "isnet", "segnext"])
def test_losses_under_autocast_stay_near(name):
    plain, half = (_network(name, auxiliary_head=False) for _ in range(2))
    torch.manual_seed(1)  # dropout, and the bases of SegNeXt
    expected = _losses(plain)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _losses(half)
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=0.1, abs=0.02), key
    sum(found.values()).backward()
    assert all(bool(each.grad.isfinite().all()) for each in half.parameters())


def test_profile_of_a_head_with_options():
    spec = ProfileSpec(
        method="ecac-segnext",
        part="decode_head",
        method_options={"channels": "32", "hidden": "8"},
        device="cpu",
        classes=K,
    )
    subject = build_subject(spec)
    assert subject.forward_input == "C2 1x128x64x64, C3 1x320x32x32, C4 1x512x16x16"
    assert (subject.spec.arch, subject.spec.method_options["hidden"]) == ("mscan-b", 8)
    assert subject.network.host.channels == 32
    assert subject.network.teacher is not None  # no forward runs it, but the thesis counts its parameters
    with pytest.raises(UsageError, match="kl_weight"):
        build_subject(spec.model_copy(update={"method_options": {"kl_wieght": "1"}}))


def test_widths_of_segnext_follow_its_encoder():
    widths = {
        arch: hosts.head_config("segnext", encoder=arch)["channels"]
        for arch in ("mscan-t", "mscan-s", "mscan-b", "mscan-l")
    }
    assert widths == {"mscan-t": 256, "mscan-s": 256, "mscan-b": 512, "mscan-l": 1024}
    assert hosts.head_config("segnext")["in_channels"] == [128, 320, 512]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("psp", "_base_/models/pspnet_r50-d8.py"),
        ("ccnet", "_base_/models/ccnet_r50-d8.py"),
        ("deeplabv3", "_base_/models/deeplabv3_r50-d8.py"),
        ("deeplabv3plus", "_base_/models/deeplabv3plus_r50-d8.py"),
        ("uper", "_base_/models/upernet_r50.py"),
        ("segnext", "segnext/segnext_mscan-b_1xb16-adamw-160k_ade20k-512x512.py"),
    ],
)
def test_values_are_those_of_the_configs_of_mmseg(name, file):
    """Heads and auxiliary heads, apart from the number of classes and from norms, which are plain here."""
    from mmengine.config import Config

    theirs = Config.fromfile(Path(import_mmseg().__file__).parent / ".mim" / "configs" / file).model.to_dict()
    method = _method(name, channels=0)
    ours = method.model_config(method.DEFAULT_ARCH, 19, training=True)
    left_out = {"num_classes", "norm_cfg", "type", "loss_decode", "ham_kwargs"}
    heads = ["decode_head", *(["auxiliary_head"] if "auxiliary_head" in theirs else [])]
    assert set(heads) == {head for head in ours if head.endswith("_head")}
    for head in heads:
        expected = {key: value for key, value in theirs[head].items() if key not in left_out}
        found = {key: value for key, value in ours[head].items() if key not in left_out}
        assert found == expected, head
        weight = ours[head].get("loss_decode", {"loss_weight": 1.0})["loss_weight"]
        assert weight == theirs[head]["loss_decode"]["loss_weight"]
    if name == "segnext":
        assert theirs["decode_head"]["ham_kwargs"]["MD_R"] == ours["decode_head"]["ham_kwargs"]["MD_R"]
        assert theirs["decode_head"]["norm_cfg"] == ours["decode_head"]["norm_cfg"]


def test_the_auxiliary_head_is_a_switch_and_training_only():
    assert not _network("psp", auxiliary_head=False).with_auxiliary_head
    assert "auxiliary_head" not in _method("psp").model_config("tiny", K)
    head = _method("psp", channels=0).model_config("resnet50-v1c", K, training=True)["auxiliary_head"]
    assert (head["in_channels"], head["channels"], head["loss_decode"]["loss_weight"]) == (1024, 256, 0.4)


def test_configs_are_plain_data():
    import json

    for name in IDS:
        config = _method(name).model_config("swin-t", K, training=True, class_frequencies=[1] * K, weights="x.pth")
        assert json.loads(json.dumps(config))["type"] == "EncoderDecoder"
        assert config["backbone"] == {"type": "PretrainedEncoder", "encoder": "swin-t", "weights": "x.pth"}


def test_only_a_weighted_cross_entropy_needs_frequencies():
    assert [_method(name).needs_class_frequencies() for name in ("psp", "caa-psp", "ecac-psp")] == [False, False, True]
    assert not _method("ecac-psp", reweight=False).needs_class_frequencies()
    with pytest.raises(UsageError, match="kl_weight"):
        closed_set_class("ecac-psp").configure({"kl_wieght": 1})


def test_recipes_are_those_of_the_spec():
    for name in IDS:
        recipes = {benchmark: Recipe(**fields) for benchmark, fields in closed_set_class(name).RECIPES.items()}
        assert {"ade20k", "coco_stuff10k", "context59"} <= set(recipes)
        chapter = {
            key: (each.lr, each.weight_decay, each.iters, each.epochs, each.crop) for key, each in recipes.items()
        }
        if name.startswith("ecac"):
            assert chapter["ade20k"] == (0.01, 5e-4, None, 130, 512)
            assert chapter["context59"] == (0.001, 1e-4, None, 110, 480)
            assert chapter["coco_stuff10k"] == (0.001, 1e-4, None, 110, 512)
        else:
            assert chapter["ade20k"] == (0.02, 5e-4, 160_000, None, 512)
            assert chapter["context59"] == chapter["coco_stuff10k"] == (0.001, 1e-4, 60_000, None, 512)
        assert all(
            (each.optimizer, each.momentum, each.power, each.batch, each.ratio_range)
            == ("sgd", 0.9, 0.9, 16, (0.5, 1.75))
            for each in recipes.values()
        )


# --- rows of the ablation tables ---

NONE = {"memory_loss": False, "kl_weight": 0.0, "iv_weight": 0.0}
ROWS = {
    ("3.2", "FCN Baseline"): ("fcn", {}),
    ("3.2", "FCN + CC"): ("caa-fcn", {"affinity": False}),
    ("3.2", "FCN + SA"): ("caa-fcn", {"center": False}),
    ("3.2", "FCN + CC + SA"): ("caa-fcn", {}),
    ("3.3", "FCN Baseline"): ("fcn", {}),
    ("3.3", "FCN + intra-class"): ("caa-fcn", {"inter": False}),
    ("3.3", "FCN + inter-class"): ("caa-fcn", {"intra": False}),
    ("3.3", "FCN + intra + inter"): ("caa-fcn", {}),
    ("3.4", "FCN+CAA no aux, no aff"): ("caa-fcn", {"aux_weight": 0.0, "affinity_weight": 0.0}),
    ("3.4", "FCN+CAA aux"): ("caa-fcn", {"affinity_weight": 0.0}),
    ("3.4", "FCN+CAA aff"): ("caa-fcn", {"aux_weight": 0.0}),
    ("3.4", "FCN+CAA aux + aff"): ("caa-fcn", {}),
    ("4.2", "FCN baseline"): ("ecac-fcn", {"ecac": False, "reweight": False}),
    ("4.2", "+ L_rce"): ("ecac-fcn", {"ecac": False}),
    ("4.2", "+ ECAC + L_rce"): ("ecac-fcn", NONE),
    ("4.2", "+ ECAC + L_rce + L_mem"): ("ecac-fcn", {**NONE, "memory_loss": True}),
    ("4.2", "+ ECAC + L_rce + L_mem + L_KL"): ("ecac-fcn", {"iv_weight": 0.0}),
    ("4.2", "+ ECAC + L_rce + L_mem + L_KL + L_mse"): ("ecac-fcn", {}),
    ("4.4", "FCN baseline"): ("ecac-fcn", {"ecac": False, "reweight": False}),
    ("4.4", "ECAC (cosine update)"): ("ecac-fcn", {"memory_update": "cosine"}),
    ("4.4", "ECAC (masked centre update)"): ("ecac-fcn", {}),
    ("4.5", "DeepLabV3+"): ("deeplabv3plus", {}),
    ("4.5", "DeepLabV3+ + ECAC"): ("ecac-deeplabv3plus", {"calibration": False}),
    ("4.5", "DeepLabV3+ + ECAC + calibration"): ("ecac-deeplabv3plus", {}),
}


def _weights_row(row: str):
    """Settings of a row of Table 4.3, "alpha=1 beta=50"."""
    alpha, beta = (float(part.partition("=")[2]) for part in row.split()[:2])  # of two blocks
    return "ecac-fcn", {"kl_weight": alpha, "iv_weight": beta}


def test_every_ablation_row_is_a_setting(shared):
    with (shared / "published" / "published.csv").open(encoding="utf-8") as file:
        rows = {
            (each["table"], each["row"])
            for each in csv.DictReader(file)
            if each["source"] in ("thesis-caa", "thesis-ecac")
            and each["table"] in ("3.2", "3.3", "3.4", "4.2", "4.3", "4.4", "4.5")
        }
    settings = {key: ROWS[key] if key[0] != "4.3" else _weights_row(key[1]) for key in rows}
    assert set(ROWS) <= rows and len(settings) > 28
    seen = {}
    for name, options in settings.values():
        if (name, tuple(sorted(options.items()))) in seen:
            continue
        network = _network(name, **options)
        losses = _losses(network)
        sum(losses.values()).backward()
        seen[name, tuple(sorted(options.items()))] = set(losses)
        assert all(each.grad is not None for each in network.parameters()), (name, options)
    assert len(seen) > 18


# --- ISNet and SegNeXt ---


def test_region_means_against_a_loop():
    generator = torch.Generator().manual_seed(5)
    features, coarse = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, K, 4, 5, generator=generator)
    coarse[:, 2] = -9  # a class without a region
    found = isnet.region_means(features, coarse)
    for image in range(2):
        regions = coarse[image].argmax(0)
        assert 2 not in regions
        for y in range(4):
            for x in range(5):
                inside = regions == regions[y, x]
                weights = coarse[image, regions[y, x]][inside].softmax(0)
                torch.testing.assert_close(found[image, :, y, x], features[image][:, inside] @ weights)


def test_coarse_logits_of_isnet_learn_from_both_losses():
    network = _network("isnet", auxiliary_head=False)
    losses = _losses(network)
    weight = network.decode_head.isnet.coarse[2].weight
    for name in ("decode.loss_ce", "decode.loss_semantic"):
        assert bool(torch.autograd.grad(losses[name], weight, retain_graph=True)[0].any())


def test_isnet_has_the_size_of_its_parts():
    """By hand: 3x3 reduction and two 3x3 fusions, two correlations of width 256, two classifiers."""
    with torch.device("meta"):
        head = closed_set.build_head("isnet")
    d, w, k = 512, 256, 150
    attention = [(d, 2 * d), (d, d)]
    blocks = [9 * 2048 * d, 9 * 2 * d * d, 9 * 2 * d * d, d * d]
    blocks += [part for q, keys in attention for part in (q * w, w * w, keys * w, w * w, keys * w, w * d)]
    norms = 2 * (3 * d + d) + 2 * sum(5 * w + d for _ in attention)
    expected = sum(blocks) + norms + 2 * (d * k + k)
    assert count_parameters(head).total == expected == 20_874_540
    maps = [torch.empty(shape, device="meta") for shape in hosts.feature_shapes(hosts.default_grids("resnet50-v1c"))]
    n = 64 * 64
    convolutions = n * (sum(blocks) + 2 * d * k)
    assert count(lambda: head(maps), "modules").gmacs == pytest.approx(convolutions / 1e9, rel=1e-6)
    products = 2 * 2 * n * n * w + k * n * d  # two attentions, means of the regions
    assert count(lambda: head(maps), "torch").gmacs == pytest.approx((convolutions + products) / 1e9, rel=1e-6)


def test_segnext_repeats_itself_in_evaluation_only():
    images = _batch()[0]
    network = _network("segnext", training=False)
    found = _logits(network, images)
    torch.rand(5)
    assert torch.equal(_logits(network, images), found)
    bases = segnext.fixed_bases(2, 1, 8, 3)
    assert torch.equal(bases[0], bases[1]) and torch.allclose(bases.norm(dim=1), torch.ones(2, 3))
    ham = network.decode_head.hamburger.ham.train()
    features = torch.rand(1, 16, 4, 4)
    assert not torch.equal(ham(features), ham(features))


# --- ECAC in a network ---


def test_the_teacher_is_not_in_the_result():
    network = _network("ecac-uper")
    _losses(network)
    images = _batch()[0]
    expected = _logits(network, images)
    network.decode_head.teacher = None
    assert torch.equal(_logits(network, images), expected)


def _bank(head, features, labels):
    """Memory, known classes and steps of a head after two batches."""
    for shift in (0, 1):
        head.losses(features.roll(shift, 2), labels)
    return head.memory.clone(), head.seen.clone(), head.steps.clone()


def _bank_head():
    torch.manual_seed(0)
    host = hosts.head_config("fcn", K, in_channels=(4, 4, 4, 4), channels=8)
    ecac.register()
    return _models().build(ecac.head_config(host, reweight=False, hidden=6, memory_update="cosine"))


def _bank_batch():
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(4, 8, 5, 5, generator=generator)
    labels = torch.randint(0, 4, (4, 5, 5), generator=generator)
    labels[:2] = labels[:2].clamp_max(2)  # class 3 is in the second process only, 4 and 5 nowhere
    labels[0, 0] = 255
    return features, labels


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    features, labels = _bank_batch()
    half = slice(2 * rank, 2 * rank + 2)
    torch.save(_bank(_bank_head(), features[half], labels[half]), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_memory_of_two_processes_is_that_of_the_joined_batch(tmp_path):
    warm.context()
    torch.multiprocessing.start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = _bank(_bank_head(), *_bank_batch())
    for rank in (0, 1):
        memory, seen, steps = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        torch.testing.assert_close(memory, expected[0])
        assert torch.equal(seen, expected[1]) and seen.tolist() == [True] * 4 + [False] * 2 and int(steps) == 2


# --- plain mmseg configs ---

CONFIG = """
custom_imports = dict(imports=["ovbench.mm.heads"])
norm = dict(type="BN")
model = dict(
    type="EncoderDecoder",
    backbone=dict(type="ResNetV1c", depth=18, base_channels=8, stem_channels=8, strides=(1, 2, 1, 1),
                  dilations=(1, 1, 2, 4), norm_cfg=norm),
    decode_head=dict(type="{addon}", host=dict(type="{host}", in_channels=64, in_index=3, channels=8, num_classes=3,
                                               norm_cfg=norm), {switches}),
)
"""


def test_plain_configs_of_mmseg(run_python, tmp_path):
    wanted = {
        "CAAHead": ("PSPHead", "center_channels=4, affinity_channels=2"),
        "ECACHead": ("ISNetHead", "hidden=4"),
    }
    for addon, (host, switches) in wanted.items():
        text = CONFIG.format(addon=addon, host=host, switches=switches)
        (tmp_path / f"{addon}.py").write_text(text, encoding="utf-8")
    code = (
        "import sys, torch\nfrom mmengine.config import Config\n"
        f"for name in {list(wanted)}:\n"
        "    config = Config.fromfile(f'{name}.py')\n"
        "    from mmseg.registry import MODELS\n"
        "    network = MODELS.build(config.model).eval()\n"
        "    print(type(network.decode_head).__name__, tuple(network(torch.zeros(1, 3, 64, 64)).shape))"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == [f"{addon} (1, 3, 8, 8)" for addon in wanted], done.stderr


def test_importing_the_methods_loads_no_mmseg(run_python):
    code = "from ovbench.methods import closed_set; import sys; print({'mmseg', 'mmengine', 'mmcv'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"


OF_0_1 = {  # options that a file of 0.1 tells, and what its head has
    "caa-fcn": (
        {"center": True, "association_scale": False, "center_channels": 12, "affinity_channels": 5, "fusion_norm": True},
        {"transform", "query", "key", "fusion"},
    ),
    "ecac-fcn": ({"ecac": True, "hidden": 12, "memory_loss_start": 1000}, {"host", "student", "teacher", "memory", "seen", "steps"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_0_1)
def test_files_of_0_1_keep_their_network(name):
    """What came later is off in it, whatever the default is now."""
    options, parts = OF_0_1[name]
    again = options_again({**options, "channels": 16, "auxiliary_head": True}, closed_set_class(name))
    head = _network(name, **again).decode_head
    part = head.caa if name == "caa-fcn" else head
    assert {key.split(".")[0] for key in part.state_dict()} == parts
    losses = _losses(_network(name, **again))
    assert "decode.loss_rce_coarse" not in losses
    if name == "ecac-fcn":
        assert float(losses["decode.loss_iv"]) > 0  # from the first iteration on
