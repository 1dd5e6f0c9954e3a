"""The training loop: the same weights whoever interrupts it, and clear ends."""

from __future__ import annotations

import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ovbench.errors import RunError, WeightsError
from ovbench.models.trainable import ParameterGroup, Trainable
from ovbench.train import checkpoint
from ovbench.train.data import Positions, seed_at, seeded
from ovbench.train.recipe import Recipe
from ovbench.train.runner import Journal, build_runner
from ovbench.train.training import _graceful

CLASSES = 5


class Noise:
    """Images that depend on index and position, as augmented crops do."""

    def __len__(self):
        return 7

    def __getitem__(self, item):
        index, position = item
        generator = torch.Generator().manual_seed(1000 * index + position)
        label = torch.randint(0, CLASSES, (8, 8), generator=generator)
        return {"image": torch.randint(0, 255, (3, 8, 8), generator=generator).byte(), "label": label}


class Small(Trainable):
    """Convolution, batch norm and dropout: statistics, noise and weights that must all be resumed."""

    def __init__(self, explode_at=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.calls, self.explode_at = 0, explode_at

    def losses(self, images, labels):
        self.calls += 1
        loss = nn.functional.cross_entropy(self.head(self.body(images.float() / 255)), labels)
        return {"loss_ce": loss * (math.nan if self.calls == self.explode_at else 1.0), "acc": torch.tensor(50.0)}

    def parameter_groups(self):
        return [
            ParameterGroup("body", tuple(self.body.parameters()), 0.5),
            ParameterGroup("head", tuple(self.head.parameters())),
        ]


def recipe(**fields):
    return Recipe(**{"lr": 0.05, "weight_decay": 1e-3, "iters": 20, "batch": 4, "crop": 8, **fields})


def trained(tmp_path, name, *, stop=20, resume=False, every=6, wanted=None, network=None, on_losses=None, asked=None):
    """The state after training, and the Runner; a folder is resumed from its last checkpoint."""
    torch.manual_seed(0)
    network = network or Small()
    wanted = wanted or recipe()
    folder = tmp_path / name
    journal = Journal(folder, every)
    if on_losses:
        journal.on_losses = on_losses
    if asked:
        journal.on_losses = lambda done, lr, losses: setattr(journal, "stop_asked", done >= asked)
    runner = build_runner(
        network, network.parameter_groups(), wanted, Noise(), journal,
        seed=3, planned=20, stop=stop, device="cpu", workers=0, work_dir=tmp_path / "mm",
    )  # fmt: skip
    if resume:
        runner.resume_from = checkpoint.checkpoints(folder)[-1][1]
    runner.train()
    return runner.averaged_state(), runner, journal


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": "adamw", "schedule": "cosine", "warmup_iters": 5, "grad_clip": 0.5},
        {"ema": 0.1},
        {"amp": "bfloat16"},
        {"schedule": "constant"},
    ],
    ids=["sgd-poly", "adamw-cosine", "ema", "bf16", "constant"],
)
def test_resumed_training_ends_in_the_same_weights(tmp_path, fields):
    wanted = recipe(**fields)
    whole, _, _ = trained(tmp_path, "whole", wanted=wanted)
    trained(tmp_path, "parts", stop=13, wanted=wanted)
    assert [done for done, _ in checkpoint.checkpoints(tmp_path / "parts")] == [12, 13]
    _, last = checkpoint.checkpoints(tmp_path / "parts")[-1]
    last.unlink()  # as if killed in the 13th: the 12th was the last saved
    resumed, _, _ = trained(tmp_path, "parts", resume=True, wanted=wanted)
    assert same(whole, resumed)
    moved, _, _ = trained(tmp_path, "other", wanted=recipe(**{**fields, "lr": 0.04}))
    assert not same(whole, moved)  # the comparison can fail


def test_mean_of_weights_is_not_the_weights(tmp_path):
    mean, runner, _ = trained(tmp_path, "mean", wanted=recipe(ema=0.1))
    assert not torch.equal(mean["head.weight"], runner.plain_model.state_dict()["head.weight"])


def test_factors_on_the_learning_rate(tmp_path):
    seen = []
    trained(tmp_path, "lr", on_losses=lambda done, lr, losses: seen.append(lr))
    assert seen[0] == pytest.approx(0.025) and len(seen) == 20
    expected = [0.025 * (1 - step / 19) ** 0.9 for step in range(20)]  # mmengine's poly: 0 in the last of 20
    assert seen == pytest.approx(expected)
    _, runner, _ = trained(tmp_path, "short", stop=5)
    body, head = runner.optim_wrapper.optimizer.param_groups
    assert body["lr"] == pytest.approx(0.5 * head["lr"]) and head["lr"] > 0


def test_asked_to_stop_it_saves_first(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "asked", asked=9, every=100)
    assert [done for done, _ in checkpoint.checkpoints(tmp_path / "asked")] == [9]
    whole, _, _ = trained(tmp_path, "whole")
    resumed, _, _ = trained(tmp_path, "asked", resume=True)
    assert same(whole, resumed)


def test_signals_ask_once_and_then_end():
    assert threading.current_thread() is threading.main_thread()
    journal = Journal(None, 1)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _graceful(journal):
        os.kill(os.getpid(), signal.SIGTERM)
        assert journal.stop_asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_nan_ends_with_the_last_checkpoint_kept(tmp_path):
    with pytest.raises(RunError, match=r"in loss.* after 8 iterations.*grad_clip.*checkpoint, of iteration 6, is kept"):
        trained(tmp_path, "nan", network=Small(explode_at=8))
    assert [done for done, _ in checkpoint.checkpoints(tmp_path / "nan")] == [6]
    with pytest.raises(RunError, match=r"after 2 iterations.*Nothing was saved yet"):
        trained(tmp_path, "early", network=Small(explode_at=2))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The losses of an iteration are those of the weights before it."""

    class Spoilt(Small):
        def losses(self, images, labels):
            found = super().losses(images, labels)
            if self.calls == 6:  # a finite loss whose gradient is not
                found["loss_ce"] = found["loss_ce"] + 0 * torch.sqrt(self.head.bias.sum() * 0)
            return found

    with pytest.raises(
        RunError, match=r"NaN or infinity in the weights 'head.bias' after 6 iterations.*of iteration 3, is kept"
    ):
        trained(tmp_path, "spoilt", network=Spoilt(), every=3)
    assert [done for done, _ in checkpoint.checkpoints(tmp_path / "spoilt")] == [3]


def test_float16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(RunError, match="float16 training needs a GPU"):
        trained(tmp_path, "half", wanted=recipe(amp="float16"))


def test_damaged_and_foreign_checkpoints(tmp_path):
    trained(tmp_path, "run", stop=6)
    path = checkpoint.checkpoints(tmp_path / "run")[-1][1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"cannot be read.*the one before"):
        checkpoint.read(path)
    torch.save({"anything": 1}, path)
    with pytest.raises(WeightsError, match="no checkpoint of ovbench"):
        checkpoint.read(path)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"iteration": 1, "state_dict": Evil(), "optimizer": {}, "schedulers": []}, path)
    with pytest.raises(WeightsError):
        checkpoint.read(path)
    assert not (tmp_path / "owned").exists()


def test_no_space_names_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(RunError, match=r"Cannot write the checkpoint .*No space left.*--resume"):
        checkpoint.write(tmp_path, 5, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_same_batches(world):
    def batches(first, count):
        ranks = [iter(Positions(7, 5, 4 // world, first, rank, world)) for rank in range(world)]
        return [[next(rank) for rank in ranks for _ in range(4 // world)] for _ in range(count)]

    alone = iter(Positions(7, 5, 4))
    expected = [[next(alone) for _ in range(4)] for _ in range(6)]
    assert batches(0, 6) == expected
    assert batches(3, 3) == expected[3:]  # resumed: nothing is skipped through


def test_every_pass_has_every_image_once_in_a_new_order():
    stream = iter(Positions(7, 5, 1))
    passes = [[next(stream)[0] for _ in range(7)] for _ in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_seeds_of_places():
    assert seed_at(0, 1, 2) != seed_at(0, 2, 1) != seed_at(1, 1, 2)
    assert 0 <= seed_at(7, 0, 10**9) < 2**32
    np.random.seed(0)
    expected = np.random.RandomState(0).rand()
    with seeded(5):
        inside = np.random.rand()
    with seeded(5):
        assert np.random.rand() == inside
    assert np.random.rand() == expected  # outside nothing has moved
