"""Every trainable method trains on one GPU as on the CPU, under an emulation that refuses tensors of two devices."""

from __future__ import annotations

import json
import os
import socket
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from emulated_cuda import OnGPU, emulated_cuda
from torch import nn

from ovbench import benchmarks
from ovbench.cli.app import run_command
from ovbench.ops.panoptic import Segments
from ovbench.registry import class_of, method_info, method_names
from ovbench.train import network as subjects
from ovbench.train.recipe import Recipe
from ovbench.train.runner import Journal, build_runner

TRAINABLE = [name for name in method_names(None) if getattr(class_of(name), "RECIPES", None)]
SIDE = 64


class Crops:
    """Images, labels and, where wanted, segments that depend on index and position."""

    def __init__(self, classes: int, segments: bool) -> None:
        self.classes, self.segments = classes, segments

    def __len__(self):
        return 5

    def __getitem__(self, item):
        generator = torch.Generator().manual_seed(100 * item[0] + item[1])
        coarse = torch.randint(0, min(self.classes, 8), (8, 8), generator=generator)
        label = coarse.repeat_interleave(SIDE // 8, 0).repeat_interleave(SIDE // 8, 1)
        image = torch.randint(0, 255, (3, SIDE, SIDE), generator=generator).byte()
        found = {"image": image, "label": label}
        if self.segments:
            present = label.unique()
            ids = torch.searchsorted(present, label)
            found["segments"] = Segments(ids, present, torch.zeros(len(present), dtype=torch.bool))
        return found


def subject_of(name, device):
    options = subjects.trial_options(name)
    if not method_info(name).takes_words:
        return subjects.closed_set_subject(
            name, options, "tiny", "random", 8, seed=0, device=device, class_frequencies=range(1, 9)
        )
    benchmark = benchmarks.get("coco_panoptic" if name == "fisa" else "voc20")
    return subjects.open_vocabulary_subject(
        name, options, None, "builtin", benchmark, sentences=None, seed=0, device=device
    )


def losses_of(name, device, tmp_path, iterations=2):
    """Losses of the first iterations, and the network, trained by mmengine's Runner as ``ovbench train`` does."""
    subject = subject_of(name, device)
    recipe = Recipe(lr=1e-3, weight_decay=1e-4, iters=iterations, batch=2, crop=SIDE)
    policy = next(iter(class_of(name).RECIPES.values())).get("policy", "all")
    groups, _ = subjects.choose_parameters(subject.network, policy)
    told = []
    journal = Journal(tmp_path / device, 100, lambda done, lr, losses: told.append(losses))
    images = Crops(8 if not method_info(name).takes_words else 20, subject.takes_segments)
    runner = build_runner(
        subject.network, groups, recipe, images, journal, seed=3, planned=iterations, stop=iterations, device=device,
        workers=0, work_dir=tmp_path / "mm",
    )  # fmt: skip
    runner.train()
    return told, subject.network


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_on_one_gpu_is_training_on_the_cpu(name, tmp_path):
    if name == "fisa":
        pytest.importorskip("scipy")
    found = {}
    for device in ("cpu", "cuda"):
        with emulated_cuda() if device == "cuda" else nullcontext():
            found[device], network = losses_of(name, device, tmp_path)
            assert all(isinstance(value, OnGPU) == (device == "cuda") for value in network.state_dict().values())
    assert len(found["cuda"]) == 2
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_the_emulation_refuses_what_a_gpu_refuses():
    before = torch.cuda.device_count()
    with emulated_cuda():
        layer = nn.Linear(4, 3).to("cuda")
        image = torch.rand(2, 4)
        with pytest.raises(RuntimeError, match="same device"):
            layer(image)
        out = layer(image.to("cuda"))
        assert out.device.type == "cuda" and torch.zeros(2, device="cuda").is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            nn.functional.cross_entropy(out, torch.tensor([0, 1]))
        with pytest.raises(TypeError, match="numpy"):
            out.detach().numpy()
        (out * torch.tensor(2.0)).sum().backward()  # single numbers may be anywhere
        assert isinstance(layer.weight.grad, OnGPU) and not isinstance(layer.weight.grad.cpu(), OnGPU)
    assert torch.cuda.device_count() == before


@pytest.fixture
def chosen():
    """Indices that were made torch's current GPU, of one or several; those that are not there are refused, as by torch."""
    taken: list[int] = []

    def take(device):
        assert int(device) < torch.cuda.device_count(), f"invalid device ordinal {device}"
        taken.append(int(device))

    @contextmanager
    def machine(gpus):
        with emulated_cuda(gpus), mock.patch.object(torch.cuda, "set_device", take):
            yield taken

    return machine


SMALL = (
    "--demo", "-m", "fcn", "-d", "ade20k", "--set", "crop=32", "--set", "batch=2", "--set", "iters=1", "-o",
    "channels=16", "--workers", "0",
)  # fmt: skip


def test_training_and_evaluation_use_the_gpu_that_was_named(chosen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with chosen(2) as taken:
        assert run_command(["train", *SMALL, "--device", "cuda:1"]) == 0, capsys.readouterr().err
    assert taken == [1]  # and nobody goes back to the first
    (record,) = (tmp_path / "results" / "runs" / "fcn" / "ade20k").glob("*.json")
    assert json.loads(record.read_text())["spec"]["device"] == "cuda"


def test_a_task_of_slurm_that_sees_one_gpu_takes_it(chosen, tmp_path, monkeypatch, capsys):
    """The task's number is 3, but --gpus-per-task=1 leaves each task one GPU, which is number 0."""
    monkeypatch.chdir(tmp_path)
    names = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "3", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        names["MASTER_PORT"] = str(free.getsockname()[1])
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    joined = torch.distributed.init_process_group
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: joined("gloo"))
    try:
        with chosen(1) as taken:
            assert run_command(["train", *SMALL, "--launcher", "slurm", "--dry-run"]) == 0, capsys.readouterr().err
        assert taken == [0]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
