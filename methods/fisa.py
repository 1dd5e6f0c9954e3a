"""FISA: fine-grained semantic adaptation of mask tokens in CLIP.

MaskCLIP's mask tokens (:mod:`ovbench.methods.maskclip_ding`), to which each block first injects the class embeddings (SEVE):

    (a) m^  = softmax(g_q(m) g_k(T)^T / sqrt d) g_v(T)
    (b) out = softmax(f_q(m^) f_k(img)^T / sqrt d + M) f_v(img)

with CLIP's own f; two convolution layers correct the proposals before M is formed (distribution adapter). Trained are g, the
adapter and CLIP's query projections (SIMO), with 2 CE + 5 Dice + 5 BCE on proposals matched to true segments.

The sum of (b) runs over image patches, so mask tokens do not see CLS; with ``mask_sees_cls`` untrained FISA is MaskCLIP to the
bit. "For all other experimental settings not explicitly stated" the paper follows MaskCLIP, so its public code decides over
thresholds, padding and the resizing of CLIP's input (protocol ``fisa``), the constant learning rate, clipping, AMP, norms
without decay, and a word "other" in training (``distractor``) that no segment has. LoRA sits in the attention projections, all
four of them (Table 3d).

Inferred, as the paper is silent: a residual around (a) and g_v at zero, so that untrained FISA is its baseline
(``seve_residual``); g is of low rank in each block, which brings the count to the printed 26 M (``seve_rank``), and sees m
behind the block's first norm and T at variance 1; the adapter is one residual stack for all masks, its last layer at zero
(``adapter_width``); tuned queries serve image tokens as well (``query_scope``: "image-token self-attention remains unchanged
from the original CLIP" speaks for ``masks``, and the count decides nothing); a mask that touches no patch sees all, so that its
softmax has something; proposals that match no segment count in no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError, unknown_name
from ovbench.methods.maskclip_ding import MaskCLIPDing  # type: ignore[import-not-found]
from ovbench.models.mask_method import Classified, MaskConfig, Words
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.recompute import recomputed
from ovbench.words.embeddings import encode_tokens
from ovbench.words.prompts import Prompts

# Looked at for what is inferred: FISA's paper with its section 5.3, which leaves the rest to MaskCLIP's settings; the
# public MaskCLIP; no public code of FISA was found.
METHODS = {
    "fisa": {
        "cls": "FISA",
        "summary": "mask tokens that see the class embeddings in every block; trained on COCO panoptic",
        "paper": "FISA: fine-grained semantic adaptation",
        "protocol": "fisa",
        "track": "mask-based",
    }
}
CLIP_LR = 0.1
PROJECTIONS = ("q", "k", "v", "out")
MASKS_AT_ONCE = 10  # through the adapter; divides the number that masks are padded to at a fixed window batch
RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-4,
    "weight_decay": 0.05,
    "schedule": "constant",  # MaskCLIP's: its step lies beyond the end
    "grad_clip": 0.01,  # of all parameters together, MaskCLIP's
    "amp": "float16",  # MaskCLIP's; off on a CPU
    "iters": 25_000,
    "batch": 16,
    "crop": 1024,
    "resize": (1024, 1024),
    "ratio_range": (0.1, 2.0),  # large-scale jitter
    "cat_max_ratio": 1.0,
    "photometric": False,
    "policy": "simo",
}


@dataclass(frozen=True)
class FISAConfig(MaskConfig):
    """Switches of Tables 3a to 3e, and what the paper leaves open."""

    seve: bool = True  # Table 3a
    seve_rank: int = 8  # inferred: 24 x (3584 x 8) beside the 25.2 M of the query projections
    seve_residual: bool = True  # inferred: none is written around (a)
    query_scope: str = "all"  # inferred; 'masks': image tokens keep CLIP's own projections
    mask_sees_cls: bool = False  # Eq. 5 sums over patches; True: as MaskCLIP
    distractor: str = "other"  # one more word in training, MaskCLIP's; '': none
    lora_rank: int = 0  # Table 3d: 64, 128, 256 in place of SIMO (--set policy=lora)
    adapter_layers: int = 2  # Table 3e: 0 to 3
    adapter_width: int = 16  # inferred: the paper gives the layers alone
    training_side: int = 896  # crops are resized to this for CLIP; 0: as they are


class SemanticInjection(nn.Module):
    """(a) of one block.

    Args:
        width: C of the tokens.
        text: D of the class embeddings.
        rank: Width of queries, keys and values.
        residual: Add the tokens themselves, with the output at zero in the beginning.
    """

    def __init__(self, width: int, text: int, rank: int, residual: bool) -> None:
        super().__init__()
        self.q = nn.Linear(width, rank, bias=False)
        self.k = nn.Linear(text, rank, bias=False)
        self.v = nn.Linear(text, rank, bias=False)
        self.out = nn.Linear(rank, width, bias=False)
        self.residual = residual
        if residual:
            nn.init.zeros_(self.out.weight)

    def forward(self, m: Tensor, normed: Tensor, text: Tensor) -> Tensor:
        """Tokens (B, M, C) from tokens, these behind a norm, and class embeddings (Q, D) of length 1."""
        text = text * text.shape[-1] ** 0.5  # values of variance 1, as the normed tokens have
        attention = (self.q(normed) @ self.k(text).T / self.q.out_features**0.5).softmax(dim=-1)  # (B, M, Q)
        found = self.out(attention @ self.v(text))
        result: Tensor = m + found if self.residual else found
        return result


class DistributionAdapter(nn.Module):
    """Convolutions over each proposal's logits, added to them; without effect in the beginning.

    Args:
        layers: 0 to 3.
        width: Channels between them.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        sides = [1, *[width] * (layers - 1), 1] if layers else []
        self.layers = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in pairwise(sides))
        if layers:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]
        self.recompute = False

    def forward(self, masks: Tensor) -> Tensor:
        """Logits (B, M, h, w) of logits (B, M, h, w)."""
        if not len(self.layers) or not masks.shape[1]:
            return masks
        # logits of padding, or of generators that are very sure, are no scale to learn on
        every = masks.flatten(0, 1)[:, None].clamp(-20, 20)
        # channels of all masks at once would be by far the largest tensors of a forward
        parts = every.split(len(every) if torch.is_grad_enabled() and not self.recompute else MASKS_AT_ONCE)
        added = torch.cat([recomputed(self.recompute, self._convolved, part) for part in parts])
        result: Tensor = masks + added[:, 0].unflatten(0, masks.shape[:2])
        return result

    def _convolved(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(F.relu(x, inplace=True) if index else x)
        return x


class FISA(MaskCLIPDing):  # type: ignore[misc]
    """FISA on any CLIP ViT.

    Args:
        clip: The CLIP.
        config: Switches.
        seed: Of random weights of all that is new.
    """

    Config = FISAConfig
    OFFLINE_OPTIONS: ClassVar[dict[str, Any]] = {"generator": "grid", "training_side": 0}
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {"coco_panoptic": RECIPE, "*": RECIPE}
    POLICIES = ("simo", "seve", "full", "lora", "simo+text", "simo+generator")  # Tables 3a, 3b, 3d

    def __init__(self, clip: DenseCLIP, config: FISAConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(clip, config, seed=seed)
        c = self.config
        if c.query_scope not in ("all", "masks"):
            raise unknown_name("query scope", c.query_scope, ("all", "masks"))
        if not 0 <= c.adapter_layers <= 3 or c.seve_rank < 1:
            raise UsageError("adapter_layers is 0 to 3 and seve_rank at least 1.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = DistributionAdapter(c.adapter_layers, c.adapter_width)
            blocks = range(clip.depth) if c.seve else range(0)
            self.seve = nn.ModuleList(
                SemanticInjection(clip.width, clip.embed_dim, c.seve_rank, c.seve_residual) for _ in blocks
            )
            self.query_bias = nn.Parameter(torch.zeros(clip.depth, clip.width))
            if c.lora_rank:  # of query, key, value and output projections
                shape = (clip.depth, len(PROJECTIONS), c.lora_rank, clip.width)
                self.lora_in = nn.Parameter(torch.randn(shape) / clip.width**0.5)
                self.lora_out = nn.Parameter(torch.zeros(*shape[:2], clip.width, c.lora_rank))
        if c.query_scope == "masks":
            self.query_weight = nn.Parameter(torch.stack([_query_rows(clip, index) for index in range(clip.depth)]))
        self.to(clip.mean.device)
        self.requires_grad_(False).eval()
        self._training: Words | None = None
        self._training_tokens: Tensor | None = None

    def classify(self, images: Tensor, masks: Tensor, words: Words) -> Classified:
        """Cosines of the mask tokens with the words, on proposals as the adapter corrects them."""
        found: Classified = super().classify(images, self.adapter(masks), words)
        return found

    def injected(self, m: Tensor, text: Tensor, index: int) -> Tensor:
        """Mask tokens (B, M, C) that have seen the class embeddings (Q, D)."""
        if not len(self.seve):
            return m
        block: Any = self.clip.blocks[index]
        found: Tensor = self.seve[index](m, block.ln_1(m), text)
        return found

    @property
    def sees_cls(self) -> bool:
        """As the switch says."""
        seen: bool = self.config.mask_sees_cls
        return seen

    def image_qkv(self, x: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the base's, with what was learnt."""
        q, k, v = self.clip.qkv(x, index)
        if self.config.query_scope == "masks":
            return q, k, v
        return self._tuned(q, x, index), self._adapted(k, x, index, "k"), self._adapted(v, x, index, "v")

    def mask_keys(self, x: Tensor, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """As the base's; where image tokens keep CLIP's own, with what was learnt."""
        if self.config.query_scope == "all":
            return k, v
        return self._adapted(k, x, index, "k"), self._adapted(v, x, index, "v")

    def finished(self, x: Tensor, heads: Tensor, index: int, *, of_masks: bool) -> Tensor:
        """As the base's, with LoRA on the output projection."""
        added = None
        if self.config.lora_rank and (of_masks or self.config.query_scope == "all"):
            added = self._lora(heads.transpose(1, 2).flatten(2), index, "out")
        done: Tensor = self.clip.finish_block(index, x, heads, added=added)
        return done

    def mask_queries(self, m: Tensor, index: int) -> Tensor:
        """As the base's, with what was learnt for the queries."""
        if self.config.query_scope == "all":
            return self._tuned(self.clip.queries(m, index), m, index)
        block: Any = self.clip.blocks[index]
        bias = block.attn.in_proj_bias.chunk(3)[0]
        q = F.linear(block.ln_1(m), self.query_weight[index].to(m.dtype), bias)
        return self._tuned(q.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2), m, index)

    def _tuned(self, q: Tensor, x: Tensor, index: int) -> Tensor:
        """Queries (B, heads, T, d) with the learnt bias and LoRA's product on the tokens (B, T, C)."""
        bias: Tensor = self.query_bias[index].view(q.shape[1], 1, -1)
        return self._adapted(q + bias, x, index, "q")

    def _adapted(self, heads: Tensor, x: Tensor, index: int, projection: str) -> Tensor:
        """Queries, keys or values (B, heads, T, d) with LoRA's product on the tokens (B, T, C)."""
        if not self.config.lora_rank:
            return heads
        block: Any = self.clip.blocks[index]
        added = self._lora(block.ln_1(x), index, projection)
        moved: Tensor = heads + added.unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)
        return moved

    def _lora(self, x: Tensor, index: int, projection: str) -> Tensor:
        """LoRA's product (B, T, C) on what a projection is given (B, T, C)."""
        place = PROJECTIONS.index(projection)
        return F.linear(F.linear(x, self.lora_in[index, place]), self.lora_out[index, place])

    def recompute_activations(self) -> None:
        """Keep only the inputs of CLIP's blocks and of the adapter for the backward pass."""
        self.clip.recompute_activations()
        self.adapter.recompute = True

    def training_input(self, images: Tensor) -> Tensor:
        """Crops (B, 3, S, S), RGB 0..255, at CLIP's training size, normalised."""
        side = self.config.training_side
        if side and images.shape[-2:] != (side, side):
            images = F.interpolate(images.float(), size=(side, side), mode="bicubic", align_corners=False)
        prepared: Tensor = super().training_input(images)
        return prepared

    def set_training_classes(self, words: Sequence[str], prompts: Prompts) -> None:
        """The vocabulary that losses are taken on, with the distractor behind it."""
        other = self.config.distractor
        words = [*words, other] if other and other not in words else list(words)
        super().set_training_classes(words, prompts)
        sentences = prompts.sentences(list(words))
        self._training_tokens = None
        if all(len(group) == 1 for group in sentences):
            self._training_tokens = self.clip.tokenizer([group[0] for group in sentences])

    def losses(self, images: Tensor, labels: Tensor, segments: Any = None) -> dict[str, Tensor]:
        """As the base's; where the text encoder is trained, of the words as it encodes them now."""
        words: Words | None = self._training
        if self.policy == "simo+text":
            tokens = self._training_tokens
            if tokens is None or words is None:
                raise UsageError("Training the text encoder takes one sentence per class: --prompts plain.")
            tokens = tokens.to(images.device)
            text = F.normalize(encode_tokens(self.clip.clip, tokens, int((tokens != 0).sum(1).max())).float(), dim=-1)
            self._training = words._replace(text=text)
        found: dict[str, Tensor] = super().losses(images, labels, segments)
        return found

    def trained(self, policy: str) -> list[tuple[str, list[str], float]]:
        """Parts of a policy: ``simo`` as the paper, ``seve`` without CLIP, ``full`` CLIP's whole image tower, and so on."""
        parts = [("seve", self.named("seve."), 1.0), ("adapter", self.named("adapter."), 1.0)]
        if policy == "lora":
            if not self.config.lora_rank:
                raise UsageError("The policy lora needs a rank: -o lora_rank=64.")
            return [*parts, ("lora", self.named("lora_"), 1.0)]
        if policy == "full":
            return [*parts, ("clip.visual", self.named("clip.clip.visual."), CLIP_LR)]
        if policy.startswith("simo"):
            if self.config.query_scope == "masks":
                queries = self.named("query_weight")
            else:
                self.clip.split_projections()
                queries = [name for name in self.named("clip.clip.visual.") if name.endswith("q_proj_weight")]
            parts.append(("clip.queries", [*queries, "query_bias"], CLIP_LR))
        if policy == "simo+text":
            names = self.named("clip.clip.")
            text = [name for name in names if ".visual." not in name and not name.endswith("logit_scale")]
            parts.append(("clip.text", text, CLIP_LR))
        if policy == "simo+generator":
            parts.append(("generator", self.named("generator."), CLIP_LR))
        return parts


def _query_rows(clip: DenseCLIP, index: int) -> Tensor:
    block: Any = clip.blocks[index]
    weight = block.attn.in_proj_weight
    rows: Tensor = block.attn.q_proj_weight if weight is None else weight.chunk(3)[0]
    return rows.detach().clone()
