"""Closed-set networks under a protocol: equal to mmseg's own inference, and weights that say what they are of."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from ovbench.errors import UsageError, WeightsError
from ovbench.models import trained_file
from ovbench.models.build import Built, ModelSpec, build
from ovbench.models.closed_set import ClosedSetModel, views_inside
from ovbench.models.closed_set_weights import build_network, configured_method
from ovbench.spec import RunSpec, protocol

NAMES = ["road", "car", "sky", "tree", "person"]


@pytest.fixture(scope="module")
def network():
    return build_network(configured_method("caa-fcn", {}), "tiny", len(NAMES), seed=1).eval()


def pictures(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def by_mmseg(network, image, size, **test_cfg):
    """Labels and logits as mmseg's EncoderDecoder gives them for a normalised image."""
    from mmengine.config import ConfigDict

    segmentor = network.segmentor
    segmentor.test_cfg = ConfigDict(test_cfg)
    meta = {"ori_shape": size, "img_shape": tuple(image.shape[-2:]), "pad_shape": tuple(image.shape[-2:])}
    with torch.inference_mode():
        logits = segmentor.inference(network.normalise(image[None]), [meta])
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    return logits.argmax(0), logits


@pytest.mark.parametrize("test_cfg", [{"mode": "whole"}, {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)}])
def test_labels_are_those_of_mmseg(network, test_cfg):
    sides = {"crop": 48, "stride": 32} if test_cfg["mode"] == "slide" else {}
    chosen = protocol("closed-set", mode=test_cfg["mode"], **sides)
    model = ClosedSetModel(network, NAMES, chosen)
    images = pictures((64, 88), (72, 50))
    sizes = [(96, 132), (72, 50)]
    found = model.predict_labels(images, sizes)
    for image, size, labels in zip(images, sizes, found, strict=True):
        expected, logits = by_mmseg(network, image, size, **test_cfg)
        close = logits.topk(2, dim=0).values
        decided = close[0] - close[1] > 1e-5  # rounding may decide a tie either way
        assert decided.float().mean() > 0.99
        assert torch.equal(labels[decided], expected[decided])
        assert torch.allclose(model.seg_logits(image[None], size)[0], logits, atol=1e-5)
        assert len(labels.unique()) > 1


def test_several_scales_and_mirrored_against_a_loop(network):
    chosen = protocol("closed-set-ms", short_side=64, long_side=200, scales=(0.5, 1.0, 1.5))
    assert views_inside(chosen) and chosen.flip
    model = ClosedSetModel(network, NAMES, chosen)
    image, size = pictures((90, 120))[0], (90, 120)
    total = torch.zeros(len(NAMES), *size)
    for scale in chosen.scales:
        target = (round(64 * scale), round(64 * scale * 120 / 90))
        resized = F.interpolate(image[None].float(), size=target, mode="bilinear", align_corners=False)[0]
        for mirrored in (False, True):
            view = resized.flip(-1) if mirrored else resized
            _, logits = by_mmseg(network, view, size, mode="whole")
            total += (logits.flip(-1) if mirrored else logits).softmax(0)
    labels = model.predict_labels([image], [size])[0]
    close = total.topk(2, dim=0).values
    decided = close[0] - close[1] > 1e-5
    assert torch.equal(labels[decided], total.argmax(0)[decided]) and decided.float().mean() > 0.99
    single = ClosedSetModel(network, NAMES, protocol("closed-set", short_side=64))
    assert not torch.equal(single.predict_labels([image], [size])[0], labels)


def test_a_batch_is_its_images(network):
    model = ClosedSetModel(network, NAMES, protocol("closed-set", mode="slide", crop=48, stride=32))
    images = pictures((64, 88), (72, 50), (64, 88))
    sizes = [tuple(image.shape[-2:]) for image in images]
    together = model.predict_labels(images, sizes)
    for image, size, labels in zip(images, sizes, together, strict=True):
        assert (model.predict_labels([image], [size])[0] == labels).float().mean() > 0.999


def test_what_has_no_meaning_is_refused(network):
    with pytest.raises(UsageError, match="prob_thd is for open-vocabulary methods"):
        ClosedSetModel(network, NAMES, protocol("closed-set", prob_thd=0.1))
    with pytest.raises(UsageError, match=r"--scales: .*each above 0"):
        protocol("closed-set", scales=(0.0, 1.0))


def test_old_specs_keep_their_hash():
    """Fields that came later do not move the hash of a run that does not use them."""
    spec = RunSpec(method="clip", dataset="voc21")
    content = json.loads(spec.model_dump_json())
    assert content["protocol"]["scales"] == [1.0] and content["protocol"]["flip"] is False
    assert spec.spec_hash() == "8d91dae0856bedabdd10721693e3d85e2200ce759a62209fe5b8c54465151729"
    moved = spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"flip": True})})
    assert moved.spec_hash() != spec.spec_hash()


def about(**fields):
    given = {
        "method": "caa-fcn", "method_options": configured_method("caa-fcn", {}).options(), "arch": "tiny",
        "dataset": "ade20k", "class_names": NAMES,
        "training": "t", "spec_hash": "0", "iterations": 5, "planned": 10, **fields,
    }  # fmt: skip
    return trained_file.About(**given)


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / "model.safetensors"
    state = dict(network.state_dict())
    state["segmentor.auxiliary_head.conv_seg.weight"] = torch.zeros(1)  # only training needs it
    trained_file.save(path, state, about())
    return path


def load(path, **fields) -> Built:
    given = {"name": "caa-fcn", "options": {}, "arch": None, "weights": str(path), "class_names": NAMES, **fields}
    return build(
        ModelSpec(
            given["name"],
            given["class_names"],
            protocol("closed-set"),
            weights=given["weights"],
            arch=given["arch"],
            method_options=given["options"],
        )
    )


def test_trained_weights_come_back(network, saved):
    built = load(saved)
    assert built.arch == "tiny" and built.method == "caa-fcn" and len(built.weights_sha256) == 64
    assert built.partial == "weights of a trial: 5 of 10 iterations were trained" and built.activation is None
    own = network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in built.model.trunk.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "caa-psp"}, "of 'caa-fcn', not of 'caa-psp'"),
        ({"arch": "resnet50-v1c"}, "have the encoder 'tiny'"),
        ({"class_names": NAMES[::-1]}, "trained on the 5 classes of ade20k"),
        ({"options": {"inter": "false"}}, "trained with inter=True"),
        ({"weights": "missing.safetensors"}, "No weights file"),
    ],
)
def test_weights_of_something_else(saved, fields, message):
    with pytest.raises(WeightsError, match=message):
        load(saved, **fields)


def test_a_file_with_nan(network, tmp_path):
    state = dict(network.state_dict())
    state["segmentor.decode_head.conv_seg.bias"] = torch.full((len(NAMES),), float("nan"))
    trained_file.save(tmp_path / "bad.safetensors", state, about())
    with pytest.raises(WeightsError, match=r"NaN or infinity in segmentor\.decode_head\.conv_seg\.bias"):
        load(tmp_path / "bad.safetensors")


def test_a_file_that_does_not_fit(network, tmp_path):
    state = dict(network.state_dict())
    state.pop("segmentor.decode_head.conv_seg.weight")
    state["segmentor.decode_head.conv_seg.bias"] = torch.zeros(7)
    state["segmentor.other"] = torch.zeros(1)
    trained_file.save(tmp_path / "bad.safetensors", state, about())
    wanted = r"missing: decode_head.conv_seg.weight; not known: other; of another shape: decode_head.conv_seg.bias"
    with pytest.raises(WeightsError, match=wanted):
        load(tmp_path / "bad.safetensors")


def test_a_checkpoint_of_mmseg_loads(network, tmp_path):
    """Public ones have the segmentor's keys, and an auxiliary head that evaluation has no use for."""
    state = {f"{key}": value for key, value in network.segmentor.state_dict().items()}
    torch.save(
        {"state_dict": {**state, "auxiliary_head.conv_seg.bias": torch.zeros(3)}, "meta": {"epoch": 1}},
        tmp_path / "x.pth",
    )
    built = load(tmp_path / "x.pth", arch="tiny")
    assert built.partial is None and "trained_on" not in built.method_options
    loaded = built.model.trunk.state_dict()["segmentor.decode_head.conv_seg.bias"]
    assert torch.equal(loaded, state["decode_head.conv_seg.bias"])


def test_no_weights_are_told_how_to_get_them():
    with pytest.raises(UsageError, match="'ovbench train' makes them"):
        load("openai")
