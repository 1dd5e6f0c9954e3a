"""One contract for every registered method; what is special to a method stands in its own test file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import photo, save_tiny

from ovbench.errors import RunError, UsageError
from ovbench.models.build import build_model
from ovbench.models.method import Method
from ovbench.models.patch_model import OpenVocabModel
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.registry import method_class, method_info, method_names
from ovbench.spec import protocol

CLASSES = ["sky", ["road", "street"], "car", "person"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DenseCLIP:
    return load_clip(str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")))


@pytest.fixture(params=method_names())
def method(request: pytest.FixtureRequest, clip: DenseCLIP) -> Method:
    cls = method_class(request.param)
    return cls.build(clip, cls.OFFLINE_OPTIONS)


def model_of(method: Method, **fields: object) -> OpenVocabModel:
    window_batch = fields.pop("window_batch", None)
    dtype = fields.pop("dtype", "float32")
    return OpenVocabModel(method, CLASSES, protocol("common", **fields), window_batch=window_batch, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(224, 224), (112, 176), (176, 112), (100, 150), (33, 65), (16, 16)])
def test_shapes_and_finite(method: Method, size: tuple[int, int]) -> None:
    images = method.clip.normalise(torch.stack([photo(*size, seed=1), photo(*size, seed=2)]))
    copy = images.clone()
    with torch.inference_mode():
        features = method.features(images)
    assert features.shape == (2, size[0] // 16, size[1] // 16, method.clip.embed_dim)
    assert features.isfinite().all()
    assert torch.equal(images, copy)


def test_two_images_are_twice_one(method: Method) -> None:
    images = method.clip.normalise(torch.stack([photo(128, 192, seed=1), photo(128, 192, seed=2)]))
    with torch.inference_mode():
        both = method.features(images)
        again = method.features(images)
        for row in range(2):
            torch.testing.assert_close(method.features(images[row : row + 1])[0], both[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(both, again)


def test_flat_and_extreme_images(method: Method) -> None:
    for value in (0, 255):
        image = torch.full((1, 3, 96, 96), value, dtype=torch.uint8)
        with torch.inference_mode():
            assert method.features(method.clip.normalise(image)).isfinite().all()


def test_no_hooks_and_no_gradients(method: Method) -> None:
    model_of(method).seg_logits(photo(100, 120)[None])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.modules())
    assert not any(p.requires_grad for p in method.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close(method: Method, dtype: str) -> None:
    image = photo(160, 224)[None]
    exact, rough = (model_of(method, dtype=kind).seg_logits(image) for kind in ("float32", dtype))
    assert rough.dtype == torch.float32
    error = (exact - rough).abs().max() / exact.abs().max()
    assert error < (0.05 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_lower_precision_are_float32_products_of_its_features(
    method: Method, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method.MODEL != Method.MODEL:
        pytest.skip("its logits are a network's; of its correlation see test_cost_aggregation")
    seen: list[torch.Tensor] = []
    owner = type(getattr(method, "base", method))  # of a solver
    own = owner.features

    def kept(self: Method, images: torch.Tensor) -> torch.Tensor:
        seen.append(own(self, images))
        return seen[-1]

    model = model_of(method, dtype=dtype)
    with torch.inference_mode(), model.precision():
        monkeypatch.setattr(owner, "features", kept)
        logits = method.patch_logits(model.network_input(photo(96, 128)[None]), model.text)  # type: ignore[arg-type]
    exact = torch.nn.functional.normalize(seen[0].double(), dim=-1) @ model.text.double().T  # type: ignore[operator]
    assert logits.dtype == torch.float32
    assert (logits.permute(0, 2, 3, 1) - exact).abs().max() < 1e-6


def test_window_batches_do_not_change_the_result(method: Method) -> None:
    images = [photo(250, 330, seed=1), photo(330, 250, seed=2), photo(240, 240, seed=3)]
    model = model_of(method, window_batch=4)
    together = model.patch_logits(images)
    for image, found in zip(images, together, strict=True):
        assert torch.equal(model.patch_logits([image])[0].values, found.values)  # to the bit: the tail is padded
    free = model_of(method).patch_logits(images)
    for one, other in zip(together, free, strict=True):
        torch.testing.assert_close(one.at((90, 120)), other.at((90, 120)), rtol=1e-4, atol=1e-5)


def test_one_window_and_64_give_the_same_labels(method: Method) -> None:
    images = [photo(250, 330, seed=1), photo(330, 250, seed=2)]
    sizes = [(375, 500), (500, 375)]
    one, many = (model_of(method, window_batch=count).predict_labels(images, sizes) for count in (1, 64))
    equal = torch.cat([(a == b).flatten() for a, b in zip(one, many, strict=True)])
    assert equal.double().mean() >= 0.9999


def test_whole_and_slide_agree_when_one_window_covers_the_image(method: Method) -> None:
    image = photo(200, 200)[None]
    whole = model_of(method, mode="whole").seg_logits(image, (50, 70))
    slide = model_of(method, mode="slide").seg_logits(image, (50, 70))
    assert whole.shape == (1, 5, 50, 70)
    assert torch.equal(whole, slide)


def test_slide_equals_a_plain_loop_over_windows(method: Method) -> None:
    image = photo(250, 340)
    model = model_of(method)
    total, count = torch.zeros(5, 250, 340), torch.zeros(250, 340)
    for top in (0, 26):
        for left in (0, 112, 116):
            crop = method.clip.normalise(image[None, :, top : top + 224, left : left + 224])
            with torch.inference_mode():
                logits = method.patch_logits(crop, model.text)
            total[:, top : top + 224, left : left + 224] += torch.nn.functional.interpolate(
                logits, (224, 224), mode="bilinear"
            )[0]
            count[top : top + 224, left : left + 224] += 1
    expected = total / count
    torch.testing.assert_close(model.seg_logits(image[None])[0], expected, rtol=1e-4, atol=1e-5)
    for size in ((500, 640), (97, 131)):
        resized = torch.nn.functional.interpolate(expected[None], size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(model.seg_logits(image[None], size), resized, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_halves_the_windows(clip: DenseCLIP) -> None:
    images = [photo(250, 330, seed=1), photo(240, 330, seed=2)]
    model = OpenVocabModel(method_class("clip").build(clip), CLASSES, protocol("common"))
    expected = model.predict_labels(images, [(60, 80)] * 2)
    network, batches = model.network, []

    def scarce(batch: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        batches.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return network(batch, text)

    model.network = scarce
    found = model.predict_labels(images, [(60, 80)] * 2)
    assert batches == [8, 4, 2, 2, 2, 2]
    for one, other in zip(found, expected, strict=True):
        assert (one == other).double().mean() > 0.999
    model.predict_labels(images, [(60, 80)] * 2)
    assert batches[6:] == [2, 2, 2, 2]  # learned
    model.window_batch = 5
    with pytest.raises(torch.OutOfMemoryError):
        model.predict_labels(images, [(60, 80)] * 2)


def test_compiled_network_gives_the_same(clip: DenseCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch reaches torch.compile and pads to one shape; the compiler itself is torch's business."""
    asked = {}

    def compile(function: Any, **options: Any) -> Any:
        asked.update(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    method = method_class("clip").build(clip)
    plain = OpenVocabModel(method, CLASSES, protocol("common"))
    fixed = OpenVocabModel(method, CLASSES, protocol("common"), compile_mode="reduce-overhead")
    assert asked == {"mode": "reduce-overhead", "dynamic": False}
    assert fixed.step((224, 224)) == fixed.step((2000, 3000)) == 32
    assert plain.step((100, 224)) == 32 and plain.step((448, 448)) == 8 and plain.step((2000, 3000)) == 1
    image = photo(230, 260)[None]
    torch.testing.assert_close(fixed.seg_logits(image), plain.seg_logits(image), rtol=1e-4, atol=1e-5)


def test_patch_padding_keeps_the_image_in_place(method: Method) -> None:
    """An image shifted by whole patches inside a padded one gives logits at the same place."""
    image = photo(89, 135)
    for pad in ("symmetric", "none"):
        logits = model_of(method, mode="whole", patch_pad=pad).seg_logits(image[None])
        assert logits.shape == (1, 5, 89, 135)
        assert logits.isfinite().all()


def test_labels_and_registry(method: Method) -> None:
    model = model_of(method)
    labels = model.predict_labels([photo(60, 90), photo(90, 60)], [(30, 45), (91, 61)])
    assert [tuple(label.shape) for label in labels] == [(30, 45), (91, 61)]
    assert all(label.dtype == torch.int64 and label.min() >= 0 and label.max() < 4 for label in labels)
    name = next(name for name in method_names() if method_class(name) is type(method))
    info = method_info(name)
    assert info.summary and info.paper
    assert protocol("paper", "voc21", method=name).name == info.protocol


def test_a_preset_may_have_values_of_its_own_for_a_baseline() -> None:
    """ClearCLIP's author names another threshold for plain CLIP, on benchmarks with a background."""
    for benchmark, own in (("voc21", 0.5), ("context60", 0.15), ("coco_object", 0.4), ("voc20", 0.0)):
        assert protocol("clearclip", benchmark, method="clearclip").prob_thd == own
        chosen = protocol("clearclip", benchmark, method="clip")
        assert chosen.prob_thd == (0.2 if own else 0.0) and chosen.overrides == ()
    assert protocol("clearclip", "voc21", method="clip", prob_thd=0.5).overrides == ("prob_thd",)


def test_nan_weights_are_an_error_that_names_image_and_stage(clip: DenseCLIP) -> None:
    model = build_model("clip", classes=CLASSES, weights="random", arch="ViT-S-32-alt")
    model.clip.visual.ln_post.bias.data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"NaN or infinity in the patch logits of b.png, window .* \(stage: backbone"):
        model.predict_labels([photo(64, 64)], [(64, 64)], ["b.png"])


def test_class_lists() -> None:
    with pytest.raises(UsageError, match="class list is empty"):
        build_model("clip", classes=[], weights="random")
    with pytest.raises(UsageError, match="Class 1 of the class list has no word"):
        build_model("clip", classes=["a", [" "]], weights="random")


def test_method_options() -> None:
    cls = method_class("sc-clip")
    assert cls.configure({"beta": "0.5", "neighbours": "10", "scale-indices": "false"}) == cls.Config(
        beta=0.5, neighbours=10, scale_indices=False
    )
    with pytest.raises(UsageError, match=r"Unknown option of SCCLIP 'betta'. Did you mean: beta"):
        cls.configure({"betta": "1"})
    with pytest.raises(UsageError, match="Option beta='high': a float is needed"):
        cls.configure({"beta": "high"})
    with pytest.raises(UsageError, match=r"Unknown method 'scclip'. Did you mean: sc-clip"):
        method_info("scclip")


@pytest.mark.parametrize(
    "fields", [{"pamr": 3, "pamr_dilations": (1, 2)}, {"upsample": "jbu"}, {"upsample": "jbu", "pamr": 1}]
)
def test_refinements_follow_the_image(clip: DenseCLIP, fields: dict[str, Any]) -> None:
    """Logits are moved towards the picture's edges, at the output's size, and the switch lands in the protocol."""
    image = torch.full((3, 160, 208), 30, dtype=torch.uint8)
    image[:, :, 100:] = 220  # an edge that no patch border meets
    method = method_class("clip").build(clip)
    plain = OpenVocabModel(method, CLASSES, protocol("common"))
    refined = OpenVocabModel(method, CLASSES, protocol("common", **fields))
    assert set(refined.protocol.overrides) == set(fields)
    for size in ((160, 208), (90, 131)):
        [before], [after] = plain.patch_logits([image]), refined.patch_logits([image])
        assert torch.equal(before.values, after.values)
        logits = refined.refine(after, size)
        assert logits.shape == (5, *size) and logits.isfinite().all()
        edge = round(100 * size[1] / 208)
        steps = (logits[..., 1:] - logits[..., :-1]).abs().mean(dim=(0, 1))
        smooth = (before.at(size)[..., 1:] - before.at(size)[..., :-1]).abs().mean(dim=(0, 1))
        assert steps[edge - 2 : edge + 1].max() > smooth[edge - 2 : edge + 1].max()
        [labels] = refined.predict_labels([image], [size])
        assert (
            torch.equal(labels, refined.word_class[logits.argmax(dim=0)])
            or (labels == refined.word_class[logits.argmax(dim=0)]).double().mean() > 0.99
        )
