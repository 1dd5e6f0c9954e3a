"""The discrepancy solvers against POT and plain loops in double precision, and properties that hold for any input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.ops import markov
from ovbench.ops.discrepancy import (
    CHOICES,
    REJECTED,
    SolverConfig,
    class_posterior,
    discrepancy_maps,
    early_rejection,
    normalise,
    suppress,
)
from ovbench.ops.markov import arrival_steps, doubly_stochastic, hop, settling_steps
from ovbench.ops.transport import sinkhorn, transport_cost

pytest.importorskip("hypothesis", reason="hypothesis is a test dependency: pip install hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

SOLVERS = CHOICES["solver"]
# Every solver, and what moves the numerics of each.
VARIANTS = [
    *({"solver": "op", "ot_cost": c, "ot_readout": r, "ot_value": v} for c, r, v in [
        ("one_minus", "target", "gain"),
        ("attention", "target", "cost"),
        ("neg_log", "source", "gain"),
    ]),
    {"solver": "op", "eps": 0.01, "sinkhorn_max_iterations": 60},
    {"solver": "op", "eps": 0.001, "sinkhorn_iterations": 5, "sinkhorn_max_iterations": 10},
    {"solver": "op", "ot_attention": "row", "norm_axis": "classes", "mass_of": "map"},
    {"solver": "mv"},
    {"solver": "mv", "tau": 0.95, "mv_start": 0, "mv_weight": "mass", "class_mass": "drop"},
    {"solver": "mv", "mv_rule": "literal", "tau": 0.3},
    {"solver": "kl"},
    {"solver": "kl", "norm_rule": "softmax"},
    {"solver": "propagate"},
    {"solver": "propagate", "hops": 3, "nms_threshold": 0.0, "early_rejection": False},
]  # fmt: skip
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: " ".join(str(v) for v in o.values()))
few = settings(max_examples=20, deadline=None, database=None)


def scene(seed: int, classes: int = 5, patches: int = 24, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """A posterior (K, N) and row-stochastic attention (N, N) like those of a network: softmaxes of noise."""
    g = torch.Generator().manual_seed(seed)
    posterior = (sharpness * torch.randn(classes, patches, generator=g)).softmax(0)
    attention = (2 * torch.randn(patches, patches, generator=g) + 3 * torch.eye(patches)).softmax(1)
    return posterior, attention


def shapes() -> Any:
    """Arguments of ``scene``: flat and one-hot posteriors, one class, one patch."""
    return st.tuples(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.1, 3.0, 1e4]))


# --- stages


def test_posterior_equals_a_loop() -> None:
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    word_class = torch.tensor([2, 0, 0, 1, 2, 2, 4])
    found = class_posterior(logits, word_class, 20.0, 5)
    words = (logits.double() * 20).softmax(0)
    for k in range(5):
        mine = [words[q] for q in range(7) if word_class[q] == k]
        expected = torch.stack(mine).amax(0) if mine else torch.zeros(10).double()
        torch.testing.assert_close(found[k].double(), expected, atol=1e-6, rtol=1e-5)
    assert found.dtype == torch.float32
    half = class_posterior(logits.bfloat16(), word_class, 20.0, 5)
    assert half.dtype == torch.float32 and torch.equal(
        half, class_posterior(logits.bfloat16().float(), word_class, 20.0, 5)
    )


def test_early_rejection_keeps_the_winners_of_patches() -> None:
    posterior = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.6, 0.4], [0.3, 0.3, 0.3]])
    assert early_rejection(posterior).tolist() == [True, True, False]


def test_suppression_is_relative_or_absolute() -> None:
    posterior = torch.tensor([[0.8, 0.5, 0.3, 0.4], [0.1, 0.2, 0.05, 0.09]])
    assert suppress(posterior, 0.5).tolist() == [
        pytest.approx([0.8, 0.5, 0.0, 0.4]),
        pytest.approx([0.1, 0.2, 0.0, 0.0]),
    ]
    assert suppress(posterior, 0.5, "absolute").tolist() == [pytest.approx([0.8, 0.5, 0, 0]), [0, 0, 0, 0]]
    assert torch.equal(suppress(posterior, 0.0), posterior)


@pytest.mark.parametrize("axis", CHOICES["norm_axis"])
@pytest.mark.parametrize("rule", CHOICES["norm_rule"])
def test_normalised_maps_sum_to_one_and_keep_their_zeros(axis: str, rule: str) -> None:
    maps = suppress(scene(3)[0], 0.6)
    found = normalise(maps, axis, rule)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    assert torch.equal(found > 0, maps > 0)


def test_normalising_over_classes_makes_patches_equal_first() -> None:
    maps = torch.tensor([[0.2, 0.0, 0.3], [0.2, 0.0, 0.1]])
    expected = torch.tensor([[0.5, 0, 0.75], [0.5, 0, 0.25]])
    torch.testing.assert_close(normalise(maps, "classes"), expected / expected.sum(1, keepdim=True))


# --- the pipeline


@variants
@few
@given(shape=shapes(), threshold=st.sampled_from([0.0, 0.5, 1.0]), rule=st.sampled_from(CHOICES["nms_rule"]))
def test_scores_are_finite_and_rejected_classes_are_below(
    options: dict[str, Any], shape: tuple[int, int, int, float], threshold: float, rule: str
) -> None:
    posterior, attention = scene(*shape)
    config = replace(SolverConfig(nms_threshold=threshold, nms_rule=rule, max_steps=50), **options)
    scores = discrepancy_maps(posterior, attention, config)
    assert scores.shape == posterior.shape and scores.dtype == torch.float32 and bool(scores.isfinite().all())
    alive = suppress(posterior, config.nms_threshold, rule).sum(1) > 0
    if config.early_rejection:
        alive &= early_rejection(posterior)
    if alive.any():
        assert bool((scores[~alive] == REJECTED).all()) and bool((scores[alive] >= 0).all())
        assert bool(alive[scores.argmax(0)].all())
    else:
        assert torch.equal(scores, posterior)


@variants
@pytest.mark.parametrize("kind", ["zero rows", "zero columns", "identity", "constant", "one sink", "tiny"])
def test_any_attention_gives_finite_scores(options: dict[str, Any], kind: str) -> None:
    posterior, attention = scene(1)
    n = len(attention)
    if kind == "zero rows":
        attention[3:5] = 0
    if kind == "zero columns":
        attention[:, 3:5] = 0
    if kind == "one sink":
        attention = torch.zeros(n, n)
        attention[:, 0] = 1
    attention = {
        "identity": torch.eye(n),
        "constant": torch.full((n, n), 1 / n),
        "tiny": (100 * torch.randn(n, n, generator=torch.Generator().manual_seed(2))).softmax(1),
    }.get(kind, attention)
    scores = discrepancy_maps(posterior, attention, SolverConfig(**options, max_steps=40))
    assert bool(scores.isfinite().all()) and float(scores.min()) >= REJECTED


@variants
@few
@given(seed=st.integers(0, 10**6))
def test_patches_and_classes_may_come_in_any_order(options: dict[str, Any], seed: int) -> None:
    posterior, attention = scene(seed)
    g = torch.Generator().manual_seed(seed)
    k, n = torch.randperm(5, generator=g), torch.randperm(24, generator=g)
    config = SolverConfig(**options)
    expected = discrepancy_maps(posterior, attention, config)[k][:, n]
    found = discrepancy_maps(posterior[k][:, n], attention[n][:, n], config)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=0)


@variants
@few
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.01, 0.5, 30.0]))
def test_scale_of_attention_is_free_and_scores_follow_the_posterior(
    options: dict[str, Any], seed: int, factor: float
) -> None:
    if options.get("norm_rule") == "softmax":  # of the values themselves: not free of their scale, by definition
        return
    posterior, attention = scene(seed)
    config = SolverConfig(**options)
    expected = discrepancy_maps(posterior, attention, config)
    tolerance = 1e-4 * float(expected.max())
    torch.testing.assert_close(
        discrepancy_maps(posterior, attention * factor, config), expected, atol=tolerance, rtol=0
    )
    linear = config.class_mass == "keep" and config.norm_axis == "patches"
    alive = expected[:, 0] != REJECTED
    found = discrepancy_maps(posterior * factor, attention, config)
    torch.testing.assert_close(found[alive] / (factor if linear else 1), expected[alive], atol=tolerance, rtol=0)


@variants
def test_each_class_is_solved_by_itself(options: dict[str, Any]) -> None:
    """Also when the others have left the work: normalising over classes aside, a class's scores are its own."""
    if options.get("norm_axis") == "classes":
        return
    posterior, attention = scene(5)
    config = replace(SolverConfig(**options), early_rejection=False)
    together = discrepancy_maps(posterior, attention, config)
    for k in range(len(posterior)):
        alone = discrepancy_maps(posterior[k : k + 1], attention, config)
        torch.testing.assert_close(together[k], alone[0], atol=1e-4 * float(alone.max()), rtol=0)


@variants
def test_inputs_stay_and_modes_change_nothing(options: dict[str, Any]) -> None:
    posterior, attention = scene(7)
    config = SolverConfig(**options)
    before = posterior.clone(), attention.clone()
    expected = discrepancy_maps(posterior, attention, config)
    assert torch.equal(posterior, before[0]) and torch.equal(attention, before[1])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(discrepancy_maps(posterior, attention, config), expected)
    found = discrepancy_maps(posterior.requires_grad_(), attention, config)
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_bfloat16_products_are_a_switch_and_close(solver: str) -> None:
    posterior, attention = scene(9, patches=64)
    exact = discrepancy_maps(posterior, attention, SolverConfig(solver=solver))
    rough = discrepancy_maps(posterior, attention, SolverConfig(solver=solver, matmul_dtype="bfloat16"))
    torch.testing.assert_close(rough, exact, atol=0.05 * float(exact.max()), rtol=0)
    assert torch.equal(rough, exact) == (solver == "kl")


def test_mass_is_what_the_class_has() -> None:
    posterior, attention = scene(11)
    kept = discrepancy_maps(posterior, attention, SolverConfig(solver="op"))
    dropped = discrepancy_maps(posterior, attention, SolverConfig(solver="op", class_mass="drop"))
    after = discrepancy_maps(posterior, attention, SolverConfig(solver="op", mass_of="map"))
    alive = early_rejection(posterior)
    torch.testing.assert_close(kept[alive], dropped[alive] * posterior[alive].sum(1, keepdim=True))
    torch.testing.assert_close(after[alive], dropped[alive] * suppress(posterior, 0.5)[alive].sum(1, keepdim=True))


def test_propagation_without_stages_is_posterior_times_t() -> None:
    posterior, attention = scene(12)
    found = discrepancy_maps(
        posterior, attention, SolverConfig(solver="propagate", nms_threshold=0.0, early_rejection=False)
    )
    torch.testing.assert_close(found, posterior @ doubly_stochastic(attention), atol=1e-5, rtol=1e-5)


def test_kl_terms_sum_to_the_divergence_of_what_lies_above_uniform() -> None:
    posterior, attention = scene(13)
    config = SolverConfig(solver="kl", nms_threshold=0.0, class_mass="drop", early_rejection=False)
    found = discrepancy_maps(posterior, attention, config)
    f = (posterior / posterior.sum(1, keepdim=True)).double()
    term = f * (f * 24).log()
    torch.testing.assert_close(found.double(), term.clamp_min(0), atol=2e-6, rtol=0)
    assert torch.equal(found.argmax(1), term.argmax(1))


def test_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"24 patches.*\(23, 23\)"):
        discrepancy_maps(scene(0)[0], torch.eye(23), SolverConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: "none"}, ", ".join(choices)) for name, choices in CHOICES.items()),
        ({"nms_threshold": 1.5}, "nms_threshold=1.5"),
        ({"nms_threshold": float("nan")}, "nms_threshold=nan"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"tau": 1.0}, "tau=1.0"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations=0: 1 or more"),
        ({"sinkhorn_tolerance": -1.0}, "sinkhorn_tolerance"),
        ({"max_steps": 0}, "max_steps"),
        ({"hops": -1}, "hops"),
    ],
)
def test_a_config_names_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SolverConfig(**options)


def test_every_named_choice_is_a_field_with_its_default_first_or_known() -> None:
    names = {field.name: field.default for field in fields(SolverConfig)}
    strings = {name for name, default in names.items() if isinstance(default, str)}
    assert strings == set(CHOICES) and all(names[name] in choices for name, choices in CHOICES.items())


# --- optimal transport


def some_maps(kind: str, n: int, seed: int) -> Tensor:
    """Distributions (4, N)."""
    g = torch.Generator().manual_seed(seed)
    maps = torch.rand(4, n, generator=g) ** 4
    if kind == "one-hot":
        maps = torch.eye(n)[torch.randint(n, (4,), generator=g)]
    if kind == "sparse":
        maps = suppress(maps, 0.7)
    if kind == "uneven":
        maps = 10 ** (-30 * torch.rand(4, n, generator=g))
    return maps / maps.sum(1, keepdim=True)


@few
@given(
    kind=st.sampled_from(["dense", "one-hot", "sparse", "uneven"]),
    n=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    eps=st.sampled_from([10.0, 0.1, 0.02, 0.01, 0.002, 0.001, 1e-4]),
    blocks=st.booleans(),
)
def test_plans_have_both_marginals_for_any_maps_cost_and_eps(
    kind: str, n: int, seed: int, eps: float, blocks: bool
) -> None:
    maps = some_maps(kind, n, seed)
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed + 1))
    if blocks:  # all or nothing: the hardest for scaling
        cost = (torch.arange(n)[:, None] % 3 != torch.arange(n) % 3).float()
    plan = sinkhorn(maps, cost, eps=eps, max_iterations=100)
    for side, wanted in (("source", maps), ("target", torch.full_like(maps, 1 / n))):
        assert float((plan.totals(side) - wanted).abs().sum(1).max()) <= 1.5e-4
    dense = torch.stack([plan.dense(k) for k in range(4)])
    assert bool((dense >= 0).all()) and bool(dense.isfinite().all())
    for side, axis in (("source", 2), ("target", 1)):
        torch.testing.assert_close(plan.totals(side).double(), dense.sum(axis), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            plan.totals(side, cost).double(), (dense * cost.double()).sum(axis), atol=1e-5, rtol=1e-4
        )


def test_what_fifty_iterations_reach_without_a_tolerance() -> None:
    """The target is always exact; the source only where eps is not small."""
    errors = {}
    for eps in (0.1, 0.01, 0.001):
        posterior, attention = scene(21, patches=60)
        maps = normalise(suppress(posterior, 0.5))
        plan = sinkhorn(maps, transport_cost(attention, "one_minus"), eps=eps, tolerance=0.0)
        assert plan.iterations == 50 and plan.missing is None
        torch.testing.assert_close(plan.totals("target"), torch.full_like(maps, 1 / 60), atol=1e-7, rtol=1e-4)
        errors[eps] = float((plan.totals("source") - maps).abs().sum(1).max())
    assert errors[0.1] < 1e-5 and errors[0.001] > 1e-4


@pytest.mark.parametrize("eps", [0.01, 0.001])
def test_the_slow_paths_agree_with_the_fast_one_where_both_can(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovbench.ops import transport

    posterior, attention = scene(22)
    maps, cost = normalise(posterior), transport_cost(attention, "one_minus") * 0.5 * eps / 0.01
    doubles = sinkhorn(maps, cost, eps=eps, tolerance=0.0)  # eps / cost is 0.02 in both
    monkeypatch.setattr(transport, "FLOAT32_RANGE", 1e9)
    monkeypatch.setattr(transport, "FLOAT64_RANGE", 1e9)
    singles = sinkhorn(maps, cost, eps=eps, tolerance=0.0)
    monkeypatch.setattr(transport, "FLOAT64_RANGE", 0.0)
    logs = sinkhorn(maps, cost, eps=eps, tolerance=0.0)
    assert doubles.logarithmic == (eps == 0.001) and not singles.logarithmic and logs.logarithmic
    for side in ("source", "target"):
        expected = logs.totals(side, cost)
        for plan in (doubles, singles):
            torch.testing.assert_close(plan.totals(side, cost), expected, atol=1e-4 * float(expected.max()), rtol=0)


def test_the_log_domain_is_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovbench.ops import transport

    posterior, attention = scene(23)
    maps, cost = normalise(posterior), transport_cost(attention, "one_minus")
    expected = sinkhorn(maps, cost, eps=1e-3, iterations=3, tolerance=0.0).totals("target", cost)
    monkeypatch.setattr(transport, "BLOCK_BYTES", {"cpu": 1})
    torch.testing.assert_close(
        sinkhorn(maps, cost, eps=1e-3, iterations=3, tolerance=0.0).totals("target", cost), expected
    )


@pytest.mark.parametrize("rule", CHOICES["ot_cost"])
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02, 0.005])
@pytest.mark.parametrize("value", CHOICES["ot_value"])
@pytest.mark.parametrize("side", CHOICES["ot_readout"])
def test_op_agrees_with_pot_in_double_precision(rule: str, eps: float, value: str, side: str) -> None:
    ot = pytest.importorskip("ot", reason="POT is a test dependency: pip install POT")
    posterior, attention = scene(31, classes=4, patches=49)
    config = SolverConfig(
        ot_cost=rule, eps=eps, ot_value=value, ot_readout=side, ot_attention="row", sinkhorn_tolerance=0.0
    )
    found = discrepancy_maps(posterior, attention, config)
    a = attention.double().numpy() / attention.double().numpy().max()
    cost = {"attention": a, "one_minus": 1 - a, "neg_log": np.log(np.maximum(a, 1e-6)) / np.log(1e-6)}[rule]
    weights = 1 - cost if value == "gain" else cost
    for k in early_rejection(posterior).nonzero()[:, 0].tolist():
        p = posterior[k].double().numpy()
        kept = np.where(p >= 0.5 * p.max(), p, 0)
        f, s = kept / kept.sum(), np.full(49, 1 / 49)
        # POT updates the second marginal first: with the sides swapped, its k-th iterate is ours.
        plan = ot.sinkhorn(s, f, cost.T, reg=eps, numItermax=50, stopThr=0, method="sinkhorn", warn=False).T
        expected = (plan * weights).sum(0 if side == "target" else 1) * 49 * p.sum()
        assert np.abs(found[k].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_op_reaches_the_optimum_that_pot_finds_for_small_eps() -> None:
    ot = pytest.importorskip("ot", reason="POT is a test dependency: pip install POT")
    posterior, attention = scene(32, classes=3, patches=25)
    maps, cost = normalise(posterior), transport_cost(attention, "one_minus")
    plan = sinkhorn(maps, cost, eps=1e-3, max_iterations=2000)
    for k in range(3):
        least = ot.emd2((maps[k].double() / maps[k].double().sum()).numpy(), np.full(25, 1 / 25), cost.double().numpy())
        spent = float((plan.dense(k) * cost).sum())
        assert least - 1e-4 <= spent <= least + 0.01


def test_costs() -> None:
    a = torch.tensor([[0.5, 0.25], [0.0, 0.05]])
    torch.testing.assert_close(transport_cost(a, "attention"), a * 2)
    torch.testing.assert_close(transport_cost(a, "one_minus"), 1 - a * 2)
    expected = torch.tensor([[0.0, np.log(0.5)], [np.log(1e-6), np.log(0.1)]]) / np.log(1e-6)
    torch.testing.assert_close(transport_cost(a, "neg_log"), expected.float())
    assert bool(transport_cost(torch.zeros(2, 2), "one_minus").isfinite().all())
    with pytest.raises(ValueError, match="one_minus"):
        transport_cost(a, "two_minus")


@pytest.mark.parametrize(("rule", "value"), [("attention", "cost"), ("one_minus", "gain")])
def test_op_with_much_entropy_is_one_hop(rule: str, value: str) -> None:
    """As eps grows, pi becomes f s^T, and the target's sum of a_ij pi_ij the hop f T up to one factor."""
    posterior, attention = scene(33)
    config = SolverConfig(eps=1e4, ot_cost=rule, ot_value=value)
    found = discrepancy_maps(posterior, attention, config)
    expected = discrepancy_maps(posterior, attention, replace(config, solver="propagate"))
    alive = early_rejection(posterior)
    top = float(doubly_stochastic(attention).max())
    torch.testing.assert_close(found[alive] * top, expected[alive], atol=1e-3 * float(expected.max()), rtol=0)


# --- Markov chain


@few
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    sharpness=st.sampled_from([(0.0, 15), (1.0, 15), (3.0, 100)]),
)
def test_rows_and_columns_sum_to_one(seed: int, n: int, sharpness: tuple[float, int]) -> None:
    """The few dominant entries of very sharp attention are what takes more rounds."""
    g = torch.Generator().manual_seed(seed)
    sinks = torch.randn(n, generator=g)  # columns that draw everything, as in real attention
    t = doubly_stochastic((sharpness[0] * torch.randn(n, n, generator=g) + sinks).softmax(1), sharpness[1])
    assert float((t.sum(1) - 1).abs().max()) <= 1e-5
    assert float((t.sum(0) - 1).abs().max()) <= 1e-3
    assert bool((t >= 0).all())


def test_a_patch_without_attention_keeps_its_mass() -> None:
    _, attention = scene(41)
    attention[4] = 0  # looks nowhere
    attention[:, 7] = 0  # is looked at by nobody
    t = doubly_stochastic(attention, 200)
    assert bool(t.isfinite().all()) and float((t.sum(1) - 1).abs().max()) <= 1e-5
    assert float((t.sum(0) - 1).abs().max()) <= 0.02  # no doubly stochastic matrix has that pattern: slow
    assert float(t[4, 4]) > 0.99 and float(t[4].sum() - t[4, 4]) == 0 and float(t[7, 7]) > 0.9
    assert torch.equal(doubly_stochastic(torch.zeros(3, 3)), torch.eye(3))


def test_fitting_keeps_a_doubly_stochastic_matrix_and_its_factors() -> None:
    _, attention = scene(42)
    t = doubly_stochastic(attention, 100)
    torch.testing.assert_close(doubly_stochastic(t), t, atol=1e-6, rtol=1e-4)
    ratio = (t / attention).double()  # rows times columns: rank one
    torch.testing.assert_close(ratio * ratio[0, 0], ratio[:, :1] * ratio[:1], rtol=1e-3, atol=1e-6)


def test_fitting_real_attention(shared: Path) -> None:
    from ovbench.benchmarks import get
    from ovbench.networks.attention import load_source
    from ovbench.pictures import read_rgb

    weights = shared / "weights" / "dinov2_vits14_fp16.safetensors"
    data = shared / "data" / "voc2012"
    if not weights.is_file() or not data.is_dir():
        pytest.skip("no DINOv2 weights or VOC images in the shared data")
    source = load_source("dinov2-s14", weights)
    for pair in get("voc21").pairs(data)[:3]:
        image = torch.from_numpy(np.array(read_rgb(pair.image))).permute(2, 0, 1).float()
        with torch.inference_mode():
            attention, _ = source.attention(image[None, :, :280, :280])
        t = doubly_stochastic(attention[0])
        assert float((t.sum(1) - 1).abs().max()) <= 1e-4 and float((t.sum(0) - 1).abs().max()) <= 1e-3


def arrival_by_loops(maps: Tensor, t: Tensor, tau: float, max_steps: int) -> Tensor:
    out = torch.zeros(maps.shape, dtype=torch.float64)
    for k in range(len(maps)):
        f, before = maps[k].double(), torch.zeros(maps.shape[1], dtype=torch.float64)
        found = [0.0] * maps.shape[1]
        for step in range(1, max_steps + 1):
            f = f / f.max()
            for i, value in enumerate(f.tolist()):
                if not found[i] and value > tau:
                    found[i] = step - 1 + (tau - float(before[i])) / (value - float(before[i]))
            before, last, f = f, f, f @ t.double()
        out[k] = torch.tensor([s or max_steps * tau / max(float(v), 1e-300) for s, v in zip(found, last, strict=True)])
    return out


def settling_by_loops(maps: Tensor, t: Tensor, tau: float, max_steps: int) -> Tensor:
    out = torch.full(maps.shape, float(max_steps), dtype=torch.float64)
    for k in range(len(maps)):
        f = maps[k].double() / maps[k].double().max()
        earlier = torch.full((maps.shape[1],), float("nan"), dtype=torch.float64)
        done = [False] * maps.shape[1]
        for step in range(1, max_steps + 1):
            new = f @ t.double()
            change = (new - f).abs()
            for i, c in enumerate(change.tolist()):
                if not done[i] and c <= tau:
                    done[i] = True
                    part = c / tau if step == 1 else (float(earlier[i]) - tau) / (float(earlier[i]) - c)
                    out[k, i] = min(step - 1 + part, max_steps) if step > 1 else part
            earlier, f = change, new
    return out


@pytest.mark.parametrize(("tau", "max_steps"), [(0.3, 100), (0.6, 100), (0.9, 4), (0.9, 1)])
@pytest.mark.parametrize("start", ["posterior", "suppressed", "one-hot"])
@pytest.mark.parametrize(("walk", "loops"), [(arrival_steps, arrival_by_loops), (settling_steps, settling_by_loops)])
def test_steps_equal_loops(
    walk: Callable[..., Tensor], loops: Callable[..., Tensor], start: str, tau: float, max_steps: int
) -> None:
    posterior, attention = scene(51)
    if walk is settling_steps:
        tau /= 10
    maps = {"posterior": posterior, "suppressed": suppress(posterior, 0.8), "one-hot": torch.eye(5, 24)}[start]
    t = doubly_stochastic(0.2 * attention + 0.8 * torch.eye(24))  # slow, so that there are steps
    found = 1 / walk(maps, t, tau=tau, max_steps=max_steps).double()
    expected = 1 / loops(maps, t, tau, max_steps)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if max_steps == 100:
        assert len((1 / expected).round().unique()) > 3  # not a tie


@pytest.mark.parametrize("every", [1, 3, 8])
def test_looking_seldom_changes_nothing(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, attention = scene(52)
    t = doubly_stochastic(0.3 * attention + 0.7 * torch.eye(24))
    expected = arrival_steps(posterior, t, tau=0.9)
    original = markov._Walk.__init__

    def seldom(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.every = every

    monkeypatch.setattr(markov._Walk, "__init__", seldom)
    torch.testing.assert_close(arrival_steps(posterior, t, tau=0.9), expected, atol=1e-5, rtol=1e-5)


def test_finished_maps_leave_the_products_and_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def counted(maps: Tensor, transition: Tensor, hops: int = 1) -> Tensor:
        rows.append(len(maps))
        return hop(maps, transition, hops)

    monkeypatch.setattr(markov, "hop", counted)
    posterior, attention = scene(53)
    attention[:12, 12:] = attention[12:, :12] = 0  # two halves: what starts in one never reaches the other
    t = doubly_stochastic(attention)
    maps = posterior[:, :12].repeat(1, 2)
    maps[0, 12:] = 0
    found = arrival_steps(maps, t, tau=0.9, max_steps=200)
    assert rows[0] == 5 and rows[-1] == 1 and len(rows) == 199 and rows == sorted(rows, reverse=True)
    assert bool(found[0, 12:].isinf().all()) and bool(found[1:].isfinite().all())


def test_hops_are_matrix_powers() -> None:
    posterior, attention = scene(54)
    t = doubly_stochastic(attention, 100)
    assert torch.equal(hop(posterior, t, 0), posterior)
    torch.testing.assert_close(hop(posterior, t, 3), posterior @ t @ t @ t)
    torch.testing.assert_close(
        hop(posterior, t, 200), posterior.mean(1, keepdim=True).expand(-1, 24), atol=1e-4, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@variants
def test_a_gpu_gives_the_same(options: dict[str, Any]) -> None:
    posterior, attention = scene(61, patches=200)
    config = SolverConfig(**options)
    expected = discrepancy_maps(posterior, attention, config)
    found = discrepancy_maps(posterior.cuda(), attention.cuda(), config)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3 * float(expected.max()), rtol=0)
