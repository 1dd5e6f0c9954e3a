"""Real processes: killed at any moment, signalled as a scheduler does, and several that share one run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from short_runs import IMAGES, Processes, areas_of, lines, spec, told
from tiny_clip import save_tiny

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.synth.copies import synth
from ovbench.errors import RunError, UsageError
from ovbench.evaluate import ranks
from ovbench.results import image_areas, store
from ovbench.results.record import RunRecord


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", layers=2))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("voc21", tmp_path_factory.mktemp("voc"), images=IMAGES, size=(64, 96))


@pytest.fixture(scope="module")
def whole(weights: str, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return ovbench.run(spec(weights), data_root=voc, results=tmp_path_factory.mktemp("whole"), workers=0, gallery=0)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    folder = tmp_path / "told"
    folder.mkdir()
    found = Processes(folder)
    yield found
    found.end()


def ended_well(results: Path, whole: RunRecord) -> RunRecord:
    """The one record of a folder, which is the uninterrupted run's, with one shard beside it."""
    [record] = store.load_all(results)
    assert record.status == "ok" and areas_of(record) == areas_of(whole) and record.spec_hash == whole.spec_hash
    path = store.record_path(record, results)
    assert list(path.parent.glob("*.areas.jsonl")) == [image_areas.path_beside(path)]
    assert len(image_areas.read(image_areas.path_beside(path), record).names) == IMAGES
    return record


def until(results: Path, images: int) -> None:
    """Waits until so many images are in shards."""
    while lines(results) < images:
        time.sleep(0.02)


def test_killed_again_and_again(
    processes: Processes, weights: str, voc: Path, tmp_path: Path, whole: RunRecord
) -> None:
    results, chance = tmp_path / "r", random.Random(5)
    options: dict[str, Any] = {"data_root": voc, "results": results, "workers": 1, "gallery": 0, "resume": True}
    before = 0
    for _ in range(4):
        process, _ = processes.start(spec(weights), slow=0.1, **options)
        until(results, min(before + chance.randrange(2), IMAGES - 1))
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.join()
        assert before <= lines(results)
        before = lines(results)
        assert not list(results.rglob("*.json"))
    assert told(*processes.start(spec(weights), **options)) == (0, "")
    ended_well(results, whole)


def test_a_schedulers_signal_to_the_whole_group(
    processes: Processes, weights: str, voc: Path, tmp_path: Path, whole: RunRecord
) -> None:
    results = tmp_path / "r"
    options: dict[str, Any] = {"data_root": voc, "results": results, "workers": 1, "gallery": 0}
    process, path = processes.start(spec(weights), slow=0.2, **options)
    until(results, 2)
    os.killpg(process.pid, signal.SIGTERM)  # readers as well
    code, message = told(process, path)
    assert code == 130 and "Finished images are kept" in message
    [stopped] = store.load_all(results)
    assert stopped.status == "interrupted" and stopped.metrics is not None and stopped.metrics.images == lines(results)
    ovbench.run(spec(weights), **options, resume=True)
    ended_well(results, whole)


@pytest.mark.parametrize(("world", "launcher"), [(2, "slurm"), (3, "pytorch")])
def test_any_number_of_processes_finds_the_same(
    world: int, launcher: str, processes: Processes, weights: str, voc: Path, tmp_path: Path, whole: RunRecord
) -> None:
    results = tmp_path / "r"
    options = {
        "data_root": voc,
        "results": results,
        "gallery": 3,
        "save_predictions": True,
        "workers": 0,
        "launcher": launcher,
    }
    started = processes.ranks(world, spec(weights), **options)
    assert [told(*one) for one in started] == [(0, "")] * world
    record = ended_well(results, whole)
    cost = record.efficiency
    assert cost is not None and cost.processes == world and cost.latency_ms is not None and cost.latency_ms.n == IMAGES
    assert f"the highest of {world} processes" in str(cost.peak_memory_kind)
    folder = store.record_path(record, results).with_suffix("")
    stems = {pair.stem for pair in benchmarks.get("voc21").pairs(voc)}
    assert {path.stem for path in (folder / "predictions").iterdir()} == stems
    assert {path.name for path in folder.iterdir()} == {"predictions", "gallery.png"}

    again = processes.ranks(world, spec(weights), skip_recorded=True, **options)  # the first decides, for all
    assert [told(*one) for one in again] == [(0, "")] * world
    assert ended_well(results, whole) == record


def test_a_dead_process_ends_all_and_one_alone_resumes(
    processes: Processes, weights: str, voc: Path, tmp_path: Path, whole: RunRecord
) -> None:
    results = tmp_path / "r"
    options = {"data_root": voc, "results": results, "gallery": 0, "workers": 0}
    started = processes.ranks(3, spec(weights), slow=2.5, env={"OVBENCH_PEER_TIMEOUT": "5"}, **options)
    while not any(path.read_bytes().count(b'"classes"') for path in results.rglob("*.rank1.areas.jsonl")):
        time.sleep(0.02)  # until it has done one of its two images
    started[1][0].kill()
    (first, message), dead, (third, heard) = [told(*one) for one in started]
    assert (first, dead[0], third) == (5, -signal.SIGKILL, 5)
    assert "Process 1 of 3 has ended without a word" in message and "--resume, with any number" in message
    assert "Process 1 of 3 has ended without a word" in heard
    [failed] = store.load_all(results)
    assert failed.status == "failed" and failed.metrics is not None and failed.metrics.images == lines(results) < IMAGES
    ovbench.run(spec(weights), **options, resume=True)
    assert ended_well(results, whole).run_id == failed.run_id


def test_an_error_in_one_process_ends_all_with_its_message(
    processes: Processes, weights: str, tmp_path: Path, whole: RunRecord
) -> None:
    root = synth("voc21", tmp_path / "data", images=IMAGES, size=(64, 96))
    pair = benchmarks.get("voc21").pairs(root)[1]  # the second process' first image
    content = pair.image.read_bytes()
    pair.image.write_bytes(content[:-2] + b"\0\0")  # no end, at the same size
    results = tmp_path / "r"
    options = {"data_root": root, "results": results, "gallery": 0, "workers": 0, "check": False}
    started = processes.ranks(2, spec(weights), slow=1.0, **options)
    (first, message), (second, own) = [told(*one) for one in started]
    assert (first, second) == (3, 3)
    assert "is cut off" in own and pair.image.name in own and not own.startswith("Process")
    assert message.startswith("Process 1 of 2: The image") and "Record of the failed run" in message
    pair.image.write_bytes(content)
    ovbench.run(spec(weights), **options, resume=True)
    ended_well(results, whole)


def test_processes_of_another_command_are_refused(
    processes: Processes, weights: str, voc: Path, tmp_path: Path
) -> None:
    options = {"data_root": voc, "results": tmp_path / "r", "gallery": 0, "workers": 0, "slow": 0.5}
    started = processes.ranks(2, [spec(weights), spec(weights, seed=1)], **options)
    (first, message), (second, own) = [told(*one) for one in started]
    assert (first, second) == (3, 3)
    assert "Process 1 of 2 has another spec_hash than process 0" in own and own in message


@pytest.mark.parametrize(
    ("launcher", "env", "message"),
    [
        ("mpi", {}, "give none, pytorch, slurm"),
        ("pytorch", {"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ("slurm", {}, "SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID not set"),
        (
            "slurm",
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "no[1-2]", "PATH": ""},
            r"scontrol does not tell the first of the nodes 'no\[1-2\]': set MASTER_ADDR",
        ),
    ],
)
def test_a_launcher_that_did_not_start_this(
    launcher: str, env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    put_back(monkeypatch)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        ranks.join(launcher)


def put_back(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Names that joining sets; they are gone now, and again what they were after the test."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return names


def test_slurm_names_become_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    names = put_back(monkeypatch)
    given = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "41234",
        "MASTER_ADDR": "n1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ranks._name_as_torchrun()
    assert [os.environ[name] for name in names] == ["3", "8", "1", "21234"]
    assert not ranks.is_first("slurm") and ranks.is_first("none")


def test_results_that_are_not_shared_are_noticed(processes: Processes, weights: str, voc: Path, tmp_path: Path) -> None:
    """The second process writes to a folder of the same name that the first cannot see, as on another node."""
    started = processes.ranks(
        2, spec(weights), data_root=voc, results=[tmp_path / "a", tmp_path / "b"], gallery=0, workers=0
    )
    code, message = told(*started[0])
    assert code == 5 and "--results must be a folder that all nodes share" in message
    assert told(*started[1])[0] == 5


class Memory:
    """A store as torch's, in this process."""

    def __init__(self) -> None:
        self.content: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.content[key] = value

    def get(self, key: str) -> bytes:
        return self.content[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.content for key in keys)


def test_a_first_process_that_is_silent_is_noticed_while_the_others_wait() -> None:
    team = ranks.Team(Memory(), rank=1, world=2, timeout=0.4)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="Process 0 of 2 has ended without a word"), team.first_alone():
        raise AssertionError("it must not go first")
    team.leave()
