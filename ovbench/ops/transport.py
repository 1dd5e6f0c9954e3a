"""Entropic optimal transport of many maps to the uniform one, with one cost for all: Sinkhorn as matrix products.

Map f (a distribution over N patches) is moved to s = 1/N at the cost C (N, N). The plan is pi = diag(mu) K diag(nu) with
K = exp(-C / eps), found by mu <- f / (K nu), nu <- s / (K^T mu) from nu = 1 (Cuturi, NeurIPS 2013). K is shared, so the
iterations of all maps are one product of (maps, N) by (N, N) each.

Numerics. C lies in [0, 1] (:func:`transport_cost`), so K >= exp(-1/eps). The scale of nu is free (mu takes it up); with its
maximum held at 1, K nu >= exp(-1/eps) and mu <= exp(1/eps): nothing over- or underflows where exp(1/eps) itself fits.

====================  ==========================================================
1/eps                 iterations
====================  ==========================================================
<= 60 (eps >= 1/60)   float32 products, the fast path
<= 600 (eps >= 1/600) the same in float64
above                 log domain in float64: a log-sum-exp over blocks, N^2 exponentials per map and step; 20 to 100 x slower
====================  ==========================================================

After the last step the target's marginal is exact to rounding. The source's is checked after ``iterations`` steps, and
blocks of as many steps follow until it is within ``tolerance``. On DINOv2 attention with the cost 1 - a, 50 steps leave an
L1 error below 2e-6 at eps 0.1, up to 2e-3 at 0.02 (100 steps: 1e-6), 0.06 at 0.002 and 0.15 at 0.001 (1000 steps: 1e-4 to
2e-3). Where ``max_iterations`` are not enough, the plan is rounded to one with both marginals (Altschuler, Weed and
Rigollet, NeurIPS 2017, algorithm 2): rows are scaled down to f, and what is missing is added as a matrix of rank one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FLOAT32_RANGE = 60.0  # exp(-60) / N^2 is the least sum that can occur: 3e-35 at N = 16384, a normal number
FLOAT64_RANGE = 600.0  # exp(600) = 4e260
SMALLEST_ATTENTION = 1e-6  # of the maximum, where its logarithm is taken
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of one block of the log domain


def transport_cost(attention: Tensor, rule: str) -> Tensor:
    """Cost (N, N) in [0, 1], float32, of moving mass from patch i to patch j, from attention (N, N) >= 0.

    Args:
        attention: Any scale: a = attention / max is used.
        rule: ``attention``: a; ``one_minus``: 1 - a; ``neg_log``: log a / log 1e-6, a below 1e-6 counting as that.
    """
    a = attention.float() / attention.amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    if rule == "attention":
        return a
    if rule == "one_minus":
        return a.neg_().add_(1)
    if rule == "neg_log":
        return a.clamp_min_(SMALLEST_ATTENTION).log_().div_(math.log(SMALLEST_ATTENTION))
    raise ValueError(f"cost rule {rule!r}: attention, one_minus or neg_log")


@dataclass(frozen=True)
class Plan:
    """Transport plans of M maps, pi_ij = left_i kernel_ij right_j; or the logarithms of the three.

    Attributes:
        left: mu (M, N); 0, or -inf as a logarithm, where the map is 0.
        right: nu (M, N).
        kernel: K (N, N), shared.
        logarithmic: The three are logarithms.
        iterations: How many were done.
        missing: What rounding adds, as source's and target's part (M, N) each: their outer product.
    """

    left: Tensor
    right: Tensor
    kernel: Tensor
    logarithmic: bool
    iterations: int
    missing: tuple[Tensor, Tensor] | None = None

    def totals(self, side: str, weights: Tensor | None = None) -> Tensor:
        """Sum of weights_ij pi_ij at each patch (M, N), float32: over i for the ``target`` side, over j for ``source``.

        Without weights these are the plan's marginals.

        Args:
            side: ``target`` or ``source``.
            weights: Not negative (N, N).
        """
        target = side == "target"
        kernel, (outer, inner) = self.kernel, (self.right, self.left) if target else (self.left, self.right)
        if self.logarithmic:
            if weights is not None:
                kernel = kernel + weights.to(kernel.dtype).log()
            found = (outer + _log_product(inner, kernel if target else kernel.T)).exp_().float()
        else:
            if weights is not None:
                kernel = kernel.to(inner.dtype) * weights
            found = (_product(inner, kernel if target else kernel.T) * outer).float()
        if self.missing is not None:
            inner, outer = self.missing if target else self.missing[::-1]
            if weights is None:
                found += outer * inner.sum(1, keepdim=True)
            else:
                found += outer * (inner @ (weights if target else weights.T))
        return found

    def dense(self, index: int) -> Tensor:
        """One map's whole plan (N, N), float64."""
        left, right, kernel = self.left[index].double(), self.right[index].double(), self.kernel.double()
        plan = (left[:, None] + kernel + right).exp() if self.logarithmic else left[:, None] * kernel * right
        if self.missing is not None:
            source, target = (part[index].double() for part in self.missing)
            plan += source[:, None] * target
        return plan

    def rounded(self, maps: Tensor) -> Plan:
        """The plan with exactly the marginals ``maps`` (M, N) and uniform."""
        maps, reached = maps.float(), self.totals("source")
        scale = (maps / reached.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)
        left = self.left + scale.log() if self.logarithmic else self.left * scale
        plan = replace(self, left=left)
        source = (maps - reached * scale).clamp_min(0)
        target = (1 / maps.shape[1] - plan.totals("target")).clamp_min(0)
        total = target.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return replace(plan, missing=(source, target / total))


def sinkhorn(
    maps: Tensor,
    cost: Tensor,
    *,
    eps: float = 0.1,
    iterations: int = 50,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
    matmul_dtype: torch.dtype = torch.float32,
) -> Plan:
    """Plans from each map to the uniform distribution; finite for any maps and any eps > 0.

    Args:
        maps: Distributions (M, N), each summing to 1; zeros allowed.
        cost: Cost (N, N) in [0, 1].
        eps: Weight of the entropy, in units of the cost's maximum.
        iterations: Steps of both scalings.
        tolerance: Largest sum over the patches of the source marginal's absolute error, of any map. 0: ``iterations``
            steps and nothing more.
        max_iterations: Where the additional steps end, and the plan is rounded.
        matmul_dtype: bfloat16 rounds the operands of the fast path's products (no check then: its rounding is above any
            useful tolerance); the slower paths ignore it.
    """
    inverse = 1 / eps
    if inverse > FLOAT64_RANGE:
        return _log_sinkhorn(maps, cost.double() * -inverse, iterations, tolerance, max_iterations)
    single = inverse <= FLOAT32_RANGE
    dtype = torch.float32 if single else torch.float64
    f = maps.to(dtype)
    kernel = (cost.to(dtype) * -inverse).exp_()
    if single and matmul_dtype != dtype:
        kernel, tolerance = kernel.to(matmul_dtype), 0.0
    nu = torch.ones_like(f)
    done = 0
    while True:
        block = min(iterations, max(max_iterations - done, 1)) if done else iterations
        for _ in range(block):
            mu = f / _product(nu, kernel.T)
            reached = _product(mu, kernel)
            nu = reached.amin(1, keepdim=True) / reached
        done += block
        plan = Plan(mu, (1 / f.shape[1]) / reached, kernel, False, done)
        if not tolerance or _error(plan, maps) <= tolerance:
            return plan
        if done >= max_iterations:
            return plan.rounded(maps)


def _error(plan: Plan, maps: Tensor) -> float:
    """L1 error of the source's marginal, of the worst map. Waits for the device."""
    return float((plan.totals("source") - maps).abs().sum(1).amax())


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """X @ matrix in the matrix's type, given back in that of x."""
    return (x.to(matrix.dtype) @ matrix).to(x.dtype)


def _log_sinkhorn(maps: Tensor, kernel: Tensor, iterations: int, tolerance: float, max_iterations: int) -> Plan:
    """The same with logarithms of everything, float64; ``kernel`` is -C / eps."""
    log_f, log_s = maps.double().log(), -math.log(maps.shape[1])
    nu = torch.zeros_like(log_f)
    done = 0
    while True:
        block = min(iterations, max(max_iterations - done, 1)) if done else iterations
        for _ in range(block):
            mu = log_f - _log_product(nu, kernel.T)
            nu = log_s - _log_product(mu, kernel)
        done += block
        plan = Plan(mu, nu, kernel, True, done)
        if not tolerance or _error(plan, maps) <= tolerance:
            return plan
        if done >= max_iterations:
            return plan.rounded(maps)


def _log_product(x: Tensor, matrix: Tensor) -> Tensor:
    """Logarithm (M, N) of exp(x) @ exp(matrix), in blocks of columns."""
    m, n = x.shape
    step = max(1, BLOCK_BYTES.get(x.device.type, 64 << 20) // (8 * m * n))
    parts = [(x[:, None] + matrix.T[i : i + step]).logsumexp(2) for i in range(0, matrix.shape[1], step)]
    return torch.cat(parts, 1)
