"""The one door from names to a model: run, Python, predict, mmseg's types, profile and a dumped config agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ovbench
from ovbench.cli.app import app
from ovbench.errors import UsageError, WeightsError
from ovbench.evaluate.config import mmengine_config
from ovbench.evaluate.expected import expected
from ovbench.evaluate.state import RunOptions
from ovbench.measure.profile.record import ProfileSpec
from ovbench.measure.profile.subject import build_subject
from ovbench.models import trained_file
from ovbench.models.build import build_model
from ovbench.models.resolve import resolve
from ovbench.registry import method_class, method_info, method_names
from ovbench.spec import RunSpec, protocol

CLASSES = ["road", "car", "sky"]
RECORDED = Path(__file__).with_name("specs_of_0_1.json")  # of demo runs on voc21


def save_trained(path, method, options, *, arch=None, **fields):
    """A file as 'ovbench train' leaves it, of a method on the built-in CLIP."""
    built = method_class(method).load("builtin", None, method_class(method).configure(options))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if not name.startswith("clip."):  # what is new is added at zero: a training moves it
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    about = trained_file.About(
        method=method, method_options=built.options(), arch=arch or built.clip.arch, dataset="ade20k",
        class_names=CLASSES, training="t", spec_hash="0", iterations=2, planned=2, **fields,
    )  # fmt: skip
    trained_file.save(path, built.public_state(), about)
    return path


@pytest.fixture(scope="module")
def fisa_file(tmp_path_factory):
    options = {"generator": "grid", "seve_residual": "false", "training_side": 0}
    return save_trained(tmp_path_factory.mktemp("fisa") / "model.safetensors", "fisa", options)


@pytest.fixture(scope="module")
def lsmseg_file(tmp_path_factory):
    options = {**method_class("lsmseg").OFFLINE_OPTIONS, "filter_k": 4}
    return save_trained(tmp_path_factory.mktemp("lsmseg") / "model.safetensors", "lsmseg", options)


def test_every_door_reads_the_header_of_a_trained_file(fisa_file):
    """Measured before: 27 to 100 % of the pixels of four images differed between run and Python, without a word."""
    name = str(fisa_file)
    options = resolve("fisa", name, {}).config
    assert options.seve_residual is False and options.generator == "grid"
    model = build_model("fisa", classes=CLASSES, weights=name)
    assert model.method.config == options
    assert ovbench.build_segmentor("fisa", classes=CLASSES, weights=name).model.method.config == options
    subject = build_subject(
        ProfileSpec(method="fisa", weights=name, classes=3, protocol=protocol("fisa"), input="64x64")
    )
    assert subject.network.method.config == options and subject.spec.method_options["trained_on"] == "ade20k"
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = build_model("fisa", classes=CLASSES, weights=name, method_options={"seve_residual": True})
    assert not torch.equal(model.seg_logits(images), plain.seg_logits(images))  # the option matters here


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    from ovbench.benchmarks.synth.copies import synth

    return synth("ade20k", tmp_path_factory.mktemp("data"), images=2, seed=3, size=(64, 96))


def test_a_run_a_foretold_run_and_a_dumped_config_have_the_trained_options(fisa_file, demo_data, tmp_path):
    spec = RunSpec(method="fisa", dataset="ade20k", weights=str(fisa_file), protocol={"name": "fisa", "short_side": 64})
    record = ovbench.run(spec, data_root=demo_data, results=tmp_path, workers=0, gallery=0)
    foretold = expected(spec, demo_data)
    told = record.spec.method_options
    assert told["seve_residual"] is False and told["trained_on"] == "ade20k"
    assert {**told, **foretold.spec.method_options} == told
    dumped = mmengine_config(spec, RunOptions(data_root=demo_data))["model"]["method_options"]
    assert dumped["seve_residual"] is False and dumped["generator"] == "grid"


def test_query_scope_of_a_trained_file_is_known_to_every_door(tmp_path):
    path = save_trained(tmp_path / "m.safetensors", "fisa", {"generator": "grid", "query_scope": "masks"})
    assert build_model("fisa", classes=CLASSES, weights=str(path)).method.config.query_scope == "masks"
    spec = ProfileSpec(method="fisa", weights=str(path), classes=3, protocol=protocol("fisa"), input="64x64")
    assert build_subject(spec).spec.method_options["query_scope"] == "masks"


def test_predict_of_a_trained_file_needs_no_options_and_refuses_another_method(lsmseg_file, tmp_path):
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "a.png")
    call = ["predict", str(tmp_path / "a.png"), "--classes", "road, car, sky", "--weights", str(lsmseg_file), "--json"]
    done = CliRunner().invoke(app, [*call, "-m", "lsmseg"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"] == "lsmseg"
    with pytest.raises(WeightsError, match="are of 'lsmseg', not of 'cat-seg': use --method lsmseg"):
        CliRunner().invoke(app, [*call, "-m", "cat-seg"], catch_exceptions=False)


def test_closed_set_methods_come_through_the_same_door():
    seg = ovbench.build_segmentor("fcn", classes=CLASSES, weights="random", arch="tiny", short_side=32)
    images = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    assert seg.model.query_words == CLASSES and not seg.model.takes_words
    assert seg.predict_labels(images, [(32, 48)])[0].shape == (32, 48)
    [features] = seg.extract_feat(list(images))
    assert features.ndim == 3 and features.dtype == torch.float32
    with pytest.raises(UsageError, match="'ovbench train' makes them"):
        ovbench.build_segmentor("fcn", classes=CLASSES)
    with pytest.raises(UsageError, match="reads no synonyms: 'sky, cloud'"):
        build_model("fcn", classes=[["sky", "cloud"], "road"], weights="random", arch="tiny")


@pytest.mark.parametrize("name", method_names(None))
def test_all_options_in_force_can_be_given_again(name):
    """What a dumped config says of the options makes the same config."""
    info = method_info(name)
    first = resolve(name, "builtin" if info.takes_words else "random", {}, demo=True)
    again = resolve(name, "builtin" if info.takes_words else "random", first.chosen())
    assert again.config == first.config


@pytest.mark.parametrize("stored", json.loads(RECORDED.read_text()), ids=lambda stored: stored["spec"]["method"])
def test_specs_that_version_0_1_recorded_keep_their_hash(stored):
    assert RunSpec(**stored["spec"]).spec_hash() == stored["spec_hash"]


def test_predict_takes_closed_set_methods_and_says_that_random_weights_mean_nothing(tmp_path):
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "a.png")
    call = [
        "predict",
        str(tmp_path / "a.png"),
        "--classes",
        "road, car",
        "--weights",
        "random",
        "--arch",
        "tiny",
        "-m",
        "fcn",
    ]
    done = CliRunner().invoke(app, [*call, "--overlay", str(tmp_path / "out.png")])
    assert done.exit_code == 0 and "Random weights: the answers mean nothing." in done.output
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width >= 56
