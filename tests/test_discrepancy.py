"""The discrepancy methods: bases, attention sources, and how a run uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import photo, save_tiny

from ovbench.cli.app import run_command
from ovbench.cli.inputs import choose
from ovbench.errors import UsageError
from ovbench.models.method import Method, Solver
from ovbench.models.patch_model import OpenVocabModel
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.discrepancy import class_posterior, discrepancy_maps
from ovbench.ops.jbu import jbu
from ovbench.registry import method_class, method_names
from ovbench.spec import protocol

CLASSES = ["sky", ["road", "street"], "car", "person"]
SOLVERS = ["op", "mv", "opmv", "kl", "propagate"]
PATCHES = [name for name in method_names() if method_class(name).MODEL == Method.MODEL]
BASES = [name for name in PATCHES if not name.startswith("discrepancy-")]


def test_methods_that_average_views_are_no_bases(clip: DenseCLIP) -> None:
    with pytest.raises(UsageError, match="'cat-seg' gives logits of views"):
        method_class("discrepancy-op").build(clip, {"base": "cat-seg", "attention": "clip"})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DenseCLIP:
    return load_clip(str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")))


def solver_of(clip: DenseCLIP, name: str = "op", **options: Any) -> Solver:
    method = method_class(f"discrepancy-{name}").build(clip, {"attention": "clip", **options})
    assert isinstance(method, Solver)
    return method


def model_of(clip: DenseCLIP, name: str = "op", fields: dict[str, Any] | None = None, **options: Any) -> OpenVocabModel:
    return OpenVocabModel(solver_of(clip, name, **options), CLASSES, protocol("direct-seg", **(fields or {})))


@pytest.mark.parametrize("blocks", [None, "3"])
@pytest.mark.parametrize("base", BASES)
def test_attention_of_the_own_tower_comes_out_of_the_one_forward(
    clip: DenseCLIP, base: str, blocks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"base.attention": "clip"} if base == "proxyclip" else {}
    model = model_of(clip, base=base, attention_blocks=blocks, **options)
    images = [photo(96, 144, seed=1), photo(144, 96, seed=2), photo(96, 144, seed=3)]
    embed, forwards = clip.embed, []
    monkeypatch.setattr(clip, "embed", lambda x: forwards.append(len(x)) or embed(x))
    found = model.patch_logits(images)
    assert sum(forwards) == 3  # each image once
    plain = build_plain(clip, base, options)
    for image, logits, expected in zip(images, found, plain.patch_logits(images), strict=True):
        assert logits.attention is not None
        second, grid = model.method.source.attention(image[None])  # type: ignore[union-attr, operator]
        torch.testing.assert_close(logits.attention[0], second[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(logits.attention[0].sum(-1), torch.ones(grid[0] * grid[1]))
        torch.testing.assert_close(logits.values, expected.values, rtol=1e-4, atol=1e-6)


def build_plain(clip: DenseCLIP, base: str, options: dict[str, Any]) -> OpenVocabModel:
    own = {name.removeprefix("base."): value for name, value in options.items()}
    return OpenVocabModel(method_class(base).build(clip, own), CLASSES, protocol("direct-seg"))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("source", ["clip", "dinov2-s14"])
def test_labels_are_the_stages_one_after_the_other(clip: DenseCLIP, name: str, source: str) -> None:
    weights = {} if source == "clip" else {"attention_weights": "random"}
    model = model_of(clip, name, attention=source, **weights)
    image, size = photo(96, 144), (120, 180)
    [labels] = model.predict_labels([image], [size])
    method: Any = model.method
    attention, grid = method.source.attention(image[None])
    with torch.inference_mode():
        logits = method.patch_logits(model.network_input(image[None]), model.text)
    if grid != (6, 9):
        logits = torch.nn.functional.interpolate(logits, grid, mode="bilinear", align_corners=False)
    posterior = class_posterior(logits[0].flatten(1), model.word_class, 40.0, 4)  # type: ignore[arg-type]
    scores = discrepancy_maps(posterior, attention[0], method.config).unflatten(1, grid)
    guide = torch.nn.functional.interpolate(image[None].float() / 255, size, mode="bilinear", align_corners=False)[0]
    expected = jbu(scores.clamp_min(0), guide).argmax(0)
    assert (labels == expected).double().mean() > 0.999
    assert len(labels.unique()) > 1


def test_neighbours_in_a_batch_windows_and_sizes_change_nothing(clip: DenseCLIP) -> None:
    images = [photo(96, 144, seed=1), photo(144, 96, seed=2), photo(96, 144, seed=3)]
    sizes = [(96, 144), (200, 100), (90, 130)]
    for fields in ({}, {"mode": "slide", "crop": 64, "stride": 32}, {"upsample": "bilinear"}, {"pamr": 1}):
        model = model_of(clip, fields=fields)
        for image, size, labels in zip(images, sizes, model.predict_labels(images, sizes), strict=True):
            assert labels.shape == size and labels.dtype == torch.int64
            [alone] = model.predict_labels([image], [size])
            assert (alone == labels).double().mean() > 0.995


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("source", "mode"), [("clip", "whole"), ("clip", "slide"), ("dinov2-s14", "whole")])
def test_lower_precision_of_both_networks(tmp_path: Path, source: str, mode: str, dtype: str) -> None:
    path, image = str(save_tiny(tmp_path / "tiny.safetensors")), photo(96, 144)
    options = {"attention": source, **({} if source == "clip" else {"attention_weights": "random"})}
    labels = []
    for kind in ("float32", dtype):  # a CLIP of its own for each: precision is lost for good
        method = method_class("discrepancy-mv").build(load_clip(path), options)
        fields = {"mode": mode, "crop": 64, "stride": 32}
        model = OpenVocabModel(method, CLASSES, protocol("direct-seg", **fields), dtype=kind)  # type: ignore[arg-type]
        labels += model.predict_labels([image], [(96, 144)])
    assert (labels[0] == labels[1]).double().mean() > 0.8


def test_thresholds_and_solvers_as_bases_are_refused(clip: DenseCLIP) -> None:
    with pytest.raises(UsageError, match=r"no probabilities.*--protocol direct-seg"):
        OpenVocabModel(solver_of(clip), CLASSES, protocol("common", prob_thd=0.1))
    with pytest.raises(UsageError, match="'discrepancy-mv' is a solver itself"):
        solver_of(clip, base="discrepancy-mv")
    with pytest.raises(UsageError, match="The solver of this method is op: choose another with --solver mv"):
        solver_of(clip, solver="mv")
    with pytest.raises(UsageError, match="Unknown option of SCCLIP 'betta'"):
        solver_of(clip, base="sc-clip", **{"base.betta": "1"})


def test_options_of_the_base_and_the_source_are_recorded(clip: DenseCLIP) -> None:
    told = solver_of(
        clip,
        "mv",
        base="sc-clip",
        tau="0.5",
        **{"base.beta": "0.3", "attention": "dino-b8", "attention_weights": "random"},
    ).options()
    assert (told["base"], told["base.beta"], told["tau"], told["solver"]) == ("sc-clip", 0.3, 0.5, "mv")
    assert told["attention_random"] is True and told["attention_params"] > 80e6
    assert json.loads(json.dumps(told)) == told


def test_random_clip_brings_a_random_source() -> None:
    cls = method_class("discrepancy-op")
    assert cls.configure_for({}, weights="random").attention_weights == "random"
    assert cls.configure_for({"attention": "clip"}, weights="random").attention_weights is None
    assert cls.configure_for({}, weights="openai").attention_weights is None
    assert cls.configure_for({}, weights="builtin", demo=True).attention == "clip"


def test_solver_flags() -> None:
    assert choose("sc-clip", "op", None, None, None, {"tau": "1"}) == (
        "discrepancy-op",
        {"tau": "1", "base": "sc-clip"},
    )
    assert choose(None, "mv", "clip", "clip", None, {}) == ("discrepancy-mv", {"base": "clip", "attention": "clip"})
    assert choose(None, "kl", None, None, "x", {}) == ("discrepancy-kl", {"attention_weights": "x"})
    for arguments, message in (
        ((None, "opp", None), r"Unknown solver 'opp'. Did you mean: op"),
        (("discrepancy-op", "op", None), "is a solver already"),
        (("clip", "op", "kk"), "say the same"),
        ((None, None, None), "Which method"),
        (("clip", None, "kk"), "--base is for a solver"),
        ((None, "op", "sclipp"), r"Unknown method 'sclipp'"),
    ):
        with pytest.raises(UsageError, match=message):
            choose(*arguments, None, None, {})


def test_demo_run_records_the_four_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--demo", "--solver", "mv", "--base", "sc-clip", "-d", "voc21", "--limit", "2", "--json"]
    assert run_command([*arguments, "--results", str(tmp_path), "--workers", "0", "--gallery", "0"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["spec"]["method"] == "discrepancy-mv"
    assert record["spec"]["method_options"]["base"] == "sc-clip"
    assert record["spec"]["protocol"]["name"] == "direct-seg"
    assert {"logits", "attention", "distribution", "jbu"} <= set(record["efficiency"]["stages_ms"])
