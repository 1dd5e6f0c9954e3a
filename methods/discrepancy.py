"""Discrepancy solvers: classes read from how far each one's distribution over the patches is from a degenerate one.

Direct Segmentation without Logits Optimization for Training-Free Open-Vocabulary Semantic Segmentation, arXiv 2604.07723.
A base method gives logits, an attention source says which patches belong together, a solver of
:mod:`ovbench.ops.discrepancy` turns both into scores per class and patch; the protocol's upsampling (JBU) brings them to
the image. Any dense method can be the base: ``--method sc-clip --solver op`` is ``discrepancy-op`` with ``base=sc-clip``.

Stages of an image: ``logits`` (base network), ``attention`` (source), ``distribution`` (solver), ``jbu``. The source
``clip`` takes its attention out of the base's own forward where the image is one window; its cost is then in ``logits``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ovbench.errors import UsageError
from ovbench.models.base import Stage
from ovbench.models.method import Method, Solver, Vocabulary
from ovbench.networks.attention import AttentionSource, ClipSource, load_source
from ovbench.networks.attention_base import add_attention, between_patches
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.discrepancy import SolverConfig, class_posterior, discrepancy_maps
from ovbench.ops.patch_logits import PatchLogits
from ovbench.registry import method_class, method_info

# Looked at for what is inferred: arXiv 2604.07723 (no public code was found), its public ancestor M2N2, and the trials
# of docs/discrepancy.md. The paper names time step 0 of sd2 as one that works.
METHODS = {
    "discrepancy-op": {
        "cls": "OptimalPath",
        "summary": "optimal transport of each class's distribution to the uniform one, on any base and attention",
        "paper": "Direct Segmentation without Logits Optimization, arXiv 2604.07723",
        "protocol": "direct-seg",
    },
    "discrepancy-mv": {
        "cls": "MaximumVelocity",
        "summary": "how fast each class's distribution diffuses, on any base and attention",
        "paper": "Direct Segmentation without Logits Optimization, arXiv 2604.07723",
        "protocol": "direct-seg",
    },
    "discrepancy-opmv": {
        "cls": "PathAndVelocity",
        "summary": "mean of both solvers' scores, each over its largest",
        "paper": "Direct Segmentation without Logits Optimization, arXiv 2604.07723",
        "protocol": "direct-seg",
    },
    "discrepancy-kl": {
        "cls": "KullbackLeibler",
        "summary": "baseline of the solvers: each patch's term of the divergence from the uniform distribution",
        "paper": "Direct Segmentation without Logits Optimization, arXiv 2604.07723",
        "protocol": "direct-seg",
    },
    "discrepancy-propagate": {
        "cls": "Propagate",
        "summary": "baseline of the solvers: the posterior after one hop along the attention",
        "paper": "Direct Segmentation without Logits Optimization, arXiv 2604.07723",
        "protocol": "direct-seg",
    },
}

BASE = "base."  # prefix of the base's own options


@dataclass(frozen=True)
class DiscrepancyConfig(SolverConfig):
    """The solver's constants, and what it works on."""

    base: str = "kk"  # gives the logits: k-k attention is the paper's default (40.8 against 36.2 with CLIP's own)
    base_options: tuple[tuple[str, Any], ...] = ()  # the base's own options, given as base.NAME=VALUE
    attention: str = "sd2"  # source of the attention; the paper's main one
    attention_weights: str | None = None  # None: published weights from the hub; a file or folder; or "random"
    # blocks averaged, of a vision transformer: N last ones, or A-B. None: the last 3; of clip the middle third; inferred
    attention_blocks: str | None = None
    attention_size: int = 512  # side in pixels of the square whose area sd2 sees
    attention_timestep: int = 1  # of sd2's one denoising call; inferred


class Discrepancy(Solver):
    """A solver on a base method and an attention source.

    Raises:
        UsageError: The base is a solver itself, or no such method.
    """

    Config = DiscrepancyConfig
    OFFLINE_OPTIONS = {"attention": "clip"}  # noqa: RUF012 (declared as a ClassVar in Method)

    def __init__(self, clip: DenseCLIP, config: DiscrepancyConfig | None = None) -> None:
        super().__init__(clip, config)
        c = self.config
        base = method_class(c.base)
        if base.MODEL != Method.MODEL:
            raise UsageError(f"'{c.base}' gives logits of views, not of patches: a solver needs another base.")
        if issubclass(base, Solver):
            raise UsageError(f"The base '{c.base}' is a solver itself: give a dense method, e.g. kk or sc-clip.")
        self.dtype = torch.float32
        self.base: Method = base.build(clip, dict(c.base_options))
        self.constants = self.base.constants
        its: dict[str, Any] = {"size": c.attention_size, "timestep": c.attention_timestep}
        if c.attention != "sd2":
            its = {"blocks": None if c.attention_blocks is None else str(c.attention_blocks)}
        self.source: AttentionSource = load_source(c.attention, c.attention_weights, clip=clip, **its)

    @classmethod
    def configure(cls, options: dict[str, Any]) -> Any:
        """The config; ``base.NAME`` are options of the base."""
        own = {name: value for name, value in options.items() if not name.startswith(BASE)}
        solver = next(field.default for field in fields(cls.Config) if field.name == "solver")
        if own.get("solver", solver) != solver:
            raise UsageError(f"The solver of this method is {solver}: choose another with --solver {own['solver']}.")
        theirs = {name.removeprefix(BASE): value for name, value in options.items() if name.startswith(BASE)}
        if theirs:
            own["base_options"] = tuple(sorted(theirs.items()))
        return super().configure(own)

    def options(self) -> dict[str, Any]:
        """Constants in force, those of the base as ``base.NAME``, and what the attention source was."""
        own = asdict(self.config)
        own.pop("base_options")
        own["base"] = method_info(self.config.base).name
        theirs = {BASE + name: value for name, value in self.base.options().items()}
        return {**own, **theirs, **self.source.record()}

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the matrices of both networks in ``dtype``."""
        self.dtype = dtype
        self.base.use_precision(dtype)
        if not isinstance(self.source, ClipSource):
            self.source.use_precision(dtype)

    def features(self, images: Tensor) -> Tensor:
        """The base's dense features."""
        return self.base.features(images)

    def patch_logits(self, images: Tensor, text: Tensor) -> Tensor:
        """The base's logits."""
        return self.base.patch_logits(images, text)

    def patch_logits_and_attention(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """The base's logits, and from the same forward the tower's attention (B, N, N) if that is the source."""
        if not isinstance(self.source, ClipSource):
            return self.patch_logits(images, text), None
        total: list[Tensor] = []

        def collect(index: int, q: Tensor, k: Tensor) -> None:
            if not total:
                total.append(torch.zeros(q.shape[0], q.shape[2], q.shape[2], device=q.device))
            add_attention(total[0], q, k)

        with self.clip.watched(collect, self.source.averaged):
            logits = self.patch_logits(images, text)
        return logits, between_patches(total[0], self.source.prefix) if total else None

    def class_scores(self, found: PatchLogits, vocabulary: Vocabulary, stage: Stage) -> Tensor:
        """Scores (K, h, w) of one image on the attention's grid."""
        with stage("attention"):
            attention, grid = self._attention(found)
        with stage("distribution"):
            logits = found.on_grid(grid).flatten(1)  # (Q, N)
            posterior = class_posterior(logits, vocabulary.word_class, vocabulary.logit_scale, vocabulary.classes)
            scores: Tensor = discrepancy_maps(posterior, attention, self.config).unflatten(1, grid)
            return scores

    def _attention(self, found: PatchLogits) -> tuple[Tensor, tuple[int, int]]:
        """Attention (N, N) of the whole image, and its grid."""
        if found.attention is not None and len(found.attention) == 1:
            return found.attention[0], self._tower_grid(found)
        device = found.values.device
        # outside the logits' forward, so the source's network needs its own autocast
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            attention, grid = self.source.attention(found.image[None].to(device))
        return attention[0], grid

    def _tower_grid(self, found: PatchLogits) -> tuple[int, int]:
        """CLIP's own grid in the one window of an image; a base such as proxyclip answers on a finer one."""
        plan, patch = found.plan, self.clip.patch
        height, width = plan.window[0] + sum(plan.pad_rows), plan.window[1] + sum(plan.pad_columns)
        return height // patch, width // patch


@dataclass(frozen=True)
class OptimalPathConfig(DiscrepancyConfig):
    """``op``."""

    solver: str = "op"


class OptimalPath(Discrepancy):
    """Entropic optimal transport from each class's distribution to the uniform one."""

    Config = OptimalPathConfig


@dataclass(frozen=True)
class MaximumVelocityConfig(DiscrepancyConfig):
    """``mv``."""

    solver: str = "mv"


class MaximumVelocity(Discrepancy):
    """The speed at which each class's mass reaches a patch along the attention."""

    Config = MaximumVelocityConfig


@dataclass(frozen=True)
class PathAndVelocityConfig(DiscrepancyConfig):
    """``opmv``."""

    solver: str = "opmv"


class PathAndVelocity(Discrepancy):
    """Both solvers together."""

    Config = PathAndVelocityConfig


@dataclass(frozen=True)
class KullbackLeiblerConfig(DiscrepancyConfig):
    """``kl``."""

    solver: str = "kl"


class KullbackLeibler(Discrepancy):
    """Each patch's term of the divergence from the uniform distribution."""

    Config = KullbackLeiblerConfig


@dataclass(frozen=True)
class PropagateConfig(DiscrepancyConfig):
    """``propagate``."""

    solver: str = "propagate"


class Propagate(Discrepancy):
    """The posterior after one hop along the attention."""

    Config = PropagateConfig
