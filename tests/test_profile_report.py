"""Profiles as they are stored, put together from repetitions, and marked where they cannot be relied on."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from ovbench.errors import DataError, RunError, UsageError
from ovbench.measure.profile import launch
from ovbench.measure.profile import record as report
from ovbench.measure.profile.record import ProfileRecord, ProfileSpec
from ovbench.measure.samples import summary
from ovbench.results.record import Efficiency

STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


@pytest.fixture
def make_profile(make_record):
    def make(samples=(10.0, 10.1, 10.2), **figures) -> ProfileRecord:
        spec = ProfileSpec(
            method="clip", arch="ViT-B-16", classes=21, words=21, input="336x448", device="cpu", threads=1
        )
        run = make_record()
        latency = summary(list(samples))
        reasons = {f"{name}_reason": "a test" for name in ("images_per_s", "throughput", "peak_reserved_mib")}
        efficiency = {
            "params_m": 149.6, "trainable_params_m": 0.0, "gmacs": 17.5, "gflops": 35.0, "image_gmacs": 70.0,
            "image_gflops": 140.0, "input": "1x3x224x224", "tool": "counter", "batch": 1, "latency_ms": latency,
            "forward_ms": latency, "stages_ms": {"backbone": latency}, "peak_memory_mib": 900.0,
            "forward_peak_memory_mib": 800.0, "peak_memory_kind": "process-rss", "convention": "torch",
            "counted": "products", "not_counted": "the rest", "forwards": 4, "warm_up": {"latency_ms": 3},
            "parts": {"clip.visual": {"params_m": 86.2, "trainable_params_m": 0.0}},
        }  # fmt: skip
        return ProfileRecord(
            run_id="20260102T030405Z-aaaaaaaa-bbbb",
            spec=spec,
            spec_hash=spec.spec_hash(),
            efficiency={**efficiency, **reasons, **figures},
            environment=run.environment,
            provenance=run.provenance,
        )

    return make


def test_a_profile_survives_the_disk(make_profile, tmp_path):
    record = make_profile()
    path = report.write(record, tmp_path / "profiles")
    assert path == tmp_path / "profiles" / "clip" / f"{record.run_id}.json"
    assert report.read(path) == record
    assert report.load_all(tmp_path / "profiles") == [record]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["efficiency"]["forwards"] == 4


def test_flat_has_the_keys_of_a_records_efficiency(make_profile):
    flat = make_profile().flat()
    assert set(Efficiency.model_fields) <= set(flat)
    assert flat["trainable_params_m"] == 0.0 and flat["spec"]["input"] == "336x448"
    assert {"convention", "parts", "environment", "provenance"} <= set(flat)


def test_tables_can_read_it(make_profile, tmp_path):
    profiles = pytest.importorskip("ovbench.results.profiles")
    found = profiles.read(report.write(make_profile(), tmp_path))
    assert (found.method, found.image_gmacs) == ("clip", 70.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "no valid JSON"), ("[]", "not a profile"), ('{"schema_version": 7}', "schema version 7"), ("{}", "run_id")],
)
def test_a_file_that_is_no_profile(tmp_path, content, words):
    path = tmp_path / "clip" / "a.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        report.read(path)
    problems = []
    assert report.load_all(tmp_path, on_problem=problems.append) == []
    assert len(problems) == 1


def test_a_folder_that_cannot_be_written(make_profile, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--profiles"):
        report.write(make_profile(), tmp_path / "file")


def test_repetitions_are_put_together(make_profile):
    rate = {"batch": 2, "tried": {1: 5.0}, "stopped": "no faster"}
    made = [
        make_profile(
            [value, value, value],
            peak_memory_mib=memory,
            images_per_s=speed,
            images_per_s_reason=None,
            throughput={**rate, "images_per_s": speed},
            throughput_reason=None,
        )
        for value, memory, speed in ((10.0, 900.0, 8.0), (10.2, 950.0, 10.0), (10.4, 920.0, 9.0))
    ]
    end = made[2].provenance.model_copy(update={"finished": STARTED + timedelta(days=1)})
    found = launch.merged([*made[:2], made[2].model_copy(update={"provenance": end})])
    figures = found.efficiency
    assert figures.latency_ms.n == 9 and figures.latency_ms.median == 10.2
    assert figures.stages_ms["backbone"].n == 9
    assert figures.repeats["latency_ms"] == (10.0, 10.2, 10.4)
    assert (figures.peak_memory_mib, figures.images_per_s) == (950.0, 9.0)
    assert figures.unstable == {}
    assert found.provenance.finished == end.finished


def test_medians_that_lie_apart_are_marked(make_profile):
    found = launch.merged([make_profile([value] * 3) for value in (10.0, 10.6)])
    assert found.efficiency.unstable["latency_ms"] == "medians of 2 processes differ by 6%"


def test_noise_is_kept_and_marked_above_a_quarter(make_profile):
    quiet = launch.merged([make_profile([10.0, 11.0, 12.0])]).efficiency
    assert quiet.noise["latency_ms"] == pytest.approx(1 / 11)
    assert quiet.unstable == {} and quiet.repeats == {}
    wild = launch.merged([make_profile([10.0, 20.0, 30.0])]).efficiency
    assert wild.unstable["latency_ms"] == "IQR is 50% of the median"


def test_a_missing_figure_needs_a_reason(make_profile):
    with pytest.raises(ValueError, match="image_gmacs_reason"):
        make_profile(image_gmacs=None)


def test_threads_come_from_the_environment_or_the_machine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.default_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch.default_threads() >= 1


def _child(monkeypatch, code: str) -> ProfileSpec:
    monkeypatch.setattr(launch, "_CHILD", code)
    return ProfileSpec(method="clip", threads=1)


def test_errors_of_the_process_keep_their_class(monkeypatch):
    answer = json.dumps({"error": {"kind": "UsageError", "message": "no such thing"}})
    with pytest.raises(UsageError, match="no such thing"):
        launch.profile(_child(monkeypatch, f"print({answer!r})"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory runs out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "signal 15"),
    ],
)
def test_a_process_that_dies(monkeypatch, code, words):
    with pytest.raises(RunError, match=words):
        launch.profile(_child(monkeypatch, code))


def test_messages_and_threads_reach_their_place(monkeypatch, make_profile):
    record = make_profile().to_json()
    code = (
        "import json, os, sys\n"
        "request = json.load(sys.stdin)\n"
        "said = [os.environ[name] for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')]\n"
        "print(json.dumps({'message': ' '.join(said) + request['spec']['method']}))\n"
        f"print(json.dumps({{'record': json.loads({record!r})}}))"
    )
    _child(monkeypatch, code)
    said = []
    found = launch.profile(ProfileSpec(method="clip", threads=2, repeat=2), on_message=said.append)
    assert said == ["process 1 of 2", "2 2clip", "process 2 of 2", "2 2clip"]
    assert found.efficiency.latency_ms.n == 6
