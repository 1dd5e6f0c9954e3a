from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import photo, save_tiny

from ovbench.errors import UsageError, WeightsError
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP, LastBlock, resize_position_embedding


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DenseCLIP:
    return load_clip(str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")))


def test_equals_open_clips_own_forward(clip: DenseCLIP) -> None:
    images = clip.normalise(torch.stack([photo(224, 224, 1), photo(224, 224, 2)]))
    with torch.inference_mode():
        tokens = clip.tokens(images, [clip.depth - 1])
        cls = clip.project(tokens.after[clip.depth - 1][:, 0])
        torch.testing.assert_close(cls, clip.clip.encode_image(images), rtol=1e-4, atol=1e-5)
        dense = clip.dense(images, LastBlock())
        torch.testing.assert_close(dense.flatten(1, 2), clip.project(tokens.after[clip.depth - 1][:, 1:]))


def test_tokens_after_chosen_blocks_chain(clip: DenseCLIP) -> None:
    images = clip.normalise(photo(160, 240)[None])
    with torch.inference_mode():
        tokens = clip.tokens(images, [3, -2, 4])
        assert sorted(tokens.after) == [3, 4, clip.depth - 2]
        assert tokens.grid == (10, 15)
        assert tokens.after[3].shape == (1, 151, clip.width)
        torch.testing.assert_close(clip.block(4, tokens.after[3]), tokens.after[4])


def test_replaceable_last_block(clip: DenseCLIP) -> None:
    images = clip.normalise(photo(96, 128)[None])
    seen = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        seen["shapes"], seen["grid"] = (q.shape, k.shape, v.shape), grid
        return F.scaled_dot_product_attention(q, k, v)

    with torch.inference_mode():
        torch.testing.assert_close(clip.dense(images, LastBlock(attend)), clip.dense(images, LastBlock()))
        values = clip.dense(images, LastBlock(lambda q, k, v, grid: v, residual=False, mlp=False))
    assert seen["grid"] == (6, 8)
    assert seen["shapes"] == (torch.Size([1, 1, 49, 64]),) * 3
    assert values.shape == (1, 6, 8, 32)


def test_leaves_nothing_behind(clip: DenseCLIP) -> None:
    images = clip.normalise(photo(112, 112)[None])
    before = {key: value.clone() for key, value in clip.clip.state_dict().items()}
    copy = images.clone()
    with torch.inference_mode():
        clip.dense(images, LastBlock(lambda q, k, v, grid: v, residual=False, mlp=False))
    assert torch.equal(images, copy)
    assert all(torch.equal(value, before[key]) for key, value in clip.clip.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clip.modules())


@pytest.mark.parametrize("grid", [(7, 7), (14, 21), (21, 14), (29, 33)])
def test_position_interpolation(grid: tuple[int, int]) -> None:
    embedding = torch.randn(1 + 196, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_position_embedding(embedding, (14, 14), grid, "offset")
    assert resized.shape == (1 + grid[0] * grid[1], 8)
    assert torch.equal(resized[0], embedding[0])
    assert torch.equal(resize_position_embedding(embedding, (14, 14), (14, 14)), embedding)
    # a ramp along one axis stays a ramp along that axis: h and w are not swapped
    ramp = torch.arange(14.0).repeat_interleave(14)[:, None].expand(-1, 8)
    rows = resize_position_embedding(torch.cat([embedding[:1], ramp]), (14, 14), grid, "size")[1:, 0].view(grid)
    assert torch.allclose(rows, rows[:, :1].expand_as(rows), atol=1e-5)
    assert grid[0] == 1 or (rows[1:, 0] > rows[:-1, 0]).all()


def test_batch_and_sizes(clip: DenseCLIP) -> None:
    images = clip.normalise(torch.stack([photo(100, 180, 1), photo(100, 180, 2)]))
    with torch.inference_mode():
        both = clip.dense(images, LastBlock())
        assert both.shape == (2, 6, 11, 32)
        for row in range(2):
            torch.testing.assert_close(
                clip.dense(images[row : row + 1], LastBlock())[0], both[row], rtol=1e-4, atol=1e-5
            )
    with pytest.raises(UsageError, match="smaller than one 16-pixel patch"):
        clip.dense(images[..., :10], LastBlock())


def test_towers_without_dense_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"RN50 cannot give dense features here: its image tower is a ModifiedResNet"
    ):
        load_clip("random", "RN50")
