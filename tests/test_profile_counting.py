"""Operations under each convention: by hand, by closed form, and against the tool that a convention is named after."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from ovbench.errors import UsageError
from ovbench.measure.conventions import CONVENTIONS, COUNTED, NOT_COUNTED
from ovbench.measure.counters import count
from ovbench.measure.parameters import by_part, count_parameters
from ovbench.networks.clip_weights import load_clip


def _macs(fn, convention: str) -> float:
    return sum(count(fn, convention).by_op.values()) / 2


class Attention(nn.Module):
    """Linear layers, attention with a mask (which torch takes apart), einsum, a product of tensors, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(x.shape[0], -1, 4, 48).transpose(1, 2).split(16, -1)
        mask = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.einsum("bhnd,bhmd->bhnm", q, k) + y @ y.transpose(-1, -2)


def _images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8, affine=False),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),
        nn.Upsample(scale_factor=2),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
    )


CASES = {
    "attention": (Attention, (2, 10, 64)),
    "images": (_images, (2, 3, 20, 30)),
    "layers of torch": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 7, 32)),
}


@pytest.mark.parametrize("case", CASES)
def test_fvcore_convention_is_fvcores(case):
    analysis = pytest.importorskip("fvcore.nn", reason="fvcore is not installed").FlopCountAnalysis
    build, shape = CASES[case]
    module, x = build().eval(), torch.randn(shape)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = analysis(module, (x,)).unsupported_ops_warnings(False).total()
    finally:
        logging.disable(logging.NOTSET)
    assert expected > 0
    assert _macs(lambda: module(x), "fvcore") == expected


def test_fvcore_convention_by_hand():
    module, x = Attention().eval(), torch.randn(2, 10, 64)
    linear, norm, product = 2 * 10 * 64 * 192, 5 * 2 * 10 * 64, 2 * 4 * 10 * 10 * 16
    assert _macs(lambda: module(x), "fvcore") == linear + norm + 2 * product  # einsum and @, but no attention
    assert _macs(lambda: module(x), "torch") == linear + 4 * product
    assert _macs(lambda: module(x), "modules") == linear


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_fvcore_convention_does_not_depend_on_the_grad_mode_inside(guard):
    module, x = Attention().eval(), torch.randn(2, 10, 64)

    def guarded() -> None:
        with guard():
            module(x)

    assert _macs(guarded, "fvcore") == _macs(lambda: module(x), "fvcore")


def test_modules_convention_by_hand():
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)
    )
    head = nn.Linear(6, 5)
    x = torch.randn(2, 4, 5, 7)

    def run() -> None:
        y = layers(x).permute(0, 2, 3, 1)
        functional.linear(head(y), torch.ones(3, 5))  # no module

    conv, transposed, linear = 2 * 35 * 8 * 2 * 9, 2 * 35 * 8 * 6 * 4, 2 * 140 * 6 * 5
    found = count(run, "modules")
    assert found.gmacs * 1e9 == pytest.approx(conv + transposed + linear)
    assert found.by_op == {"conv": 2 * (conv + transposed), "linear": 2 * linear}
    assert found.gflops == 2 * found.gmacs


def test_nothing_stays_behind():
    before = torch.backends.mha.get_fastpath_enabled()
    for convention in ("fvcore", "modules"):
        with pytest.raises(ZeroDivisionError):
            count(lambda: 1 / 0, convention)
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert not nn.modules.module._global_forward_hooks


def test_an_unknown_convention():
    with pytest.raises(UsageError, match="Known: fvcore, modules, torch"):
        count(lambda: None, "paper")


def test_every_convention_says_what_it_counts_and_what_not():
    assert set(CONVENTIONS) == set(COUNTED) == set(NOT_COUNTED)
    assert "attention" in COUNTED["torch"] and "1 MAC = 2 FLOP" in COUNTED["torch"]
    assert "scaled-dot-product attention" in NOT_COUNTED["fvcore"]


def test_clip_vit_b_16_as_published():
    clip = load_clip("random", "ViT-B-16")
    assert count_parameters(clip).total / 1e6 == pytest.approx(149.6, abs=0.05)  # direct-seg complexity table
    n, w = 14 * 14 + 1, 768
    blocks, patches = 12 * (12 * n * w**2 + 2 * n**2 * w), (n - 1) * w * 3 * 16 * 16
    x = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        counted = _macs(lambda: clip.tokens(x, [11]), "torch")
    assert counted == pytest.approx(blocks, rel=0.01)
    assert counted == blocks + patches


def test_parameters_by_part_count_shared_ones_once():
    shared = nn.Linear(3, 4, bias=False)
    network = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared, nn.Linear(4, 2)), "three": nn.ReLU()})
    network.register_parameter("own", nn.Parameter(torch.zeros(5), requires_grad=False))
    network.register_buffer("bank", torch.zeros(100))
    parts = by_part(network, dict(network.named_children()))
    assert {name: (part.total, part.trainable) for name, part in parts.items()} == {
        "one": (12, 12), "two": (10, 10), "other": (5, 0),
    }  # fmt: skip
    whole = count_parameters(network)
    assert (whole.total, whole.trainable) == (27, 22)
