"""What is profiled: every method on the built-in CLIP, stages as they are named, and nothing of mmseg."""

from __future__ import annotations

import json

import pytest
import torch

from ovbench.errors import UsageError
from ovbench.measure import sampling
from ovbench.measure.profile.figures import measure
from ovbench.measure.profile.record import ProfileSpec
from ovbench.measure.profile.subject import build_subject
from ovbench.methods.proxyclip import ProxyCLIP
from ovbench.models.method import random_backbones
from ovbench.spec import protocol


def _spec(method: str = "sc-clip", *, preset: str = "common", overrides: dict | None = None, **fields) -> ProfileSpec:
    chosen = protocol(preset, fields.get("dataset"), method=method, templates="plain", **(overrides or {}))
    return ProfileSpec(
        **{
            "method": method,
            "weights": "builtin",
            "protocol": chosen,
            "device": "cpu",
            "samples": 2,
            "threads": 1,
            **fields,
        }
    )


def test_all_figures_of_a_method():
    subject = build_subject(_spec(classes=5, input="112x160", throughput=False, overrides={"crop": 112, "stride": 48}))
    assert (subject.windows, subject.spec.words, subject.spec.arch) == (2, 5, "builtin-ViT-12x128")
    said = []
    figures = measure(subject, said.append)
    assert said == ["memory", "2 forwards", "2 whole images", "operations"]
    assert figures.params_m == pytest.approx(sum(part.params_m for part in figures.parts.values()), rel=1e-12)
    assert set(figures.parts) == {"clip.visual", "clip.text"} and figures.trainable_params_m == 0
    assert 2 * figures.gmacs <= figures.image_gmacs < 2.2 * figures.gmacs  # two windows, and their assembling
    assert figures.gflops == 2 * figures.gmacs == pytest.approx(2 * sum(figures.gmacs_by_op.values()))
    assert figures.latency_ms.n == figures.forward_ms.n == 2
    assert set(figures.stages_ms) == {"prepare", "backbone", "decide"}
    assert sum(stage.median for stage in figures.stages_ms.values()) <= 1.05 * max(figures.latency_ms.samples)
    assert figures.peak_memory_mib > 0 and figures.forward_peak_memory_mib > 0
    assert figures.peak_reserved_mib is None and figures.images_per_s_reason == "left out (--no-throughput)"
    assert figures.input == "1x3x112x112, one forward; an image of 112x160 takes 2"


def test_a_stage_that_a_model_names_shows_up():
    subject = build_subject(_spec(classes=2, input="64x64", throughput=False, samples=1))
    model = subject.network
    decide = model.decide

    def with_stage(logits, size):
        with model.stage("propagation"):
            return decide(logits, size)

    model.decide = with_stage
    assert "propagation" in measure(subject).stages_ms


def test_times_are_shared_out_over_a_batch():
    subject = build_subject(_spec(classes=2, input="64x64", batch=3, params_only=False, throughput=False, samples=1))
    figures = measure(subject)
    assert figures.batch == 3
    assert figures.input.startswith("1x3x64x64")  # operations are of one input
    assert len(subject.image(3)()) == 3


def test_throughput_is_searched(monkeypatch):
    monkeypatch.setattr(sampling, "RATE_SECONDS", 0.01)
    figures = measure(build_subject(_spec(classes=2, input="32x32", samples=1)))
    assert figures.images_per_s == figures.throughput.images_per_s == figures.throughput.tried[figures.throughput.batch]


def test_parameters_alone():
    figures = measure(build_subject(_spec(params_only=True)))
    assert figures.params_m > 0 and figures.latency_ms is None
    assert figures.gmacs_reason == figures.latency_ms_reason == "only parameters were asked for"


def test_conventions_differ_on_the_same_forward():
    gmacs = {}
    for convention in ("torch", "fvcore", "modules"):
        figures = measure(build_subject(_spec(classes=2, input="64x64", count=convention, samples=1, throughput=False)))
        gmacs[convention] = figures.gmacs
        assert figures.convention == convention and figures.not_counted
    assert gmacs["modules"] < gmacs["fvcore"] and gmacs["modules"] < gmacs["torch"]


def test_words_are_those_of_the_benchmark():
    spec = build_subject(_spec(dataset="voc21", params_only=True)).spec
    assert spec.classes == 21 and spec.words > 21  # synonyms
    assert build_subject(_spec(dataset="voc21", classes=7, params_only=True)).spec.words == 7


def test_the_default_image_is_the_protocols_short_side_at_4_to_3():
    assert build_subject(_spec(params_only=True)).spec.input == "336x448"
    assert build_subject(_spec(params_only=True, overrides={"short_side": 448})).spec.input == "448x597"
    with pytest.raises(UsageError, match="--input"):
        build_subject(_spec(params_only=True, input="336"))


def test_further_backbones_are_random_with_random_weights():
    assert random_backbones(ProxyCLIP, {}) == {"attention_weights": "random"}
    assert random_backbones(ProxyCLIP, {"attention": "clip"}) == {}


def test_what_was_compiled_is_counted_uncompiled():
    subject = build_subject(_spec(classes=2, input="64x64", compile_mode="default"))
    compiled = subject.network.network
    with subject.countable():
        assert subject.network.network == subject.network.method.patch_logits
    assert subject.network.network is compiled


def test_low_precision_is_timed_in_it():
    subject = build_subject(_spec(classes=2, input="64x64", dtype="bfloat16"))
    seen = []
    subject.network.network = lambda images, text: seen.append(torch.is_autocast_enabled("cpu"))
    subject.forward(1)()
    assert seen == [True]


def test_every_method_is_profiled_without_mmseg(run_python):
    """With mmseg, mmengine, mmcv and cv2 barred, as where only torch and open_clip are installed."""
    code = """
import sys
for name in ("mmseg", "mmengine", "mmcv", "cv2"):
    sys.modules[name] = None
import json
from ovbench.measure.profile.job import profile_here
from ovbench.measure.profile.record import ProfileSpec
from ovbench.registry import method_class, method_names
from ovbench.spec import protocol
done = []
for name in method_names():
    spec = ProfileSpec(
        method=name, weights="builtin", method_options=method_class(name).OFFLINE_OPTIONS, classes=3, input="64x64",
        protocol=protocol("paper", method=name, templates="plain"), device="cpu", samples=1, threads=1,
        throughput=False,
    )
    figures = profile_here(spec, command="test").efficiency
    assert figures.latency_ms.n == 1 and figures.gmacs > 0 and figures.stages_ms, name
    done.append(name)
print(json.dumps(done))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) >= 8
