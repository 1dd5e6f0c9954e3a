"""Class frequencies: counted once over a split, kept under its fingerprint, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ovbench import benchmarks
from ovbench.benchmarks import frequencies as module
from ovbench.benchmarks.frequencies import class_pixels, frequencies, thirds
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.data import app
from ovbench.errors import DataError, OvbenchWarning, UsageError

TRAIN = benchmarks.get("ade20k").for_split("train")
runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("OVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frequencies"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return synth("ade20k", tmp_path / "data", images=2, train_images=6, long_tail=1.0, size=(48, 64))


@pytest.mark.parametrize("name", ["ade20k", "context59", "coco_stuff", "coco_stuff10k", "ade847", "voc20b"])
def test_counts_are_those_of_the_labels(name: str, tmp_path: Path) -> None:
    benchmark = benchmarks.get(name)
    trainable = "train" in benchmark.splits
    made = synth(name, tmp_path / "data", images=3, train_images=4 if trainable else 0, size=(48, 64))
    for split in benchmark.splits:
        looked_at = benchmark.for_split(split)
        pixels, images = (np.zeros(benchmark.num_classes, int) for _ in range(2))
        ignored = 0
        for pair in looked_at.pairs(made):
            label = looked_at.load_label(pair.label)
            for index in np.unique(label).tolist():
                count = int((label == index).sum())
                if index == benchmark.ignore_index:
                    ignored += count
                else:
                    pixels[index] += count
                    images[index] += 1
        found = frequencies(looked_at, made)
        assert found.pixels.tolist() == pixels.tolist() and found.pixels.dtype == np.int64
        assert found.images.tolist() == images.tolist()
        assert (found.ignored, found.files) == (ignored, len(looked_at.pairs(made)))
        assert class_pixels(looked_at, made).tolist() == pixels.tolist()


def test_processes_count_the_same(root: Path, cache: Path) -> None:
    alone = frequencies(TRAIN, root)
    next(cache.glob("*.json")).unlink()
    calls: list[tuple[int, int]] = []
    together = frequencies(TRAIN, root, workers=2, progress=lambda *done: calls.append(done))
    assert together.pixels.tolist() == alone.pixels.tolist() and together.images.tolist() == alone.images.tolist()
    assert calls == [(done, 6) for done in range(1, 7)]


def test_the_second_call_reads_no_label(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = frequencies(TRAIN, root)
    assert [path.name for path in cache.iterdir()] == [f"{TRAIN.fingerprint(root)}.json"]

    def refuse(*_: object) -> None:
        raise AssertionError("a label was read")

    monkeypatch.setattr(module, "_count_file", refuse)
    calls: list[tuple[int, int]] = []
    again = frequencies(TRAIN, root, progress=lambda *done: calls.append(done))
    assert again.pixels.tolist() == first.pixels.tolist() and calls == [(6, 6)]


def test_other_files_and_other_splits_are_counted_anew(root: Path, cache: Path) -> None:
    before = class_pixels(TRAIN, root)
    assert class_pixels(TRAIN.for_split("val"), root).tolist() != before.tolist()
    path = TRAIN.pairs(root)[0].label
    Image.fromarray(np.full((7, 9), 150, np.uint8)).save(path)
    after = class_pixels(TRAIN, root)
    assert after[149] == before[149] + 63 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"format": 1}', '{"format": 1, "pixels": [1], "images": [1], "ignored": 0, "files": 1}', "short"],
)
def test_a_damaged_cache_is_counted_anew_and_mended(root: Path, cache: Path, damage: str) -> None:
    first = frequencies(TRAIN, root)
    [path] = cache.iterdir()
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace('"pixels": [', '"pixels": [-') if damage == "short" else damage, encoding="utf-8")
    with pytest.warns(OvbenchWarning, match="class frequencies in .* are damaged .*: counted again"):
        again = frequencies(TRAIN, root)
    assert again.pixels.tolist() == first.pixels.tolist()
    assert path.read_text(encoding="utf-8") == good and [path.name for path in cache.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_no_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(OvbenchWarning, match="class frequencies cannot be kept"):
        assert class_pixels(TRAIN, root).sum() > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_out_of_range_name_the_file_and_leave_no_cache(root: Path, cache: Path, workers: int) -> None:
    path = TRAIN.pairs(root)[2].label
    Image.fromarray(np.full((4, 4), 151, np.uint8)).save(path)
    with pytest.raises(DataError, match=rf"{path.name}' has ids of no class: 151"):
        frequencies(TRAIN, root, workers=workers)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{path.name}' is damaged"):
        frequencies(TRAIN, root, workers=workers)
    assert not cache.exists()


def test_thirds_leave_out_what_never_occurs() -> None:
    assert thirds(np.array([5, 0, 9, 7, 1, 2, 3])) == ((2, 3), (0, 6), (5, 4))
    assert thirds(np.array([4, 4, 4, 4])) == ((0, 1), (2,), (3,))
    assert thirds(np.zeros(3, np.int64)) == ((), (), ())


def test_frequencies_as_a_command(root: Path, tmp_path: Path) -> None:
    arguments = ["frequencies", "ade20k", "--data-root", str(tmp_path / "data")]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    expected = frequencies(TRAIN, root)
    assert (content["benchmark"], content["split"], content["files"]) == ("ade20k", "train", 6)
    assert [entry["pixels"] for entry in content["classes"]] == expected.pixels.tolist()
    assert [entry["images"] for entry in content["classes"]] == expected.images.tolist()
    assert sum(entry["share"] for entry in content["classes"]) == pytest.approx(1)
    assert {entry["third"] for entry in content["classes"]} <= {"head", "middle", "tail", None}
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0 and "wall" in table.stdout and "of all pixels are ignored" in table.stdout
    val = json.loads(runner.invoke(app, [*arguments, "--split", "val", "--json"]).stdout)
    assert val["files"] == 2
    refused = runner.invoke(app, ["frequencies", "voc21", "--data-root", str(root)])
    assert isinstance(refused.exception, UsageError) and "voc21 has no training split" in str(refused.exception)
