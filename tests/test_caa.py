"""CAA as an add-on: its equations against loops, its switches, its losses, and its size against Table 3.5."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import pickle
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovbench.errors import UsageError
from ovbench.measure.counters import count
from ovbench.measure.parameters import count_parameters
from ovbench.methods import caa, closed_set, hosts
from ovbench.methods.caa import CAA, CAAConfig
from ovbench.ops import affinity
from ovbench.ops.affinity import affinity_loss, affinity_target, aggregate, class_centers, labels_on_grid

SMALL = {"center_channels": 6, "affinity_channels": 5}
ABLATIONS = {
    "full": {},
    "CC": {"affinity": False},
    "SA": {"center": False},
    "intra": {"inter": False},
    "inter": {"intra": False},
    "no losses": {"aux_weight": 0.0, "affinity_weight": 0.0},
    "aux": {"affinity_weight": 0.0},
    "aff": {"aux_weight": 0.0},
    "softmax over classes": {"center_softmax": "classes"},
    "rows not normalised": {"row_normalise": False},
    "association not scaled": {"association_scale": False},
    "association as in the equation": {"projections": False, "association_scale": False, "center_mass": False},
    "centres of all classes": {"center_mass": False},
    "affinity reaches F": {"affinity_detached": False},
    "CPNet's loss": {"affinity_rows": True},
    "fusion instead of F": {"fusion_residual": False},
    "fusion without norm": {"fusion_norm": False, "fusion_residual": False},
}


def _head(name: str = "fcn", **switches):
    """A host with few channels and CAA: the mathematics is the same and a test takes no time."""
    torch.manual_seed(0)
    host = hosts.head_config(name, 5, in_channels=(4, 6, 7, 9), channels=8)
    hosts.register()
    caa.register()
    from ovbench.mm.compat import import_mmseg

    return _begun(import_mmseg().registry.MODELS.build(caa.head_config(host, **{**SMALL, **switches})))


def _begun(module):
    """A head or add-on whose contexts count, as they do after the first steps."""
    addon = getattr(module, "caa", module)
    if addon.config.fusion_residual:
        torch.nn.init.normal_(addon.fusion[1].weight)
    return module


def _inputs(grid=(6, 7), batch=2):
    generator = torch.Generator().manual_seed(1)
    grids = hosts.feature_grids("x".join(map(str, grid)))
    return [torch.randn(batch, c, *g, generator=generator) for c, g in zip((4, 6, 7, 9), grids, strict=True)]


def _samples(labels):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


def _factors(logits):
    """Rows and columns whose product is these logits of an affinity."""
    return logits, torch.eye(logits.shape[-1], dtype=logits.dtype).expand_as(logits)


# --- equations ---


def test_affinity_ground_truth_against_a_double_loop():
    labels = torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(3))
    labels[labels == 3] = 255
    labels[2] = 255
    target, counted = affinity_target(labels)
    for image, i, j in itertools.product(range(3), range(12), range(12)):
        a, b = int(labels[image, i]), int(labels[image, j])
        assert bool(counted[image, i, j]) == (a != 255 and b != 255)
        assert bool(target[image, i, j]) == (a == b != 255)
    assert 0 < int(target.sum()) < int(counted.sum()) < counted.numel()


def test_affinity_ground_truth_is_the_product_of_one_hot_labels():
    labels = torch.tensor([[0, 1, 1, 2, 255, 0]])
    one_hot = torch.stack([labels == k for k in range(3)], dim=-1).float()
    assert torch.equal(affinity_target(labels)[0].float(), one_hot @ one_hot.transpose(1, 2))


@pytest.mark.parametrize("entries", [1, 40, 10**9])
def test_affinity_loss_against_a_double_loop(entries):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 9, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 9), generator=generator)
    labels[0, :4] = 255
    losses = []
    for image, i, j in itertools.product(range(2), range(9), range(9)):
        a, b = int(labels[image, i]), int(labels[image, j])
        if 255 not in (a, b):
            p = logits[image, i, j].sigmoid()
            losses.append(-(p if a == b else 1 - p).log())
    found = affinity_loss(*_factors(logits), labels, entries=entries)
    assert float(found) == pytest.approx(float(torch.stack(losses).mean()))


def test_ignored_positions_have_no_gradient_on_either_axis():
    logits = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    labels = torch.tensor([[0, 255, 1, 1, 255, 0]])
    affinity_loss(*_factors(logits), labels).backward()
    ignored = labels[0] == 255
    assert not logits.grad[0, ignored].any() and not logits.grad[0, :, ignored].any()
    assert bool(logits.grad[0][~ignored][:, ~ignored].all())


def test_affinity_loss_without_a_counted_pair():
    query = torch.full((1, 4, 1), torch.inf).requires_grad_()
    loss = affinity_loss(query, torch.ones(1, 1, 4), torch.full((1, 4), 255))
    loss.backward()
    assert loss.item() == 0 and not query.grad.any()


def test_labels_on_a_coarser_grid():
    labels = torch.arange(32).reshape(1, 4, 8)
    assert labels_on_grid(labels, (2, 4)).tolist() == [[0, 2, 4, 6, 16, 18, 20, 22]]


@pytest.mark.parametrize("normalise", [False, True])
def test_inter_is_the_rest_of_the_affinity_times_the_features(normalise):
    generator = torch.Generator().manual_seed(6)
    affinity = torch.rand(2, 30, 30, generator=generator, dtype=torch.float64)
    features = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    intra, inter = aggregate(affinity, features, normalise)
    rest = 1 - affinity
    if normalise:
        affinity, rest = affinity / affinity.sum(-1, keepdim=True), rest / rest.sum(-1, keepdim=True)
    torch.testing.assert_close(intra, affinity @ features)
    torch.testing.assert_close(inter, rest @ features)


def test_a_saturated_affinity_stays_finite():
    features = torch.rand(1, 50, 4, generator=torch.Generator().manual_seed(7))
    for value in (0.0, 1.0):
        intra, inter = aggregate(torch.full((1, 50, 50), value), features)
        assert bool(intra.isfinite().all()) and bool(inter.isfinite().all())
        assert max(float(intra.abs().max()), float(inter.abs().max())) < 1.01


@pytest.mark.parametrize("axis", ["positions", "classes"])
def test_class_centers_against_a_loop(axis):
    generator = torch.Generator().manual_seed(8)
    coarse, features = torch.randn(2, 3, 10, generator=generator), torch.randn(2, 10, 4, generator=generator)
    found = class_centers(coarse, features, axis)
    for image, k in itertools.product(range(2), range(3)):
        weights = coarse[image].exp() / (1 if axis == "positions" else coarse[image].exp().sum(0))
        mean = sum(weights[k, i] * features[image, i] for i in range(10)) / weights[k].sum()
        torch.testing.assert_close(found[image, k], mean)


# --- the head ---


@pytest.mark.parametrize("name", hosts.host_names())
def test_every_host(name):
    head = _head(name)
    inputs = _inputs()
    labels = torch.randint(0, 5, (2, 24, 28))
    labels[:, :8] = 255
    output = head.train()(inputs)
    losses = head.loss_by_feat(output, _samples(labels))
    own = {"loss_semantic"} if name == "isnet" else set()
    assert set(losses) == {"loss_ce", "acc_seg", "coarse.loss_ce", "coarse.acc_seg", "loss_affinity"} | own
    sum(value for key, value in losses.items() if "loss" in key).backward()
    parameters = dict(head.named_parameters())
    assert {key.split(".")[0] for key in parameters} == {"host", "caa", "conv_seg"}
    # A convolution before a batch norm that sees one value per channel (pooled to 1 x 1) may get a gradient of 0, not None.
    assert [key for key, value in parameters.items() if value.grad is None or not value.grad.isfinite().all()] == []
    for key in ("host.conv_seg", "caa.transform.0", "caa.query", "caa.key", "caa.fusion.0", "conv_seg"):
        assert bool(parameters[f"{key}.weight"].grad.any()), key
    if name == "fcn":
        assert bool(parameters["host.convs.0.conv.weight"].grad.any())
    with torch.no_grad():
        logits = head.eval()(inputs)
    assert logits.shape == output.seg_logits.shape and bool(logits.isfinite().all())


@pytest.mark.parametrize("switches", ABLATIONS.values(), ids=ABLATIONS)
def test_every_ablation(switches):
    head = _head(**switches).train()
    output = head(_inputs())
    losses = head.loss_by_feat(output, _samples(torch.randint(0, 5, (2, 24, 28))))
    assert ("coarse.loss_ce" in losses) == (switches.get("aux_weight", 1) > 0)
    assert ("loss_affinity" in losses) == (switches.get("affinity", True) and switches.get("affinity_weight", 1) > 0)
    sum(value for key, value in losses.items() if "loss" in key).backward()
    assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in head.parameters())


def test_training_starts_with_the_host():
    """Before its first step the add-on passes F through, and the loss moves what lets the contexts in."""
    torch.manual_seed(0)
    addon, features = CAA(8, CAAConfig.of(**SMALL)).train(), torch.randn(2, 8, 5, 7).relu()
    found = addon(features, torch.randn(2, 4, 5, 7))[0]
    assert torch.equal(found, features)
    found.square().mean().backward()
    assert bool(addon.fusion[1].weight.grad.any())


def test_association_against_a_loop():
    """Projected positions against projected centres, weighed by the classes' shares; the centres themselves are mixed."""
    generator = torch.Generator().manual_seed(4)
    rows, keys, centers = (torch.randn(2, n, c, generator=generator) for n, c in ((6, 3), (4, 3), (4, 5)))
    mass = torch.rand(2, 4, generator=generator)
    mass[:, 2] = 0
    found = affinity.associate(rows, centers, True, keys=keys, mass=mass)
    for b in range(2):
        for n in range(6):
            parts = torch.stack([(mass[b, k] * torch.exp(rows[b, n] @ keys[b, k] / 3**0.5)) for k in range(4)])
            assert float(parts[2]) == 0
            torch.testing.assert_close(found[b, n], (parts / parts.sum()) @ centers[b])
    other = centers.clone()
    other[:, 2] = 1e3  # a class that is nowhere
    torch.testing.assert_close(affinity.associate(rows, other, True, keys=keys, mass=mass), found)


def test_shares_of_the_classes():
    coarse = torch.randn(2, 4, 6)
    expected = torch.stack([coarse[b, :, n].softmax(0) for b in range(2) for n in range(6)]).view(2, 6, 4).mean(1)
    torch.testing.assert_close(affinity.class_mass(coarse), expected)


@pytest.mark.parametrize("entries", [30, 10**9])
def test_terms_of_rows_against_a_loop(entries):
    generator = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(2, 6, 6, generator=generator), torch.tensor([[0, 0, 1, 255, 1, 2], [3] * 6])
    chance, terms, rows = logits.sigmoid(), 0.0, 0
    for b in range(2):
        known = [n for n in range(6) if labels[b, n] != 255]
        for i in known:
            own = [j for j in known if labels[b, i] == labels[b, j]]
            rest = [j for j in known if j not in own]
            hits = sum(float(chance[b, i, j]) for j in own)
            terms -= math.log(hits / sum(float(chance[b, i, j]) for j in known)) + math.log(hits / len(own))
            terms -= math.log(sum(1 - float(chance[b, i, j]) for j in rest) / len(rest)) if rest else 0
            rows += 1
    plain = affinity_loss(*_factors(logits), labels)
    found = affinity_loss(*_factors(logits), labels, entries=entries, rows_too=True)
    assert float(found - plain) == pytest.approx(terms / rows, rel=1e-4)


def test_the_losses_add_to_the_gradient_of_their_parts():
    """The affinity loss alone reaches a and b, and the host where they may; CE(coarse) reaches the coarse classifier."""
    detached = _head().train()
    losses = detached.loss_by_feat(detached(_inputs()), _samples(torch.randint(0, 5, (2, 6, 7))))
    wanted = [detached.caa.query.weight, detached.host.convs[0].conv.weight]
    got = torch.autograd.grad(losses["loss_affinity"], wanted, allow_unused=True)
    assert bool(got[0].any()) and got[1] is None
    head = _head(affinity_detached=False).train()
    losses = head.loss_by_feat(head(_inputs()), _samples(torch.randint(0, 5, (2, 6, 7))))
    host = head.host.convs[0].conv.weight
    both = [host, head.caa.query.weight]
    got = torch.autograd.grad(losses["loss_affinity"], both, retain_graph=True)
    assert all(bool(grad.any()) for grad in got)
    assert bool(torch.autograd.grad(losses["coarse.loss_ce"], head.host.conv_seg.weight, retain_graph=True)[0].any())
    assert torch.autograd.grad(losses["loss_affinity"], head.conv_seg.weight, allow_unused=True)[0] is None


def test_aux_loss_has_its_weight():
    """Weights scale the losses and nothing else."""
    samples = _samples(torch.randint(0, 5, (2, 6, 7)))
    found = []
    for switches in ({}, {"aux_weight": 0.8, "affinity_weight": 3.0}):
        head = _head(**switches).train()
        torch.manual_seed(9)  # dropout
        found.append(head.loss_by_feat(head(_inputs()), samples))
    for name, factor in {"coarse.loss_ce": 2, "loss_affinity": 3, "loss_ce": 1}.items():
        assert found[1][name].item() == pytest.approx(factor * found[0][name].item())


@torch.no_grad()
def test_evaluation_does_not_depend_on_what_only_training_has():
    expected = _head().eval()(_inputs())
    for switches in (ABLATIONS["no losses"], ABLATIONS["aux"], ABLATIONS["aff"]):
        assert torch.equal(_head(**switches).eval()(_inputs()), expected)
    alone = _head(center=False).eval()  # without centre, the coarse classifier is there for its loss only
    expected = alone(_inputs())
    del alone.host.conv_seg
    assert torch.equal(alone(_inputs()), expected)


@torch.no_grad()
def test_permuting_the_classes_permutes_the_result():
    head = _head("psp").eval()
    order = torch.tensor([3, 0, 4, 1, 2])
    other = copy.deepcopy(head)
    for layer in (other.conv_seg, other.host.conv_seg):
        layer.weight.copy_(layer.weight[order])
        layer.bias.copy_(layer.bias[order])
    torch.testing.assert_close(other(_inputs()), head(_inputs())[:, order])
    # and the centres do take part: another order of the coarse classes alone is the same set of centres
    other.conv_seg.load_state_dict(head.conv_seg.state_dict())
    torch.testing.assert_close(other(_inputs()), head(_inputs()))
    other.host.conv_seg.weight.mul_(-3)
    assert not torch.allclose(other(_inputs()), head(_inputs()))


@pytest.mark.parametrize("switches", ABLATIONS.values(), ids=ABLATIONS)
@torch.no_grad()
def test_tiny_grids_are_finite(switches):
    head = _head(**switches)
    for grid in ((2, 2), (1, 1)):
        assert bool(head.eval()(_inputs(grid)).isfinite().all())
        assert bool(head.train()(_inputs(grid)).seg_logits.isfinite().all())


def _addon(**switches) -> CAA:
    torch.manual_seed(0)
    return _begun(CAA(8, CAAConfig.of(**{**SMALL, **switches})).eval())


@torch.no_grad()
def test_evaluation_by_rows_is_the_whole_map(monkeypatch):
    addon, features, coarse = _addon(), torch.randn(3, 8, 5, 7), torch.randn(3, 4, 5, 7)
    whole = addon(features, coarse)[0]
    monkeypatch.setattr(caa, "MAP_ENTRIES", 3 * 35 * 4)  # 4 rows at a time
    torch.testing.assert_close(addon(features, coarse)[0], whole)
    separately = torch.cat([addon(features[i : i + 1], coarse[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(separately, whole)


def test_training_by_rows_has_the_values_and_gradients_of_the_whole_map(monkeypatch):
    """Maps that are dropped and made again in the backward pass change nothing."""
    generator = torch.Generator().manual_seed(2)
    coarse, labels = torch.randn(2, 4, 5, 7, generator=generator), torch.randint(0, 4, (2, 35), generator=generator)
    given = torch.randn(2, 8, 5, 7, generator=generator)
    found = []
    for entries in (2 * 35 * 4 * 4, 10**9):  # 4 rows at a time; all
        monkeypatch.setattr(caa, "MAP_ENTRIES", entries)
        addon, features = _addon().train(), given.clone().requires_grad_()
        with monkeypatch.context() as patch:
            patch.setattr(affinity, "checkpoint", lambda part, *rest, **_: part(*rest)) if entries == 10**9 else None
            out, (query, key) = addon(features, coarse)
            loss = out.square().mean() + affinity_loss(query, key, labels, entries=entries)
        loss.backward()
        found.append([loss, features.grad, *(parameter.grad for parameter in addon.parameters())])
    torch.testing.assert_close(found[0], found[1])


class _Maps(TorchDispatchMode):
    """The most bytes that storages of a size or more held at a time."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.alive, self.peak = least, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (size := out.untyped_storage().nbytes()) >= self.least:
            pointer = out.untyped_storage().data_ptr()
            self.alive[pointer] = (weakref.ref(out.untyped_storage()), size)
        self.alive = {key: entry for key, entry in self.alive.items() if entry[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize(("side", "batch"), [(64, 1), (64, 2), (128, 1)])
def test_one_affinity_map_in_evaluation(side, batch):
    """64 MiB, the map of one 64 x 64 image in fp32: never more, whatever the grid and the batch."""
    addon, counted = _addon(), _Maps(2**20)
    with torch.inference_mode(), counted:
        addon(torch.randn(batch, 8, side, side), torch.randn(batch, 4, side, side))
    maps = 4 * affinity.MAP_ENTRIES
    # what else is over a MiB are rows of F' and of its contexts
    assert maps <= counted.peak < 1.25 * maps


def test_training_holds_no_map():
    """Forward, both losses and backward with less than 2 maps, where logits, sigmoid and loss would be 6."""
    addon, counted = _addon().train(), _Maps(2**20)
    features, labels = torch.randn(1, 8, 64, 64, requires_grad=True), torch.randint(0, 4, (1, 64 * 64))
    with counted:
        out, factors = addon(features, torch.randn(1, 4, 64, 64))
        (out.square().mean() + affinity_loss(*factors, labels)).backward()
    assert features.grad.any() and counted.peak < 2 * 4 * affinity.MAP_ENTRIES


def test_half_precision_stays_near():
    head = _head("psp").eval()
    inputs = _inputs((16, 16))
    with torch.no_grad():
        expected = head(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = head(inputs)
    assert bool(found.isfinite().all())
    assert float((found.float() - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_wrong_switches():
    with pytest.raises(UsageError, match="intra"):
        caa.head_config(hosts.head_config("psp"), intr=False)
    with pytest.raises(UsageError, match="host itself"):
        CAAConfig(center=False, affinity=False)
    with pytest.raises(UsageError, match="neither"):
        CAAConfig(intra=False, inter=False)
    with pytest.raises(UsageError, match="positions"):
        CAAConfig.of(center_softmax="pixels")
    with pytest.raises(UsageError, match="at least 0"):
        CAAConfig(center_channels=-1)
    with pytest.raises(UsageError, match="leave fusion_norm on"):
        CAAConfig(fusion_norm=False)
    with pytest.raises(UsageError, match="at least 0"):
        CAAConfig(aux_weight=-1.0)
    with pytest.raises(UsageError, match="caa-deeplabv3"):
        closed_set.build_head("caa-deeplab", 5)


def test_a_head_can_be_pickled_and_copied():
    head = _head().eval()
    with torch.no_grad():
        expected = head(_inputs())
        for other in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
            assert torch.equal(other(_inputs()), expected)


def test_importing_loads_no_mmseg(run_python):
    done = run_python(
        "-c", "from ovbench.methods import caa; import sys; print({'mmseg', 'mmengine'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr


# --- size ---

ROWS = {"psp": "PSPNet", "ccnet": "CCNet", "deeplabv3": "DeepLabV3", "uper": "UperNet"}
GRIDS = hosts.feature_grids("64x64,64x64,64x64,64x64")


def _gmacs(head, convention) -> float:
    features = [torch.empty(shape, device="meta") for shape in hosts.feature_shapes(GRIDS)]
    return count(lambda: head(features), convention).gmacs


@pytest.mark.parametrize("name", ROWS)
def test_size_beside_the_thesis(shared, name):
    with (shared / "published" / "published.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "thesis-caa" and row["table"] == "3.5"]
    published = {(row["row"], row["metric"]): float(row["value"]) for row in rows}
    with torch.device("meta"):
        host, head = closed_set.build_head(name), closed_set.build_head(f"caa-{name}")
    params = (count_parameters(head).total - count_parameters(host).total) / 1e6
    thesis = published[f"{ROWS[name]}+CAA", "params"] - published[ROWS[name], "params"]
    assert params == pytest.approx(thesis, rel=0.012) and params == pytest.approx(3.570, abs=0.001)
    modules = _gmacs(head, "modules") - _gmacs(host, "modules")
    n, k, c, d, a = 64 * 64, 150, 512, 448, 64
    on_pixels = c * d + 2 * c * a + 2 * (2 * d * d + d * d + (d + c) * d) + (c + 2 * d) * c + c * k
    convolutions = (n * on_pixels + 2 * k * d * d) / 1e9
    assert modules == pytest.approx(convolutions, rel=1e-9) and convolutions == pytest.approx(12.991, abs=0.0005)
    if name != "uper":  # whose addition is less by what a classifier costs, see the module
        thesis = published[f"{ROWS[name]}+CAA", "flops"] - published[ROWS[name], "flops"]
        assert modules == pytest.approx(thesis, rel=0.01)
    products = n * n * (a + d) + k * n * d + 2 * 2 * n * k * d  # M, M F'; centres; two associations
    assert _gmacs(head, "torch") - _gmacs(host, "torch") == pytest.approx(modules + products / 1e9, rel=1e-4)
