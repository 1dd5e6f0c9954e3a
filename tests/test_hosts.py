"""Decode heads of closed-set networks against the efficiency tables of the thesis (ResNet features, 512 x 512 input)."""

from __future__ import annotations

import csv

import pytest
import torch

from ovbench.errors import UsageError
from ovbench.measure.counters import count
from ovbench.measure.parameters import count_parameters
from ovbench.methods import closed_set, hosts

GRIDS = hosts.feature_grids("64x64")
ROWS = {
    "fcn": "FCN",
    "psp": "PSPNet",
    "ccnet": "CCNet",
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3+",
    "uper": "UperNet",
}


@pytest.fixture(scope="module")
def heads():
    """All heads without storage: shapes are all that counting needs."""
    return {name: closed_set.build_head(name).to("meta") for name in hosts.host_names()}


@pytest.fixture(scope="module")
def published(shared):
    """(table, row, metric) -> value of the thesis' efficiency tables."""
    with (shared / "published" / "published.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] in ("3.5", "4.6")]
    return {(row["table"], row["row"], row["metric"]): float(row["value"]) for row in rows}


def _gmacs(head, grids=GRIDS, convention="torch") -> float:
    features = [torch.empty(shape, device="meta") for shape in hosts.feature_shapes(grids)]
    return count(lambda: head(features), convention).gmacs


@pytest.mark.parametrize(
    ("name", "params", "gmacs"), [("psp", 23.15, 77.68), ("ccnet", 24.00, 100.24), ("deeplabv3", 42.29, 168.89)]
)
def test_parameters_and_macs_as_checked_before(heads, name, params, gmacs):
    assert count_parameters(heads[name]).total / 1e6 == pytest.approx(params, rel=1e-3)
    assert _gmacs(heads[name]) == pytest.approx(gmacs, rel=6e-3)


@pytest.mark.parametrize(
    ("name", "table", "params", "gmacs"),
    [
        ("psp", "3.5", 1e-3, 6e-3),
        ("ccnet", "3.5", 1e-3, 6e-3),
        ("deeplabv3", "3.5", 1e-3, 6e-3),
        ("fcn", "4.6", 1e-3, 0.04),
        ("psp", "4.6", 1e-3, 6e-3),
    ],
)
def test_the_tables_of_the_thesis(heads, published, name, table, params, gmacs):
    head, row = heads[name], ROWS[name]
    assert count_parameters(head).total / 1e6 == pytest.approx(published[table, row, "params"], rel=params)
    assert _gmacs(head) == pytest.approx(published[table, row, "flops"], rel=gmacs)


def test_ccnet_on_the_convention_of_the_thesis(heads, published):
    """Without the products of the criss-cross attention, which a tool that looks at modules does not see."""
    found = _gmacs(heads["ccnet"], convention="modules")
    assert found == pytest.approx(published["3.5", "CCNet", "flops"], rel=5e-4)
    assert _gmacs(heads["ccnet"]) - found == pytest.approx(0.604, abs=0.01)


def test_deeplabv3plus_with_c1_on_the_stride_8_grid(heads, published):
    """The thesis' figure needs C1 at 64 x 64, where the network has 128 x 128."""
    head = heads["deeplabv3plus"]
    assert count_parameters(head).total / 1e6 == pytest.approx(published["4.6", "DeepLabV3+", "params"], rel=2e-3)
    small = hosts.feature_grids("64x64,64x64,64x64,64x64")
    flops = published["4.6", "DeepLabV3+", "flops"]
    assert _gmacs(head, small) == pytest.approx(flops, rel=0.04)
    assert _gmacs(head) > 1.1 * flops


def test_upernet_is_published_as_fused_on_the_stride_8_grid(heads, published):
    """No pyramid of customary strides gives the figure; C1 at 128 x 128 with the fusion at 64 x 64 does."""
    head = heads["uper"]
    assert count_parameters(head).total / 1e6 == pytest.approx(published["3.5", "UperNet", "params"], rel=1e-3)
    flops = published["3.5", "UperNet", "flops"]
    for features in ("64x64", "64x64,64x64,64x64,64x64", "128x128,64x64,32x32,16x16"):
        assert abs(_gmacs(head, hosts.feature_grids(features)) / flops - 1) > 0.1

    def fusion(side: int) -> float:
        joined = torch.empty(1, 4 * 512, side, side, device="meta")
        return count(lambda: head.cls_seg(head.fpn_bottleneck(joined))).gmacs

    assert _gmacs(head) - fusion(128) + fusion(64) == pytest.approx(flops, rel=1e-3)


def test_heads_compute():
    grids = hosts.feature_grids("6x8")
    features = [torch.randn(shape) for shape in hosts.feature_shapes(grids, batch=2)]
    for name in ("ccnet", "fcn"):
        with torch.no_grad():
            out = closed_set.build_head(name, num_classes=7)(features)
        assert out.shape == (2, 7, 6, 8) and bool(out.isfinite().all())


def test_a_config_is_ones_own():
    config = hosts.head_config("uper", 19)
    config["in_channels"].append(1)
    assert hosts.head_config("uper")["in_channels"] == [256, 512, 1024, 2048]
    assert config["num_classes"] == 19


def test_feature_grids():
    assert hosts.feature_grids("64x48") == ((128, 96), (64, 48), (64, 48), (64, 48))
    assert hosts.feature_grids("128x128, 64x64, 32x32, 16X16")[3] == (16, 16)
    for bad in ("64", "64x", "0x64", "64x64,32x32", "axb", ""):
        with pytest.raises(UsageError, match="--features"):
            hosts.feature_grids(bad)


def test_an_unknown_head():
    with pytest.raises(UsageError, match="deeplabv3"):
        hosts.head_config("deeplab")


def test_names_load_neither_torch_nor_mmseg(run_python):
    done = run_python(
        "-c",
        "from ovbench.methods import hosts; hosts.head_config('psp'); import sys; print({'torch', 'mmseg'} & set(sys.modules))",
    )
    assert done.stdout.strip() == "set()", done.stderr
