"""Which parameters of CAT-Seg and its kin are trained, and how: the policies."""

from __future__ import annotations

from typing import Any

from torch import nn

from ovbench.errors import unknown_name

ATTENTION = {  # weights of CLIP's attention that a policy trains
    "attention": (".q_proj_weight", ".v_proj_weight"),
    "attention+position": (".q_proj_weight", ".v_proj_weight", "positional_embedding"),
    "attention-qk": (".q_proj_weight", ".k_proj_weight"),
    "attention-kv": (".k_proj_weight", ".v_proj_weight"),
}
POLICIES = (*ATTENTION, "frozen-clip", "full")
CLIP_LR = 0.01  # CLIP_MULTIPLIER of the public configs
NO_DECAY = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)  # detectron2's defaults


def require_policy(policy: str) -> None:
    """Nothing, if there is such a policy.

    Raises:
        UsageError: There is none.
    """
    if policy not in POLICIES:
        raise unknown_name("trainable-parameter policy", policy, POLICIES)


def parameter_groups(network: nn.Module, policy: str, frozen: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What is trained: dicts with ``name``, ``params`` (names), ``lr_mult`` and ``weight_decay_mult``.

    Args:
        network: Its CLIP is ``clip``, with query, key and value weights apart where the policy is one of ``ATTENTION``.
        policy: See :data:`POLICIES`.
        frozen: What names of parts begin with that are never trained.
    """
    wanted = ATTENTION.get(policy, ())
    found: dict[tuple[str, bool], list[str]] = {}
    for place, module in network.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            name = f"{place}.{own}"
            of_clip = name.startswith("clip.")
            if name.startswith(frozen):
                continue
            if of_clip and not (name.endswith(wanted) if policy != "full" else own != "logit_scale"):
                continue
            part = ("clip.visual" if ".visual." in name else "clip.text") if of_clip else name.partition(".")[0]
            found.setdefault((part, not isinstance(module, NO_DECAY)), []).append(name)
    return [
        {
            "name": part if decays else f"{part}, norms and embeddings",
            "params": names,
            "lr_mult": CLIP_LR if part.startswith("clip.") else 1.0,
            "weight_decay_mult": float(decays),
        }
        for (part, decays), names in found.items()
    ]
