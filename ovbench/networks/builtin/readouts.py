"""Differentiable dense read-outs of a small open_clip ``CLIP``, for training and checking the built-in weights.

These are not the suite's methods (those live in ``ovbench.methods`` over ``DenseCLIP``): they are the shortest batched
forms that gradients can pass through. ``feats[i]`` is the output of block i + 1, (B, 1 + N, D), CLS first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRE, POST, MULTI = 8, 3, range(3, 10)  # SC-CLIP's constants for 12 blocks
BETA, CLS_WEIGHT = 0.4, 0.3


def _split(block: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block, each (B, heads, T, d)."""
    b, t, width = normed.shape
    heads = block.attn.num_heads
    packed = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = packed.view(b, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, written out: on CPU the fused kernel's backward is several times slower here."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return torch.softmax(scores, -1).to(v.dtype) @ v


def _merge(block: Any, values: Tensor) -> Tensor:
    """(B, heads, T, d) -> output projection, (B, T, D)."""
    projected: Tensor = block.attn.out_proj(values.transpose(1, 2).flatten(2))
    return projected


def run_block(block: Any, x: Tensor, causal: bool = False) -> Tensor:
    """One ordinary residual attention block, (B, T, D) -> (B, T, D)."""
    q, k, v = _split(block, block.ln_1(x))
    x = x + _merge(block, _attend(q, k, v, causal))
    out: Tensor = x + block.mlp(block.ln_2(x))
    return out


def visual_tokens(visual: Any, images: Tensor, corner: tuple[int, int] = (0, 0)) -> list[Tensor]:
    """Outputs of all blocks for (B, 3, S, S) normalised images.

    Args:
        visual: open_clip's ``VisionTransformer``.
        images: S a multiple of the patch size, at most the pretrained side.
        corner: Row and column of the position grid's window that a smaller image takes.
    """
    x = visual.conv1(images)
    side = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    grid = visual.grid_size[0]
    position = visual.positional_embedding
    window = position[1:].view(grid, grid, -1)[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
    cls = (visual.class_embedding + position[0]).expand(x.shape[0], 1, -1)
    x = visual.ln_pre(torch.cat([cls.to(x.dtype), x + window.reshape(1, side * side, -1).to(x.dtype)], 1))
    feats = []
    for block in visual.transformer.resblocks:
        x = run_block(block, x)
        feats.append(x)
    return feats


def project(visual: Any, x: Tensor) -> Tensor:
    """Final norm and projection, L2-normalised; (..., D) -> (..., E) float32."""
    return F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1)


def value_only(visual: Any, x: Tensor) -> Tensor:
    """Tokens ``x`` (B, T, D) through the last block's value and output projections alone.

    No attention, no residual, no MLP.
    """
    block = visual.transformer.resblocks[-1]
    return _merge(block, _split(block, block.ln_1(x))[2])


def self_self(visual: Any, x: Tensor, rule: str) -> Tensor:
    """Last block under a self-self attention without residual and MLP.

    Args:
        visual: open_clip's ``VisionTransformer``.
        x: Patch tokens after the penultimate block, (B, N, D).
        rule: "kk", "qq", or "qqkk" (the sum of both softmaxes, halved).
    """
    block = visual.transformer.resblocks[-1]
    q, k, v = _split(block, block.ln_1(x))
    if rule == "kk":
        return _merge(block, _attend(k, k, v))
    if rule == "qq":
        return _merge(block, _attend(q, q, v))
    both = _attend(k, k, v) + _attend(q, q, v)
    return _merge(block, 0.5 * both)


def similarity(tokens: Tensor) -> Tensor:
    """Cosines between patch tokens, (B, N, D) -> (B, N, N) float32."""
    unit = F.normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def _adjust(cosines: Tensor, x: Tensor) -> Tensor:
    kept = torch.where(cosines >= BETA, cosines, 0.0)
    return (kept / (kept.sum(-1, keepdim=True) + 1e-6)) @ x.float()


def _sc_attention(visual: Any, x: Tensor, shared: Tensor, cls: Tensor) -> Tensor:
    block = visual.transformer.resblocks[-1]
    _, k, v = _split(block, block.ln_1(x))
    own = torch.softmax((k @ k.transpose(-1, -2)).float() * k.shape[-1] ** -0.5, -1)
    return _merge(block, (0.5 * (shared + own)).to(v.dtype) @ v) + CLS_WEIGHT * cls


def sc(visual: Any, feats: list[Tensor]) -> Tensor:
    """SC-CLIP's read-out (arXiv 2411.15869) without the repair of outlier tokens, (B, N, D)."""
    deep = feats[-2]
    cosines = similarity(feats[PRE][:, 1:])
    centred = 3.0 * (cosines - cosines.mean((1, 2), keepdim=True))
    shared = torch.softmax(centred.masked_fill(centred < 0, float("-inf")), -1).unsqueeze(1)
    late = similarity(feats[POST][:, 1:])
    main = _sc_attention(visual, _adjust(cosines, deep[:, 1:]), shared, deep[:, :1])
    levels = torch.stack([feats[i] for i in MULTI]).sum(0)
    multi = _sc_attention(visual, levels[:, 1:], shared, levels[:, :1])
    return _adjust(late, main + multi)


def encode_text(model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """L2-normalised text embeddings, (P, L) ids cut to the longest prompt and the index of each end token -> (P, E).

    The mask is causal, so cutting the padding off changes nothing.
    """
    x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    for block in model.transformer.resblocks:
        x = run_block(block, x, causal=True)
    last = model.ln_final(x[torch.arange(len(x)), lengths])
    return F.normalize((last @ model.text_projection).float(), dim=-1)


def small_clip(vocabulary: int, seed: int) -> nn.Module:
    """The untrained network: ViT 128 wide, 12 blocks, patch 16, 224 px; text 64 wide, 3 blocks; embeddings of 64."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    vision = CLIPVisionCfg(layers=12, width=128, head_width=64, patch_size=16, image_size=224)
    text = CLIPTextCfg(context_length=77, vocab_size=vocabulary, width=64, heads=1, layers=3)
    model: nn.Module = CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    return model
