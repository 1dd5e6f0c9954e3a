"""Validation while training: the scores of ``run``, the best weights kept, and a training that does not notice it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.cli.train_progress import LogLines
from ovbench.errors import Interrupted, UsageError, WeightsError
from ovbench.models.closed_set import ClosedSetNetwork
from ovbench.train import record as records
from ovbench.train.curves import plot_validation
from ovbench.train.network import choose_parameters
from ovbench.train.plan import TrainOptions, plan
from ovbench.train.record import ValidationPoint
from ovbench.train.training import train
from ovbench.train.validation import branch_scores, generators_kept

FIELDS = {"crop": "32", "batch": "2", "resize": "64,48", "lr": "0.05", "iters": "5"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synth("ade20k", tmp_path_factory.mktemp("data"), images=2, train_images=4, size=(48, 64), classes=8)


def planned(data, method="ecac-fcn", options=None, **given):
    where = options or TrainOptions(data_root=data, workers=0)
    small = {"channels": 16, **({"hidden": 16} if method.startswith("ecac") else {})}
    given = {"changes": FIELDS, "arch": "tiny", "method_options": small, **given}
    return plan(method, "ade20k", options=where, **given)


@pytest.fixture(scope="module")
def validated(data, tmp_path_factory):
    """A training of 5 iterations that is validated after 2, 4 and 5; and the same one without."""
    root = tmp_path_factory.mktemp("trainings")
    found = []
    for every in (2, None):
        where = TrainOptions(data_root=data, workers=0, results=root / str(every), val_every=every, checkpoint_every=3)
        made = planned(data, options=where)
        found.append((*train(made, where), made))
    return found


def test_a_training_does_not_notice_that_it_is_validated(validated):
    (with_it, folder, made), (without, plain, _) = validated
    one, other = load_file(folder / records.WEIGHTS), load_file(plain / records.WEIGHTS)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    assert with_it.spec_hash == without.spec_hash and with_it.final_losses == without.final_losses
    assert made.subject.network.training and made.subject.network.segmentor.auxiliary_head.training
    assert without.validation == () and not (plain / records.VALIDATION_CURVE).exists()


def test_scores_are_those_of_a_run_and_the_best_weights_are_kept(validated, data, tmp_path):
    from ovbench.evaluate import run
    from ovbench.train.validation import evaluation_of

    record, folder, made = validated[0]
    assert [point.iteration for point in record.validation] == [2, 4, 5]
    best = max(record.validation, key=lambda point: point.miou)
    assert record.best_iteration == best.iteration and (folder / records.VALIDATION_CURVE).stat().st_size > 5000
    for name, point in ((records.BEST, best), (records.WEIGHTS, record.validation[-1])):
        found = run(evaluation_of(record.spec, folder / name), data_root=data, results=tmp_path, workers=0, gallery=0)
        assert found.metrics.miou == point.miou
    assert set(record.validation[0].branches) == {"auxiliary", "coarse"}
    # the branches go through the same windows, sizes and areas: the deciding classifier as a branch has the run's score
    network = made.subject.network

    class Deciding(ClosedSetNetwork):
        def branches(self):
            return ("decode",)

        def branch_logits(self, batch):
            return {"decode": self(batch)}

    same = Deciding(network.segmentor, network.mean.flatten().tolist(), network.std.flatten().tolist())
    assert branch_scores(same, made) == {"decode": pytest.approx(record.validation[-1].miou, abs=1e-9)}
    network.train()


def test_killed_between_validations_it_ends_in_the_same_curve(validated, data):
    record, folder, _ = validated[0]
    where = TrainOptions(
        data_root=data, workers=0, results=folder.parents[2], val_every=2, checkpoint_every=3, resume=True
    )
    (folder / "checkpoints" / "iteration-00000005.pt").unlink()  # as if it had been killed in the fourth
    records.write(record.model_copy(update={"status": "running"}), folder)
    again, place = train(planned(data, options=where), where)
    assert place == folder and again.validation == record.validation
    assert again.best_iteration == record.best_iteration and again.best_weights_sha256 == record.best_weights_sha256
    records.write(record.model_copy(update={"status": "running"}), folder)
    without = TrainOptions(data_root=data, workers=0, results=folder.parents[2], resume=True)
    later, _ = train(planned(data, options=without), without)  # what is known stays, though nothing is validated now
    assert later.validation == record.validation and later.best_weights_sha256 == record.best_weights_sha256


def test_asked_to_stop_in_a_validation_it_saves_and_goes_on_there(data, tmp_path, monkeypatch):
    from ovbench.train import validation

    where = TrainOptions(data_root=data, workers=0, results=tmp_path, val_every=2)
    told = validation.Validation.__call__

    def asked(self, runner, iteration, stop_asked):
        monkeypatch.setattr(validation.Validation, "__call__", told)
        told(self, runner, iteration, lambda: True)

    monkeypatch.setattr(validation.Validation, "__call__", asked)
    with pytest.raises(Interrupted, match="after 2 iterations"):
        train(planned(data, options=where), where)
    (folder,) = (tmp_path / "ecac-fcn" / "ade20k").iterdir()
    assert records.read(folder / records.RECORD).validation == ()
    where = TrainOptions(data_root=data, workers=0, results=tmp_path, val_every=2, resume=True)
    record, _ = train(planned(data, options=where), where)
    assert [point.iteration for point in record.validation] == [2, 4, 5]


def test_branches_of_a_head_that_names_a_coarse_classifier():
    class Head(nn.Module):
        def forward(self, maps):
            return maps[-1]

        def coarse_logits(self, inputs):
            return inputs[-1] + 1

    class Segmentor(nn.Module):
        with_auxiliary_head = True

        def __init__(self):
            super().__init__()
            self.decode_head, self.auxiliary_head = Head(), nn.ModuleList([Head(), Head()])

        def extract_feat(self, batch):
            return [batch]

    network = ClosedSetNetwork(Segmentor(), (0, 0, 0), (1, 1, 1))
    found = network.branch_logits(torch.zeros(1, 3, 4, 4))
    assert list(found) == list(network.branches()) == ["auxiliary_0", "auxiliary_1", "coarse"]
    assert bool((found["coarse"] == 1).all()) and not bool(found["auxiliary_1"].any())


def test_generators_are_kept():
    import random

    import numpy as np

    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with generators_kept():
        drawn()
    assert drawn() == expected


def test_a_dead_branch_is_a_line_of_the_picture(tmp_path):
    points = [ValidationPoint(iteration=step, miou=step, branches={"coarse": 0.5}) for step in (1, 2)]
    assert plot_validation(points, tmp_path / "curve.png", "title").stat().st_size > 5000
    assert plot_validation([], tmp_path / "none.png", "title") is None


# Recipes


def test_factors_for_heads_and_norms_that_do_not_decay(data):
    network = planned(data).subject.network
    before, _ = choose_parameters(network, "all")
    assert {group.lr_mult for group in before} == {1.0} and not any(group.undecayed for group in before)
    groups, parts = choose_parameters(network, "all", head_lr_mult=10, norm_decay=False)
    assert {part.part: part.lr_mult for part in parts} == {"encoder": 1.0, "decode_head": 10.0, "auxiliary_head": 10.0}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    still = {names[id(parameter)] for group in groups for parameter in group.undecayed}
    assert all(parameter.dim() == 1 for name, parameter in network.named_parameters() if name in still)
    assert any("bn" in name or "norm" in name for name in still) and any(
        name.endswith("conv_seg.bias") for name in still
    )
    assert not any(name.endswith("conv_seg.weight") for name in still)
    with pytest.raises(UsageError, match="no part of this network is a decode head"):
        choose_parameters(Flat(), "all", head_lr_mult=10)


class Flat(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def parameter_groups(self, policy):
        return [{"name": "all", "params": ["weight"], "lr_mult": 1.0, "weight_decay_mult": 1.0}]


def test_batches_in_parts_with_batch_norm_are_wanted_by_name(data, tmp_path):
    changes = {**FIELDS, "accumulate": "2"}
    with pytest.raises(UsageError, match="norm_of_parts=true"):
        planned(data, "fcn", changes=changes)
    where = TrainOptions(data_root=data, workers=0, results=tmp_path)
    made = planned(data, "fcn", options=where, changes={**changes, "norm_of_parts": "true", "batch": "4", "iters": "2"})
    record, folder = train(made, where)
    assert record.status == "ok" and record.final_losses["loss"] > 0
    from ovbench.models.trained_file import read_about

    assert {"accumulate=2", "norm_of_parts=True"} <= set(read_about(folder / records.WEIGHTS).overrides)


def test_warm_restarts_are_refused_with_the_reason(data, validated):
    with pytest.raises(UsageError, match="a schedule falls once"):
        planned(data, changes={**FIELDS, "schedule": "cosine-restarts"})
    _, folder, _ = validated[1]
    where = TrainOptions(data_root=data, workers=0, results=folder.parents[2], resume=True)
    with pytest.raises(UsageError, match="warm restart"):
        train(planned(data, options=where, changes={**FIELDS, "iters": "9"}), where)


# Starting from a whole network


def test_start_from_a_host_and_from_other_classes(validated, data, tmp_path):
    where = TrainOptions(data_root=data, workers=0, results=tmp_path)
    host, folder = train(planned(data, "fcn", options=where, changes={**FIELDS, "iters": "1"}), where)
    file = str(folder / records.WEIGHTS)
    made = planned(data, "ecac-fcn", options=where, init=file, arch=None)
    state, weights = made.subject.network.state_dict(), load_file(file)
    for key, value in weights.items():
        assert torch.equal(state[key.replace("decode_head.", "decode_head.host.")], value), key
    assert made.spec.init == records.WEIGHTS and made.spec.init_sha256 == host.weights_sha256
    assert made.spec.arch == "tiny" and "start from 'fcn'" in made.subject.start and "new" in made.subject.start
    assert planned(data).spec.spec_hash() != planned(data, init=file).spec.spec_hash()
    with pytest.raises(UsageError, match="leave --weights away"):
        planned(data, "fcn", init=file, weights=file)


def test_other_classes_are_refused_unless_told(validated, data, tmp_path):
    _, folder, _ = validated[1]
    other = synth("context59", tmp_path / "context", images=1, train_images=3, size=(48, 64), classes=6)
    where = TrainOptions(data_root=other, workers=0)
    given = {
        "options": where, "arch": "tiny", "changes": FIELDS, "method_options": {"channels": 16, "hidden": 16},
        "init": str(folder / records.WEIGHTS),
    }  # fmt: skip
    with pytest.raises(WeightsError, match=r"tells 150 classes apart, not 59.*--new-classes"):
        plan("ecac-fcn", "context59", **given)
    made = plan("ecac-fcn", "context59", new_classes=True, **given)
    state, weights = made.subject.network.state_dict(), load_file(folder / records.WEIGHTS)
    backbone = [key for key in state if key.startswith("segmentor.backbone.")]
    assert backbone and all(torch.equal(state[key], weights[key]) for key in backbone)
    assert state["segmentor.decode_head.host.conv_seg.weight"].shape[0] == 59 and "left out" in made.subject.start


# What a log shows


def test_lines_of_a_log_have_all_losses_and_the_time_that_is_left():
    now, lines = [0.0], []
    log = LogLines(lambda: now[0], lines.append)
    for done in range(1, 101):
        now[0] += 1.0
        log(done, 100, 0.02, {"decode.loss_ce": 2.0, "aux.loss_ce": 0.5, "loss": 2.5, "decode.acc_seg": 30.0})
    assert len(lines) == 5  # the first, every 30 s, the last
    assert lines[0].startswith("1/100 iterations  lr 0.02  loss 2.5") and "left" not in lines[0]
    assert "decode.loss_ce 2" in lines[1] and "aux.loss_ce 0.5" in lines[1] and "decode.acc_seg 30" in lines[1]
    assert lines[1].endswith("0:01:09 left") and "left" not in lines[-1]


def test_the_command_validates_and_a_finished_training_is_told(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "train", "-m", "fcn", "-d", "ade20k", "--data-root", str(data), "--arch", "tiny", "-o", "channels=16",
        "--workers", "0", "--device", "cpu", "--val-every", "1", *(f"--set={k}={v}" for k, v in FIELDS.items()),
        "--set", "iters=2",
    ]  # fmt: skip
    assert run_command(command) == 0
    told = capsys.readouterr()
    assert "validation: best mIoU" in told.out and "best.safetensors" in told.out
    assert "Validation after 1 iterations: mIoU" in told.err and "auxiliary" in told.err
    assert run_command([*command, "--resume"]) == 0
    told = capsys.readouterr()
    assert "Trained already: 2 of 2 iterations" in told.err and "Recorded already" in told.err
    assert len(list((tmp_path / "results" / "trainings" / "fcn" / "ade20k").iterdir())) == 1
    assert len(list((tmp_path / "results" / "runs" / "fcn" / "ade20k").glob("*.json"))) == 1
    (folder,) = (tmp_path / "results" / "trainings" / "fcn" / "ade20k").iterdir()
    lines = [json.loads(line) for line in (folder / records.VALIDATION).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
