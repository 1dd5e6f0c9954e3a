"""``ovbench train`` as a user runs it: weights, record, curves and evaluation; killed and resumed; two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import warm
from safetensors.torch import load_file

from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import RunError
from ovbench.train import record as records

SMALL = (
    "--arch", "tiny", "--set", "crop=32", "--set", "batch=4", "--set", "resize=64,48", "--set", "lr=0.01",
    "--workers", "0", "--device", "cpu", "-o", "channels=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return synth("ade20k", root, images=3, train_images=6, size=(48, 64), classes=8)


def started(data, cwd, *arguments, method="fcn"):
    command = ["train", "-m", method, "-d", "ade20k", "--data-root", str(data), *SMALL, *arguments]
    return warm.Started(warm.ovbench, command, cwd=cwd)


def finished(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def only_folder(cwd, method="fcn"):
    (folder,) = (cwd / "results" / "trainings" / method / "ade20k").iterdir()
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted training of 14 iterations and its evaluation."""
    cwd = tmp_path_factory.mktemp("whole")
    code, out, err = finished(started(data, cwd, "--set", "iters=14"))
    assert code == 0, err
    return cwd, out, err


def test_what_a_training_leaves(whole):
    cwd, out, err = whole
    folder = only_folder(cwd)
    record = records.read(folder / records.RECORD)
    assert (record.status, record.iterations, record.spec.planned) == ("ok", 14, 14)
    assert record.spec.demo and record.spec.images == 6 and set(record.spec.overrides) >= {"iters", "lr", "crop"}
    assert {part.part for part in record.parts} == {"encoder", "decode_head", "auxiliary_head"}
    losses = list(records.read_losses(folder / records.LOSSES))
    assert [line["iteration"] for line in losses] == list(range(1, 15)) and losses[-1]["decode.loss_ce"] > 0
    assert record.final_losses["loss"] == losses[-1]["loss"]
    assert (folder / records.CURVES).stat().st_size > 5000
    assert "auxiliary" not in " ".join(load_file(folder / records.WEIGHTS))
    assert "mIoU" in out and "demo: generated scenes" in out and "mmengine" not in err
    (run,) = (cwd / "results" / "runs" / "fcn" / "ade20k").glob("*.json")
    evaluated = json.loads(run.read_text())
    assert evaluated["spec"]["weights_sha256"] == record.weights_sha256 and evaluated["demo"]
    assert evaluated["spec"]["protocol"]["short_side"] == 48 and evaluated["metrics"]["images"] == 3


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_killed_and_resumed_ends_in_the_same_weights(whole, data, tmp_path, kill):
    arguments = ("--set", "iters=14", "--checkpoint-every", "3", "--no-eval")
    process = started(data, tmp_path, *arguments)
    saved = tmp_path / "results" / "trainings" / "fcn" / "ade20k"
    while process.poll() is None and not list(saved.glob("*/checkpoints/iteration-*.pt")):
        time.sleep(0.05)
    process.send_signal(kill)
    code, _, err = finished(process)
    assert code == (130 if kill == signal.SIGTERM else -9), err
    before = records.read(only_folder(tmp_path) / records.RECORD)
    assert before.status == ("interrupted" if kill == signal.SIGTERM else "running")
    code, _, err = finished(started(data, tmp_path, *arguments, "--resume"))
    assert code == 0, err
    assert "Resuming" in err
    ours, theirs = only_folder(tmp_path), only_folder(whole[0])
    after = records.read(ours / records.RECORD)
    assert after.status == "ok" and after.resumed == 1 and after.started == before.started
    one, other = load_file(ours / records.WEIGHTS), load_file(theirs / records.WEIGHTS)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    assert [line["iteration"] for line in records.read_losses(ours / records.LOSSES)] == list(range(1, 15))


def test_a_trial_is_marked_and_its_run_is_partial(data, tmp_path, run_cli):
    done = run_cli(
        "train", "-m", "ecac-fcn", "-d", "ade20k", "--data-root", str(data), *SMALL, "-o", "hidden=16",
        "--set", "epochs=10", "--limit-iters", "2", "--tensorboard",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trial: not the whole schedule" in done.stdout
    assert "weights of a trial: 2 of 15 iterations" in " ".join(done.stdout.split())
    folder = only_folder(tmp_path, "ecac-fcn")
    assert list((folder / "tensorboard").iterdir())
    state = load_file(folder / records.WEIGHTS)
    assert not any("teacher" in key for key in state)
    (memory,) = (value for key, value in state.items() if key.endswith(".memory"))
    assert memory.abs().sum() > 0  # what the bank has seen is part of the weights
    again = run_cli(
        "run", "-m", "ecac-fcn", "-d", "ade20k", "--data-root", str(data), "--weights", str(folder / records.WEIGHTS),
        "-p", "closed-set-ms", "--short-side", "48", "--scales", "0.75,1", "--json",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert record["spec"]["protocol"]["scales"] == [0.75, 1.0] and record["spec"]["protocol"]["flip"] is True
    assert record["partial"] and "it has 4 views" in record["efficiency"]["input"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run_shows_recipe_and_parameters(data, here, capsys):
    options = (*SMALL, "-o", "center_channels=8", "--dry-run")
    assert run_command(["train", "-m", "caa-psp", "-d", "ade20k", "--data-root", str(data), *options]) == 0
    out = capsys.readouterr().out
    assert "decode_head" in out and "(set by you)" in out and "iters" in out
    assert not (here / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "sc-clip", "-d", "ade20k"), "'sc-clip' is training-free"),
        (("-m", "fcn", "-d", "voc21"), "voc21 has no training split here"),
        (("-m", "fcn", "-d", "ade20k"), "Where is ADE20K"),
        (("-m", "fcn", "-d", "ade20k", "--demo", "--set", "speed=1"), "Unknown field of a recipe 'speed'"),
        (("-m", "fcn", "-d", "ade20k", "--demo", "--arch", "resnet5"), "Did you mean: resnet50-v1c"),
        (("-m", "caa-fcn", "-d", "ade20k", "--demo", "-o", "centre=1"), "Did you mean: center"),
        (("-m", "fcn", "-d", "ade20k", "--demo", "--weights", "none.pth"), "No file 'none.pth' with the encoder"),
    ],
)
def test_mistakes_are_named(here, capsys, arguments, message):
    assert run_command(["train", *arguments, "--device", "cpu"]) in (2, 4)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_broken_image_is_named_and_checkpoints_stay(here, capsys):
    root = synth("ade20k", here / "broken", images=2, train_images=4, size=(48, 64), classes=8)
    image = sorted((root / "images" / "training").iterdir())[0]
    image.write_bytes(image.read_bytes()[:500])
    options = (*SMALL, "--set", "iters=5", "--checkpoint-every", "1")
    assert run_command(["train", "-m", "fcn", "-d", "ade20k", "--data-root", str(root), *options]) == 3
    assert image.name in capsys.readouterr().err
    assert records.read(only_folder(here) / records.RECORD).status == "failed"


def test_two_processes_train_together(data, tmp_path):
    """torchrun over gloo: one record, and weights close to those of one process on the same batches."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ovbench",
        "train", "-m", "ecac-fcn", "-d", "ade20k", "--data-root", str(data), *SMALL, "-o", "hidden=16",
        "--set", "iters=3", "--launcher", "pytorch",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = only_folder(tmp_path, "ecac-fcn")
    record = records.read(folder / records.RECORD)
    assert (record.spec.processes, record.status, record.iterations) == (2, "ok", 3)
    state = load_file(folder / records.WEIGHTS)
    assert all(value.isfinite().all() for value in state.values())
    assert len(list((tmp_path / "results" / "runs" / "ecac-fcn" / "ade20k").glob("*.json"))) == 1  # one evaluation


def test_a_scheduler_signals_readers_as_well_and_a_checkpoint_is_kept(data, tmp_path):
    arguments = ("--set", "iters=200", "--checkpoint-every", "100", "--no-eval", "--workers", "1")
    process = started(data, tmp_path, *arguments)
    logs = tmp_path / "results" / "trainings" / "fcn" / "ade20k"
    while process.poll() is None and not any(path.stat().st_size for path in logs.glob("*/losses.jsonl")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 130, err
    assert list(only_folder(tmp_path).glob("checkpoints/iteration-*.pt"))
    assert records.read(only_folder(tmp_path) / records.RECORD).status == "interrupted"


def test_a_folder_is_one_process_alone(tmp_path):
    with (
        records.held(tmp_path / "one"),
        pytest.raises(RunError, match="Another process trains"),
        records.held(tmp_path / "one"),
    ):
        pass
    with records.held(tmp_path / "one"):
        pass  # let go of


def test_mmseg_evaluates_the_dumped_config_to_the_same_score(whole, data, here, capsys):
    from mmengine.config import Config
    from mmengine.runner import Runner

    weights = str(only_folder(whole[0]) / records.WEIGHTS)
    command = [
        "run", "-m", "fcn", "-d", "ade20k", "--data-root", str(data), "--weights", weights, "--short-side", "48",
        "--long-side", "64", "--device", "cpu", "--workers", "0",
    ]  # fmt: skip
    assert run_command([*command, "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["metrics"]
    assert run_command([*command, "--dump-config", "config.py"]) == 0
    config = Config.fromfile("config.py")
    config.log_level = "ERROR"
    theirs = Runner.from_cfg(config).test()
    assert theirs["mIoU"] == pytest.approx(ours["miou"], abs=0.006)  # mmseg rounds to two places
    assert theirs["aAcc"] == pytest.approx(ours["aacc"], abs=0.006)


def test_a_run_of_trained_weights_can_be_verified(whole, data, here, capsys):
    (record,) = (whole[0] / "results" / "runs" / "fcn" / "ade20k").glob("*.json")
    weights = str(only_folder(whole[0]) / records.WEIGHTS)
    status = run_command(["verify", str(record), "--data-root", str(data), "--weights", weights, "--device", "cpu"])
    assert status == 0, capsys.readouterr().err


OPEN = (
    "--weights", "builtin", "-o", "hidden=16", "-o", "layers=1", "-o", "grid=6", "-o", "window=3", "--set", "crop=48",
    "--set", "resize=64,48", "--set", "batch=2", "--set", "photometric=false", "--workers", "0", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def stuff(tmp_path_factory):
    return synth("coco_stuff", tmp_path_factory.mktemp("stuff"), images=1, train_images=4, size=(48, 64), classes=6)


def test_an_open_vocabulary_method_is_trained_resumed_and_evaluated_on_other_words(stuff, here, capsys):
    command = ["train", "-m", "cat-seg", "-d", "coco_stuff", "--data-root", str(stuff), *OPEN, "--no-eval"]
    assert run_command([*command, "--set", "iters=4", "--trainings", "whole"]) == 0
    assert run_command([*command, "--set", "iters=4", "--checkpoint-every", "1", "--trainings", "parts"]) == 0
    (whole,) = (here / "whole" / "cat-seg" / "coco_stuff").iterdir()
    (parts,) = (here / "parts" / "cat-seg" / "coco_stuff").iterdir()
    # as if it had been killed in the last iteration
    (parts / "checkpoints" / "iteration-00000004.pt").unlink()
    record = records.read(parts / records.RECORD)
    records.write(record.model_copy(update={"status": "running"}), parts)
    assert (
        run_command([*command, "--set", "iters=4", "--checkpoint-every", "1", "--trainings", "parts", "--resume"]) == 0
    )
    one, other = load_file(whole / records.WEIGHTS), load_file(parts / records.WEIGHTS)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    spec = records.read(whole / records.RECORD).spec
    assert (spec.wording, spec.templates, spec.weights, spec.recipe.policy) == (
        "spaced",
        "cat-seg",
        "builtin",
        "attention",
    )
    capsys.readouterr()
    other_words = synth("voc20", here / "voc", images=1, size=(48, 64))
    run = ["run", "-m", "cat-seg", "-d", "voc20", "--data-root", str(other_words), "--device", "cpu", "--workers", "0"]
    assert run_command([*run, "--weights", str(whole / records.WEIGHTS), "--gallery", "0", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["spec"]["method_options"]["hidden"] == 16 and record["spec"]["protocol"]["global_view"]
    assert record["metrics"]["images"] == 1
    assert run_command([*run, "--weights", str(whole / records.WEIGHTS), "-m", "lsmseg", "-o", "visual=none"]) == 4
    assert "of 'cat-seg', not of 'lsmseg'" in capsys.readouterr().err


def test_prompts_are_part_of_the_spec(stuff, here, capsys):
    command = ["train", "-m", "cat-seg", "-d", "coco_stuff", "--data-root", str(stuff), *OPEN, "--dry-run", "--json"]
    hashes = set()
    for prompts in ("cat-seg", "lsmseg", "lsmseg:colour"):
        assert run_command([*command, "--prompts", prompts]) == 0
        spec = json.loads(capsys.readouterr().out)
        assert spec["templates"] == prompts
        hashes.add(spec["templates_sha256"])
    assert len(hashes) == 3
    fixed = ["train", "-m", "fcn", "-d", "ade20k", "--demo", "--dry-run", "--device", "cpu", "--prompts", "lsmseg"]
    assert run_command(fixed) == 2 and "fixed list of classes" in capsys.readouterr().err


def test_a_training_that_has_ended_is_not_done_again(whole, data, here, capsys):
    folder = only_folder(whole[0])
    command = ["train", "-m", "fcn", "-d", "ade20k", "--data-root", str(data), *SMALL, "--set", "iters=14", "--no-eval"]
    before = (folder / records.WEIGHTS).stat().st_mtime_ns
    assert run_command([*command, "--resume", "--trainings", str(whole[0] / "results" / "trainings")]) == 0
    assert "Trained already" in capsys.readouterr().err
    assert (folder / records.WEIGHTS).stat().st_mtime_ns == before and only_folder(whole[0]) == folder


def test_a_demo_takes_what_the_user_says(here, capsys):
    (here / "mine.yaml").write_text("lr: 0.5\namp: off\n")
    command = ["train", "-m", "fcn", "-d", "ade20k", "--demo", "--device", "cpu", "--dry-run", "--json"]
    assert run_command([*command, "--recipe", "mine.yaml", "--set", "epochs=2"]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert (spec["recipe"]["lr"], spec["recipe"]["epochs"], spec["recipe"]["iters"]) == (0.5, 2.0, None)
    assert spec["recipe"]["crop"] == 64 and spec["overrides"] == ["amp", "epochs", "lr"]
