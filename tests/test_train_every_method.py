"""Every method that can be trained trains: twenty iterations of the real path on two generated pictures."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import save_tiny

from ovbench.benchmarks.synth.copies import synth
from ovbench.registry import class_of, method_info, method_names
from ovbench.train import curves
from ovbench.train import record as records
from ovbench.train.plan import TrainOptions, plan
from ovbench.train.training import train

ITERATIONS = 20
TRAINABLE = [name for name in method_names(None) if class_of(name).RECIPES]
CLOSED = [name for name in TRAINABLE if not method_info(name).takes_words]
# Always the same two whole pictures, so that a loss that falls says something.
ALIKE = {
    "iters": str(ITERATIONS),
    "batch": "2",
    "flip": "0",
    "ratio_range": "1,1",
    "photometric": "false",
    "cat_max_ratio": "1",
}
SMALL = {
    "": {},
    "caa": {"center_channels": 8, "affinity_channels": 4},
    "ecac": {"memory_loss_start": 8, "iv_start": 12},
}
CAT_SEG = {"hidden": 16, "layers": 1, "heads": 2, "window": 4, "grid": 8, "pad_len": 6}
OPEN = {
    "cat-seg": CAT_SEG,
    "lsmseg": {**CAT_SEG, "visual": "none", "filter_k": 4},
    "fisa": {"generator": "grid", "training_side": 0},
    "scn": {"generator": "grid"},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small tensors; several threads would only wait for one another. The curves' picture costs more than the training."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "plot_losses", lambda *_: None)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synth("ade20k", tmp_path_factory.mktemp("data"), images=1, train_images=2, size=(32, 32), classes=6, seed=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


class Killed(Exception):
    """As if the process ended here."""


def trained(name, data, results, clip, *, kill_at=None, resume=False):
    """The total loss of every iteration (of ECAC, some of whose losses begin later, that of its result), and the weights."""
    if name in OPEN:
        given = {"weights": clip, "method_options": OPEN[name]}
        side, lr = (128, 0.01) if name in ("cat-seg", "lsmseg") else (32, 0.001)
        sides = {"crop": str(side), "resize": f"{side},{side}", "lr": str(lr)}
    else:
        addon = name.split("-")[0] if "-" in name else ""
        given = {"arch": "tiny", "method_options": {"channels": 16, **SMALL[addon]}}
        sides = {"crop": "32", "resize": "32,32", "lr": "0.05"}

    def on_iteration(done, total, lr, losses):
        if done == kill_at:
            raise Killed

    where = TrainOptions(
        data_root=data, results=results, workers=0, checkpoint_every=6, resume=resume, on_iteration=on_iteration
    )
    _, folder = train(plan(name, "ade20k", changes={**ALIKE, **sides}, options=where, **given), where)
    lines = list(records.read_losses(folder / records.LOSSES))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    losses = [line.get("decode.loss_rce_student", line["loss"]) for line in lines]
    return losses, load_file(folder / records.WEIGHTS)


def test_all_of_them_are_here():
    assert len(CLOSED) == 24 and set(TRAINABLE) - set(CLOSED) == set(OPEN)


@pytest.mark.parametrize("name", TRAINABLE)
def test_twenty_iterations(name, data, clip, tmp_path):
    losses, weights = trained(name, data, tmp_path, clip)
    assert len(losses) == ITERATIONS
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5]), losses
    assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize("name", ["ecac-psp", "caa-fcn"])
def test_killed_and_resumed(name, data, clip, tmp_path):
    """With memory, batch statistics and dropout."""
    losses, weights = trained(name, data, tmp_path / "whole", clip)
    with pytest.raises(Killed):
        trained(name, data, tmp_path / "killed", clip, kill_at=15)  # the checkpoint before is that of 12
    again, resumed = trained(name, data, tmp_path / "killed", clip, resume=True)
    assert again == losses and set(resumed) == set(weights)
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)
