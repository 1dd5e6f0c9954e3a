"""CAT-Seg: CLIP's similarities of patches and class texts, refined by cost aggregation (Cho et al., arXiv 2303.11797).

Cosine similarities of dense CLIP features with the texts of all classes (:mod:`ovbench.networks.cost_aggregation`) are aggregated in
space and across classes under guidance of CLIP's features, and brought from 24 x 24 to 96 x 96. Trained on COCO-Stuff
together with some of CLIP's weights, evaluated on other vocabularies.

As the public code has it: the last CLIP block has no attention and adds the CLS input to the values of every token;
ignored pixels count as negatives in the loss (a switch); position embeddings stay frozen
under its policy ``attention`` although its paper trains them (``attention+position``). Deviations: texts are never kept when
words or weights change, which the public code does; what all classes of an image share is computed once
(``as_published`` goes back), and queries and keys of the last CLIP block, which nobody uses, are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError, WeightsError
from ovbench.hashing import sha256_of_file
from ovbench.models.method import Method
from ovbench.models.trained_file import read_about
from ovbench.networks.clip_weights import from_openai_format, load_clip
from ovbench.networks.cost_aggregation import checkpoint
from ovbench.networks.cost_aggregation.aggregator import Aggregated, Aggregator, AggregatorConfig
from ovbench.networks.cost_aggregation.losses import binary_cross_entropy, share_of_loss
from ovbench.networks.cost_aggregation.policies import ATTENTION, parameter_groups, require_policy
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.recompute import recomputed
from ovbench.networks.state_dict import read_state_dict, require_finite
from ovbench.words.embeddings import embed_words, encode_tokens
from ovbench.words.prompts import Prompts

METHODS = {
    "cat-seg": {
        "cls": "CATSeg",
        "summary": "cost aggregation on CLIP's similarities, trained on COCO-Stuff (public checkpoints load)",
        "paper": "Cho et al. 2024, arXiv 2303.11797",
        "protocol": "cat-seg",
    }
}
# Looked at for what is inferred: the public CAT-Seg (configs/vitb_384.yaml, vitl_336.yaml, cat_seg_model.py) and its
# paper.
COCO_STUFF: dict[str, Any] = {  # config.yaml and vitb_384.yaml of the public code, where L/14 differs in CLIP alone
    "optimizer": "adamw",
    "lr": 2e-4,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "iters": 80_000,
    "batch": 4,
    "crop": 384,
    "resize": (1333, 384),
    "ratio_range": (1.0, 1.0),
    "cat_max_ratio": 1.0,
    "photometric": True,
    "grad_clip": 0.01,
    "policy": "attention",
}


@dataclass(frozen=True)
class CATSegConfig:
    """Switches; a checkpoint's own sizes come before those given here."""

    pad_len: int = 256  # constant in the public code: top-k above, padding tokens below this number of classes
    pooling: int = 2  # POOLING_SIZES: before attention across classes, in training only (eval.sh sets 1)
    hidden: int = 128  # HIDDEN_DIMS; other widths follow it in the proportions of the public configs: inferred
    layers: int = 2  # NUM_LAYERS
    heads: int = 4  # NUM_HEADS
    window: int = 12  # WINDOW_SIZES
    grid: int = 24  # FEATURE_RESOLUTION: inputs are resized to this many patches a side
    prompts: int = 1  # templates whose similarities are kept apart (PROMPT_ENSEMBLE_TYPE "single")
    ignored_as_negative: bool = True  # the public loss; off: ignored pixels do not count
    as_published: bool = False  # the public code's own steps, for counting operations: same result to rounding


class CATSeg(Method):
    """CAT-Seg on any CLIP ViT.

    Args:
        clip: The CLIP.
        config: Switches.
        sizes: Sizes of the aggregator, read from a checkpoint; None: from ``config``.
        seed: Of random weights of the aggregator.
    """

    Config = CATSegConfig
    # small, for a demo
    OFFLINE_OPTIONS: ClassVar[dict[str, Any]] = {"hidden": 32, "layers": 1, "grid": 12, "window": 6}
    MODEL = "ovbench.models.view_averaging:ViewModel"
    ARITHMETIC = 1  # its correlation has always been float32
    BACKBONES: ClassVar[dict[str, dict[str, Any]]] = {  # blocks that guide the decoder, see __init__
        "ViT-B/16": {"source": "public code, layer_indexes 3 and 7", "values": {}},
        "ViT-L/14": {"source": "public code, layer_indexes 7 and 15", "values": {}},
    }
    ELSEWHERE = "the decoder is guided by blocks at a third and two thirds of the depth"
    # on the other training sets of the thesis' Table 5.11 alike: inferred, the table names them and no other recipe
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = dict.fromkeys(("coco_stuff", "context59", "ade20k"), COCO_STUFF)
    PARTS: ClassVar[tuple[str, ...]] = checkpoint.UPSAMPLE  # of a checkpoint, beside CLIP and the aggregator

    def __init__(
        self,
        clip: DenseCLIP,
        config: CATSegConfig | None = None,
        *,
        sizes: AggregatorConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(clip, config)
        c = self.config
        sizes = sizes or AggregatorConfig.of(
            clip.embed_dim, c.hidden, layers=c.layers, heads=c.heads, window=c.window, prompts=c.prompts, keep=c.pad_len
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.aggregator = Aggregator(sizes)
            self.upsample1 = nn.ConvTranspose2d(clip.width, sizes.decoder_guidance[0], kernel_size=2, stride=2)
            self.upsample2 = nn.ConvTranspose2d(clip.width, sizes.decoder_guidance[1], kernel_size=4, stride=4)
        for part in (self.aggregator, self.upsample1, self.upsample2):
            part.to(clip.mean.device).requires_grad_(False)  # type: ignore[arg-type]
        self.aggregator.as_published(c.as_published)
        # Blocks whose output guides the decoder: 3 and 7 of ViT-B/16, 7 and 15 of all others in the public code, of which the
        # small ones have fewer blocks.
        depth = min(clip.depth, 24)
        self.guides = (max(0, depth // 3 - 1), max(0, 2 * depth // 3 - 1))
        self.changed = False
        self._training_text: tuple[Tensor, int] | None = None
        self.eval()

    @classmethod
    def load(
        cls,
        weights: str,
        arch: str | None = None,
        config: Any = None,
        *,
        activation: Any = "auto",
        seed: int = 0,
        device: str = "cpu",
        training: bool = False,
    ) -> CATSeg:
        """The method with the weights of a public checkpoint, of a training of ours, or random ones.

        Args:
            weights: A checkpoint's file; ``random`` or ``builtin``; to begin a training also any weights of CLIP.
            arch: open_clip architecture where the weights are CLIP's.
            config: Switches.
            activation: ``auto``, ``gelu`` or ``quickgelu``.
            seed: Of random weights.
            device: Torch device.
            training: CLIP alone will do.

        Raises:
            UsageError: An architecture beside a checkpoint, which says its own.
            WeightsError: No such file, keys that are missing or unknown, or the weights of CLIP alone.
        """
        config = cls.Config() if config is None else config
        path = Path(weights).expanduser()
        state = read_state_dict(path) if path.is_file() else {}
        if checkpoint.is_checkpoint(state):
            if arch is not None:
                raise UsageError(
                    f"'{weights}' is a CAT-Seg checkpoint, which tells its architecture: leave --arch away."
                )
            return cls._from_checkpoint(state, path, config, activation, seed).to(device)
        if weights not in {"random", "builtin"} and not training:
            raise WeightsError(
                f"'{weights}' holds CLIP alone, and cost aggregation must be trained: give a CAT-Seg checkpoint with "
                "--weights FILE ('ovbench train' makes one), or 'random' to try the path."
            )
        clip = load_clip(weights, arch, activation=activation, seed=seed, device=device)
        return cls(checkpoint.with_public_statistics(clip), config, seed=seed)

    @classmethod
    def _from_checkpoint(cls, state: dict[str, Any], path: Path, config: Any, activation: Any, seed: int) -> CATSeg:
        """The method from a state dict with the public names."""
        found = checkpoint.read(state, str(path), cls.PARTS)
        about = read_about(path)
        clip = from_openai_format(
            found.clip,
            str(path),
            sha256_of_file(path),
            quick=activation != "gelu",
            path=path,
            known=None if about is None else about.arch,
            remedy="put the open_clip_config.json of its CLIP beside the file",
        )
        window = config.window if found.window is None else found.window
        sizes = checkpoint.read_config(found.head, str(path), window=window, heads=config.heads, keep=config.pad_len)
        method = cls(checkpoint.with_public_statistics(clip), config, sizes=sizes, seed=seed)
        if found.grid is not None and found.grid != config.grid:
            raise UsageError(f"'{path}' is for a grid of {found.grid} x {found.grid}: use -o grid={found.grid}.")
        method._fill(found.head, str(path))
        return method

    def _fill(self, head: dict[str, Tensor], name: str) -> None:
        own = self.head_state()
        checkpoint.refuse(
            name,
            missing=[checkpoint.public_name(key) for key in own if key not in head],
            unknown=[checkpoint.public_name(key) for key in head if key not in own],
            shapes=[checkpoint.public_name(key) for key in head if key in own and head[key].shape != own[key].shape],
        )
        require_finite(head.items(), name)
        self.load_state_dict({key: value.float() for key, value in head.items()}, strict=False)

    def head_state(self) -> dict[str, Tensor]:
        """State of all that is not CLIP, nor frozen."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(("clip.", *self.FROZEN))}

    def public_state(self) -> dict[str, Tensor]:
        """All weights under the names of the public code, which :meth:`load` takes."""
        return checkpoint.public_state(self.clip.clip.state_dict(), self.head_state())

    def options(self) -> dict[str, Any]:
        """Switches in force; the sizes of a checkpoint are its own."""
        sizes = self.aggregator.config
        return {
            **super().options(),
            **{name: getattr(sizes, name) for name in ("hidden", "layers", "window", "prompts")},
        }

    @property
    def side(self) -> int:
        """Side of the network's input in pixels."""
        return int(self.config.grid) * self.clip.patch

    def train(self, mode: bool = True) -> CATSeg:
        """Training mode, in which positions are pooled before the attention across classes, or evaluation."""
        super().train(mode)
        self.aggregator.set_pooling(self.config.pooling if mode else 1)
        return self

    def dense_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, D) in the joint space, CLS first, from the input (B, 1 + N, C) of the last block."""
        block: Any = self.clip.blocks[-1]
        if self.config.as_published and not self.training:  # queries and keys go the same way there, and are dropped
            parts = [part.transpose(1, 2).flatten(2) for part in self.clip.qkv(x)]
            values = block.attn.out_proj(torch.stack(parts))[2]
        else:
            values = block.attn.out_proj(self.clip.values(x))
        out = block.ls_1(values) + x[:, :1]
        return self.clip.project(out + block.ls_2(block.mlp(block.ln_2(out))))

    def features(self, images: Tensor) -> Tensor:
        """Dense features (B, h, w, D) of normalised images (B, 3, H, W) of any size."""
        last = self.clip.depth - 2
        tokens = self.clip.tokens(images, [last])
        dense: Tensor = self.dense_tokens(tokens.after[last])[:, 1:].unflatten(1, tokens.grid)
        return dense

    def class_logits(self, images: Tensor, text: Tensor) -> Aggregated:
        """Logits of the classes that each image keeps, on a grid four times as fine as the patches'.

        Args:
            images: Normalised images (B, 3, H, W), resized to the network's input size.
            text: Embeddings (T, D), or of several prompts (T, P, D).
        """
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images.float(), (self.side, self.side), mode="bilinear", align_corners=False)
        dense, guides = self.encode(images)
        text = (text[:, None] if text.ndim == 2 else text)[None]
        found: Aggregated = self.aggregator(dense, text, guides[0], guides[1:])
        return found

    def encode(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """What aggregation sees of images at the network's input size.

        Dense features (B, D, h, w), compared with the texts, what guides the aggregation (B, D, h, w) and what guides the
        decoder: (B, G1, 2h, 2w) and (B, G2, 4h, 4w).
        """
        last = self.clip.depth - 2
        tokens = self.clip.tokens(images, [*self.guides, last])

        def as_map(x: Tensor) -> Tensor:
            found: Tensor = x[:, 1:].transpose(1, 2).unflatten(2, tokens.grid)
            return found

        first, second = (as_map(tokens.after[index]) for index in self.guides)
        dense = as_map(recomputed(self.clip.recompute, self.dense_tokens, tokens.after[last]))
        first, second, guide = self.guidance(images, (first, second, dense))
        return self.compared(dense, guide), (guide, self.upsample1(first), self.upsample2(second))

    def guidance(self, images: Tensor, maps: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What guides decoder and aggregation, from CLIP's maps: two blocks (B, C, h, w) and the dense features."""
        return maps

    def compared(self, dense: Tensor, guide: Tensor) -> Tensor:
        """What the texts are compared with (B, D, h, w): CLIP's dense features, or what guides the aggregation."""
        return dense

    def patch_logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits (B, T, 4 grid, 4 grid), float32, of normalised images; -100 for a class that the filter dropped."""
        return self.class_logits(images, text).dense(text.shape[0]).float()

    def text_embeddings(self, words: Sequence[str], prompts: Prompts) -> Tensor:
        """Embeddings (T, P, D), float32, L2-normalised: the mean over a word's sentences, or several kept apart.

        Looked up by content; made anew while training changes the text encoder.

        Raises:
            UsageError: Not as many sentences per word as the network has similarities of.
        """
        apart = self.aggregator.config.prompts
        sentences = prompts.sentences(words)
        if apart > 1 and any(len(group) != apart for group in sentences):
            raise UsageError(f"The network is for {apart} prompts per class: choose templates with as many.")
        if self.changed:
            with torch.no_grad():
                return self._encoded(*self._tokens(sentences))
        if apart == 1:
            return embed_words(self.clip, words, prompts)[:, None]
        every = [sentence for group in sentences for sentence in group]
        return embed_words(self.clip, every, ["{}"]).view(len(words), apart, -1)

    def set_training_classes(self, words: Sequence[str], prompts: Prompts) -> None:
        """The vocabulary that :meth:`losses` is taken on."""
        self._training_text = self._tokens(prompts.sentences(words))

    def _tokens(self, sentences: Sequence[Sequence[str]]) -> tuple[Tensor, int]:
        """Tokens (T * S, context) of S sentences for each word, and S."""
        count = len(sentences[0])
        if any(len(group) != count for group in sentences):
            raise UsageError("In training, all classes need the same number of prompts.")
        tokens = self.clip.tokenizer([sentence for group in sentences for sentence in group])
        length = int((tokens != 0).sum(dim=1).max())
        return tokens[:, :length], count

    def _encoded(self, tokens: Tensor, count: int) -> Tensor:
        """Embeddings (T, P, D) of tokens by the text encoder as it is now, with gradients where there are any."""
        tokens = tokens.to(self.clip.mean.device)  # type: ignore[arg-type]
        found = F.normalize(encode_tokens(self.clip.clip, tokens, tokens.shape[1]).float(), dim=-1)
        found = found.unflatten(0, (-1, count))
        return found if self.aggregator.config.prompts > 1 else F.normalize(found.mean(dim=1, keepdim=True), dim=-1)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses by name, in training mode.

        Args:
            images: (B, 3, H, W), RGB 0..255.
            labels: (B, H, W), int64, 255 ignored.

        Raises:
            UsageError: :meth:`set_training_classes` was not called.
        """
        found, classes = self.training_logits(images)
        return {"loss_bce": binary_cross_entropy(found.dense(classes), labels, self.config.ignored_as_negative)}

    def training_logits(self, images: Tensor) -> tuple[Aggregated, int]:
        """Logits of the training classes, and how many those are, of images (B, 3, H, W), RGB 0..255.

        Raises:
            UsageError: :meth:`set_training_classes` was not called.
        """
        if self._training_text is None:
            raise UsageError("Say which classes are trained first: set_training_classes().")
        text = self._encoded(*self._training_text)
        return self.class_logits(self.clip.normalise(images), text), text.shape[0]

    def recompute_activations(self) -> None:
        """Keep only the inputs of CLIP's blocks and of the parts of the aggregation for the backward pass."""
        self.clip.recompute_activations()
        self.aggregator.recompute = True

    def loss_share(self, labels: Tensor, part: slice) -> float:
        """As of a mean over images, or over those pixels that are not ignored."""
        return share_of_loss(labels, part, self.config.ignored_as_negative)

    def prepare_training(self, policy: str = "attention") -> list[dict[str, Any]]:
        """The parameter groups of a policy, which from now on have gradients while all else has none."""
        groups = self.parameter_groups(policy)
        chosen = {name for group in groups for name in group["params"]}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.train()
        return groups

    def parameter_groups(self, policy: str | None = None) -> list[dict[str, Any]]:
        """What is trained: dicts with ``name``, ``params`` (names), ``lr_mult`` and ``weight_decay_mult``.

        Policies: ``attention``: query and value weights of both encoders, as the public code; ``attention-qk``,
        ``attention-kv``: other pairs; ``attention+position``: also the position embeddings, as the paper; ``frozen-clip``;
        ``full``. All that is not CLIP is always trained. Norms and token embeddings do not decay. Splits CLIP's attention
        weights where it must.

        Raises:
            UsageError: Unknown policy.
        """
        policy = policy or "attention"
        require_policy(policy)
        if policy in ATTENTION:
            self.clip.split_projections()
        self.changed = policy != "frozen-clip"
        return parameter_groups(self, policy, self.FROZEN)
