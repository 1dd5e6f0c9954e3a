"""Proposals kept on disk: the same bits with and without, for several processes, within a limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import photo
from torch import Tensor

from ovbench.networks.mask_generators.cache import CachedGenerator
from ovbench.networks.mask_generators.generator import MaskGenerator, Proposals
from ovbench.networks.mask_generators.grid import Grid
from ovbench.networks.mask_generators.load import load_generator
from ovbench.networks.mask_generators.oracle import NoisyOracle


class Counting(MaskGenerator):
    """Masks that no float16 could hold; remembers how many it made."""

    name = "counting"
    weights_sha256 = "ab" * 32

    def __init__(self, divisor: float = 3, objects: bool = True) -> None:
        super().__init__()
        self.divisor, self.objects, self.made = divisor, objects, 0

    def identity(self) -> str:
        return f"counting {self.divisor}"

    def propose_same_size(self, images: Tensor, truths: Sequence[Tensor]) -> list[Proposals]:
        self.made += len(images)
        return [Proposals(image.float() / self.divisor, torch.rand(3) if self.objects else None) for image in images]


def same(first: list[Proposals], second: list[Proposals]) -> bool:
    return all(
        torch.equal(a.masks, b.masks)
        and ((a.objectness is None) == (b.objectness is None))
        and (a.objectness is None or b.objectness is None or torch.equal(a.objectness, b.objectness))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("objects", [True, False])
def test_a_second_look_is_the_first_to_the_bit(tmp_path: Path, objects: bool) -> None:
    inner = Counting(objects=objects)
    cached = CachedGenerator(inner, tmp_path, 10**9)
    images = [photo(20, 30, seed=1), photo(31, 17, seed=2), photo(20, 30, seed=1)]
    first = cached.propose(images)
    assert inner.made == 2  # equal images are one
    second = CachedGenerator(inner, tmp_path, 10**9).propose(list(reversed(images)))
    assert inner.made == 2 and same(first, list(reversed(second)))
    assert torch.equal(first[1].masks, inner.propose([images[1]])[0].masks)
    assert (cached.name, cached.weights_sha256, cached.identity()) == ("counting", "ab" * 32, inner.identity())


def test_whatever_can_move_a_mask_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, truth = torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.int64)
    cached = CachedGenerator(Counting(), tmp_path, 10**9)
    keys = {
        cached.key(image, None),
        cached.key(image + 1, None),
        cached.key(image.view(3, 6, 4), None),
        cached.key(image, truth),
        cached.key(image, truth + 1),
        CachedGenerator(Counting(4), tmp_path, 10**9).key(image, None),
    }
    monkeypatch.setattr(torch, "__version__", "0")
    assert len(keys | {cached.key(image, None)}) == 7
    identities = {Grid(), Grid(levels=1), Grid(regions=3), Grid(side=64), NoisyOracle(), NoisyOracle(0.1)}
    assert len({generator.identity() for generator in [*identities, NoisyOracle(seed=1), NoisyOracle(0.5, 2)]}) == 8


def test_the_truth_is_read_through(tmp_path: Path) -> None:
    generator = load_generator("noisy-oracle", cache=tmp_path)
    assert isinstance(generator, CachedGenerator) and generator.needs_truth
    image = photo(40, 40)
    truths = [torch.zeros(40, 40, dtype=torch.int64), torch.eye(40, dtype=torch.int64)]
    found = generator.propose([image, image], truths)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert same(found, NoisyOracle().propose([image, image], truths))
    assert same(found, generator.propose([image, image], truths))


@pytest.mark.parametrize("damage", ["short", "empty", "zeros", "other keys"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    inner = Counting()
    cached = CachedGenerator(inner, tmp_path, 10**9)
    image = photo(20, 30)
    cached.propose([image])
    [path] = tmp_path.iterdir()
    good = path.read_bytes()
    spoiled = {
        "short": good[:-10],
        "empty": b"",
        "zeros": good[:-100] + bytes(100),
        "other keys": good.replace(b'"masks"', b'"nasks"'),
    }
    path.write_bytes(spoiled[damage])
    [found] = cached.propose([image])
    assert inner.made == 2 and torch.equal(found.masks, image.float() / 3)
    assert torch.equal(load_file(path)["masks"], found.masks) and len(list(tmp_path.iterdir())) == 1
    cached.propose([image])
    assert inner.made == 2


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    inner = Counting()
    images = [photo(32, 32, seed=seed) for seed in range(12)]  # 12 KiB each
    cached = CachedGenerator(inner, tmp_path, 60 * 1024)
    for age, image in enumerate(images[:4]):
        cached.propose([image])
        os.utime(tmp_path / f"{cached.key(image, None)}.safetensors", (age, age))
    cached.propose(images[:1])  # now the latest
    (tmp_path / "left.tmp").write_bytes(b"x")
    os.utime(tmp_path / "left.tmp", (0, 0))  # of a process that was killed long ago
    (tmp_path / "running.tmp").write_bytes(b"x")
    for image in images[4:7]:
        cached.propose([image])
        time.sleep(0.01)
    assert inner.made == 7
    kept = [(tmp_path / f"{cached.key(image, None)}.safetensors").exists() for image in images[:7]]
    assert kept[0] and not kept[1] and kept[6]
    for image in images:
        cached.propose([image])
        assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 60 * 1024
    assert not (tmp_path / "left.tmp").exists() and (tmp_path / "running.tmp").exists()
    small = CachedGenerator(inner, tmp_path / "small", 1000)  # no image fits
    assert torch.equal(small.propose(images[:1])[0].masks, images[0].float() / 3) and not (tmp_path / "small").exists()


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    inner = Counting()
    cached = CachedGenerator(inner, tmp_path / "file", 10**9)
    for count in (1, 2):
        assert torch.equal(cached.propose([photo(8, 8)])[0].masks, photo(8, 8).float() / 3) and inner.made == count


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Both write and evict at once; each gets the right masks."""
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from ovbench.networks.mask_generators.cache import CachedGenerator\n"
        "from ovbench.networks.mask_generators.grid import Grid\n"
        "plain = Grid(regions=0, levels=1)\n"
        "cached = CachedGenerator(plain, Path(sys.argv[1]), 300_000)\n"
        "images = [torch.full((3, 24 + size, 40), size, dtype=torch.uint8) for size in range(8)]\n"
        "expected = plain.propose(images)\n"  # 45 KB each: a limit of six files
        "for turn in range(40):\n"
        "    for found, other in zip(cached.propose(images), expected, strict=True):\n"
        "        assert torch.equal(found.masks, other.masks)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_default_folder_is_in_the_users_cache() -> None:
    from ovbench.paths import cache_dir

    generator = load_generator("grid", cache=True)
    assert isinstance(generator, CachedGenerator) and generator.folder == cache_dir() / "proposals"
    assert isinstance(load_generator("grid"), Grid) and isinstance(load_generator("grid", cache=False), Grid)
