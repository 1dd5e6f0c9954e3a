"""Class scores without optimised logits: how far each class's distribution over the patches is from a uniform one.

"Direct Segmentation without Logits Optimization for Training-Free Open-Vocabulary Semantic Segmentation", arXiv
2604.07723. One image, all classes at once, each stage a function:

1. :func:`class_posterior`: probability of each class at each patch.
2. :func:`early_rejection`: classes that win no patch are out.
3. :func:`suppress` (NMS): of each class, patches of low confidence become 0.
4. :func:`normalise`: each class's map f becomes a distribution over the patches; what it had in sum is its mass.
5. The solver, with self-attention A as the geometry of the patches: ``op``, entropic transport of f to the uniform map
   (:mod:`ovbench.ops.transport`); ``mv``, the speed at which f's mass reaches a patch along the Markov chain made of A
   (:mod:`ovbench.ops.markov`); and the baselines ``kl``, f's own term of the Kullback-Leibler divergence from uniform,
   and ``propagate``, f after one hop of the chain.

:func:`discrepancy_maps` runs 2 to 5. What the paper leaves open is a field of :class:`SolverConfig`. A default that is
marked *inferred* was chosen by ``studies/discrepancy_ablation.py`` (tables: ``docs/discrepancy.md``): labels of VOC and
COCO-Object damaged in three strengths, attention of DINOv2-S/14. Mean mIoU on the 42 images that were chosen on:

- no solver 32.2; one hop 38.6, with mv 38.7 and op 38.0. On 21 held-back images 29.5; 36.8, 36.8 (mv), 36.2 (op). No
  solver beats one hop of propagation there; mv with tau 0.3 *is* one hop wherever a class could win, and op turns into
  it as eps grows.
- class_mass: dropped, every solver is near 9. mass_of: what NMS leaves costs 2.3 to 4.5.
- op: cost 1 - a on the target side with the gain 38.0, cost a 36.4, every other pair 7 to 25; A as it is 34.8.
- mv: weighted by the mass alone 26.8, started at step 0 at most 26.6, literal rule at most 23.8.
- NMS: relative thresholds of 0.3 to 0.7 are within 0.4 for op and propagate; none costs 1.6 (op) to 3.6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.ops.markov import arrival_steps, doubly_stochastic, hop, settling_steps
from ovbench.ops.transport import sinkhorn, transport_cost

# Looked at for what is inferred: arXiv 2604.07723 (no public code was found), its public ancestor M2N2, and the
# ablation above.
REJECTED = -1.0  # score of a class that is out: below every other, and safe to interpolate
TIE_BREAK = 1e-6  # weight of the map where the KL term knows no difference

CHOICES: dict[str, tuple[str, ...]] = {
    "solver": ("op", "mv", "opmv", "kl", "propagate"),
    "nms_rule": ("relative", "absolute"),
    "norm_axis": ("patches", "classes"),
    "norm_rule": ("sum", "softmax"),
    "class_mass": ("keep", "drop"),
    "mass_of": ("posterior", "map"),
    "ot_attention": ("markov", "row"),
    "ot_cost": ("one_minus", "attention", "neg_log"),
    "ot_readout": ("target", "source"),
    "ot_value": ("gain", "cost"),
    "mv_rule": ("markov", "literal"),
    "mv_weight": ("peak", "mass"),
    "matmul_dtype": ("float32", "bfloat16"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SolverConfig:
    """The solver and everything that the paper states or leaves open. :data:`CHOICES` lists the values of names.

    Raises:
        UsageError: A name that is not a choice, or a number out of range.
    """

    solver: str = (
        "op"  # opmv: mean of op's and mv's scores, each over its largest; the paper does not say how; inferred
    )
    early_rejection: bool = True  # the paper
    nms_threshold: float = 0.5  # the paper: 0.5 or higher. 0 switches the stage off
    nms_rule: str = "relative"  # to the class's largest value, or the posterior as it is ("absolute"); inferred
    norm_axis: str = "patches"  # the paper; "classes": a patch's values are first made to sum to 1 over its classes
    norm_rule: str = "sum"  # f / sum f, which is the softmax of log f; "softmax" of f itself is nearly flat; inferred
    class_mass: str = "keep"  # scores times the class's mass, so that a class with one patch is no equal; inferred
    mass_of: str = "posterior"  # the mass is what the class had before NMS, or has after it ("map"); inferred

    eps: float = 0.1  # op, the paper: weight of the entropy; the cost lies in [0, 1]
    sinkhorn_iterations: int = 50  # op, the paper
    sinkhorn_tolerance: float = 1e-4  # op: further blocks of iterations until marginals are this near (L1); 0: never
    sinkhorn_max_iterations: int = 500  # op: where they end, and the plan is rounded to exact marginals
    ot_attention: str = "markov"  # op: the cost is made of A made doubly stochastic, or of A ("row"); inferred
    ot_cost: str = "one_minus"  # op: 1 - a, a, or log a / log 1e-6, with a = A / max A; inferred
    ot_readout: str = "target"  # op: the plan is summed over where the mass comes from, or goes to ("source"); inferred
    ot_value: str = "gain"  # op: sum of (1 - C) pi, or of C pi ("cost"); inferred

    mv_rule: str = "markov"  # mv: speed of reaching tau of the maximum, or ("literal") steps until f changes by <= tau
    tau: float = 0.3  # mv: the paper's number; of the map's maximum, inferred
    mv_start: int = 1  # mv, markov: hops before the first step; inferred
    mv_weight: str = "peak"  # mv, markov: the class's mass times the maximum at the first step, or "mass"; inferred
    max_steps: int = 1000  # mv: bound

    hops: int = 1  # propagate
    ipf_rounds: int = 15  # the paper: rounds of column and row normalisation
    matmul_dtype: str = "float32"  # of the solvers' products, or bfloat16: faster, about 2 digits

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"Option {name}={getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        for name, low in (
            ("sinkhorn_iterations", 1),
            ("max_steps", 1),
            ("ipf_rounds", 1),
            ("hops", 0),
            ("mv_start", 0),
        ):
            if getattr(self, name) < low:
                raise UsageError(f"Option {name}={getattr(self, name)}: {low} or more is needed.")
        if not 0 <= self.nms_threshold <= 1:
            raise UsageError(f"Option nms_threshold={self.nms_threshold}: a fraction from 0 (off) to 1 is needed.")
        if not 1e-5 <= self.eps < float("inf"):
            raise UsageError(f"Option eps={self.eps}: 1e-5 or more is needed, the paper's is 0.1.")
        if not 0 < self.tau < 1:
            raise UsageError(f"Option tau={self.tau}: a number between 0 and 1 is needed, both excluded.")
        if not self.sinkhorn_tolerance >= 0:
            raise UsageError(f"Option sinkhorn_tolerance={self.sinkhorn_tolerance}: 0 (no check) or more is needed.")


def class_posterior(logits: Tensor, word_class: Tensor, scale: float, classes: int) -> Tensor:
    """Probability of each class at each patch (K, N), float32: the largest of its words' in a softmax over all words.

    Args:
        logits: Cosine logits (Q, N).
        word_class: Class of each word (Q,), on the same device.
        scale: Logit scale, the protocol's.
        classes: K; a class without words has probability 0.
    """
    words = (logits.float() * scale).softmax(0)
    posterior = words.new_zeros(classes, words.shape[1])
    return posterior.scatter_reduce_(0, word_class.long()[:, None].expand_as(words), words, "amax")


def early_rejection(posterior: Tensor) -> Tensor:
    """Which classes (K,), bool, are the most probable of at least one patch."""
    alive = torch.zeros(len(posterior), dtype=torch.bool, device=posterior.device)
    alive[posterior.argmax(0)] = True
    return alive


def suppress(posterior: Tensor, threshold: float, rule: str = "relative") -> Tensor:
    """Maps (K, N) with 0 where a class's confidence is below ``threshold``: its own maximum's part, or ``absolute``."""
    if rule == "relative":
        return torch.where(posterior >= threshold * posterior.amax(1, keepdim=True), posterior, 0)
    return torch.where(posterior >= threshold, posterior, 0)


def normalise(maps: Tensor, axis: str = "patches", rule: str = "sum") -> Tensor:
    """Distributions over the patches (K, N), each summing to 1, from maps that have something in them.

    Args:
        maps: Not negative (K, N).
        axis: ``classes`` first divides every patch's values by their sum over the classes (where that is not 0).
        rule: ``sum`` divides by the sum, ``softmax`` takes the softmax over the patches that are not 0.
    """
    if axis == "classes":
        maps = over_classes(maps)
    if rule == "softmax":
        return maps.masked_fill(maps == 0, -torch.inf).softmax(1)
    return maps / maps.sum(1, keepdim=True)


def over_classes(maps: Tensor) -> Tensor:
    """Maps (K, N) with every patch's values summing to 1 over the classes, or all 0."""
    total = maps.sum(0)
    return maps / torch.where(total > 0, total, 1)


@torch.no_grad()
def discrepancy_maps(posterior: Tensor, attention: Tensor, config: SolverConfig) -> Tensor:
    """Class scores (K, N), float32, finite, to be compared across classes (argmax); all stages behind the posterior.

    Classes in the race have scores >= 0. Those that were rejected, or that NMS leaves nothing of, have
    :data:`REJECTED` = -1. Where no class is left (a high absolute threshold), the scores are the posterior.

    Args:
        posterior: Of the classes (K, N), see :func:`class_posterior`.
        attention: Row-stochastic (N, N): row i says where patch i looks.
        config: The solver and its constants.

    Raises:
        ValueError: Numbers of patches differ.
    """
    n = posterior.shape[1]
    if attention.shape != (n, n):
        raise ValueError(f"posterior of {n} patches, attention {tuple(attention.shape)}: resize to one grid first")
    with torch.autocast(posterior.device.type, enabled=False):
        posterior = posterior.float()
        maps = suppress(posterior, config.nms_threshold, config.nms_rule)
        alive = maps.sum(1) > 0
        if config.early_rejection:
            alive &= early_rejection(posterior)
        index = alive.nonzero()[:, 0]  # the one place that waits for the device
        if not len(index):
            return posterior.clone()
        maps, before = maps[index], posterior[index]
        if config.norm_axis == "classes":
            maps, before = over_classes(maps), over_classes(before)
        mass = (before if config.mass_of == "posterior" else maps).sum(1, keepdim=True)
        scores = _solve(normalise(maps, "patches", config.norm_rule), attention, config, mass)
        out = torch.full_like(posterior, REJECTED)
        out[index] = scores
    return out


def _solve(maps: Tensor, attention: Tensor, config: SolverConfig, mass: Tensor) -> Tensor:
    """Scores (M, N) >= 0 of distributions (M, N) whose classes have the mass (M, 1)."""
    if config.solver == "opmv":
        both = [_solve(maps, attention, replace(config, solver=solver), mass) for solver in ("op", "mv")]
        tiny = torch.finfo(torch.float32).tiny
        return sum((scores / scores.amax().clamp_min(tiny) for scores in both), torch.zeros_like(maps)) / 2
    scores = _scores(maps, attention, config)
    return scores * mass if config.class_mass == "keep" else scores


def _scores(maps: Tensor, attention: Tensor, config: SolverConfig) -> Tensor:
    """Scores (M, N) >= 0 of distributions (M, N), before the class's mass."""
    if config.solver == "kl":
        return _kl(maps)
    if config.solver == "op":
        return _optimal_path(maps, attention, config)
    transition = doubly_stochastic(attention, config.ipf_rounds).to(DTYPES[config.matmul_dtype])
    if config.solver == "propagate":
        return hop(maps, transition, config.hops)
    if config.mv_rule == "literal":  # the slowest to settle wins
        return settling_steps(maps, transition, tau=config.tau, max_steps=config.max_steps)
    first = hop(maps, transition, config.mv_start)
    velocity = 1 / arrival_steps(first, transition, tau=config.tau, max_steps=config.max_steps)
    return velocity * first.amax(1, keepdim=True) if config.mv_weight == "peak" else velocity


def _kl(maps: Tensor) -> Tensor:
    """F log(f / s) per patch, s = 1/N; where f <= s, or where all classes are, a trace of f decides."""
    n = maps.shape[1]
    return torch.xlogy(maps, maps * n).clamp_min(0) + TIE_BREAK * maps


def _optimal_path(maps: Tensor, attention: Tensor, config: SolverConfig) -> Tensor:
    """What the plan from each map to the uniform one gains (or costs) per patch, times N."""
    if config.ot_attention == "markov":
        attention = doubly_stochastic(attention, config.ipf_rounds)
    cost = transport_cost(attention, config.ot_cost)
    plan = sinkhorn(
        maps,
        cost,
        eps=config.eps,
        iterations=config.sinkhorn_iterations,
        tolerance=config.sinkhorn_tolerance,
        max_iterations=config.sinkhorn_max_iterations,
        matmul_dtype=DTYPES[config.matmul_dtype],
    )
    weights = 1 - cost if config.ot_value == "gain" else cost
    return plan.totals(config.ot_readout, weights) * maps.shape[1]
