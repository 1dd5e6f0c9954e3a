"""EVA-CLIP's towers without rotary positions (open_clip's EVA01-g-14 and EVA01-g-14-plus) as open_clip's own ViT.

Under timm's names such a tower computes what CLIP's ViT computes. What the ViT has no place for is folded into what it has:
a bias of the patch embedding into the patches' positions (resizing them keeps a constant, so it holds at every image size),
a bias of the projection into the last norm's. Keys have no bias in EVA, and zero in the ViT.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ovbench.errors import WeightsError

RENAMED = (
    ("patch_embed.proj.weight", "conv1.weight"),
    ("blocks.", "transformer.resblocks."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.weight", ".attn.in_proj_weight"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def is_eva(visual: Any) -> bool:
    """Whether an image tower of open_clip is timm's ``Eva``, plain or not."""
    from timm.models.eva import Eva

    return isinstance(getattr(visual, "trunk", None), Eva)


def plain_vit(visual: Any, arch: str) -> nn.Module:
    """An open_clip ``VisionTransformer`` that computes what an EVA tower does, to rounding, and shares its matrices.

    Args:
        visual: open_clip's ``TimmModel`` around timm's ``Eva``; use one of the two from now on.
        arch: Name of the architecture, for messages.

    Raises:
        WeightsError: The tower is no EVA, or has parts that a CLIP ViT cannot stand for exactly; says which.
    """
    from open_clip.transformer import LayerNorm, VisionTransformer

    if not is_eva(visual):
        raise _refusal(arch, f"is a {type(getattr(visual, 'trunk', visual)).__name__}")
    trunk: Any = visual.trunk
    if parts := _unlike_clip(visual):
        raise _refusal(arch, f"has {', '.join(parts)}")
    state = _as_clip(trunk.state_dict(), arch)
    block = trunk.blocks[0]
    hidden, width = block.mlp.fc1.weight.shape
    with torch.device("meta"):  # takes the tower's own tensors below: a second set of 4 GiB is never made
        vit = VisionTransformer(
            image_size=trunk.patch_embed.img_size,
            patch_size=trunk.patch_embed.patch_size,
            width=width,
            layers=len(trunk.blocks),
            heads=block.attn.num_heads,
            mlp_ratio=(hidden + 0.5) / width,  # open_clip rounds down
            output_dim=trunk.head.out_features,
            no_ln_pre=True,
            pool_type="tok",
            act_layer=nn.GELU,
            norm_layer=partial(LayerNorm, eps=trunk.norm.eps),
        )
    expected = {key: value.shape for key, value in vit.state_dict().items()}
    odd = [key for key in {**state, **expected} if key not in state or state[key].shape != expected.get(key)]
    if odd:
        raise _refusal(arch, f"has other tensors than a CLIP ViT: {', '.join(odd[:3])}{' ...' if odd[3:] else ''}")
    vit.load_state_dict(state, assign=True)
    result: nn.Module = vit.train(trunk.training)
    return result


def _unlike_clip(visual: Any) -> list[str]:
    """What an EVA tower has that no renaming gives to a CLIP ViT, in words."""
    from timm.layers.mlp import Mlp
    from timm.models.eva import EvaBlock

    trunk, names = visual.trunk, list(visual.trunk.state_dict())
    first = trunk.blocks[0]
    inner = (".attn.norm.", ".mlp.norm.", ".attn.q_norm.", ".attn.k_norm.")
    found = {
        f"'{trunk.global_pool}' pooling instead of CLS": trunk.global_pool != "token",
        "rotary position embeddings": trunk.rope is not None,
        "no position embeddings": trunk.pos_embed is None,
        "norms behind attention and MLP instead of before": type(first) is not EvaBlock,
        "a gated MLP (SwiGLU)": type(first.mlp) is not Mlp,
        "an activation other than GELU": isinstance(first.mlp, Mlp)
        and not (isinstance(first.mlp.act, nn.GELU) and first.mlp.act.approximate == "none"),
        "norms inside attention or MLP": any(part in name for name in names for part in inner),
        "layer scale": any(name.rpartition(".")[2].startswith("gamma_") for name in names),
        "a norm before its blocks": not isinstance(trunk.norm_pre, nn.Identity),
        "no layer norm behind its blocks": not isinstance(trunk.norm, nn.LayerNorm),
        "no linear projection at its end": not isinstance(trunk.head, nn.Linear) or len(visual.head) > 0,
    }
    return [part for part, there in found.items() if there]


def _as_clip(eva: dict[str, Tensor], arch: str) -> dict[str, Tensor]:
    """The tensors under open_clip's names, with the biases folded; what has no place keeps its name."""
    state: dict[str, Tensor] = {}
    for name, value in eva.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        state[name] = value
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "in_proj_bias")] = torch.cat([q, torch.zeros_like(q), v])
    positions = state.pop("pos_embed")[0].clone()
    positions[1:] += state.pop("patch_embed.proj.bias")
    state["positional_embedding"], state["class_embedding"] = positions, state.pop("cls_token").flatten()
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    state["proj"] = weight.T.contiguous()
    state["ln_post.weight"] = state.pop("norm.weight")
    state["ln_post.bias"] = state.pop("norm.bias") + _before(weight, bias, arch)
    return state


def _before(weight: Tensor, bias: Tensor, arch: str) -> Tensor:
    """The smallest s (C) with ``weight @ s == bias``, so that ``weight @ (x + s)`` is ``weight @ x + bias``."""
    if not bias.any():
        return torch.zeros_like(weight[0])
    exact = torch.linalg.lstsq(weight.double(), bias.double()[:, None]).solution[:, 0]
    shift: Tensor = exact.to(bias.dtype)
    if (weight.double() @ shift.double() - bias).abs().max() > 1e-5 * bias.abs().max():
        raise _refusal(arch, "has a bias behind its projection that cannot be moved before it")
    return shift


def _refusal(arch: str, what: str) -> WeightsError:
    return WeightsError(
        f"{arch} cannot give dense features here: its image tower {what}. Of EVA-CLIP, EVA01-g-14 and EVA01-g-14-plus can; "
        "else use a CLIP ViT of open_clip, e.g. ViT-L-14-336 or ViT-H-14."
    )
