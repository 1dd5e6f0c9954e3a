"""Masks of one's own as proposals, in every layout; what does not fit is named; and masks saved by ``predict``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import photo

from ovbench.cli.app import run_command
from ovbench.errors import DataError, UsageError
from ovbench.networks.mask_generators.files import Files
from ovbench.networks.mask_generators.load import load_generator
from ovbench.networks.mask_generators.mask_files import decoded, uncompressed

SIZE = (24, 36)


def some(count: int = 3, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """Masks (M, h, w), bool: rectangles, of which no two are alike."""
    generator = np.random.default_rng(seed)
    found = np.zeros((count, *size), dtype=bool)
    for index in range(count):
        top, left = generator.integers(0, size[0] - 8), generator.integers(0, size[1] - 8)
        found[index, top : top + 4 + index % 4, left : left + 5 + index % 3] = True
    return found


def compressed(runs: list[int]) -> str:
    """COCO's text of run lengths, written from its description."""
    text = ""
    for index, run in enumerate(runs):
        value = run - (runs[index - 2] if index > 2 else 0)
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr((digit | 32 if more else digit) + 48)
            if not more:
                break
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths, column by column, beginning with those outside."""
    flat, runs, value = mask.flatten(order="F"), [0], False
    for pixel in flat.tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def rle(mask: np.ndarray, text: bool = True) -> dict[str, Any]:
    runs = runs_of(mask)
    return {"size": list(mask.shape), "counts": compressed(runs) if text else runs}


def as_npz(folder: Path, masks: np.ndarray, **more: Any) -> None:
    np.savez(folder / "a.npz", masks=masks, **more)


def as_pngs(folder: Path, masks: np.ndarray, value: int = 255) -> None:
    (folder / "a").mkdir()
    for index, mask in enumerate(masks):
        Image.fromarray((mask * value).astype(np.uint8)).save(folder / "a" / f"{index + 8}.png")  # 8, 9, 10


def as_coco(folder: Path, masks: np.ndarray, text: bool = True, **fields: Any) -> None:
    content = {
        "images": [{"id": 7, "file_name": "val/a.jpg"}, {"id": 8, "file_name": "val/none.jpg"}],
        "annotations": [{"image_id": 7, "segmentation": rle(mask, text), **fields} for mask in masks],
    }
    (folder / "instances.json").write_text(json.dumps(content))


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "bool": as_npz,
    "uint8": lambda folder, masks: as_npz(folder, masks.astype(np.uint8)),
    "255": lambda folder, masks: as_npz(folder, masks.astype(np.uint8) * 255),
    "int64": lambda folder, masks: as_npz(folder, masks.astype(np.int64)),
    "logits": lambda folder, masks: as_npz(folder, np.where(masks, 3.5, -2.0).astype(np.float16)),
    "pngs": as_pngs,
    "pngs of 1": lambda folder, masks: as_pngs(folder, masks, 1),
    "coco": as_coco,
    "coco lists": lambda folder, masks: as_coco(folder, masks, text=False),
    "coco results": lambda folder, masks: (folder / "r.json").write_text(
        json.dumps([{"image_id": "a", "segmentation": rle(mask), "score": 0.5} for mask in masks])
    ),
    "names": lambda folder, masks: (folder / "r.json").write_text(
        json.dumps({"annotations": [{"file_name": "x/a.png", "segmentation": rle(mask)} for mask in masks]})
    ),
    "own json": lambda folder, masks: (folder / "a.json").write_text(
        json.dumps({"annotations": [{"segmentation": rle(mask)} for mask in masks]})
    ),
}


def read(folder: Path, name: str = "somewhere/a.jpg") -> torch.Tensor:
    return Files(folder).propose([photo(*SIZE)], names=[name])[0].masks


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_masks_in_order(layout, tmp_path):
    masks = some()
    WRITERS[layout](tmp_path, masks)
    found = read(tmp_path)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy() >= 0, masks)
    assert set(np.unique(found.numpy())) == ({-2.0, 3.5} if layout == "logits" else {-10.0, 10.0})


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
def test_one_png_of_ids(mode, tmp_path):
    """0 is no mask; ids ascend; of colours R + 256 G + 65536 B."""
    ids = np.zeros(SIZE, dtype=np.int64)
    ids[2:8, 3:9], ids[10:, 20:], ids[15:20, 2:6] = 5, 3, (255 if mode in "LP" else 700)
    if mode == "RGB":
        ids[0, 0] = 70_000
        picture = Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8))
    else:
        picture = Image.fromarray(ids.astype(np.uint16 if mode == "I;16" else np.uint8))
        if mode == "P":
            picture = Image.frombytes("P", SIZE[::-1], ids.astype(np.uint8).tobytes())
            picture.putpalette([0] * 768)
    picture.save(tmp_path / "a.png")
    found = read(tmp_path).numpy() >= 0
    values = [value for value in np.unique(ids) if value]
    assert np.array_equal(found, np.stack([ids == value for value in values]))


def test_a_file_in_place_of_a_folder(tmp_path):
    masks = some()
    as_npz(tmp_path, masks)
    as_coco(tmp_path, masks)
    alone = Files(tmp_path / "a.npz")  # of one image, whatever that is called
    assert len(alone.propose([photo(*SIZE)], names=["other.jpg"])[0].masks) == 3
    with pytest.raises(DataError, match="one image"):
        alone.propose([photo(*SIZE)], names=["third.jpg"])
    shared = Files(tmp_path / "instances.json")
    assert len(shared.propose([photo(*SIZE)], names=["a.png"])[0].masks) == 3
    assert len(shared.propose([photo(*SIZE)], names=["none.jpg"])[0].masks) == 0  # listed, without annotations
    with pytest.raises(DataError, match="No masks of the image"):
        shared.propose([photo(*SIZE)], names=["missing.jpg"])


def test_numbers_of_coco_are_file_names_with_zeros(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": 139, "segmentation": rle(some(1)[0])}]))
    assert len(read(tmp_path, "000000000139.jpg")) == 1


def test_scores_become_objectness_and_no_masks_are_none(tmp_path):
    as_npz(tmp_path, some(), objectness=np.array([0.1, 0.5, 1.0]))
    np.savez(tmp_path / "b.npz", masks=np.zeros((0, 4, 4), bool))
    (tmp_path / "c").mkdir()
    generator = load_generator("files", path=tmp_path)
    found = generator.propose([photo(*SIZE)] * 3, names=["a.jpg", "b.jpg", "c.jpg"])
    assert [len(one.masks) for one in found] == [3, 0, 0]
    torch.testing.assert_close(found[0].objectness, torch.tensor([0.1, 0.5, 1.0]))


def test_the_identity_is_the_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        as_pngs(tmp_path / name, some())
    one, two = (Files(tmp_path / name).identity() for name in ("one", "two"))
    assert one == two  # wherever it lies
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "two" / "a" / "9.png")
    assert Files(tmp_path / "two").identity() != one


def broken_npz(folder: Path) -> None:
    as_npz(folder, some())
    content = (folder / "a.npz").read_bytes()
    (folder / "a.npz").write_bytes(content[: len(content) // 2])


def huge_npz(folder: Path) -> None:
    """A header that promises more than a machine holds; no values behind it."""
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": (9000, 9000, 9000)})
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("masks.npy", header.getvalue())


def coco_with(folder: Path, **segmentation: Any) -> None:
    content = {"annotations": [{"image_id": "a", "segmentation": segmentation or [[1, 2, 3, 4, 5, 6]]}]}
    (folder / "r.json").write_text(json.dumps(content))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: (folder / "readme.txt").write_text("no"), "holds no masks"),
    "cut": (broken_npz, r"Cannot read masks from '.*a\.npz'"),
    "huge": (huge_npz, r"a\.npz.* more than can be held"),
    "another key": (lambda folder: np.savez(folder / "a.npz", mask=some()), r"a\.npz.* holds no array 'masks'.*mask"),
    "objects": (
        lambda folder: np.savez(folder / "a.npz", masks=np.array([{}], dtype=object)), "no array of numbers"
    ),
    "text": (lambda folder: np.savez(folder / "a.npz", masks=np.array([[["x"]]])), "no array of numbers"),
    "two axes": (lambda folder: as_npz(folder, some()[0]), r"\(M, h, w\)"),
    "ids": (lambda folder: as_npz(folder, some().astype(np.uint8) * 7), "0 and 1, or 0 and 255"),
    "probabilities": (lambda folder: as_npz(folder, some().astype(np.float32) * 0.9), "probabilities"),
    "nan": (lambda folder: as_npz(folder, np.where(some(), np.nan, -1.0)), "NaN"),
    "scores": (lambda folder: as_npz(folder, some(), objectness=np.ones(2)), "scores"),
    "no picture": (lambda folder: [(folder / "a").mkdir(), (folder / "a" / "1.png").write_bytes(b"x" * 99)], r"1\.png"),
    "soft png": (
        lambda folder: [(folder / "a").mkdir(), Image.linear_gradient("L").save(folder / "a" / "1.png")],
        "more than one value",
    ),
    "sizes": (
        lambda folder: [as_pngs(folder, some()), Image.new("L", (5, 5)).save(folder / "a" / "99.png")], r"99\.png' is \(5, 5\)"
    ),
    "two places": (lambda folder: [as_npz(folder, some()), as_pngs(folder, some())], "Two places"),
    "polygon": (lambda folder: coco_with(folder), r"r\.json', annotation 0: .*polygon"),
    "short runs": (lambda folder: coco_with(folder, size=[4, 4], counts=[3, 4]), "make 7 pixels"),
    "negative runs": (lambda folder: coco_with(folder, size=[4, 4], counts=[20, -4]), "make 16 pixels"),
    "bad text": (lambda folder: coco_with(folder, size=[4, 4], counts="é"), "no part of"),
    "cut text": (lambda folder: coco_with(folder, size=[4, 4], counts="Q"), "cut off"),
    "bad size": (lambda folder: coco_with(folder, size=[0, 4], counts=[0]), "size"),
    "huge size": (lambda folder: coco_with(folder, size=[10**6, 10**6], counts=[10**12]), "more than can be held"),
    "no json": (lambda folder: (folder / "r.json").write_text("{"), "Cannot read masks"),
    "nested json": (lambda folder: (folder / "r.json").write_text("[" * 100_000), "Cannot read masks"),
    "unknown id": (
        lambda folder: (folder / "r.json").write_text(json.dumps(
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "segmentation": {}}]}
        )), "no image has the id 2",
    ),
    "another image's": (lambda folder: as_coco(folder, some()), "No masks of the image"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_named(fault, tmp_path):
    write, match = WRONG[fault]
    write(tmp_path)
    with pytest.raises(DataError, match=match):
        read(tmp_path, "b.jpg" if fault == "another image's" else "a.jpg")


def test_no_place_and_no_names(tmp_path):
    with pytest.raises(DataError, match="No masks at"):
        Files(tmp_path / "missing")
    with pytest.raises(UsageError, match="generator_path"):
        load_generator("files")
    as_npz(tmp_path, some())
    with pytest.raises(UsageError, match="file name"):
        Files(tmp_path).propose([photo(*SIZE)])


def test_run_lengths_by_hand():
    assert uncompressed("0") == [0]
    mask = np.zeros((3, 4), dtype=bool)
    mask[1:, 1], mask[0, 2] = True, True
    assert runs_of(mask) == [4, 3, 5] and np.array_equal(decoded([4, 3, 5], (3, 4)), mask)
    generator = np.random.default_rng(3)
    for _ in range(20):
        noise = generator.random((17, 23)) > generator.random()
        assert np.array_equal(decoded(uncompressed(compressed(runs_of(noise))), (17, 23)), noise)


@pytest.mark.parametrize("method", ["maskclip-ding", "fisa", "fc-clip", "scn"])
def test_predict_saves_masks_that_it_can_be_given_again(method, tmp_path):
    picture = tmp_path / "street.png"
    Image.fromarray(photo(64, 96).permute(1, 2, 0).numpy()).save(picture)
    (tmp_path / "masks").mkdir()
    np.savez(tmp_path / "masks" / "street.npz", masks=some(4, (64, 96)))
    shared = [
        "predict",
        str(picture),
        "--classes",
        "sky, road, car",
        "-m",
        method,
        "--weights",
        "builtin",
        "--short-side",
        "64",
    ]
    shared += ["--square", "64", "--device", "cpu", "--option", "generator=files", "--json"]
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    assert run_command([*shared, "--option", f"generator_path={tmp_path / 'masks'}", "--save-masks", str(first)]) == 0
    found = np.load(first)
    assert np.array_equal(found["masks"] >= 0, some(4, (64, 96))) and found["masks"].dtype == np.float32
    assert found["embeddings"].shape[0] == 4 and found["embeddings"].dtype == np.float32
    assert found["scores"].shape == (4, 3) and np.allclose(found["scores"].sum(axis=1), 1, atol=1e-5)
    assert found["words"].tolist() == found["classes"].tolist() == ["sky", "road", "car"]
    assert found["word_class"].tolist() == [0, 1, 2] and np.isfinite(found["embeddings"]).all()
    assert run_command([*shared, "--option", f"generator_path={first}", "--save-masks", str(second)]) == 0
    again = np.load(second)
    assert all(np.array_equal(found[key], again[key]) for key in found.files)


def test_only_mask_methods_save_masks(tmp_path, capsys):
    Image.fromarray(photo(64, 96).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    command = [
        "predict",
        str(tmp_path / "a.png"),
        "--classes",
        "sky, road",
        "-m",
        "clip",
        "--weights",
        "builtin",
        "--device",
        "cpu",
    ]
    assert run_command([*command, "--save-masks", str(tmp_path / "a.npz")]) == 2
    assert "no masks to save" in capsys.readouterr().err and not (tmp_path / "a.npz").exists()
