"""ECAC around closed-set decode heads: its parts against loops, what it must not do, and its cost beside Table 4.6."""

from __future__ import annotations

import copy
import csv

import pytest
import torch

from ovbench.errors import UsageError
from ovbench.measure.counters import count
from ovbench.measure.parameters import count_parameters
from ovbench.methods import closed_set, ecac, hosts
from ovbench.ops import class_context

K, WIDTH = 5, 8
TINY = {
    "type": "FCNHead",
    "in_channels": 6,
    "in_index": 0,
    "channels": WIDTH,
    "num_convs": 1,
    "concat_input": False,
    "num_classes": K,
    "dropout_ratio": 0.0,
    "norm_cfg": {"type": "BN"},
}
TABLE = {"fcn": "FCN", "psp": "PSPNet", "deeplabv3plus": "DeepLabV3+"}


def _head(seed: int = 0, **switches):
    torch.manual_seed(seed)
    given = {"class_frequencies": [50, 30, 10, 5, 5], "hidden": 12, "iv_start": 0, **switches}
    return ecac.register()(host=dict(TINY), **given)


def _batch(height: int = 6, width: int = 7, batch: int = 2):
    """Features, and labels on twice their grid with classes 0, 1, 3 and ignored pixels."""
    generator = torch.Generator().manual_seed(3)
    choice = torch.randint(0, 4, (batch, 2 * height, 2 * width), generator=generator)
    return [torch.randn(batch, 6, height, width, generator=generator)], torch.tensor([0, 1, 3, 255])[choice]


def _losses(head, labels=None):
    """The head's losses of the batch, under its labels or other ones."""
    inputs, given = _batch()
    return head.losses(head.host(inputs), given if labels is None else labels)


def _pixels(seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, WIDTH, 4, 3, generator=generator)
    return features, torch.tensor([0, 1, 3, -1])[torch.randint(0, 4, (2, 4, 3), generator=generator)]


def _loop_mean(features, labels, number):
    """Mean of a class over the pixels of one image (d, h, w); None where it is absent."""
    rows = [features[:, y, x] for y in range(labels.shape[0]) for x in range(labels.shape[1]) if labels[y, x] == number]
    return torch.stack(rows).mean(0) if rows else None


def test_class_centres_against_a_loop():
    features, labels = _pixels()
    found, present = class_context.class_centres(features, labels, K)
    for image in range(2):
        for number in range(K):
            expected = _loop_mean(features[image], labels[image], number)
            assert bool(present[image, number]) == (expected is not None)
            expected = torch.zeros(WIDTH) if expected is None else expected
            torch.testing.assert_close(found[image, number], expected)


def test_soft_centres_against_a_loop_and_of_a_class_that_is_nowhere_likely():
    features, _ = _pixels()
    coarse = torch.randn(2, K, 4, 3)
    coarse[:, 4] -= 60
    found = class_context.soft_centres(features, coarse)
    probs = coarse.double().softmax(1)
    for image in range(2):
        for number in range(K):
            weight = probs[image, number]
            expected = sum(features[image, :, y, x].double() * weight[y, x] for y in range(4) for x in range(3))
            torch.testing.assert_close(found[image, number].double(), expected / weight.sum(), rtol=1e-4, atol=1e-5)


def test_memory_takes_in_present_classes_only():
    features, labels = _pixels()
    joined, ids = torch.cat(list(features), dim=2), torch.cat(list(labels), dim=1)
    memory = torch.randn(K, WIDTH)
    seen = torch.tensor([True, False, True, True, False])
    found, known = ecac.updated_memory(memory, seen, features, labels, ecac.ECACConfig(momentum=0.25))
    mean = {number: _loop_mean(joined, ids, number) for number in (0, 1, 3)}
    torch.testing.assert_close(found[0], 0.75 * memory[0] + 0.25 * mean[0])
    torch.testing.assert_close(found[3], 0.75 * memory[3] + 0.25 * mean[3])
    torch.testing.assert_close(found[1], mean[1])  # first sight
    assert torch.equal(found[[2, 4]], memory[[2, 4]])
    assert known.tolist() == [True, True, True, True, False]


def test_cosine_update_against_a_loop():
    features, labels = _pixels()
    memory, seen = torch.randn(K, WIDTH), torch.ones(K, dtype=torch.bool)
    config = ecac.ECACConfig(momentum=1.0, memory_update="cosine")
    found, _ = ecac.updated_memory(memory, seen, features, labels, config)
    rows = [features[b, :, y, x] for b, y, x in (labels == 1).nonzero().tolist()]
    weights = [1 - torch.nn.functional.cosine_similarity(row, memory[1], dim=0) for row in rows]
    torch.testing.assert_close(found[1], sum(w * r for w, r in zip(weights, rows, strict=True)) / sum(weights))
    masked, _ = ecac.updated_memory(memory, seen, features, labels, ecac.ECACConfig(momentum=1.0))
    assert not torch.allclose(found[1], masked[1])


def test_memory_of_two_processes_is_that_of_the_whole_batch():
    """What one process adds to the other's sums, in the order in which they are reduced."""
    features, labels = _pixels()
    memory, seen = torch.zeros(K, WIDTH), torch.zeros(K, dtype=torch.bool)
    other = iter(class_context.class_sums(features[1].flatten(1).T, labels[1].flatten(), K))
    found = ecac.updated_memory(
        memory, seen, features[:1], labels[:1], ecac.ECACConfig(), reduce=lambda part: part + next(other)
    )
    torch.testing.assert_close(found, ecac.updated_memory(memory, seen, features, labels, ecac.ECACConfig()))


def test_all_reduce_sums_in_a_distributed_training(monkeypatch):
    value = torch.ones(3)
    assert ecac.all_reduce(value) is value
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda part: part.mul_(2))
    assert ecac.all_reduce(value).tolist() == [2, 2, 2] and value.tolist() == [1, 1, 1]


def test_class_weights():
    found = class_context.class_weights(torch.tensor([4.0, 1.0, 0.0, 16.0]), rho=0.5)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 0.0, 0.25]) / 1.75)


def test_cross_entropy_against_torch_and_without_labels():
    logits, labels = torch.randn(2, K, 4, 3), _pixels()[1]
    weights = torch.rand(K)
    expected = torch.nn.functional.cross_entropy(logits, labels, weights, ignore_index=-1)
    torch.testing.assert_close(class_context.cross_entropy(logits, labels, weights), expected)
    assert float(class_context.cross_entropy(logits, torch.full_like(labels, -1), weights)) == 0


def test_kl_against_a_loop():
    student, teacher, labels = torch.randn(2, K, 4, 3), torch.randn(2, K, 4, 3), _pixels()[1]
    per_class = []
    for number in (0, 1, 3):
        top = bottom = 0.0
        for b, y, x in (labels == number).nonzero().tolist():
            t, s = teacher[b, :, y, x].softmax(0), student[b, :, y, x].softmax(0)
            entropy = float(-(t * t.log()).sum())
            top, bottom = top + entropy * float((t * (t / s).log()).sum()), bottom + entropy
        per_class.append(top / bottom)
    assert float(class_context.kl_loss(student, teacher, labels)) == pytest.approx(sum(per_class) / 3, rel=1e-4)
    assert float(class_context.kl_loss(teacher, teacher, labels)) == pytest.approx(0, abs=1e-6)


def test_iv_against_a_loop():
    student, teacher, labels = torch.randn(2, K, 4, 3), torch.randn(2, K, 4, 3), _pixels()[1]
    squares = []
    for b, y, x in (labels >= 0).nonzero().tolist():
        cosines = [
            torch.nn.functional.cosine_similarity(
                out[b, :, y, x], _loop_mean(out[b], labels[b], int(labels[b, y, x])), dim=0
            )
            for out in (student, teacher)
        ]
        squares.append(float((cosines[0] - cosines[1]) ** 2))
    assert float(class_context.iv_loss(student, teacher, labels)) == pytest.approx(
        sum(squares) / len(squares), rel=1e-4
    )


def test_no_gradient_of_kl_and_iv_reaches_the_teacher():
    head = _head()
    losses = _losses(head)
    shared = {"loss_rce_student", "loss_rce_teacher", "loss_rce_coarse"}
    assert set(losses) == {*shared, "loss_kl", "loss_iv", "loss_memory"}
    (losses["loss_kl"] + losses["loss_iv"]).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in head.teacher.parameters())
    assert any(bool(parameter.grad.any()) for parameter in head.student.parameters())
    losses["loss_rce_teacher"].backward()
    assert all(bool(parameter.grad.any()) for parameter in head.teacher.parameters())


def test_memory_loss_sets_in_later_and_knows_only_seen_rows():
    head = _head(memory_loss_start=2)
    found = [_losses(head)["loss_memory"].item() for _ in range(3)]
    assert found[:2] == [0, 0] and found[2] > 0
    logits = torch.randn(K, K)
    expected = torch.nn.functional.cross_entropy(logits[[0, 3]], torch.tensor([0, 3]))
    seen = torch.tensor([True, False, False, True, False])
    torch.testing.assert_close(class_context.memory_loss(logits, seen), expected)


def test_memory_is_frozen_in_evaluation():
    head = _head()
    _losses(head)
    before = head.memory.clone()
    assert head.seen.tolist() == [True, True, False, True, False] and int(head.steps) == 1
    head.eval()
    _losses(head)
    head(_batch()[0])
    assert torch.equal(head.memory, before) and int(head.steps) == 1


@torch.no_grad()
def test_evaluation_needs_no_teacher():
    head = _head()
    _losses(head)
    head.eval()
    before = head(_batch()[0])
    bare = _head(seed=9, teacher=False).eval()
    bare.load_state_dict(head.state_dict())
    assert torch.equal(bare(_batch()[0]), before)
    head.teacher = None
    assert torch.equal(head(_batch()[0]), before)


@torch.no_grad()
def test_permuting_the_classes_permutes_the_result():
    head = _head()
    _losses(head)
    head.eval()
    torch.nn.init.normal_(head.student.gamma)
    torch.nn.init.normal_(head.student.delta)
    order = torch.tensor([3, 0, 4, 1, 2])
    other = copy.deepcopy(head)
    for tensor in (other.host.conv_seg.weight, other.host.conv_seg.bias, other.student.gamma, other.student.delta):
        tensor.copy_(tensor[order].clone())
    other.memory.copy_(head.memory[order])
    torch.testing.assert_close(other(_batch()[0]), head(_batch()[0])[:, order])


@pytest.mark.parametrize("size", [(1, 1), (1, 3)])
def test_finite_on_tiny_grids_and_without_a_label(size):
    for ignored in (False, True):
        head = _head()
        inputs, labels = _batch(*size)
        losses = head.losses(head.host(inputs), torch.full_like(labels, 255) if ignored else labels)
        sum(losses.values()).backward()
        assert all(bool(value.isfinite()) for value in losses.values())
        assert all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)
        assert bool(head.memory.isfinite().all()) and bool(head.eval()(inputs).isfinite().all())
        assert bool(head.seen.any()) is not ignored


def test_state_dict_keeps_the_memory():
    head, other = _head(), _head(seed=5)
    _losses(head)
    other.load_state_dict(head.state_dict())
    assert bool(head.memory.any())
    for name in ("memory", "seen", "steps"):
        assert torch.equal(getattr(other, name), getattr(head, name))


def test_switches_of_the_ablation_tables():
    off = _head(memory_loss=False, kl_weight=0.0, iv_weight=0.0, calibration=False)
    assert set(_losses(off)) == {"loss_rce_student", "loss_rce_teacher", "loss_rce_coarse"}
    assert set(_losses(_head(memory_loss=False, kl_weight=0.0, iv_weight=0.0, coarse_weight=0.0))) == {
        "loss_rce_student",
        "loss_rce_teacher",
    }
    assert off.student.gamma is None
    host = _head(ecac=False, reweight=False).eval()
    inputs, _ = _batch()
    assert set(_losses(host)) == {"loss_rce_student"}
    assert torch.equal(host(inputs), host.host.conv_seg(host.host(inputs)))
    twice, once = (_losses(_head(iv_weight=weight))["loss_iv"] for weight in (100.0, 50.0))
    torch.testing.assert_close(twice, 2 * once)


def test_mmseg_builds_it_and_trains_it_from_data_samples():
    from mmengine.structures import PixelData

    from ovbench.mm.compat import import_mmseg

    mmseg = import_mmseg()
    ecac.register()
    head = mmseg.registry.MODELS.build({"type": "ECACHead", "host": dict(TINY), "reweight": False})
    inputs, labels = _batch()
    samples = [mmseg.structures.SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
    other = copy.deepcopy(head)
    expected = other.losses(other.host(inputs), labels)
    torch.testing.assert_close(head.loss(inputs, samples, {}), expected)


def test_errors():
    with pytest.raises(UsageError, match="kl_weight"):
        ecac.head_config(TINY, kl_wieght=1.0)
    with pytest.raises(UsageError, match="cosine"):
        ecac.head_config(TINY, memory_update="cosin")
    for wrong in ({"momentum": 0.0}, {"kl_hard": 2.0}, {"cosine_scale": -1.0}, {"absent_centre": "mean"}):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
            ecac.head_config(TINY, **wrong)
    with pytest.raises(UsageError, match="5 numbers"):
        _head(class_frequencies=[1, 2])
    with pytest.raises(UsageError, match="class_frequencies"):
        _losses(_head(class_frequencies=None))
    with pytest.raises(UsageError, match="teacher=True"):
        _losses(_head(teacher=False))


@pytest.fixture(scope="module")
def costs():
    """Host -> (parameters in M, GMACs, GMACs of modules alone) that ECAC adds, on the grids of the thesis."""
    found = {}
    for name in hosts.host_names():
        encoder = hosts.default_encoder(name)
        grids = hosts.default_grids(encoder)
        grids = hosts.feature_grids("64x64,64x64,64x64,64x64") if name == "deeplabv3plus" else grids
        maps = [torch.empty(shape, device="meta") for shape in hosts.feature_shapes(grids, encoder=encoder)]
        heads = [closed_set.build_head(each).to("meta") for each in (name, f"ecac-{name}")]
        figures = [
            (
                count_parameters(head).total / 1e6,
                *(count(lambda head=head, maps=maps: head(maps), rule).gmacs for rule in ("torch", "modules")),
            )
            for head in heads
        ]
        found[name] = tuple(after - before for before, after in zip(*figures, strict=True))
    return found


def test_parameters_within_5_percent_of_the_thesis(costs, shared):
    """Two projectors 2d -> d/2 -> d, calibrations of two networks, and the coarse classifier's convolution with its norm."""
    width = 512
    projector = 2 * width * width // 2 + width // 2 + width // 2 * width + width
    expected = (2 * projector + 4 * 150 + width * width + 2 * width) / 1e6
    assert {name: cost[0] for name, cost in costs.items()} == pytest.approx(dict.fromkeys(hosts.host_names(), expected))
    assert expected == pytest.approx(1.0517, abs=1e-4)
    with (shared / "published" / "published.csv").open(encoding="utf-8") as file:
        rows = {row["row"]: row for row in csv.DictReader(file) if (row["table"], row["metric"]) == ("4.6", "params")}
    for name, row in TABLE.items():
        with_ecac = row + (" + ECAC" if name == "deeplabv3plus" else "+ECAC")
        published = float(rows[with_ecac]["value"]) - float(rows[row]["value"])
        assert costs[name][0] == pytest.approx(published, rel=0.05)


def test_macs_by_hand(costs):
    """The coarse classifier's convolution and one xi; C_s and S F are one product of 150 x 4096 x 512 each."""
    modules, product = (64 * 64 * 512 * 512 + 150 * 1536 * 256) / 1e9, 150 * 64 * 64 * 512 / 1e9
    assert modules == pytest.approx(1.13, abs=0.005)  # PSPNet's in Table 4.6
    assert modules + product == pytest.approx(1.45, abs=0.005)  # FCN's, S F as a convolution
    for name in ("fcn", "psp", "deeplabv3plus"):
        assert costs[name][1] == pytest.approx(modules + 2 * product, rel=1e-6)
        assert costs[name][2] == pytest.approx(modules, rel=1e-6)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("absent", ["memory", "classifier", "zero"])
def test_the_teachers_centres(batched, absent):
    """Means of the whole batch or of each image; classes that are not there fall back on what is asked."""
    head = _head(teacher_centres="batch" if batched else "image", absent_centre=absent)
    features, labels = _pixels()
    head.memory.normal_()
    seen = []
    head.teacher.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    head._teachers_logits(features, labels)
    rows = {"memory": head.memory, "classifier": head.host.conv_seg.weight[:, :, 0, 0], "zero": torch.zeros(K, WIDTH)}
    for image in range(2):
        for number in range(K):
            pixels = (features.transpose(0, 1).flatten(1, 2), labels.flatten(0, 1)) if batched else None
            mean = _loop_mean(*(pixels or (features[image], labels[image])), number)
            expected = rows[absent][number] if mean is None else mean
            torch.testing.assert_close(seen[0][image, number], expected)


def test_classification_by_cosines():
    classifiers, features = torch.randn(2, K, WIDTH), torch.randn(2, WIDTH, 3, 2)
    found = class_context.classify(classifiers, features, 15)
    for b, k, y, x in ((0, 1, 2, 1), (1, 4, 0, 0)):
        cosine = torch.nn.functional.cosine_similarity(classifiers[b, k], features[b, :, y, x], dim=0)
        torch.testing.assert_close(found[b, k, y, x], 15 * cosine)


def test_kl_with_the_label_in_its_target():
    student, teacher, labels = torch.randn(1, K, 2, 2), torch.randn(1, K, 2, 2), torch.tensor([[[2, 2], [2, -1]]])
    top = bottom = 0.0
    for y, x in ((0, 0), (0, 1), (1, 0)):
        t, s = teacher[0, :, y, x].softmax(0), student[0, :, y, x].softmax(0)
        target = 0.5 * t + 0.5 * torch.nn.functional.one_hot(torch.tensor(2), K)
        entropy = float(-(t * t.log()).sum())
        top, bottom = top + entropy * float((target * (target / s).log()).sum()), bottom + entropy
    assert float(class_context.kl_loss(student, teacher, labels, 0.5)) == pytest.approx(top / bottom, rel=1e-4)


def test_the_coarse_classifier_has_its_own_loss_and_logits():
    head = _head(coarse_weight=0.5)
    inputs, _ = _batch()
    whole, half = (_losses(_head(coarse_weight=weight))["loss_rce_coarse"] for weight in (1.0, 0.5))
    torch.testing.assert_close(whole, 2 * half)
    losses = _losses(head)
    wanted = [head.host.conv_seg.weight, head.coarse_conv[0].weight]
    assert all(bool(grad.any()) for grad in torch.autograd.grad(losses["loss_rce_coarse"], wanted))
    read = head.eval().coarse_conv(head.host(inputs))
    assert torch.equal(head.coarse_logits(inputs), head.host.conv_seg(read))
    assert len(_head(coarse_conv=False).coarse_conv) == 0


def test_the_variance_loss_sets_in_later():
    head = _head(iv_start=2)
    assert [_losses(head)["loss_iv"].item() > 0 for _ in range(3)] == [False, False, True]


def test_the_memory_loss_leaves_the_norms_statistics():
    head = _head()
    before = head.coarse_conv[1].running_mean.clone()
    head._of_rows(torch.randn(K, WIDTH))
    assert torch.equal(head.coarse_conv[1].running_mean, before) and head.coarse_conv[1].training


def test_import_loads_no_mmseg(run_python):
    code = "from ovbench.methods import ecac; import sys; print({'mmseg', 'mmengine', 'mmcv'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"
