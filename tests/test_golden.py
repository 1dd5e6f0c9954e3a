"""Agreement with the outputs of the public implementations, through the Python interface and through ``predict``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import ovbench

METHODS = {"sc-clip": "scclip_pub.safetensors", "clip": "naclip_pub.safetensors"}
MEAN = torch.tensor([122.771, 116.746, 104.094]).view(3, 1, 1)
STD = torch.tensor([68.501, 66.632, 70.323]).view(3, 1, 1)


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


def picture(vectors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The uint8 RGB picture (3, H, W) that a normalised input was made from."""
    return (vectors[name] * STD + MEAN).round().to(torch.uint8)


def words(golden: Path, method: str) -> list[str]:
    with safe_open(golden / METHODS[method], "pt") as file:
        names: list[str] = json.loads(file.metadata()["names"])
    return names


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_python_interface(golden: Path, method: str) -> None:
    vectors = load_file(golden / METHODS[method])
    names = words(golden, method)
    seg = ovbench.build_segmentor(method, weights=str(golden / "clip_pub.safetensors"), classes=names)
    assert isinstance(seg, torch.nn.Module)
    torch.testing.assert_close(seg.model.text, vectors["text_features"], rtol=0, atol=1e-6)
    for size in ("224", "224x336"):
        if f"{method}.features_{size}" in vectors:
            features = seg.model.dense_features(picture(vectors, f"image_{size}"))
            assert close(features.flatten(0, 1), vectors[f"{method}.features_{size}"])
    image = picture(vectors, "image_336x448")
    batch = torch.stack([image, image.flip(-1)])  # not alone in its batch
    logits = seg.seg_logits(batch, size=(84, 112))
    assert logits.shape == (2, 21, 84, 112) and logits.dtype == torch.float32
    expected = vectors[f"{method}.slide_logits"].float()
    assert close(logits[0], expected, 1e-3)  # the vectors are float16
    assert (logits[0] - expected).abs().max() <= 2**-11 * expected.abs().max() * 2
    labels = seg.predict_labels(batch, [(375, 500), (375, 500)])[0]
    agreement = (labels == vectors[f"{method}.slide_pred"]).double().mean()
    assert agreement >= 0.999, agreement


@pytest.mark.parametrize("method", METHODS)
def test_predict_command(
    golden: Path, method: str, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    vectors = load_file(golden / METHODS[method])
    for name in ("image_224", "image_336x448"):
        Image.fromarray(picture(vectors, name).permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    (tmp_path / "classes.txt").write_text("\n".join(words(golden, method)))
    common = [
        "--method",
        method,
        "--weights",
        str(golden / "clip_pub.safetensors"),
        "--classes",
        "classes.txt",
        "--short-side",
        "0",
        "--device",
        "cpu",
    ]
    done = run_cli("predict", "image_224.png", *common, "--save-features", "f.npz")
    assert done.returncode == 0, done.stderr
    stored = np.load(tmp_path / "f.npz")
    assert stored["grid"].tolist() == [14, 14] and stored["features"].dtype == np.float32
    assert close(torch.from_numpy(stored["features"]), vectors[f"{method}.features_224"])

    done = run_cli(
        "predict",
        "image_336x448.png",
        *common,
        "--mode",
        "slide",
        "--crop",
        "224",
        "--stride",
        "112",
        "--save-logits",
        "l.npz",
        "--out",
        "label.png",
    )
    assert done.returncode == 0, done.stderr
    logits = torch.from_numpy(np.load(tmp_path / "l.npz")["seg_logits"])
    assert logits.shape == (21, 336, 448)
    small = torch.nn.functional.interpolate(logits[None], (84, 112), mode="bilinear")[0]
    assert close(small, vectors[f"{method}.slide_logits"].float(), 1e-3)
    large = torch.nn.functional.interpolate(logits[None], (375, 500), mode="bilinear")[0].argmax(0)
    assert (large == vectors[f"{method}.slide_pred"]).double().mean() >= 0.999
    label = np.array(Image.open(tmp_path / "label.png"))
    assert (torch.from_numpy(label) == logits.argmax(0)).double().mean() >= 0.999


@pytest.mark.parametrize("method", METHODS)
def test_float16_keeps_the_predictions(golden: Path, method: str) -> None:
    """This random CLIP amplifies rounding about a hundredfold, so bfloat16 reaches only about 93 % on it."""
    vectors = load_file(golden / METHODS[method])
    image = picture(vectors, "image_336x448")
    for dtype, least in (("float16", 0.98), ("bfloat16", 0.9)):
        seg = ovbench.build_segmentor(
            method, weights=str(golden / "clip_pub.safetensors"), classes=words(golden, method), dtype=dtype
        )
        labels = seg.predict_labels(image[None], [(375, 500)])[0]
        agreement = (labels == vectors[f"{method}.slide_pred"]).double().mean()
        assert agreement >= least, (dtype, agreement)


@pytest.mark.parametrize(("constants", "options"), [("sc-clip", {}), ("sc-clip-b-constants", "B/16")])
def test_sc_clip_on_24_blocks_with_its_authors_constants(golden: Path, constants: str, options: object) -> None:
    """With no option, those of ViT-L/14; set by hand, those of ViT-B/16, which tells arithmetic and constants apart."""
    vectors = load_file(golden / "scclip_l_pub.safetensors")
    own = {"pre": 8, "post": 3, "multi_first": 3, "multi_last": 9, "cls_weight": 0.3}
    seg = ovbench.build_segmentor(
        "sc-clip", weights=str(golden / "clip_l_pub.safetensors"), classes=["a"], method_options=own if options else {}
    )
    found = seg.model.dense_features(picture(load_file(golden / METHODS["sc-clip"]), "image_224"))
    assert seg.model.clip.depth == 24
    assert close(found.flatten(0, 1), vectors[f"{constants}.features_224"])
    other = "sc-clip" if options else "sc-clip-b-constants"
    assert not close(found.flatten(0, 1), vectors[f"{other}.features_224"], 1e-2)
