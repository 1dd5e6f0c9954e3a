"""Batches larger than memory: parts whose gradients are added up, activations computed again, a share of the images."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train_runner import CLASSES, Noise, recipe, same, trained
from tiny_clip import photo, save_tiny
from torch import Tensor, nn

from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import UsageError
from ovbench.hashing import sha256_of
from ovbench.models.trainable import ParameterGroup, Trainable
from ovbench.models.trained_file import read_about
from ovbench.registry import method_class
from ovbench.train import accumulation
from ovbench.train import record as records
from ovbench.train.data import chosen_images
from ovbench.train.network import choose_parameters
from ovbench.train.record import TrainSpec
from ovbench.words.embeddings import prompts

WORDS = ["sky", "road", "car", "person", "tree", "dog", "boat", "chair"]
SMALL = {"hidden": 16, "layers": 1, "heads": 2, "window": 4, "grid": 8, "pad_len": 6}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


# Parts of a batch


class Plain(Trainable):
    """Without batch statistics; its loss is a mean over images, as those of all that may be taken in parts."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)
        self.seen: list[int] = []

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(len(images))
        logits = self.head(self.body(images.float() / 255).relu())
        return {"loss_ce": nn.functional.cross_entropy(logits, labels), "acc": torch.tensor(float(len(images)))}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", tuple(self.parameters()))]


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("fields", [{}, {"optimizer": "adamw", "grad_clip": 0.05}], ids=["sgd", "adamw-clipped"])
def test_a_batch_in_parts_gives_the_weights_of_the_whole(tmp_path, parts, fields):
    told: dict[str, list[dict[str, float]]] = {"whole": [], "parts": []}

    def run(name: str, accumulate: int) -> tuple[dict[str, Tensor], Plain]:
        network, wanted = Plain(), recipe(batch=5, accumulate=accumulate, lr=0.01, **fields)
        state, _, _ = trained(
            tmp_path, name, wanted=wanted, network=network, on_losses=lambda done, lr, losses: told[name].append(losses)
        )
        return state, network

    whole, _ = run("whole", 1)
    found, network = run("parts", parts)
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    assert len(told["whole"]) == len(told["parts"]) == 20
    for one, other in zip(told["whole"], told["parts"], strict=True):
        assert other["loss_ce"] == pytest.approx(one["loss_ce"], rel=1e-5)
    # the step is one of 5 images, however many go through at a time
    assert sum(network.seen) == 100 and max(network.seen) == -(-5 // parts)
    unweighted, _, _ = trained(tmp_path, "other", wanted=recipe(batch=4, lr=0.01, **fields), network=Plain())
    assert not all(torch.allclose(unweighted[key], value, rtol=1e-4, atol=1e-6) for key, value in whole.items())


def test_parts_resume_in_the_same_weights(tmp_path):
    wanted = recipe(batch=5, accumulate=2)
    whole, _, _ = trained(tmp_path, "whole", wanted=wanted, network=Plain())
    trained(tmp_path, "half", stop=12, wanted=wanted, network=Plain())
    resumed, _, _ = trained(tmp_path, "half", resume=True, wanted=wanted, network=Plain())
    assert same(whole, resumed)


def cat_seg(weights: str, name: str = "cat-seg", **options: Any) -> Any:
    cls = method_class(name)
    extra = {"visual": "none", "filter_k": 4} if name == "lsmseg" else {}
    method = cls.load(weights, None, cls.configure({**SMALL, **extra, **options}), training=True)
    method.set_training_classes(WORDS, prompts("cat-seg"))
    choose_parameters(method, "attention")
    return method.train()


def fisa(weights: str, name: str = "fisa", **options: Any) -> Any:
    cls = method_class(name)
    side = {"training_side": 0} if name == "fisa" else {}
    method = cls.load(weights, None, cls.configure({"generator": "grid", **side, **options}), training=True)
    method.set_training_classes(WORDS, prompts("cat-seg"))
    choose_parameters(method, method.POLICIES[0])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # as after some iterations: at first, much of it is zero
        for key, parameter in method.named_parameters():
            if not key.startswith(("clip.", "generator.")):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return method.train()


METHODS = {
    "cat-seg": cat_seg,
    "cat-seg, ignored left out": lambda weights: cat_seg(weights, ignored_as_negative=False),
    "lsmseg": lambda weights: cat_seg(weights, "lsmseg"),
    "fisa": fisa,
}


def batch(count: int = 3, side: int = 128) -> dict[str, Tensor]:
    labels = torch.randint(0, 8, (count, side, side), generator=torch.Generator().manual_seed(1)) // 2 * 2
    labels[0, : side * 90 // 128] = 255  # images have different numbers of pixels that count
    return {"image": torch.stack([photo(side, side, seed=seed) for seed in range(count)]), "label": labels}


def batch_for(method: Any) -> dict[str, Tensor]:
    """A small one for FISA, whose adapter sees every mask at the size of the image."""
    return batch(side=64 if type(method).__name__ == "FISA" else 128)


class Wrapper:
    """What :func:`accumulation.step` wants of mmengine's, keeping the gradients."""

    def __init__(self) -> None:
        self.stepped = 0

    def optim_context(self, model: Any) -> Any:
        return torch.enable_grad()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.stepped += 1

    def zero_grad(self) -> None:
        pass


def gradients(method: Any, parts: int = 1) -> tuple[dict[str, float], dict[str, Tensor]]:
    from ovbench.train.runner import TrainingModel

    model, wrapper = TrainingModel(method), Wrapper()
    told = accumulation.step(model, model, batch_for(method), wrapper, parts)
    assert wrapper.stepped == 1
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {name: float(value) for name, value in told.items()}, found


def rounding(name: str, tolerance: float) -> float:
    """How far gradients may lie apart, of the largest one.

    FISA's adapter sums over all masks and pixels: measured in float32, the images of a batch in another order alone move the
    gradient of its last convolution by 1e-4 of the largest, in parts by 2.5e-4.
    """
    return 1e-3 if name == "fisa" else tolerance


def alike(one: tuple[Any, Any], other: tuple[Any, Any], tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance) and set(one[1]) == set(other[1])
    largest = max(float(value.abs().max()) for value in one[1].values())
    assert largest > 0
    for name, value in one[1].items():
        assert float((value - other[1][name]).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_parts_are_those_of_the_batch(name, weights):
    if name == "fisa":
        pytest.importorskip("scipy")
    whole = gradients(METHODS[name](weights))
    for parts in (2, 3):
        alike(whole, gradients(METHODS[name](weights), parts), rounding(name, 2e-5))


def test_shares_count_pixels_where_the_loss_does(weights):
    labels = batch()["label"]
    plain, valid = METHODS["cat-seg"](weights), METHODS["cat-seg, ignored left out"](weights)
    assert plain.loss_share(labels, slice(0, 1)) == pytest.approx(1 / 3)
    assert valid.loss_share(labels, slice(0, 1)) == pytest.approx(38 / (38 + 128 + 128))
    assert valid.loss_share(labels.fill_(255), slice(0, 1)) == 0


# Activations computed again


def kept_bytes(method: Any) -> int:
    """Bytes of different storages that the forward keeps for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    found: dict[int, int] = {}
    tensors = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # alive, so that no other takes its address
        return tensor

    given = batch_for(method)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = method.losses(given["image"], given["label"])
    assert all(value.isfinite() for value in losses.values())
    return sum(found.values())


@pytest.mark.parametrize("name", ["cat-seg", "lsmseg", "fisa"])
def test_activations_computed_again_give_the_same_and_keep_less(name, weights):
    if name == "fisa":
        pytest.importorskip("scipy")
    plain, again = METHODS[name](weights), METHODS[name](weights)
    again.recompute_activations()
    alike(gradients(plain), gradients(again), rounding(name, 1e-6))
    before, after = kept_bytes(METHODS[name](weights)), kept_bytes(again)
    assert after < 0.5 * before, (before, after)


def test_without_gradients_nothing_is_computed_again(weights, monkeypatch):
    method = METHODS["cat-seg"](weights)
    method.recompute_activations()
    method.eval()
    expected = METHODS["cat-seg"](weights).eval()
    x, text = method.clip.normalise(batch()["image"]), method.text_embeddings(WORDS, prompts("cat-seg"))
    monkeypatch.setattr("ovbench.networks.recompute.checkpoint", None)  # would raise if it were called
    with torch.no_grad():
        assert torch.equal(method.patch_logits(x, text), expected.patch_logits(x, text))


# What would not be exact is refused


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({"accumulate": 5}, 1, "4 images per process cannot be taken in 5 parts"),
        ({"accumulate": 3}, 2, "2 images per process cannot be taken in 3 parts"),
        ({"checkpoint_activations": True}, 1, "Plain trains nothing through whose depth"),
    ],
)
def test_what_cannot_be_is_refused(fields, world, message):
    with pytest.raises(UsageError, match=message):
        accumulation.prepare(Plain(), recipe(**fields), world)


@pytest.mark.parametrize("name", ["accumulate", "checkpoint_activations"])
def test_batch_statistics_are_refused(name):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    wanted = recipe(**{name: 2 if name == "accumulate" else True})
    with pytest.raises(UsageError, match=f"{name} would change what batch norm sees"):
        accumulation.prepare(network, wanted)
    frozen = network.eval()
    if name == "accumulate":
        accumulation.prepare(frozen, wanted)


def test_a_method_on_a_frozen_clip_has_nothing_to_compute_again(weights):
    with pytest.raises(UsageError, match="SCN trains nothing through whose depth"):
        accumulation.prepare(fisa(weights, "scn"), recipe(checkpoint_activations=True))


# A share of the images, the spec and its hash


def test_a_share_is_drawn_once_and_lies_in_the_larger_ones():
    assert chosen_images(50, 1.0, 0) is None
    tenth, half = chosen_images(50, 0.1, 0), chosen_images(50, 0.5, 0)
    assert tenth is not None and half is not None
    assert len(tenth) == 5 and len(half) == 25 and set(tenth) < set(half) and list(half) == sorted(half)
    assert chosen_images(50, 0.1, 0) == tenth != chosen_images(50, 0.1, 1)
    assert len(chosen_images(50, 0.001, 0) or ()) == 1


def test_hashes_of_trainings_from_before_stay():
    spec = TrainSpec(
        method="fisa", arch="ViT-B-16", dataset="coco_panoptic", dataset_version=1, dataset_fingerprint="ab",
        images=10, planned=5, recipe=records.Recipe(lr=1e-3, weight_decay=0, iters=5, batch=4, crop=64),
    )  # fmt: skip
    assert spec.spec_hash() == "2a8cf000bafec0354467e1fa26e748354eee150436b3f3429848305bd34a4226"  # of version 0.1.0
    moved = {"accumulate": 2, "checkpoint_activations": True, "data_fraction": 0.5}
    hashes = {
        spec.model_copy(update={"recipe": spec.recipe.model_copy(update={name: value})}).spec_hash()
        for name, value in moved.items()
    }
    hashes.add(spec.model_copy(update={"subset_sha256": "ab"}).spec_hash())
    assert len(hashes | {spec.spec_hash()}) == 5
    old = json.loads(spec.model_dump_json())
    for name in moved:
        del old["recipe"][name]
    del old["subset_sha256"]
    assert TrainSpec(**old).spec_hash() == spec.spec_hash()


def test_a_training_in_parts_on_a_share_is_recorded_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stuff = synth("coco_stuff", tmp_path / "stuff", images=1, train_images=10, size=(48, 64), classes=6)
    command = [
        "train", "-m", "cat-seg", "-d", "coco_stuff", "--data-root", str(stuff), "--no-eval", "--device", "cpu",
        "--weights", "builtin", "--workers", "0", "--checkpoint-every", "1", "--set", "iters=4", "--set", "batch=3",
        "--set", "crop=48", "--set", "resize=64,48", "--set", "accumulate=2", "--set", "checkpoint_activations=true",
        "--set", "data_fraction=0.3", "-o", "hidden=16", "-o", "layers=1", "-o", "grid=6", "-o", "window=3",
    ]  # fmt: skip
    assert run_command([*command, "--trainings", "whole"]) == 0, capsys.readouterr().err
    assert run_command([*command, "--trainings", "parts"]) == 0
    (whole,) = (tmp_path / "whole" / "cat-seg" / "coco_stuff").iterdir()
    (parts,) = (tmp_path / "parts" / "cat-seg" / "coco_stuff").iterdir()
    record = records.read(parts / records.RECORD)
    for iteration in (3, 4):  # as if it had been killed in the third
        (parts / "checkpoints" / f"iteration-0000000{iteration}.pt").unlink(missing_ok=True)
    records.write(record.model_copy(update={"status": "running"}), parts)
    capsys.readouterr()
    assert run_command([*command, "--trainings", "parts", "--resume"]) == 0
    one, other = load_file(whole / records.WEIGHTS), load_file(parts / records.WEIGHTS)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    spec = records.read(whole / records.RECORD).spec
    names = (whole / records.SUBSET).read_text().split()
    assert spec.images == len(names) == 3 and spec.subset_sha256 == sha256_of(names)
    assert (spec.recipe.accumulate, spec.recipe.checkpoint_activations, spec.recipe.data_fraction) == (2, True, 0.3)
    about = read_about(whole / records.WEIGHTS)
    assert about is not None and "data_fraction=0.3" in about.overrides
    assert not any(override.startswith(("accumulate", "checkpoint")) for override in about.overrides)
    # other images are not looked at
    for image in (stuff / "images" / "train2017").iterdir():
        if image.stem not in names:
            image.write_bytes(b"")
    assert run_command([*command, "--trainings", "third", "--set", "iters=1"]) == 0, capsys.readouterr().err


def test_class_frequencies_of_all_images_are_not_those_of_a_share(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = synth("ade20k", tmp_path / "ade", images=1, train_images=4, size=(48, 64), classes=6)
    command = ["train", "-m", "ecac-fcn", "-d", "ade20k", "--data-root", str(root), "--arch", "tiny", "--dry-run"]
    assert run_command([*command, "--device", "cpu", "--set", "data_fraction=0.5"]) == 2
    assert "how frequent they are in all training images" in capsys.readouterr().err
    assert run_command([*command, "--device", "cpu", "--set", "accumulate=2"]) == 2
    assert "batch norm" in capsys.readouterr().err


def test_the_subset_is_what_the_loader_reads():
    from ovbench.train.data import TrainingSet

    class Data:
        def __len__(self) -> int:
            return 10

    assert len(TrainingSet(Data(), None, 8, 0)) == 10  # type: ignore[arg-type]
    assert len(TrainingSet(Data(), None, 8, 0, chosen=(2, 5, 7))) == 3  # type: ignore[arg-type]
    assert len(Noise()) == 7
