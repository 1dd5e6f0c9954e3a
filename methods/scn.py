"""SCN: semantic calibration of mask classification, in our reading of its abstract.

Masks are pooled from a frozen CLIP's features, p (:mod:`ovbench.methods.fc_clip`), s1 = p t^T / temperature. Public are only
the ideas; every equation here is inferred and has its switch:

* Class disambiguation (``cd``): cross-attention turns texts into pseudo-texts of this image,
  t' = t + LN(t + MHA(t, V, V)) - LN(t), s2 = p t'^T / temperature. The difference of norms stands where a plain LN would, so
  that t' = t before training. A residual module along the classes follows: r = s2 + sum_h gamma_h (A_h s2 - s2) with A_h the
  attention between pseudo-texts, gamma = 0 in the beginning; it knows no number of classes.
* Logits fusion (``lf``): weights over s1, s2, r from p, softmax-normalised, equal in the beginning; without it they stay so.
* Geometric ensemble (``ensemble``) with frozen CLIP: p_scn^(1-a) p_clip^a, a = .4 for classes of which a word was trained, .8
  for others; as in FC-CLIP, a class has its best word's logit before, and words are compared by their exact string.

So SCN equals its base to the bit before training, and permuting the classes permutes its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError
from ovbench.methods.fc_clip import FCCLIP  # type: ignore[import-not-found]
from ovbench.models.mask_method import Classified, MaskConfig, Words
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.ops.full_precision import product
from ovbench.ops.mask_losses import LossWeights
from ovbench.ops.masks import geometric_ensemble

if TYPE_CHECKING:
    from ovbench.models.mask_method import Encoder

# Looked at for what is inferred: SCN's abstract and a reading of it; no equations, tables or code are public.
METHODS = {
    "scn": {
        "cls": "SCN",
        "summary": "pseudo-texts and calibrated mask classification on a frozen CLIP; trained on COCO-Stuff (our reading)",
        "paper": "SCN: semantic calibration network (abstract only)",
        "protocol": "fc-clip",
        "track": "mask-based",
    }
}
RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 2e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.05,  # inferred: as Mask2Former's recipes
    "schedule": "cosine",
    "iters": 20_000,
    "batch": 4,
    "crop": 640,  # inferred: as Mask2Former's recipes for ADE20K
    "resize": (2560, 640),
    "ratio_range": (1.0, 1.0),
    "cat_max_ratio": 1.0,
    "photometric": False,
    "policy": "heads",
}


@dataclass(frozen=True)
class SCNConfig(MaskConfig):
    """Switches; all inferred but heads, dropout, alpha and beta."""

    cd: bool = True
    lf: bool = True
    ensemble: bool = True
    heads: int = 8  # of the cross-attention
    dropout: float = 0.1
    class_heads: int = 4  # of the attention between classes
    class_width: int = 64
    alpha: float = 0.4  # share of frozen CLIP in the ensemble for seen classes
    beta: float = 0.8  # for all others


class PseudoText(nn.Module):
    """Texts that have looked at an image.

    Args:
        maps: Channels of the dense features.
        dim: D of the texts.
        heads: Of the attention.
        dropout: In and behind it.
    """

    def __init__(self, maps: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(maps, dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, text: Tensor, maps: Tensor) -> Tensor:
        """What is added to texts (Q, D): (B, Q, D), from dense features (B, C, h, w)."""
        seen = self.project(maps.float().flatten(2).transpose(1, 2))
        t = text.expand(maps.shape[0], -1, -1)
        looked, _ = self.attention(t, seen, seen, need_weights=False)
        change: Tensor = self.norm(t + self.dropout(looked)) - self.norm(t)
        return change


class ClassRelations(nn.Module):
    """Logits that know each other's classes, added as a residual.

    Args:
        dim: D of the texts.
        heads: Attentions.
        width: Of queries and keys, all heads together.
    """

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, width, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.gamma = nn.Parameter(torch.zeros(heads))

    def forward(self, logits: Tensor, text: Tensor) -> Tensor:
        """What is added to logits (B, M, Q), from pseudo-texts (B, Q, D)."""
        q, k = (layer(text).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k))
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # (B, heads, Q, Q)
        moved = product(logits[:, None], attention.transpose(-1, -2)) - logits[:, None]
        added: Tensor = (self.gamma[:, None, None] * moved).sum(dim=1)
        return added


class SCN(FCCLIP):  # type: ignore[misc]
    """SCN on a ConvNeXt CLIP, or on a ViT.

    Args:
        clip: The CLIP.
        config: Switches.
        seed: Of random weights of all that is new.

    Raises:
        UsageError: Heads that do not divide the widths.
    """

    Config = SCNConfig
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {"coco_stuff": RECIPE, "*": RECIPE}
    POLICIES = ("heads",)
    LOSS = LossWeights(cross_entropy=1.0, dice=1.0, bce=1.0)  # the latter two only in the matching; inferred

    def __init__(self, clip: Encoder, config: SCNConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(clip, config, seed=seed)
        c, dim = self.config, clip.embed_dim
        if dim % c.heads or c.class_width % c.class_heads:
            raise UsageError(f"heads must divide {dim}, and class_heads class_width.")
        channels = dim if isinstance(clip, DenseCLIP) else clip.width  # of the maps of FCCLIP
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pseudo = PseudoText(channels, dim, c.heads, c.dropout) if c.cd else None
            self.relations = ClassRelations(dim, c.class_heads, c.class_width) if c.cd else None
            self.gate = nn.Linear(dim, 3) if c.cd and c.lf else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.to(clip.mean.device)
        self.requires_grad_(False).eval()

    def classify(self, images: Tensor, masks: Tensor, words: Words) -> Classified:
        """Calibrated logits of the words; with the ensemble, of the classes, logarithms of what probabilities are equal to
        but for a factor.
        """
        with torch.no_grad():  # CLIP is frozen
            maps = self.maps(images)
            embeddings = self.embeddings(maps, masks)
            pooled = F.normalize(embeddings, dim=-1)
        scale, text = words.logit_scale, words.text
        frozen = product(pooled, text.T) * scale
        if self.pseudo is None or self.relations is None:
            return Classified(frozen, masks, embeddings)
        change = self.pseudo(text, maps)  # (B, Q, D)
        second = frozen + product(pooled, change.transpose(1, 2)) * scale
        third = second + self.relations(second, text + change)
        shares = pooled.new_full((*pooled.shape[:2], 3), 1 / 3) if self.gate is None else self.gate(pooled).softmax(-1)
        # the same as shares @ (frozen, second, third), and exactly the first where all are equal
        logits = frozen + shares[..., 1:2] * (second - frozen) + shares[..., 2:3] * (third - frozen)
        if not self.config.ensemble or self.training:
            return Classified(logits, masks, embeddings)
        c = self.config
        mixed = geometric_ensemble(words.best(logits), words.best(frozen), words.seen, c.alpha, c.beta)
        return Classified(mixed, masks, embeddings)

    def trained(self, policy: str) -> list[tuple[str, list[str], float]]:
        """Everything that is not CLIP nor the generator."""
        return [(name, self.named(f"{name}."), 1.0) for name in ("pseudo", "relations", "gate")]
