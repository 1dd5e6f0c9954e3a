"""``ovbench predict`` on several pictures and folders, the names of its results, and the pictures it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_clip import photo, save_tiny

from ovbench import pictures
from ovbench.benchmarks import colours
from ovbench.cli.app import run_command
from ovbench.cli.pictures import gather
from ovbench.errors import DataError, UsageError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


def save(path: Path, height: int = 60, width: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    Image.fromarray(photo(height, width, seed).permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three pictures, one of them below, and things that are none; the working folder is its parent."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "photos" / "b.jpg")
    save(tmp_path / "photos" / "a.PNG", 90, 60)
    save(tmp_path / "photos" / "trip" / "b.jpg", 64, 64)
    (tmp_path / "photos" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return Path("photos")


def arguments(*given: str, weights: str) -> list[str]:
    common = ["-m", "clip", "--weights", weights, "--templates", "plain", "--device", "cpu", "--short-side", "64"]
    return ["predict", *given, "--classes", "classes.txt", *common]


@pytest.fixture
def classes(photos: Path) -> list[str]:
    Path("classes.txt").write_text("background: wall\nsky: cloud, clear sky\nroad, street\n")
    return ["background", "sky", "road"]


def names(given: list[str], out: str = "out") -> dict[str, str]:
    return {picture.path.as_posix(): picture.name for picture in gather([Path(name) for name in given], Path(out))}


def test_folders_give_their_pictures_in_order(photos: Path) -> None:
    assert list(names(["photos"]).items()) == [
        ("photos/a.PNG", "a"),
        ("photos/b.jpg", "b"),
        ("photos/trip/b.jpg", "trip/b"),
    ]


def test_result_names_never_meet(photos: Path) -> None:
    save(Path("photos/B.png"))  # as b.jpg, to a file system that knows no upper case
    save(Path("other/b.jpg"))
    save(Path("other/deep/photos/b.jpg"))
    found = names(["photos", "photos/a.PNG", "./photos/b.jpg", "other", "other/deep/photos/b.jpg"])
    assert found == {
        "photos/B.png": "B.png",
        "photos/a.PNG": "a",
        "photos/b.jpg": "photos/b.jpg",
        "photos/trip/b.jpg": "trip/b",
        "other/b.jpg": "other/b.jpg",
        "other/deep/photos/b.jpg": "deep/photos/b",
    }
    found = names(["photos/b.jpg", "other/deep/photos/b.jpg", "other/b.jpg"])
    assert found["other/b.jpg"] == "other/b.jpg"
    assert sorted(found.values()) == ["other/b.jpg", "photos/b.jpg-1", "photos/b.jpg-2"]


def test_names_are_unique_whatever_is_given(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    parts = ["a", "b.jpg", "A", "c"]
    for _ in range(60):
        folder = "/".join(generator.choice(parts, size=generator.integers(1, 4)))
        name = generator.choice(["a.jpg", "a.png", "a.jpg.jpg", "b.jpg", "A.JPG", "a.jpg-1.png"])
        target = tmp_path / "in" / folder
        if not any(parent.is_file() for parent in [target, *target.parents]) and not (target / name).is_dir():
            save(target / name, 2, 2)
    files = [path for path in (tmp_path / "in").rglob("*") if path.is_file()]
    given = [tmp_path / "in" / "a", tmp_path / "in" / "b.jpg", tmp_path / "in", *files]
    found = gather([path for path in given if path.exists()], tmp_path / "out")
    assert len(found) == len(files)
    assert len({picture.name.casefold() for picture in found}) == len(files)


def test_results_are_no_pictures(photos: Path) -> None:
    save(Path("photos/results/a-overlay.png"))
    assert "photos/results/a-overlay.png" not in names(["photos"], "photos/results")
    with pytest.raises(UsageError, match="would be read as pictures"):
        gather([photos], Path("./photos"))
    with pytest.raises(DataError, match=r"No picture in 'empty' \(looked for \.jpg"):
        Path("empty").mkdir()
        gather([Path("empty")], Path("out"))
    with pytest.raises(DataError, match=r"There is no picture or folder 'photo'"):
        gather([photos, Path("photo")], Path("out"))


def test_a_folder_and_more(
    photos: Path, classes: list[str], weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovbench.models import build as door

    built = []
    build = door.build_model
    monkeypatch.setattr(door, "build_model", lambda *a, **k: built.append(a) or build(*a, **k))
    save(Path("more.jpg"))
    assert run_command(arguments("photos", "more.jpg", "--out-dir", "results", weights=weights)) == 0
    assert len(built) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4 and out.startswith("photos/a.PNG: ") and " %" in out
    assert "4 pictures: results in 'results'" in err
    written = sorted(path.relative_to("results").as_posix() for path in Path("results").rglob("*.*"))
    stems = ["a", "b", "more", "trip/b"]
    assert written == sorted(f"{stem}-{kind}.png" for stem in stems for kind in ("labels", "overlay"))
    label = Image.open("results/a-labels.png")
    assert label.size == (60, 90) and set(np.unique(np.array(label))) <= {0, 1, 2}
    assert label.getpalette()[:9] == [value for colour in colours.for_classes(classes) for value in colour]  # type: ignore[index]

    # the same as one picture alone
    assert run_command(arguments("photos/a.PNG", "--out", "alone.png", "--save-logits", "l.npz", weights=weights)) == 0
    assert np.array_equal(np.array(Image.open("alone.png")), np.array(label))
    assert np.load("l.npz")["words"].tolist() == ["background", "wall", "sky", "cloud", "clear sky", "road", "street"]


def test_a_broken_picture_is_named_and_the_rest_go_on(
    photos: Path, classes: list[str], weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/a.PNG").write_bytes(b"no picture")
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:-100])
    save(photos / "thin.png", 2, 400)  # less than one patch once it is as long as allowed
    call = arguments("photos", "--out-dir", "results", "--json", "--patch-pad", "none", weights=weights)
    assert run_command([*call, "--short-side", "0"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [Path(item["image"]).name for item in report["images"]] == ["b.jpg", "b.jpg"]
    assert sum(entry["share"] for entry in report["images"][0]["classes"]) == pytest.approx(1)
    assert [entry["name"] for entry in report["images"][0]["classes"]] == classes
    assert {Path(item["image"]).name for item in report["failed"]} == {"a.PNG", "cut.jpg", "thin.png"}
    assert "Left out: 'photos/a.PNG' is not an image" in err and "photos/cut.jpg' is cut off" in err
    assert "Error: 3 of 5 pictures were left out: 'photos/a.PNG'" in err
    assert Path("results/trip/b-overlay.png").is_file() and not Path("results/cut-overlay.png").exists()


def test_write_chooses(photos: Path, classes: list[str], weights: str) -> None:
    call = arguments("photos/b.jpg", "--out-dir", "r", "--write", "features, logits", weights=weights)
    assert run_command(call) == 0  # one picture may have a folder as well
    assert sorted(path.name for path in Path("r").iterdir()) == ["b-features.npz", "b-logits.npz"]
    assert np.load("r/b-logits.npz")["seg_logits"].shape == (7, 60, 90)
    assert np.load("r/b-features.npz")["grid"].tolist() == [4, 6]


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["photos"], 2, "Several pictures need a folder for their results: give --out-dir DIR"),
        (["photos/b.jpg", "photos/a.PNG"], 2, "give --out-dir DIR"),
        (["photos", "--out-dir", "r", "--overlay", "x.png"], 2, "--overlay names the file of one picture.*--write overlay"),
        (["photos", "--out-dir", "r", "--write", "picture"], 2, "give some of labels, overlay, logits, features"),
        (["photos", "--out-dir", "r", "--write", ","], 2, "give some of labels"),
        (["photos/b.jpg", "--write", "labels"], 2, "give --out-dir as well"),
        (["photos", "none.jpg", "--out-dir", "r"], 3, "There is no picture or folder 'none.jpg'"),
        (["photos", "--out-dir", "classes.txt"], 5, "Cannot write 'classes.txt'"),
        (["photos", "--out-dir", "r", "--crop", "0"], 2, "--crop: Input should be greater"),
    ],
)  # fmt: skip
def test_wrong_calls_are_explained(
    photos: Path, classes: list[str], weights: str, capsys: pytest.CaptureFixture[str], given: list[str], code: int, message: str
) -> None:  # fmt: skip
    assert run_command(arguments(*given, weights=weights)) == code
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("Error: ")]
    before, _, after = message.partition(".*")
    assert before in line and after in line


def test_a_full_disk_ends_it_at_once(
    photos: Path, classes: list[str], weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "save_label_png", full)
    assert run_command(arguments("photos", "--out-dir", "r", weights=weights)) == 5
    assert "Cannot write 'r/a-labels.png': No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 7, 10, 20, 21, 64, 65, 171, 300])
def test_colours_differ_and_stay(count: int) -> None:
    found = colours.distinct(count)
    assert len(set(found)) == count and found == colours.distinct(count + 30)[:count]
    assert all(0 <= value <= 255 for colour in found for value in colour)
    assert colours.least_distance(found) > (0.09 if count <= 21 else 0.02)


def test_the_first_colours_differ_for_everyone() -> None:
    """Measured .076 among ten and .049 among twenty; a step of .02 is just seen. VOC's colours have .006 and less."""
    for sight in colours.SIGHTS:
        assert colours.least_distance(colours.distinct(10), sight) > 0.07
        assert colours.least_distance(colours.distinct(20), sight) > 0.045
        assert colours.least_distance(pictures.palette(11)[1:], sight) < 0.035
    pair = [(90, 0, 0), (0, 60, 0)]
    assert colours.least_distance(pair, "deuteranopia") < 0.5 * colours.least_distance(pair)


def test_the_background_is_grey_and_takes_no_colour() -> None:
    found = colours.for_classes(["cat", "Background", "dog"])
    assert found == [colours.distinct(2)[0], colours.GREY, colours.distinct(2)[1]]


def test_outlines_are_as_thick_as_asked() -> None:
    labels = np.zeros((40, 60), dtype=np.int64)
    labels[:, 30:] = 1
    for thickness in (1, 2, 3, 6):
        edge = pictures.edges(labels, thickness)
        assert (edge.sum(axis=1) == thickness).all() and edge[0, 30 - thickness // 2 : 30 + (thickness + 1) // 2].all()
        assert (pictures.edges(labels.T, thickness) == edge.T).all()
    assert pictures.edges(np.array([[0, 1]]), 9).all()  # thicker than the picture
    assert not pictures.edges(np.zeros((1, 1)), 1).any()


def test_blend_mixes_colours_and_dims_what_is_ignored() -> None:
    image = np.full((4, 8, 3), (200, 100, 0), dtype=np.uint8)
    labels = np.zeros((4, 8), dtype=np.int64)
    labels[:, 4:] = 255
    mixed = pictures.blend(image, labels, [(0, 0, 255)], opacity=0.5, outline=1)
    assert mixed[0, 0].tolist() == [100, 50, 128] and mixed[0, 7].tolist() == [100, 50, 0]
    faded = pictures.blend(image, labels, [(0, 0, 255)], opacity=0.5, fade=1.0)
    luma = (0.299 * 200 + 0.587 * 100) / 2
    assert np.abs(faded[0, 0].astype(float) - [luma, luma, luma + 127.5]).max() <= 1
    assert image[0, 0].tolist() == [200, 100, 0]


SIZES = [
    (48, 64),
    (64, 48),
    (375, 500),
    (1200, 1600),
    (3000, 4000),
    (4000, 600),
    (120, 1600),
    (2, 2),
    (5, 400),
    (400, 5),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
def test_an_overlay_can_be_read_at_any_size(size: tuple[int, int]) -> None:
    height, width = size
    labels = np.zeros(size, dtype=np.int64)
    labels[height // 2 :] = 1
    labels[:, width // 2 :] += 2
    image = np.full((*size, 3), 128, dtype=np.uint8)
    long = "a very long name that no legend has room for, with a description of the class " * 3
    found = pictures.overlay(image, labels, colours.distinct(4), ["sky", long, "car", "tree"])
    scale = found.width / width
    assert found.width >= 200 and (scale >= 1 or found.width == width)
    type_size = pictures.type_size(width * int(scale), height * int(scale))
    assert 12 <= type_size <= max(12, found.width // 12)
    strip = np.array(found)[height * max(1, min(int(scale), 2400 // height)) :]
    assert strip.shape[0] >= 1.7 * type_size  # the legend
    for colour in colours.distinct(4)[: len(np.unique(labels))]:  # all swatches are there, each large enough to see
        assert (strip == colour).all(axis=-1).sum() > 60
    right = strip[:, -3:]
    assert (right == 255).all(), "text runs into the edge"


def test_a_legend_keeps_the_figures_of_cut_names() -> None:
    def soft(name: str, figure: str) -> int:
        """Pixels in the grey that only figures have (and a pixel or two of smoothed letters)."""
        found = pictures.legend([(colours.GREY, name, figure)], 400, 14)
        assert found.size == (400, 37)
        return int((np.array(found)[:, 25:] == pictures.SOFT).all(axis=-1).sum())

    assert soft("", "34 %") > 10
    for length in (3, 30, 300):
        assert soft("n" * length, "34 %") >= soft("", "34 %") > soft("n" * length, "") + 10


def test_shortened_texts_fit() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    text = "traffic light at a crossing"
    assert pictures.shortened(text, font, 1000) == text
    for width in (40, 60, 100, 150):
        found = pictures.shortened(text, font, width)
        assert found is not None and found.endswith("...") and font.getlength(found) <= width
        assert text.startswith(found[:-3])
    assert pictures.shortened(text, font, 20) is None


def test_names_stand_inside_their_regions() -> None:
    """White text appears in the wide region, none in the one that has no room."""
    labels = np.zeros((200, 300), dtype=np.int64)
    labels[:, 290:] = 1
    blank = Image.new("RGB", (300, 200), (10, 60, 10))
    pictures.name_regions(blank, labels, [(0, "meadow"), (1, "fence")], 14)
    white = (np.array(blank) == 255).all(axis=-1)
    rows, columns = np.nonzero(white)
    assert white.any() and columns.max() < 288 and 60 < rows.mean() < 140
    before = np.array(blank)
    pictures.name_regions(blank, labels, [(1, "fence")], 14)
    assert (np.array(blank) == before).all()


def test_on_real_photographs(shared: Path, run_cli: Callable[..., Any]) -> None:
    """The path over real files with real label maps as predictions; how it looks is for people to judge."""
    voc = shared / "data" / "voc2012" / "VOCdevkit" / "VOC2012"
    from ovbench import benchmarks

    names = list(benchmarks.get("voc21").class_names)
    for path in sorted((voc / "SegmentationClass").glob("*.png"))[:6]:
        labels = np.array(Image.open(path)).astype(np.int64)
        image = pictures.read_rgb(voc / "JPEGImages" / f"{path.stem}.jpg")
        found = pictures.overlay(image, labels, colours.for_classes(names), names)
        assert found.width == image.shape[1] and found.height > image.shape[0]
        strip = np.array(found)[image.shape[0] :]
        for index in np.unique(labels[labels < 21]):
            assert (strip == colours.for_classes(names)[int(index)]).all(axis=-1).sum() > 60
