"""The embedded default: both methods far above chance on all eight benchmarks, and far below when anything is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.synth.copies import synth
from ovbench.methods.clip import Clip
from ovbench.networks.builtin.scenes import render

IMAGES = 5
# Half of what was measured with the committed weights (docs/demo.md), so that only a fault falls below.
FLOOR = 40.0


def miou(method: str, dataset: str, results: Path, data: Path | None = None, **protocol: Any) -> float:
    spec = {
        "method": method,
        "dataset": dataset,
        "weights": "builtin",
        "demo": data is None,
        "limit": IMAGES,
        "protocol": {"name": "paper", **protocol},
    }
    record = ovbench.run(spec, data_root=data, results=results, gallery=0, workers=0)
    assert record.demo and record.metrics is not None and record.metrics.miou is not None
    return record.metrics.miou


@pytest.mark.parametrize("dataset", benchmarks.names("eight"))
def test_both_methods_are_far_above_chance(dataset: str, tmp_path: Path) -> None:
    """On one with the prompts of the public code, which take seconds to encode; elsewhere with the words alone."""
    chance = 100 / benchmarks.get(dataset).num_classes
    prompts = {} if dataset == "voc21" else {"templates": "plain"}
    for method in ("clip", "sc-clip"):
        found = miou(method, dataset, tmp_path, **prompts)
        assert found > max(FLOOR, 4 * chance), f"{method} on {dataset}: {found:.1f} mIoU, chance about {chance:.1f}"


def test_a_wrong_class_list_collapses(tmp_path: Path) -> None:
    words = benchmarks.get("voc20").words("sclip")
    rotated = words[7:] + words[:7]
    (tmp_path / "wrong.txt").write_text("\n".join(",".join(entry) for entry in rotated))
    right = miou("sc-clip", "voc20", tmp_path)
    wrong = miou("sc-clip", "voc20", tmp_path, wording=str(tmp_path / "wrong.txt"))
    assert wrong < 5 < 0.2 * right


def test_shuffled_labels_collapse(tmp_path: Path) -> None:
    root = synth("voc20", tmp_path / "data", images=IMAGES)
    right = miou("clip", "voc20", tmp_path, root)
    order = np.arange(256, dtype=np.uint8)
    order[1:21] = np.roll(order[1:21], 7)
    for pair in benchmarks.get("voc20").pairs(root):
        Image.fromarray(order[np.array(Image.open(pair.label))]).save(pair.label)
    assert miou("clip", "voc20", tmp_path, root) < 5 < 0.2 * right


def test_a_broken_method_collapses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = miou("clip", "voc20", tmp_path)
    features = Clip.features

    def swapped(self: Clip, images: torch.Tensor) -> torch.Tensor:
        """Patches in a wrong order, as after a mistaken reshape."""
        found = features(self, images)
        return found.flatten(1, 2).flip(1).view_as(found)

    monkeypatch.setattr(Clip, "features", swapped)
    assert miou("clip", "voc20", tmp_path) < 0.6 * right


@pytest.mark.parametrize("method", ["clip", "sc-clip"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_keeps_the_predictions_of_a_trained_network(method: str, dtype: str) -> None:
    names = ["sky", "grass", "dog", "car", "tree", "road"]
    scene = render(names, 336, 448, seed=10**6 + 1)
    image = torch.from_numpy(scene.image).permute(2, 0, 1)
    labels = [
        ovbench.build_segmentor(method, weights="builtin", classes=names, dtype=kind).predict_labels(
            [image], [(336, 448)]
        )[0]
        for kind in ("float32", dtype)
    ]
    agreement = (labels[0] == labels[1]).double().mean()
    assert agreement >= 0.98, agreement
