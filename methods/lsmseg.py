"""LSMSeg: CAT-Seg with enriched prompts, SAM's features beside CLIP's, and few classes per image (thesis, chapter 5).

Three changes to :mod:`ovbench.methods.cat_seg`. Prompts are sentences about size, shape, texture and colour (the protocol's
``templates``, ``--prompts lsmseg``). What is compared with the texts (Eqs. 5.2 and 5.6) and guides the aggregation (Eqs. 5.7 and
5.8) is E = w F_clip + (1 - w) F_visual with features of a frozen second encoder
(:mod:`ovbench.networks.cost_aggregation.fusion`); ``cost_from=clip`` compares CLIP's own features. Only the k classes of an image
go on whose largest cost is highest, A_n = max over positions and prompts of M_n (Eqs. 5.3 to 5.5); the others get the logit -100,
below all others.

CAT-Seg's public code has such a filter too, at 256 classes. Here it begins at 32, so it works on every vocabulary with more
classes, in training as well, where the loss is then taken over the kept classes (inferred). Filled up with learned tokens
are lists shorter than 32 instead of 256 (inferred; ``pad_len``). At the weight 1, or with ``visual=none``, and without the
filter the method is CAT-Seg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ovbench.errors import unknown_name
from ovbench.methods.cat_seg import CATSeg, CATSegConfig  # type: ignore[import-not-found]
from ovbench.networks.cost_aggregation.aggregator import AggregatorConfig
from ovbench.networks.cost_aggregation.filtering import RENORMALISE, kept_labels
from ovbench.networks.cost_aggregation.fusion import KINDS, Fusion
from ovbench.networks.cost_aggregation.losses import binary_cross_entropy
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.visual import load_visual

# Looked at for what is inferred: thesis ch. 5 (Eqs. 5.1 to 5.8, Tables 5.1 to 5.11); LMSeg, arXiv 2412.00364, of the
# same idea, whose code is announced and not public; the public CAT-Seg and SAM.
COST_FROM = ("fused", "clip")
METHODS = {
    "lsmseg": {
        "cls": "LSMSeg",
        "summary": "CAT-Seg with enriched prompts, SAM's features as guidance and the 32 likeliest classes per image",
        "paper": "thesis, chapter 5",
        "protocol": "lsmseg",
    }
}


@dataclass(frozen=True)
class LSMSegConfig(CATSegConfig):  # type: ignore[misc]
    """Switches; a checkpoint's own sizes come before those given here."""

    pad_len: int = 32  # inferred: the number of classes at which the filter begins, as 256 is both in CAT-Seg
    filter_k: int = 32  # k and q of the category filter, Table 5.5: 16 to 96; 0: every class goes on
    filter_training: bool = True  # inferred: the training of Table 5.8 is shorter, which it could not be without
    # Inferred: what is normalised again behind the filter. "text": the kept texts, to unit length, which they have already,
    # so that the kept costs stay as they are; "cost": the kept costs of an image, spread over 0 .. 1.
    renormalise: str = "text"
    visual: str = "sam-l"  # second encoder: none, sam-b, sam-l, dinov2-b (Table 5.6), dinov2-s
    visual_weights: str | None = None  # None: published weights from the hub; a file or folder; or "random"
    # What the texts are compared with: "fused", E as in Eqs. 5.2 and 5.6; "clip": CLIP's dense features. The same with visual=none.
    cost_from: str = "fused"
    visual_size: int = 0  # side of its input in pixels; 0: CLIP's (384 at B/16). Inferred: SAM was trained at 1024
    fusion: str = "add"  # add, concat, attention (Table 5.7; what the last two are precisely is inferred)


class LSMSeg(CATSeg):  # type: ignore[misc]
    """LSMSeg on any CLIP ViT.

    Args:
        clip: The CLIP.
        config: Switches.
        sizes: Sizes of the aggregator, read from a checkpoint; None: from ``config``.
        seed: Of random weights of all that is trained.

    Raises:
        UsageError: Unknown names.
        WeightsError: The second encoder's weights cannot be had or do not fit.
    """

    Config = LSMSegConfig
    OFFLINE_OPTIONS: ClassVar[dict[str, Any]] = {**CATSeg.OFFLINE_OPTIONS, "visual": "none"}
    # Table 5.11: trained alike on each (inferred: no other recipe is printed)
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = CATSeg.RECIPES
    PARTS: ClassVar[tuple[str, ...]] = (*CATSeg.PARTS, "fusion.")
    FROZEN: ClassVar[tuple[str, ...]] = ("visual.",)
    BEFORE: ClassVar[dict[str, Any]] = {"cost_from": "clip"}  # in 0.1.0 the costs were CLIP's

    def __init__(
        self,
        clip: DenseCLIP,
        config: LSMSegConfig | None = None,
        *,
        sizes: AggregatorConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(clip, config, sizes=sizes, seed=seed)
        c = self.config
        for option, value, known in (
            ("fusion", c.fusion, KINDS),
            ("renormalise", c.renormalise, RENORMALISE),
            ("cost_from", c.cost_from, COST_FROM),
        ):
            if value not in known:
                raise unknown_name(f"kind of {option}", value, known)
        self.aggregator.rescale = c.renormalise == "cost"
        device = clip.mean.device
        self.visual = load_visual(
            c.visual, c.visual_weights
        )  # random ones too are the same wherever a checkpoint is read
        self.fusion: Fusion | None = None
        if self.visual is not None:
            self.visual.to(device)  # type: ignore[arg-type]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.fusion = Fusion(c.fusion, self.visual.width, (clip.width, clip.width, clip.embed_dim))
            self.fusion.to(device).requires_grad_(False).eval()  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Switches in force, and what the second encoder was."""
        return {**super().options(), **({} if self.visual is None else self.visual.record())}

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the matrices of both encoders in ``dtype``."""
        super().use_precision(dtype)
        if self.visual is not None:
            self.visual.use_precision(dtype)

    def train(self, mode: bool = True) -> LSMSeg:
        """Training mode, in which the filter may be off, or evaluation; the second encoder does not change."""
        super().train(mode)
        self.aggregator.keep = self.config.filter_k if self.config.filter_training or not mode else 0
        return self

    def guidance(self, images: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """E for each of CLIP's maps."""
        if self.visual is None or self.fusion is None:
            return tuple(maps)
        seen = self.visual.sized(self.clip.denormalise(images), self.config.visual_size)
        return self.fusion(maps, self.visual.maps(seen))  # type: ignore[no-any-return]

    def compared(self, dense: Tensor, guide: Tensor) -> Tensor:
        """E or CLIP's dense features (B, D, h, w), by ``cost_from``."""
        return guide if self.config.cost_from == "fused" else dense

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses by name, in training mode, over the classes that each image keeps.

        A pixel whose class was dropped counts as one without any class, as an ignored one does (``ignored_as_negative``).

        Args:
            images: (B, 3, H, W), RGB 0..255.
            labels: (B, H, W), int64, 255 ignored.

        Raises:
            UsageError: :meth:`set_training_classes` was not called.
        """
        found, _ = self.training_logits(images)
        if found.kept is not None:
            labels = kept_labels(labels, found.kept)
        return {"loss_bce": binary_cross_entropy(found.logits, labels, self.config.ignored_as_negative)}
