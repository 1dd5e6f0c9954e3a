"""SC-CLIP's steps against definitions written out as loops."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import photo, save_tiny, tiny_state

from ovbench.errors import OvbenchWarning
from ovbench.methods.sc_clip import (
    SCCLIP,
    SCClipConfig,
    aggregation,
    local_outlier_factor,
    outliers,
    repair,
    similarity_attention,
)
from ovbench.networks.clip_weights import load_clip


def brute_force_lof(points: torch.Tensor, k: int) -> torch.Tensor:
    count = points.shape[0]
    distance = ((points[:, None] - points[None]) ** 2).sum(-1)
    neighbours = [
        sorted((j for j in range(count) if j != i), key=lambda j: float(distance[i, j]))[:k] for i in range(count)
    ]
    k_distance = [max(float(distance[i, j]) for j in neighbours[i]) for i in range(count)]
    density = []
    for i in range(count):
        reach = [max(k_distance[i], float(distance[i, j])) for j in neighbours[i]]
        density.append(k / (sum(reach) / k))
    return torch.tensor([sum(density[j] for j in neighbours[i]) / k / density[i] for i in range(count)])


def test_local_outlier_factor_against_loops() -> None:
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    x[0, 7] *= 8
    found = local_outlier_factor(x, 5)
    for row in range(2):
        torch.testing.assert_close(found[row], brute_force_lof(x[row], 5), rtol=1e-4, atol=1e-5)
    assert int(found[0].argmax()) == 7


def test_few_points_lower_k() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(local_outlier_factor(x, 30), local_outlier_factor(x, 5))
    assert local_outlier_factor(x[:, :1], 30).tolist() == [[1.0]]


def test_outliers_are_chosen_per_image() -> None:
    x = torch.randn(3, 100, 8, generator=torch.Generator().manual_seed(0))
    x[1] *= 100  # another scale must not take the others' share
    mask = outliers(x, 10, 0.05)
    assert mask.sum(dim=1).tolist() == [5, 5, 5]


def test_repair_against_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    h, w = 5, 7
    x = torch.randn(2, h * w, 3, generator=generator)
    bad = torch.rand(2, h * w, generator=generator) < 0.4
    bad[0, :3] = bad[0, w : w + 3] = True  # the corner has no normal neighbour
    found = repair(x, bad, (h, w))
    for b in range(2):
        for y in range(h):
            for z in range(w):
                i = y * w + z
                near = [
                    (y + dy) * w + z + dz
                    for dy in (-1, 0, 1)
                    for dz in (-1, 0, 1)
                    if (dy, dz) != (0, 0) and 0 <= y + dy < h and 0 <= z + dz < w
                ]
                good = [j for j in near if not bad[b, j]]
                expected = x[b, good].mean(0) if bad[b, i] and good else x[b, i]
                torch.testing.assert_close(found[b, i], expected)
    assert torch.equal(found[0, 0], x[0, 0])


def test_aggregation_and_attention() -> None:
    similarity = torch.tensor([[[1.0, 0.5, 0.3], [0.5, 1.0, 0.39], [0.3, 0.39, 1.0]]])
    weights = aggregation(similarity, 0.4)
    torch.testing.assert_close(weights[0, 0], torch.tensor([1.0, 0.5, 0.0]) / 1.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[0, 2], torch.tensor([0.0, 0.0, 1.0]), rtol=1e-5, atol=1e-6)
    attention = similarity_attention(similarity, 3.0)
    assert attention[0, 0, 1] == 0  # below the mean of 0.598
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 3))


def test_other_depths_scale_the_indices_and_say_so(tmp_path: Path) -> None:
    state = tiny_state(layers=32, patch=14, grid=2)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "deep.safetensors")
    with pytest.warns(OvbenchWarning, match="Constants of SCCLIP: inferred for this backbone .32 blocks, patch 14"):
        deep = SCCLIP(load_clip(str(tmp_path / "deep.safetensors")))
    assert (deep.pre, deep.post, deep.first, deep.last) == (21, 8, 8, 24)
    assert deep.options()["blocks_inferred"] is True and deep.options()["pre"] == 8
    fixed = SCCLIP(deep.clip, SCClipConfig(scale_indices=False))
    assert fixed.options()["blocks_used"] == {"pre": 8, "post": 3, "multi": [3, 9]}


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (112, 112)])
def test_dense_features_against_the_straightforward_implementation(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark's baseline (N x N x C distances, a loop over outliers and their neighbours) on any shape of image."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "studies"))
    engine = importlib.import_module("engine")
    clip = load_clip(str(save_tiny(tmp_path / "tiny.safetensors")))
    method = SCCLIP(clip)
    images = clip.normalise(torch.stack([photo(*size, seed=1), photo(*size, seed=2)]))
    with torch.inference_mode():
        found = method.features(images)
        for row in range(2):
            [expected] = engine.straightforward_features(method, images[row : row + 1])
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
