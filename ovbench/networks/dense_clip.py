"""One CLIP vision tower for every dense method: tokens, last-block q/k/v, and a replaceable last block.

Works on the parameters of open_clip's ``VisionTransformer`` for any batch and any image size; it registers no hook and
changes no module, so the wrapped model stays usable as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovbench.errors import UsageError, WeightsError
from ovbench.networks.frozen_clip import FrozenCLIP
from ovbench.networks.recompute import recomputed

PosInterp = Literal["offset", "size", "bilinear"]
Grid = tuple[int, int]
# (q, k, v), each (B, heads, 1+N, d), and the patch grid -> attention output (B, heads, 1+N, d)
Attend = Callable[[Tensor, Tensor, Tensor, Grid], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Output tokens of chosen blocks.

    Attributes:
        after: Block index (0 = first block) -> tokens (B, 1 + N, C), CLS first, patches row-major.
        grid: Patch grid (h, w), N = h * w.
    """

    after: dict[int, Tensor]
    grid: Grid


@dataclass(frozen=True)
class LastBlock:
    """How the last block turns tokens into dense tokens; the training-free family differs in nothing else.

    Attributes:
        attend: Attention on the block's own q, k, v; None is the block's ordinary q-k attention.
        residual: Add the block's input to the attention output.
        mlp: Run the block's MLP (with its own residual) behind the attention.
    """

    attend: Attend | None = None
    residual: bool = True
    mlp: bool = True


def resize_position_embedding(
    embedding: Tensor, pretrained: Grid, grid: Grid, how: PosInterp = "offset", antialias: bool = False
) -> Tensor:
    """Position embedding (1 + h*w, C) for ``grid`` from (1 + g_h*g_w, C), the CLS row untouched.

    Args:
        embedding: Pretrained embedding, CLS first.
        pretrained: Its grid.
        grid: Wanted grid (h, w).
        how: ``"offset"`` scales by ((h + 0.1)/g_h, (w + 0.1)/g_w), as the public numbers were made (a trick of DINO
            against rounding, which shifts the sampling points a little); ``"size"`` resizes to the exact size; both are
            bicubic; ``"bilinear"`` resizes to the exact size bilinearly.
        antialias: Low-pass where the grid shrinks.
    """
    if grid == pretrained:
        return embedding
    cls, patches = embedding[:1], embedding[1:]
    image = patches.reshape(1, *pretrained, -1).permute(0, 3, 1, 2).float()  # (1, C, g_h, g_w)
    if how == "bilinear":
        image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False, antialias=antialias)
    elif how == "offset":
        scale = [(grid[0] + 0.1) / pretrained[0], (grid[1] + 0.1) / pretrained[1]]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False, antialias=antialias)
    else:
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    if tuple(image.shape[-2:]) != grid:  # floor((h + 0.1)/g * g) can only differ through rounding on huge grids
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([cls, image.flatten(2)[0].T.to(embedding.dtype)])


class DenseCLIP(FrozenCLIP):
    """A frozen CLIP with dense access to its vision tower.

    Args:
        clip: open_clip model whose ``visual`` is open_clip's own ``VisionTransformer``, or was turned into one
            (:func:`ovbench.networks.eva_clip.plain_vit`).
        about: See :class:`FrozenCLIP`.

    Raises:
        WeightsError: The tower is not a plain CLIP ViT (ResNet, timm, attention pooling).
    """

    def __init__(self, clip: nn.Module, **about: Any) -> None:
        _require_plain_vit(clip, about["arch"])
        super().__init__(clip, **about)
        self.pos_interp: PosInterp = "offset"
        self._positions: dict[tuple[Any, ...], Tensor] = {}
        self._watcher: Callable[[int, Tensor, Tensor], None] | None = None
        self._watched = range(0)
        self.recompute = False

    def recompute_activations(self) -> None:
        """Keep only the inputs of both towers' blocks for the backward pass from now on."""
        self.recompute = True
        text: Any = getattr(self.clip, "text", self.clip)
        text.transformer.grad_checkpointing = True  # open_clip's own switch

    @property
    def visual(self) -> Any:
        """open_clip's ``VisionTransformer``."""
        return self.clip.visual

    @property
    def blocks(self) -> nn.ModuleList:
        """The residual attention blocks, first to last."""
        blocks: nn.ModuleList = self.visual.transformer.resblocks
        return blocks

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Token width C."""
        return int(self.visual.conv1.out_channels)

    @property
    def heads(self) -> int:
        """Attention heads per block."""
        return int(self.blocks[-1].attn.num_heads)  # type: ignore[union-attr, arg-type]

    @property
    def embed_dim(self) -> int:
        """Width D of the joint image-text space."""
        return int(self.visual.proj.shape[1])

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.visual.conv1.kernel_size[0])

    @property
    def image_size(self) -> Grid:
        """Image size (h, w) in pixels of the pretrained position grid."""
        grid = self.visual.grid_size
        return grid[0] * self.patch, grid[1] * self.patch

    def use_precision(self, dtype: torch.dtype) -> None:
        """Keep the vision tower's matrices in ``dtype``, so that autocast need not convert them at every forward.

        Norms, embeddings, the patch embedding (under 1 % of the work) and the text tower stay float32. Going back to
        float32 does not restore lost digits.
        """
        for module in self.visual.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
            elif isinstance(module, nn.MultiheadAttention):
                for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                    parameter = getattr(module, name)
                    if parameter is not None:
                        parameter.data = parameter.data.to(dtype)
        self.visual.proj.data = self.visual.proj.data.to(dtype)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, 1 + N, C) that enter the first block, and the grid, from normalised images (B, 3, h, w).

        Pixels beyond the last whole patch (right, bottom) are dropped, as CLIP's patch embedding does.

        Raises:
            UsageError: The image is smaller than one patch.
        """
        if min(images.shape[-2:]) < self.patch:
            raise UsageError(
                f"An input of {images.shape[-2]} x {images.shape[-1]} pixels is smaller than one "
                f"{self.patch}-pixel patch of {self.arch}: raise --short-side or --crop."
            )
        with torch.autocast(images.device.type, enabled=False):  # a rounding here is amplified by every block
            patches = self.visual.conv1(images.float())  # (B, C, h, w)
        grid = (patches.shape[-2], patches.shape[-1])
        x = patches.flatten(2).transpose(1, 2).float()  # under autocast too: the residual stream stays float32
        cls = self.visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self._position(grid, x)
        x = self.visual.ln_pre(x)
        return x, grid

    def _position(self, grid: Grid, like: Tensor) -> Tensor:
        embedding = self.visual.positional_embedding
        if embedding.requires_grad:  # changes from step to step
            return resize_position_embedding(embedding, self.visual.grid_size, grid, self.pos_interp).to(like.dtype)
        key = (grid, self.pos_interp, like.dtype, like.device)
        if key not in self._positions:
            resized = resize_position_embedding(embedding, self.visual.grid_size, grid, self.pos_interp)
            if len(self._positions) >= 64:  # whole-image runs meet many sizes
                self._positions.clear()
            self._positions[key] = resized.to(like.dtype)
        return self._positions[key]

    def tokens(self, images: Tensor, after: Collection[int]) -> Tokens:
        """Output tokens of the chosen blocks from normalised images (B, 3, h, w); later blocks are not run.

        Args:
            images: Normalised images.
            after: Block indices, 0 .. L-1; negative ones count from the end.
        """
        wanted = {index % self.depth for index in after}
        x, grid = self.embed(images)
        kept: dict[int, Tensor] = {}
        for index in range(max(wanted) + 1):
            x = recomputed(self.recompute, self._shown_block, index, x)
            if index in wanted:
                kept[index] = x
        if (
            self._watcher is not None and self.depth - 1 in self._watched and max(wanted) == self.depth - 2
        ):  # a rule takes the place of the last block
            q, k, _ = self.qkv(x)
            self._show(self.depth - 1, q, k)
        return Tokens(kept, grid)

    @contextmanager
    def watched(self, watcher: Callable[[int, Tensor, Tensor], None], blocks: range) -> Iterator[None]:
        """Shows ``watcher`` the index, queries and keys (B, heads, T, d) of some blocks during :meth:`tokens`.

        A method that replaces the last block still shows the queries and keys of the ordinary one. So a second use of
        the tower's attention needs no second forward.
        """
        self._watcher, self._watched = watcher, blocks
        try:
            yield
        finally:
            self._watcher = None

    def _show(self, index: int, q: Tensor, k: Tensor) -> None:
        if self._watcher is not None and index in self._watched:
            self._watcher(index, q, k)

    def _shown_block(self, index: int, x: Tensor) -> Tensor:
        """As :meth:`block`; who watches it is shown its queries and keys."""
        q, k, v = self.qkv(x, index)
        self._show(index, q, k)
        return self._after_attention(index, x, q, k, v, (0, 0), LastBlock())

    def block(self, index: int, x: Tensor) -> Tensor:
        """Output (B, T, C) of one ordinary block."""
        return self.apply_block(index, x, (0, 0), LastBlock())

    def apply_block(self, index: int, x: Tensor, grid: Grid, rule: LastBlock) -> Tensor:
        """Output (B, T, C) of block ``index`` under ``rule``."""
        return self._after_attention(index, x, *self.qkv(x, index), grid, rule)

    def _after_attention(
        self, index: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: Grid, rule: LastBlock
    ) -> Tensor:
        heads = F.scaled_dot_product_attention(q, k, v) if rule.attend is None else rule.attend(q, k, v, grid)
        return self.finish_block(index, x, heads, rule)

    def finish_block(
        self, index: int, x: Tensor, heads: Tensor, rule: LastBlock | None = None, added: Tensor | None = None
    ) -> Tensor:
        """Output (B, T, C) of a block from its input (B, T, C) and what its attention gave (B, heads, T, d).

        ``added`` (B, T, C) joins what the attention's output projection gives.
        """
        block: Any = self.blocks[index]
        rule = rule or LastBlock()
        merged = self.merge_heads(heads, index)
        out = block.ls_1(merged if added is None else merged + added)
        if rule.residual:
            out = x + out
        if rule.mlp:
            out = out + block.ls_2(block.mlp(block.ln_2(out)))
        result: Tensor = out
        return result

    def queries(self, x: Tensor, index: int = -1) -> Tensor:
        """Queries (B, heads, T, d) of a block (its LN1 applied) from tokens (B, T, C)."""
        block: Any = self.blocks[index]
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        own = block.attn.q_proj_weight if weight is None else weight.chunk(3)[0]
        q = F.linear(block.ln_1(x), own, bias.chunk(3)[0])
        heads: Tensor = q.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
        return heads

    def qkv(self, x: Tensor, index: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value of a block (its LN1 applied), each (B, heads, T, d), from its input (B, T, C)."""
        block: Any = self.blocks[index]
        weight = block.attn.in_proj_weight
        if weight is None:  # split for training
            weight = torch.cat([block.attn.q_proj_weight, block.attn.k_proj_weight, block.attn.v_proj_weight])
        qkv = F.linear(block.ln_1(x), weight, block.attn.in_proj_bias)
        batch, length, _ = x.shape
        q, k, v = qkv.view(batch, length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def values(self, x: Tensor, index: int = -1) -> Tensor:
        """Values (B, T, C) of a block, all heads side by side, from its input (B, T, C)."""
        block: Any = self.blocks[index]
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        own = block.attn.v_proj_weight if weight is None else weight.chunk(3)[2]
        return F.linear(block.ln_1(x), own, bias.chunk(3)[2])

    def split_projections(self) -> None:
        """Hold query, key and value weights of every attention of both towers apart, so that some can be trained alone.

        What the towers compute stays the same, at a little more time; :meth:`join_projections` undoes it.
        """
        for module in self.clip.modules():
            if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                parts = module.in_proj_weight.detach().chunk(3)
                module.in_proj_weight = None  # type: ignore[assignment]
                for name, part in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
                    setattr(module, name, nn.Parameter(part.clone(), requires_grad=False))
                module._qkv_same_embed_dim = False
        self._positions.clear()

    def join_projections(self) -> None:
        """Query, key and value weights in one matrix again; nothing is trainable any more."""
        for module in self.clip.modules():
            if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None:
                names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
                joined = torch.cat([getattr(module, name).detach() for name in names])
                for name in names:
                    setattr(module, name, None)
                module.in_proj_weight = nn.Parameter(joined, requires_grad=False)
                module._qkv_same_embed_dim = True
        self.requires_grad_(False)
        self._positions.clear()

    def public_state(self) -> dict[str, Tensor]:
        """The weights of both towers under open_clip's names, projections in one matrix; the network stays as it is."""
        state = dict(self.clip.state_dict())
        for key in [key for key in state if key.endswith("q_proj_weight")]:
            own = key.removesuffix("q_proj_weight")
            state[f"{own}in_proj_weight"] = torch.cat([state.pop(f"{own}{part}_proj_weight") for part in "qkv"])
        return state

    def merge_heads(self, heads: Tensor, index: int = -1) -> Tensor:
        """Output projection of a block's attention: (B, heads, T, d) -> (B, T, C)."""
        block: Any = self.blocks[index]
        out: Tensor = block.attn.out_proj(heads.transpose(1, 2).flatten(2))
        return out

    def project(self, x: Tensor) -> Tensor:
        """Tokens (..., C) in the joint image-text space (..., D): final layer norm and projection."""
        projected: Tensor = self.visual.ln_post(x) @ self.visual.proj
        return projected

    def dense(self, images: Tensor, rule: LastBlock) -> Tensor:
        """Dense features (B, h, w, D), not normalised, of normalised images under a rule for the last block."""
        tokens = self.tokens(images, [self.depth - 2])
        x = self.apply_block(self.depth - 1, tokens.after[self.depth - 2], tokens.grid, rule)
        dense: Tensor = self.project(x[:, 1:]).unflatten(1, tokens.grid)
        return dense


def _require_plain_vit(clip: nn.Module, arch: str) -> None:
    from open_clip.transformer import VisionTransformer

    visual = getattr(clip, "visual", None)
    problem = None
    if not isinstance(visual, VisionTransformer):
        problem = f"its image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None or visual.proj is None:
        problem = "its image tower pools by attention"
    elif not isinstance(visual.transformer.resblocks[-1].attn, nn.MultiheadAttention):
        problem = "its attention blocks are not the standard ones"
    if problem:
        raise WeightsError(
            f"{arch} cannot give dense features here: {problem}. Use a CLIP ViT of open_clip, e.g. ViT-B-16, ViT-B-32, "
            "ViT-L-14, ViT-L-14-336 or ViT-H-14, or EVA01-g-14-plus."
        )
