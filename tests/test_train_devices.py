"""Every trainable method trains on one GPU as on the CPU, under an emulation that refuses tensors of two devices."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from emulated_cuda import OnGPU, emulated_cuda
from torch import nn

from ovbench import benchmarks
from ovbench.ops.panoptic import Segments
from ovbench.registry import class_of, method_info, method_names
from ovbench.train import network as subjects
from ovbench.train.recipe import Recipe
from ovbench.train.runner import Journal, build_runner

TRAINABLE = [name for name in method_names(None) if getattr(class_of(name), "RECIPES", None)]
SIDE = 64


class Crops:
    """Images, labels and, where wanted, segments that depend on index and position."""

    def __init__(self, classes: int, segments: bool) -> None:
        self.classes, self.segments = classes, segments

    def __len__(self):
        return 5

    def __getitem__(self, item):
        generator = torch.Generator().manual_seed(100 * item[0] + item[1])
        coarse = torch.randint(0, min(self.classes, 8), (8, 8), generator=generator)
        label = coarse.repeat_interleave(SIDE // 8, 0).repeat_interleave(SIDE // 8, 1)
        image = torch.randint(0, 255, (3, SIDE, SIDE), generator=generator).byte()
        found = {"image": image, "label": label}
        if self.segments:
            present = label.unique()
            ids = torch.searchsorted(present, label)
            found["segments"] = Segments(ids, present, torch.zeros(len(present), dtype=torch.bool))
        return found


def subject_of(name, device):
    options = subjects.trial_options(name)
    if not method_info(name).takes_words:
        return subjects.closed_set_subject(
            name, options, "tiny", "random", 8, seed=0, device=device, class_frequencies=range(1, 9)
        )
    benchmark = benchmarks.get("coco_panoptic" if name == "fisa" else "voc20")
    return subjects.open_vocabulary_subject(
        name, options, None, "builtin", benchmark, sentences=None, seed=0, device=device
    )


def losses_of(name, device, tmp_path, iterations=2):
    """Losses of the first iterations, and the network, trained by mmengine's Runner as ``ovbench train`` does."""
    subject = subject_of(name, device)
    recipe = Recipe(lr=1e-3, weight_decay=1e-4, iters=iterations, batch=2, crop=SIDE)
    policy = next(iter(class_of(name).RECIPES.values())).get("policy", "all")
    groups, _ = subjects.choose_parameters(subject.network, policy)
    told = []
    journal = Journal(tmp_path / device, 100, lambda done, lr, losses: told.append(losses))
    images = Crops(8 if not method_info(name).takes_words else 20, subject.takes_segments)
    runner = build_runner(
        subject.network, groups, recipe, images, journal, seed=3, planned=iterations, stop=iterations, device=device,
        workers=0, work_dir=tmp_path / "mm",
    )  # fmt: skip
    runner.train()
    return told, subject.network


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_on_one_gpu_is_training_on_the_cpu(name, tmp_path):
    if name == "fisa":
        pytest.importorskip("scipy")
    found = {}
    for device in ("cpu", "cuda"):
        with emulated_cuda() if device == "cuda" else nullcontext():
            found[device], network = losses_of(name, device, tmp_path)
            assert all(isinstance(value, OnGPU) == (device == "cuda") for value in network.state_dict().values())
    assert len(found["cuda"]) == 2
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_the_emulation_refuses_what_a_gpu_refuses():
    before = torch.cuda.device_count()
    with emulated_cuda():
        layer = nn.Linear(4, 3).to("cuda")
        image = torch.rand(2, 4)
        with pytest.raises(RuntimeError, match="same device"):
            layer(image)
        out = layer(image.to("cuda"))
        assert out.device.type == "cuda" and torch.zeros(2, device="cuda").is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            nn.functional.cross_entropy(out, torch.tensor([0, 1]))
        with pytest.raises(TypeError, match="numpy"):
            out.detach().numpy()
        (out * torch.tensor(2.0)).sum().backward()  # single numbers may be anywhere
        assert isinstance(layer.weight.grad, OnGPU) and not isinstance(layer.weight.grad.cpu(), OnGPU)
    assert torch.cuda.device_count() == before
