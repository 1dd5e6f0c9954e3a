"""``ovbench sweep``: what is planned, what may be skipped, and that jobs are run, retried, ended and continued."""

from __future__ import annotations

import importlib.util
import ipaddress
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import warm

from ovbench import benchmarks
from ovbench.cli.app import run_command
from ovbench.cli.run import spec_of
from ovbench.errors import UsageError
from ovbench.evaluate.sweep.job import Work
from ovbench.evaluate.sweep.local import Local
from ovbench.evaluate.sweep.plan import Grid, Job, plan, read_grids

FAKE = (sys.executable, str(Path(__file__).with_name("fake_job.py")))


def jobs_of(folder: Path, *whats: str, seconds: float = 0.0) -> list[Job]:
    """Jobs of the stand-in."""
    return [
        Job(index, f"m{index}", "d", "", (str(folder), f"m{index}", what, str(seconds)))
        for index, what in enumerate(whats)
    ]


def work_in(folder: Path, **changed: Any) -> Work:
    return Work(**{"folder": folder, "cwd": folder, "program": FAKE, "grace_s": 20.0, **changed})


def marks(folder: Path, name: str = "m*") -> dict[str, list[str]]:
    """By file name what each started stand-in has left: parent, start, GPUs, and its end if it came to it."""
    found = [path for path in folder.glob(f"{name}.*") if path.suffix[1:].isdigit()]
    return {path.name: path.read_text().split() for path in sorted(found)}


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition gives once it is true; five minutes at most, so that a fault does not hang."""
    give_up = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Jobs on this machine


def test_a_queue_fills_every_slot_and_goes_on_after_failures(tmp_path: Path) -> None:
    whats = ("ok", "fail", "crash", "silent", "recorded")
    executor = Local(("cuda:0", "cuda:3"))
    jobs = jobs_of(tmp_path, *whats, seconds=0.2)
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="4,5,6,7"):
        found = {job.index: outcome for job, outcome in executor.run(jobs, work_in(tmp_path))}
    assert [found[index].state for index in range(5)] == ["done", "failed", "failed", "failed", "recorded"]
    assert (found[0].run_id, found[0].miou, found[0].tries) == ("m0", 12.5, 1)
    assert found[1].message == "no such thing." and "SIGKILL" in str(found[2].message)
    assert "printed no record" in str(found[3].message)
    left = list(marks(tmp_path).values())
    assert {entry[2] for entry in left} == {"4", "7"}  # each had one of its devices, as the user's list names it
    spans = {gpu: sorted((float(e[1]), float(e[3])) for e in left if e[2] == gpu) for gpu in ("4", "7")}
    for gpu in spans.values():  # one at a time on each
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(gpu))
    assert "no such thing" in Path(str(found[1].log)).read_text()
    assert not list(tmp_path.glob("*.out"))


def test_what_is_interrupted_ends_by_itself(tmp_path: Path) -> None:
    running = Local(per_device=2).run(jobs_of(tmp_path, "ok", "ok", "ok", seconds=60), work_in(tmp_path))

    def interrupt() -> None:
        wait_for(lambda: len(marks(tmp_path)) == 2)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(running)
    pids = [int(name.rpartition(".")[2]) for name in marks(tmp_path)]
    assert len(pids) == 2 and not any(map(alive, pids))
    assert len(list(tmp_path.glob("*.ended"))) == 2  # ended as asked, not killed; the third was never started


def interrupt_when_started(executor: Any, folder: Path) -> None:
    """Closes an executor's iterator while its first job runs, which must then end by itself."""
    folder.mkdir()
    jobs = [
        Job(0, "m0", "d", "", (str(folder), "m0", "ok", "0")),
        Job(1, "m1", "d", "", (str(folder), "m1", "ok", "90")),
    ]
    running = executor.run(jobs, work_in(folder))
    next(running)
    ((name, _),) = wait_for(lambda: marks(folder, "m1")).items()
    running.close()
    wait_for(lambda: (folder / f"{name}.ended").exists())


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ovbench.evaluate.sweep.job import Work, run_job; "
        "from ovbench.evaluate.sweep.plan import Job\n"
        f"run_job(Job(0, 'm0', 'd', '', ({str(tmp_path)!r}, 'm0', 'ok', '60')), "
        f"Work(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), {FAKE!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: marks(tmp_path))
    parent.kill()
    parent.wait()
    wait_for(lambda: list(tmp_path.glob("*.ended")))


# Clusters

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose path leaves room for the names of Ray's sockets."""
    folder = tmp_path_factory.mktemp("r")
    if len(str(folder)) <= 40:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="r") as name:
            yield Path(name)


@needs_ray
def test_a_ray_sweep_completes_when_a_worker_is_killed(tmp_path: Path, short_folder: Path) -> None:
    from ovbench.evaluate.sweep.on_ray import OnRay

    listening: list[bool] = []

    def kill() -> None:
        ((name, entry),) = wait_for(lambda: marks(tmp_path, "m1")).items()
        worker = int(entry[0])
        assert b"ray::" in Path(f"/proc/{worker}/cmdline").read_bytes()
        listening.extend(address.is_loopback for address in _listening_addresses(short_folder))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: (tmp_path / f"{name}.ended").exists())  # no orphan goes on beside the retry

    jobs = jobs_of(tmp_path, "ok", "ok", "fail", "ok")
    jobs[1] = Job(1, "m1", "d", "", (str(tmp_path), "m1", "ok", "3"))
    with mock.patch.dict(os.environ, HOME=str(short_folder)), OnRay(workers=2, folder=short_folder) as executor:
        killer = threading.Thread(target=kill)
        killer.start()
        found = {job.index: outcome for job, outcome in executor.run(jobs, work_in(tmp_path))}
        killer.join()
        assert executor.device == "cpu"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        interrupt_when_started(executor, tmp_path / "again")
    assert [found[index].state for index in range(4)] == ["done", "done", "failed", "done"]
    assert [found[index].tries for index in range(4)] == [1, 2, 1, 1]
    assert len(marks(tmp_path, "m1")) == 2
    assert listening and all(listening)
    assert not (short_folder / ".ray").exists()  # nothing of it stays in the home folder
    assert not _processes_of(short_folder)


def _processes_of(folder: Path) -> list[int]:
    """Processes whose command line names a folder, as those of a Ray cluster name its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _listening_addresses(folder: Path) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses on which those processes accept connections."""
    inodes = set()
    for pid in _processes_of(folder):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host = bytes.fromhex(fields[1].partition(":")[0])
                address = ipaddress.ip_address(b"".join(host[i : i + 4][::-1] for i in range(0, len(host), 4)))
                yield getattr(address, "ipv4_mapped", None) or address


@needs_submitit
def test_submitit_runs_jobs_and_reports_failures(tmp_path: Path) -> None:
    from ovbench.evaluate.sweep.on_slurm import OnSlurm

    executor = OnSlurm({"cluster": "local", "partition": "gpu", "timeout_min": "5"})
    found = {job.index: o for job, o in executor.run(jobs_of(tmp_path, "ok", "fail"), work_in(tmp_path))}
    assert [found[index].state for index in range(2)] == ["done", "failed"]
    assert found[0].miou == 12.5 and found[1].message == "no such thing."
    interrupt_when_started(executor, tmp_path / "again")


@needs_submitit
def test_what_slurm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    from ovbench.evaluate.sweep.on_slurm import OnSlurm, Task

    for name in ("srun", "sbatch"):  # submitit looks for the one and calls the other
        path = tmp_path / name
        path.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncp "$1" {tmp_path}/script.sh\necho Submitted batch job 7\n'
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = {
        "partition": "gpu", "gpus_per_node": "1", "timeout_min": "240", "mem_gb": "32", "account": "lab",
        "array_parallelism": "2",
    }  # fmt: skip
    chosen = OnSlurm(options)
    assert chosen.device == "cuda" and OnSlurm({"partition": "gpu"}).device == "cpu"
    executor = chosen.executor(tmp_path / "slurm")
    jobs, work = jobs_of(tmp_path, "ok", "ok", "ok"), work_in(tmp_path)
    with executor.batch():
        submitted = [executor.submit(Task(), job, work) for job in jobs]
    assert [job.job_id for job in submitted] == ["7_0", "7_1", "7_2"]
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "partition=gpu",
        "gpus-per-node=1",
        "time=240",
        "mem=32GB",
        "account=lab",
        "array=0-2%2",
        "signal=USR2@90",
    ):
        assert f"#SBATCH --{line}" in script, script
    again = Task().checkpoint(jobs[0], work)  # when the time is over, the same is queued again
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.args == (jobs[0], work)
    with pytest.raises(UsageError, match="slurm_partitoin"):
        OnSlurm({"partitoin": "gpu"}).executor(tmp_path / "slurm")


# What is planned


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small generated images of VOC20, another copy of them, and three others."""
    from ovbench.benchmarks.synth.copies import synth

    folder = tmp_path_factory.mktemp("data")
    for name, images in (("a", 2), ("same", 2), ("other", 3)):
        synth("voc20", folder / name, images=images, size=(64, 80))
    return folder


def planned(
    data: Path,
    results: Path,
    method: str = "clip",
    root: str = "a",
    vary: dict[str, tuple[str, ...]] | None = None,
    **chosen: str,
) -> list[Job]:
    chosen = {"weights": "builtin", "templates": "plain", "short_side": "64", **chosen}
    chosen = {key.replace("option_", "option."): value for key, value in chosen.items()}
    grid = Grid((method,), ("voc20",), data / root, set={k: v for k, v in chosen.items() if v}, vary=vary or {})
    return plan([grid], spec_of, results=results, device="cpu")


def do(job: Job, **options: Any) -> Any:
    """Runs a job in this process."""
    import ovbench

    arguments = list(job.arguments[1:])
    root = arguments[arguments.index("--data-root") + 1]
    results = arguments[arguments.index("--results") + 1]
    return ovbench.run(spec_of(arguments), data_root=root, results=results, gallery=0, workers=0, **options)


@pytest.fixture(scope="module")
def recorded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of records with one run of sc-clip on data ``a``."""
    results = tmp_path_factory.mktemp("results")
    (job,) = planned(data, results, "sc-clip")
    assert job.recorded is None
    return results, do(job)


def test_a_recorded_run_is_known(data: Path, recorded: tuple[Path, Any]) -> None:
    results, record = recorded
    (job,) = planned(data, results, "sc-clip")
    assert (job.recorded, job.spec_hash, job.miou) == (record.run_id, record.spec_hash, record.metrics.miou)
    (copy,) = planned(data, results, "sc-clip", root="same")
    assert copy.recorded == record.run_id
    spelled = {"stride": "112", "option_beta": str(record.spec.method_options["beta"]), "workers": "1", "batch": "2"}
    (job,) = planned(data, results, "sc-clip", **spelled)  # defaults in words, and what moves no number
    assert job.recorded == record.run_id


def test_no_other_run_is_taken_for_it(data: Path, recorded: tuple[Path, Any], tmp_path: Path) -> None:
    results, _ = recorded
    words = [", ".join(entry) for entry in benchmarks.get("voc20").words("sclip")]
    (tmp_path / "words.txt").write_text("\n".join(["plane", *words[1:]]))
    changes: list[dict[str, str]] = [
        {"dtype": "bfloat16"}, {"stride": "56"}, {"short_side": "72"}, {"logit_scale": "50"}, {"templates": ""},
        {"protocol": "common"}, {"prob_thd": "0.2"}, {"upsample": "jbu"}, {"pamr": "1"}, {"mode": "whole"},
        {"weights": "random"}, {"weights": "random", "seed": "1"}, {"window_batch": "4"}, {"compile": "default"},
        {"limit": "1"}, {"wording": str(tmp_path / "words.txt")}, {"option_beta": "0.1"}, {"pos_interp": "size"},
        {"patch_pad": "none"}, {"seed": "3"},
    ]  # fmt: skip
    for change in changes:
        (job,) = planned(data, results, "sc-clip", **change)
        assert job.recorded is None, change
    (job,) = planned(data, results, "sc-clip", root="other")
    assert job.recorded is None
    (job,) = planned(data, results, "clip")
    assert job.recorded is None


def test_every_field_of_a_spec_is_looked_at(data: Path, recorded: tuple[Path, Any]) -> None:
    """Each field of a recorded spec is changed in turn; a field that comes later needs a value here."""
    from ovbench.evaluate.expected import expected
    from ovbench.results.record import RunRecord
    from ovbench.spec import Protocol, RunSpec

    results, record = recorded
    known = expected(spec_of(planned(data, results, "sc-clip")[0].arguments[1:]), data / "a")
    assert known.is_of(record) and known.unknown == ()
    other = {
        "method": "clip", "dataset": "voc21", "dataset_version": 99, "arch": "ViT-L-14", "weights": "openai", "dtype": "float16",
        "device": "cuda", "weights_sha256": "0", "activation": "gelu", "window_batch": 7, "compile_mode": "default", "limit": 5,
        "seed": 9, "arithmetic": 3, "name": "x", "overrides": ["crop"], "short_side": 11, "long_side": 12, "crop": 999, "stride": 13,
        "patch_pad": "none", "pos_interp": "size", "logit_scale": 1.5, "prob_thd": 0.9, "area_thd": 0.9,
        "area_rule": "next-best", "upsample": "jbu", "pamr": 4, "pamr_dilations": [1], "scales": [0.5], "flip": True,
        "square": 640, "global_view": True, "wording": "x", "wording_sha256": "0", "templates": "x", "templates_sha256": "0",
    }  # fmt: skip

    other |= {"object_thd": 0.9, "overlap_thd": 0.9, "pad": 64, "clip_resize": "bicubic"}
    two_valued = {
        "clip_resize": "bilinear",
        "area_rule": "background",
        "upsample": "bilinear",
        "patch_pad": "symmetric",
        "pos_interp": "offset",
    }

    def changed(update: Callable[[dict[str, Any]], None]) -> RunRecord:
        content = record.model_dump(mode="json")
        update(content["spec"])
        return RunRecord(**content)

    for name in set(RunSpec.model_fields) - {"protocol", "mode", "method_options", "demo"}:
        assert not known.is_of(changed(lambda spec, name=name: spec.update({name: other[name]}))), name
    for name in set(Protocol.model_fields) - {"mode"}:
        value = other[name] if getattr(record.spec.protocol, name) != other[name] else two_valued[name]
        assert not known.is_of(changed(lambda spec, n=name, v=value: spec["protocol"].update({n: v}))), name
    for name in record.spec.method_options:
        if name in known.spec.method_options:
            assert not known.is_of(changed(lambda spec, name=name: spec["method_options"].update({name: "x"}))), name

    def whole(spec: dict[str, Any]) -> None:
        spec["mode"] = spec["protocol"]["mode"] = "whole"

    assert not known.is_of(changed(whole))
    for stored in ({"status": "failed", "partial": True, "reason": "x"}, {"partial": True, "reason": "x"}):
        assert _found_beside(record.model_copy(update=stored), known) is None
    assert _found_beside(record, known) == record.run_id


def _found_beside(record: Any, known: Any) -> str | None:
    from ovbench.results import store

    with tempfile.TemporaryDirectory() as folder:
        store.write(record, folder)
        found = known.find(Path(folder))
        return None if found is None else found.run_id


@pytest.mark.parametrize(
    ("method", "chosen", "final"),
    [
        ("clip", {}, True),
        ("clip", {"dtype": "bfloat16"}, True),
        ("clip", {"weights": "FILE"}, True),
        ("clip", {"weights": "FILE", "activation": "gelu"}, True),
        ("proxyclip", {"option_attention": "clip"}, False),
        ("discrepancy-op", {"option_attention": "clip", "option_base": "sc-clip", "option_base.beta": "0.3"}, False),
        ("fcn", {"weights": "random", "arch": "tiny", "templates": ""}, True),
    ],
)  # fmt: skip
def test_what_a_run_will_say_is_foretold(
    data: Path, tmp_path: Path, method: str, chosen: dict[str, str], final: bool
) -> None:
    from tiny_clip import save_tiny

    if chosen.get("weights") == "FILE":
        chosen = {**chosen, "weights": str(save_tiny(tmp_path / "tiny.safetensors"))}
    (job,) = planned(data, tmp_path, method, **chosen)
    assert job.recorded is None and job.hash_is_final is final
    record = do(job)
    # in half precision, records from before logits were float32 are of another run
    assert record.spec.arithmetic == (2 if chosen.get("dtype") == "bfloat16" else 1)
    if final:
        assert job.spec_hash == record.spec_hash
    (again,) = planned(data, tmp_path, method, **chosen)
    assert again.recorded == record.run_id
    if "activation" in chosen:  # what the file itself says is something else
        assert planned(data, tmp_path, method, **{**chosen, "activation": ""})[0].recorded is None
        save_tiny(Path(chosen["weights"]), seed=1)  # another file of that name
        assert planned(data, tmp_path, method, **chosen)[0].recorded is None


def test_published_weights_stand_for_themselves(make_record: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """Of a tag only the hash is not known before the run; nothing is fetched to find it."""
    from ovbench.evaluate.expected import expected
    from ovbench.results import store

    arguments = [
        "-m", "proxyclip", "-d", "voc20", "--device", "cpu", "--data-root", str(data / "a"), "--templates", "plain",
    ]  # fmt: skip
    known = expected(spec_of(arguments), data / "a")
    assert known.unknown == ("weights_sha256",) and known.spec.activation == "quickgelu"
    content = known.spec.model_dump(mode="json")
    content["weights_sha256"] = "12" * 32
    content["demo"] = True
    options = {**content.pop("method_options"), "attention_weights": "hub/dino", "attention_weights_sha256": "34" * 32}
    for weights, same in (("hub/dino", True), ("dino.pth", False), ("random", False)):
        record = make_record(
            method="proxyclip", dataset="voc20", spec={**content, "method_options": {**options, "attention_weights": weights}},
            provenance={"dataset_fingerprint": known.fingerprint},
        )  # fmt: skip
        root = tmp_path / weights.replace("/", "-")
        store.write(record, root)
        assert (known.find(root) is not None) == same, weights


def test_a_run_sees_itself_that_it_is_recorded(data: Path, recorded: tuple[Path, Any]) -> None:
    results, record = recorded
    before = sorted(path.name for path in results.rglob("*"))
    (job,) = planned(data, results, "sc-clip", stride="112")
    assert do(job, skip_recorded=True).run_id == record.run_id
    assert sorted(path.name for path in results.rglob("*")) == before


def test_a_grid_is_all_combinations(data: Path, tmp_path: Path) -> None:
    vary = {"stride": ("112", "56"), "dtype": ("float32", "bfloat16")}
    found = planned(data, tmp_path, vary=vary)
    assert len(found) == 4 and len({job.spec_hash for job in found}) == 4
    last = found[3]
    assert last.changed == "weights=builtin templates=plain short_side=64 stride=56 dtype=bfloat16"
    assert last.arguments[:5] == ("run", "--method", "clip", "--dataset", "voc20")
    assert {"--stride=56", "--dtype=bfloat16", "--resume", "--skip-recorded", "--json"} <= set(last.arguments)
    grids = [Grid(("clip", "naclip"), ("voc20",), data / "a"), Grid(("clip",), ("voc20", "voc20"), data / "a")]
    assert [job.method for job in plan(grids, spec_of, results=tmp_path, device="cpu")] == ["clip", "naclip"]


def test_a_sweep_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "- methods: [clip, sc-clip]\n  datasets: voc20\n  data_root: /data\n  set: {flip: true, scales: [0.5, 1]}\n"
        "- methods: all\n  datasets: eight\n  demo: true\n  vary: {prob_thd: [0, 0.1]}\n"
    )
    one, two = read_grids(path)
    assert one == Grid(("clip", "sc-clip"), ("voc20",), Path("/data"), set={"flip": "true", "scales": "0.5,1"})
    assert two == Grid(("all",), ("eight",), demo=True, vary={"prob_thd": ("0", "0.1")})
    for text, wrong in (
        ("methods: [clip]", "'datasets' is missing"),
        ("methods: clip\ndatasets: voc20\nsets: {}", "Unknown field of a sweep 'sets'. Did you mean: set"),
        ("methods: clip\ndatasets: voc20\nset: [a]", "must be a mapping"),
        ("{", "no YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=wrong):
            read_grids(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "clip"], "What to run? Give --methods"),
        (["-m", "clp", "-d", "voc20"], "Unknown method 'clp'. Did you mean: clip"),
        (["-m", "clip", "-d", "voc"], "Unknown dataset 'voc'. Did you mean: voc2"),
        (["-m", "clip", "-d", "voc20", "--set", "dtpe=float16"], "clip on voc20, dtpe=float16: No such option: --dtpe"),
        (["-m", "clip", "-d", "voc20", "--set", "option.x=1", "--demo"], "option of Clip 'x'"),
        (["-m", "clip", "-d", "voc20", "--set", "results=x"], "is an option of 'ovbench sweep' itself"),
        (["-m", "clip", "-d", "voc20", "--set", "crop=9", "--vary", "crop=8"], "is set and varied"),
        (["-m", "clip", "-d", "voc20", "--executor", "slrm"], "give local, ray, slurm"),
        (["-m", "clip", "-d", "voc20", "--slurm", "a=b"], "--slurm is for --executor slurm, not local"),
        (["-m", "clip", "-d", "voc20", "--devices", "cuda:99"], "--devices cuda:99"),
        (["no.yaml"], "Cannot read the sweep 'no.yaml'"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_and_the_exit_status(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a program that fails on naclip; a benchmark whose data is missing fails without being started."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import sys, json\n"
        "if 'naclip' in sys.argv: sys.exit('Error: out of luck')\n"
        "print(json.dumps({'run_id': 'r1', 'spec_hash': 'ab' * 32, 'metrics': {'miou': 40.25}}))\n"
    )
    monkeypatch.setattr("ovbench.evaluate.sweep.job.PROGRAM", (sys.executable, str(fake)))
    monkeypatch.chdir(tmp_path)
    arguments = [
        "sweep",
        "-m",
        "clip,naclip",
        "-d",
        "voc20,cityscapes",
        "--data-root",
        str(data / "a"),
        "--devices",
        "cpu",
    ]
    assert run_command([*arguments, "--set", "weights=builtin", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in listed] == ["clip", "naclip", "clip", "naclip"]
    assert all(len(row["spec_hash"]) == 64 for row in listed[:2]) and listed[2]["spec_hash"] is None
    assert not (tmp_path / "results").exists()
    assert run_command([*arguments, "--set", "weights=builtin", "--json"]) == 5
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["state"] for row in rows] == ["done", "failed", "failed", "failed"]
    assert rows[0]["miou"] == 40.25 and rows[1]["message"] == "out of luck" and "cityscapes" in rows[2]["problem"]
    assert "3 of 4 runs failed" in err
    (kept,) = (tmp_path / "results" / "sweeps").glob("*/sweep.json")
    assert [row["state"] for row in json.loads(kept.read_text())] == [row["state"] for row in rows]


# The real thing


def test_an_interrupted_sweep_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ovbench.benchmarks.synth.copies import synth
    from ovbench.results import store

    synth("voc20", tmp_path / "data", images=60, size=(96, 128))
    small = {"weights": "builtin", "templates": "plain", "short_side": "96", "crop": "96", "stride": "96"}
    command = ["sweep", "-m", "clip", "-d", "voc20", "--data-root", "data", "--devices", "cpu", "--set", "workers=0"]
    command += [*(word for field in small.items() for word in ("--set", "=".join(field))), "--json"]
    sweep = warm.Started(warm.ovbench, command, cwd=tmp_path)

    def finished() -> int:
        files = list(tmp_path.glob("results/runs/clip/voc20/*.areas.jsonl"))
        return len(files[0].read_text().splitlines()) - 1 if files else 0

    wait_for(lambda: finished() >= 2)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 130, err
    (record,) = store.load_all(tmp_path / "results/runs")
    assert record.status == "interrupted" and 2 <= record.metrics.images < 60
    monkeypatch.chdir(tmp_path)
    assert run_command(command) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (whole,) = store.load_all(tmp_path / "results/runs")
    assert (row["state"], row["run_id"], row["miou"]) == ("done", record.run_id, whole.metrics.miou)
    assert whole.status == "ok" and whole.metrics.images == 60 and whole.spec_hash == record.spec_hash
    assert f"Resuming {record.run_id}: {record.metrics.images} images are done." in Path(row["log"]).read_text()
    grid = Grid(("clip",), ("voc20",), tmp_path / "data", set=small)
    (job,) = plan([grid], spec_of, results=tmp_path / "results/runs", device="cpu")
    assert job.recorded == record.run_id
