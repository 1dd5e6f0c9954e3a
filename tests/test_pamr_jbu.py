"""PAMR and JBU against per-pixel loops, known special cases, and their bounds on memory."""

from __future__ import annotations

import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ovbench.ops import jbu as jbu_module
from ovbench.ops import pamr as pamr_module
from ovbench.ops.jbu import jbu
from ovbench.ops.pamr import neighbour_weights, pamr

MIB = 1 << 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pamr_by_loops(logits: Tensor, image: Tensor, iterations: int, dilations: tuple[int, ...]) -> Tensor:
    """The definition, pixel by pixel, in double precision."""
    values, colours = logits.double(), image.double()
    channels, height, width = colours.shape

    def inside(y: int, x: int) -> tuple[int, int]:
        return min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    for _ in range(iterations):
        new = torch.empty_like(values)
        for y in range(height):
            for x in range(width):
                around = [inside(y + d * a, x + d * b) for d in dilations for a, b in steps]
                neighbours = [inside(y + d * a, x + d * b) for d in dilations for a, b in steps if (a, b) != (0, 0)]
                scores = [0.0] * len(neighbours)
                for c in range(channels):
                    samples = [float(colours[c][place]) for place in around]
                    mean = sum(samples) / len(samples)
                    spread = math.sqrt(sum((v - mean) ** 2 for v in samples) / (len(samples) - 1))
                    for i, place in enumerate(neighbours):
                        gap = abs(float(colours[c, y, x]) - float(colours[c][place]))
                        scores[i] -= gap / (1e-8 + 0.1 * spread) / channels
                raw = [math.exp(score - max(scores)) for score in scores]
                new[:, y, x] = sum(w / sum(raw) * values[:, p, q] for w, (p, q) in zip(raw, neighbours, strict=True))
        values = new
    return values


def jbu_by_loops(low: Tensor, image: Tensor, radius: int, sigma_space: float, sigma_range: float) -> Tensor:
    """The definition, pixel by pixel, in double precision."""
    (k, h, w), (_, height, width) = low.shape, image.shape
    values, colours = low.double(), image.double()
    guide = F.adaptive_avg_pool2d(colours, (h, w))
    out = torch.empty(k, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            py, px = (y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5
            cy, cx = math.floor((y + 0.5) * h / height), math.floor((x + 0.5) * w / width)
            total, weight_sum = torch.zeros(k, dtype=torch.float64), 0.0
            for qy in range(max(0, cy - radius), min(h, cy + radius + 1)):
                for qx in range(max(0, cx - radius), min(w, cx + radius + 1)):
                    distance = (py - qy) ** 2 + (px - qx) ** 2
                    colour = float((colours[:, y, x] - guide[:, qy, qx]).square().sum())
                    weight = math.exp(-distance / (2 * sigma_space**2)) * math.exp(-colour / (2 * sigma_range**2))
                    total += weight * values[:, qy, qx]
                    weight_sum += weight
            out[:, y, x] = total / weight_sum
    return out


# --- PAMR


@pytest.mark.parametrize(
    ("size", "dilations", "iterations"),
    [
        ((9, 11), (1,), 3),
        ((9, 11), (1, 2), 2),
        ((7, 20), (8, 16), 2),
        ((1, 1), (8, 16), 2),
        ((1, 9), (2,), 2),
        ((9, 1), (3, 1), 2),
    ],
)
def test_pamr_equals_loops(size: tuple[int, int], dilations: tuple[int, ...], iterations: int) -> None:
    logits, image = random(3, *size), random(3, *size, seed=1) * 4 - 2
    found = pamr(logits, image, iterations=iterations, dilations=dilations)
    assert found.dtype == torch.float32 and found.shape == logits.shape
    torch.testing.assert_close(
        found.double(), pamr_by_loops(logits, image, iterations, dilations), atol=2e-6, rtol=1e-6
    )


def test_pamr_defaults_are_those_of_naclip() -> None:
    logits, image = random(2, 20, 30), random(3, 20, 30, seed=1)
    assert torch.equal(pamr(logits, image), pamr(logits, image, iterations=10, dilations=(8, 16)))


def test_pamr_of_a_constant_image_is_the_plain_mean_of_the_neighbours() -> None:
    logits = random(4, 13, 17)
    found = pamr(logits, torch.full((3, 13, 17), 0.3), iterations=3, dilations=(2,))
    expected = logits
    kernel = torch.ones(1, 1, 3, 3) / 8
    kernel[0, 0, 1, 1] = 0
    for _ in range(3):
        expected = F.conv2d(F.pad(expected[:, None], [2] * 4, mode="replicate"), kernel, dilation=2)[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_pamr_weights_are_a_distribution_over_the_neighbours() -> None:
    weights = neighbour_weights(random(3, 30, 41), (8, 16))
    assert weights.shape == (16, 30, 41) and bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(0), torch.ones(30, 41))


def test_pamr_lets_nothing_across_an_edge_of_the_image() -> None:
    """What stands right of the edge does not reach the left in 10 iterations; without the edge it does."""
    image = torch.zeros(3, 24, 40)
    image[:, :, 21:] = 1
    logits = random(3, 24, 40)
    other = logits.clone()
    other[:, :, 21:] += 5
    left = (slice(None), slice(None), slice(0, 21))
    assert (
        float((pamr(logits, image, dilations=(1, 2)) - pamr(other, image, dilations=(1, 2)))[left].abs().max()) < 1e-5
    )
    flat = torch.zeros_like(image)
    assert float((pamr(logits, flat, dilations=(1, 2)) - pamr(other, flat, dilations=(1, 2)))[left].abs().max()) > 1


def test_pamr_moves_a_blurred_boundary_to_the_edge_of_the_image() -> None:
    truth = (torch.arange(64) >= 29).long().expand(48, 64)
    image = truth.float().expand(3, -1, -1) * 0.5 + 0.02 * random(3, 48, 64)
    ramp = torch.sigmoid((torch.arange(64) - 33.0) / 4).expand(48, 64)  # the boundary at 33, four pixels off
    logits = torch.stack([1 - ramp, ramp])
    before = (logits.argmax(0) == truth).float().mean()
    after = (pamr(logits, image).argmax(0) == truth).float().mean()
    assert float(before) < 0.95 and float(after) == 1


def test_pamr_does_not_depend_on_the_scale_of_the_image() -> None:
    logits, pixels = random(3, 20, 24), (random(3, 20, 24, seed=1) * 255).to(torch.uint8)
    mean, std = torch.tensor([122.771, 116.746, 104.094]), torch.tensor([68.501, 66.632, 70.323])
    normalised = (pixels.float() - mean[:, None, None]) / std[:, None, None]
    expected = pamr(logits, normalised)
    torch.testing.assert_close(pamr(logits, pixels), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pamr(logits, pixels / 255), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3 * 4 * 51 * 65, 1 << 30])
@pytest.mark.parametrize("strip", [1, 5 * 4 * 16 * 33, 1 << 30])
def test_pamr_is_the_same_however_it_is_divided(chunk: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, image = random(7, 19, 33), random(3, 19, 33, seed=1)
    expected = pamr(logits, image, iterations=4)
    monkeypatch.setattr(pamr_module, "CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr(pamr_module, "STRIP_BYTES", {"cpu": strip})
    assert torch.equal(pamr(logits, image, iterations=4), expected)


def test_pamr_without_iterations_or_classes() -> None:
    logits, image = random(2, 5, 6), random(3, 5, 6)
    found = pamr(logits, image, iterations=0)
    assert torch.equal(found, logits) and found.data_ptr() != logits.data_ptr()
    assert pamr(logits[:0], image).shape == (0, 5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(3, 6, 5)}, r"one size.*\(2, 5, 6\).*\(3, 6, 5\)"),
        ({"logits": torch.rand(1, 2, 5, 6)}, "logits"),
        ({"logits": torch.rand(2, 0, 6), "image": torch.rand(3, 0, 6)}, "at least 1"),
        ({"dilations": ()}, "one dilation or more"),
        ({"dilations": (8, 0)}, r"at least 1; got \(8, 0\)"),
        ({"iterations": -1}, "got -1"),
    ],
)
def test_pamr_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.rand(2, 5, 6), "image": torch.rand(3, 5, 6), **change}
    with pytest.raises(ValueError, match=message):
        pamr(arguments.pop("logits"), arguments.pop("image"), **arguments)


# --- JBU


SIZES = [
    ((4, 5), (16, 20)),
    ((4, 5), (19, 23)),
    ((3, 7), (40, 9)),
    ((1, 1), (5, 6)),
    ((5, 6), (1, 1)),
    ((1, 6), (7, 13)),
    ((6, 1), (13, 1)),
    ((9, 11), (9, 11)),
    ((20, 23), (7, 9)),
    ((2, 2), (70, 35)),  # cells that are cut into pieces
]


@pytest.mark.parametrize(("low_size", "size"), SIZES)
def test_jbu_equals_loops(low_size: tuple[int, int], size: tuple[int, int]) -> None:
    low, image = random(3, *low_size), random(3, *size, seed=1)
    found = jbu(low, image)
    assert found.dtype == torch.float32 and found.shape == (3, *size)
    # Tiny where no neighbour has a similar colour: the loops divide two small numbers, but in double precision.
    torch.testing.assert_close(found.double(), jbu_by_loops(low, image, 2, 1.0, 0.1), atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize(("radius", "sigma_space", "sigma_range"), [(0, 1.0, 0.1), (1, 0.5, 0.3), (3, 2.0, 1.0)])
def test_jbu_parameters_mean_what_they_say(radius: int, sigma_space: float, sigma_range: float) -> None:
    low, image = random(2, 5, 7), random(3, 22, 31, seed=1)
    found = jbu(low, image, radius=radius, sigma_space=sigma_space, sigma_range=sigma_range)
    expected = jbu_by_loops(low, image, radius, sigma_space, sigma_range)
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize(("low_size", "size"), SIZES)
def test_jbu_of_a_constant_image_is_a_gaussian_along_each_side(
    low_size: tuple[int, int], size: tuple[int, int]
) -> None:
    def side(cells: int, length: int) -> Tensor:
        centre = (torch.arange(length).double() + 0.5) * cells / length
        offset = torch.arange(cells)[None] - centre.floor()[:, None]
        weights = torch.exp(-0.5 * (centre[:, None] - 0.5 - torch.arange(cells)[None]) ** 2) * (offset.abs() <= 2)
        return weights / weights.sum(1, keepdim=True)

    low = random(4, *low_size)
    found = jbu(low, torch.full((3, *size), 0.7))
    expected = side(low_size[0], size[0]) @ low.double() @ side(low_size[1], size[1]).T
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


def test_jbu_puts_the_boundary_on_the_edge_of_the_image() -> None:
    """The edge at column 22 runs through the cell of columns 20 to 23; bilinear upsampling cannot know where."""
    image = torch.zeros(3, 32, 40)
    image[:, :, 22:] = 1
    low = F.interpolate(image[None, :1], size=(8, 10), mode="area")[0]
    assert set(low.unique().tolist()) == {0.0, 0.5, 1.0}
    torch.testing.assert_close(jbu(low, image), image[:1], atol=1e-6, rtol=0)
    smooth = F.interpolate(low[None], size=(32, 40), mode="bilinear", align_corners=False)[0]
    assert float((smooth - image[:1]).abs().max()) > 0.3


def test_jbu_of_constant_values_is_constant() -> None:
    found = jbu(torch.full((2, 5, 6), -3.25), random(3, 31, 45))
    torch.testing.assert_close(found, torch.full((2, 31, 45), -3.25), atol=2e-6, rtol=0)


def test_jbu_has_no_nan_where_every_plain_weight_is_zero() -> None:
    """A white pixel in a black image is exp(-150) from every neighbour's colour, zero in float32."""
    image = torch.zeros(3, 32, 32)
    image[:, 13, 18] = 1
    found = jbu(random(3, 4, 4), image, sigma_range=1e-3)
    assert bool(found.isfinite().all()) and float(found.min()) >= 0 and float(found.max()) <= 1
    assert bool(jbu(random(3, 4, 4), image, sigma_space=1e-6, sigma_range=1e-6).isfinite().all())


@pytest.mark.parametrize("block", [1, 40_000, 400_000, 1 << 30])
@pytest.mark.parametrize(("low_size", "size"), [((5, 6), (33, 47)), ((30, 40), (20, 13)), ((1, 1), (90, 70))])
def test_jbu_is_the_same_however_it_is_divided(
    low_size: tuple[int, int], size: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, image = random(9, *low_size), random(3, *size, seed=1)
    expected = jbu(low, image)
    monkeypatch.setattr(jbu_module, "BLOCK_BYTES", {"cpu": block})
    torch.testing.assert_close(jbu(low, image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 5, 6, dtype=torch.uint8)}, "divide by 255"),
        ({"image": torch.rand(5, 6)}, r"\(C, H, W\).*\(5, 6\)"),
        ({"low": torch.rand(2, 0, 3)}, "at least 1"),
        ({"low": torch.rand(0, 2, 3)}, "at least 1"),
        ({"radius": -1}, "radius -1"),
        ({"sigma_space": 0.0}, "sigma_space 0.0"),
        ({"sigma_range": float("nan")}, "sigma_range nan"),
    ],
)
def test_jbu_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {"low": torch.rand(2, 3, 4), "image": torch.rand(3, 5, 6), **change}
    with pytest.raises(ValueError, match=message):
        jbu(arguments.pop("low"), arguments.pop("image"), **arguments)


# --- both


def refine(values: Tensor, image: Tensor) -> Tensor:
    return pamr(values, image, iterations=3, dilations=(1, 4))


def upsample(values: Tensor, image: Tensor) -> Tensor:
    return jbu(values[:, ::3, ::3], image)


BOTH = pytest.mark.parametrize("operator", [refine, upsample])
Operator = Callable[[Tensor, Tensor], Tensor]


@BOTH
def test_inputs_stay_and_modes_change_nothing(operator: Operator) -> None:
    values, image = random(5, 18, 25), random(3, 18, 25, seed=1)
    before = values.clone(), image.clone()
    expected = operator(values, image)
    assert torch.equal(values, before[0]) and torch.equal(image, before[1])
    with torch.inference_mode():
        assert torch.equal(operator(values, image), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = operator(values, image)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    with_graph = operator(values.clone().requires_grad_(), image)
    assert torch.equal(with_graph, expected) and not with_graph.requires_grad


@BOTH
def test_any_strides_and_types(operator: Operator) -> None:
    values, image = random(5, 18, 25), random(3, 18, 25, seed=1)
    words_innermost = values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    rgb_innermost = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(operator(words_innermost, rgb_innermost), operator(values, image))
    half = operator(values.half(), image.half())
    assert half.dtype == torch.float32
    assert torch.equal(half, operator(values.half().float(), image.half().float()))


@BOTH
@pytest.mark.parametrize("image", ["black", "white", "two tones", "noise of one rounding", "checkers"])
def test_no_nan_and_no_value_out_of_range(operator: Operator, image: str) -> None:
    """Every output is a mean, so it lies within the input's range."""
    rows, columns = torch.meshgrid(torch.arange(21), torch.arange(34), indexing="ij")
    pixels = {
        "black": torch.zeros(21, 34),
        "white": torch.ones(21, 34),
        "two tones": (columns > 13).float(),
        "noise of one rounding": 0.7 + (random(21, 34) > 0.5) * 6e-8,
        "checkers": ((rows + columns) % 2).float(),
    }[image].expand(3, -1, -1)
    values = random(4, 21, 34, seed=2) * 200 - 100
    found = operator(values, pixels)
    assert bool(found.isfinite().all())
    assert float(found.min()) >= float(values.min()) - 1e-3 and float(found.max()) <= float(values.max()) + 1e-3


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def extra_bytes(call: Callable[[], Tensor]) -> int:
    """Peak of what a call holds beside its result."""
    with LivingBytes() as mode:
        result = call()
    assert mode.now >= result.nbytes  # the result, and nothing that was forgotten
    return mode.peak - result.nbytes


def test_the_counter_sees_temporaries_and_their_end() -> None:
    values = torch.ones(1000, 1000)
    assert extra_bytes(lambda: (values + 1) * 2) == values.nbytes
    assert extra_bytes(lambda: values.add(1).mul_(2).add_(1)) == 0
    assert extra_bytes(lambda: (values * 2).view(-1)[:10].clone()) >= values.nbytes
    with LivingBytes() as mode:
        for _ in range(5):
            values + 1
    assert mode.now == 0 and mode.peak == values.nbytes


@pytest.mark.parametrize(
    ("size", "classes", "chunk", "strip"),
    [
        ((150, 200), 3, MIB, MIB // 4),
        ((40, 800), 60, MIB, MIB // 4),
        ((150, 200), 60, 1, MIB // 8),
        ((40, 800), 3, 1, MIB // 8),
    ],
)  # every pair of values
def test_pamr_keeps_the_bound_that_it_states(
    size: tuple[int, int], classes: int, chunk: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pamr_module, "CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr(pamr_module, "STRIP_BYTES", {"cpu": strip})
    logits, image = random(classes, *size), random(3, *size, seed=1)
    padded = 4 * (size[0] + 32) * (size[1] + 32)
    bound = 4 * 16 * size[0] * size[1] + max(chunk, 3 * padded) + 4 * strip
    used = extra_bytes(lambda: pamr(logits, image, iterations=2))
    assert 4 * 16 * size[0] * size[1] < used <= bound
    assert used < 0.8 * logits.nbytes * 16 or classes < 60  # not all classes' neighbours at once


@pytest.mark.parametrize(
    ("low_size", "size", "classes", "block"),
    [
        ((16, 22), (150, 200), 3, MIB // 4),
        ((16, 22), (150, 200), 300, MIB),
        ((5, 200), (40, 800), 3, MIB),
        ((5, 200), (40, 800), 300, MIB // 4),
        ((1, 1), (200, 150), 3, MIB // 4),
        ((1, 1), (200, 150), 300, MIB),
    ],
)  # every pair of values
def test_jbu_keeps_the_bound_that_it_states(
    low_size: tuple[int, int], size: tuple[int, int], classes: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jbu_module, "BLOCK_BYTES", {"cpu": block})
    low, image = random(classes, *low_size), random(3, *size, seed=1)
    used = extra_bytes(lambda: jbu(low, image))
    assert block / 4 < used <= 2 * block


MEASURE = """
import re, sys, torch
from ovbench.ops.jbu import jbu
from ovbench.ops.pamr import pamr

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
image = torch.rand(3, 512, 683)
values = torch.rand(171, 512, 683) if sys.argv[1] == "pamr" else torch.rand(171, 32, 43)
before = status("VmRSS")
result = pamr(values, image, iterations=2) if sys.argv[1] == "pamr" else jbu(values, image)
print(status("VmHWM") - before - result.nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("operator", ["pamr", "jbu"])
def test_171_classes_at_full_size_take_little_beside_the_result(
    operator: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """MiB of the process's peak over inputs and result, libraries' own buffers and all; 1 GiB is allowed."""
    done = run_python("-c", MEASURE, operator)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 160


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
def test_a_gpu_gives_the_same(operator: Operator) -> None:
    values, image = random(171, 96, 131), random(3, 96, 131, seed=1)
    expected = operator(values, image)
    found = operator(values.cuda(), image.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)
