from __future__ import annotations

import time

import numpy as np
import pytest

from ovbench import benchmarks
from ovbench.errors import UsageError
from ovbench.networks.builtin import appearances
from ovbench.networks.builtin.scenes import TRAINING_SEEDS, Variety, appearance_key, known_words, render

PINNED_MEAN = [167.01, 163.72, 154.15]
PINNED_SHARES = {
    "bottle": 0.0308,
    "fruit": 0.1871,
    "plant": 0.3758,
    "wall-other": 0.1463,
    "waterfall": 0.1912,
    "zebra": 0.0688,
}
STREET = ["sky", "road", "building", "car", "person", "tree"]


def _words(name: str) -> list[list[str]]:
    benchmark = benchmarks.get(name)
    return benchmark.words(benchmark.wordings[0])


@pytest.mark.parametrize(("height", "width"), [(112, 112), (97, 131), (360, 240), (16, 400)])
def test_a_scene_has_the_size_asked_for_and_every_pixel_labelled(height: int, width: int) -> None:
    scene = render(STREET, height, width, 3)
    assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
    assert scene.label.shape == (height, width) and scene.label.dtype == np.int32
    assert scene.label.min() >= 0 and scene.label.max() < len(STREET)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_scene() -> None:
    first, again, other = (render(STREET, 120, 160, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    assert (first.label != other.label).mean() > 0.2


def test_the_generator_still_draws_what_the_weights_were_trained_on() -> None:
    # Loose enough for another libm (a texel on an edge may flip), tight enough for any change of the rules.
    scene = render(known_words(), 160, 224, 123)
    assert np.allclose(scene.image.reshape(-1, 3).mean(0), PINNED_MEAN, atol=0.5)
    words, counts = np.unique(scene.label, return_counts=True)
    drawn = {known_words()[word]: count / scene.label.size for word, count in zip(words, counts, strict=True)}
    assert drawn.keys() == PINNED_SHARES.keys()
    assert all(abs(drawn[word] - share) < 0.003 for word, share in PINNED_SHARES.items())


@pytest.mark.parametrize("name", benchmarks.names("eight"))
def test_every_word_of_every_wording_can_be_drawn(name: str) -> None:
    benchmark = benchmarks.get(name)
    for wording in benchmark.wordings:
        unknown = [w for group in benchmark.words(wording) for w in group if appearance_key(w) is None]
        assert unknown == []


@pytest.mark.parametrize("name", benchmarks.names("eight"))
def test_no_two_classes_of_a_benchmark_look_the_same(name: str) -> None:
    owners: dict[str | None, set[int]] = {}
    for k, group in enumerate(_words(name)):
        for word in group:
            owners.setdefault(appearance_key(word), set()).add(k)
    shared = {key for key, classes in owners.items() if len(classes) > 1}
    # The customary list words coco_object's background with "bed" too, which is a class of its own.
    assert shared == ({"bed"} if name == "coco_object" else set())


def test_synonyms_share_a_look_and_spelling_of_words_is_forgiven() -> None:
    assert appearance_key("couch") == appearance_key("sofa") == appearance_key(" Sofa ")
    assert appearance_key("traffic light") == appearance_key("traffic_light") == appearance_key("trafficlight")
    assert appearance_key("person in jeans") == appearance_key("person")
    assert appearance_key("ship") != appearance_key("boat")  # both are classes of ADE20K
    assert appearance_key("unicorn") is None


def test_synonyms_do_not_make_a_class_more_frequent() -> None:
    people = ["person", "person in shirt", "person in jeans", "person in dress", "person in skirt", "dog", "cat"]
    seen = [set(np.unique(render(["sky", "road", *people], 48, 48, seed).label) - 2) for seed in range(120)]
    person = sum(bool(found & {0, 1, 2, 3, 4}) for found in seen)
    dog = sum(5 in found for found in seen)
    assert 0.6 < person / dog < 1.6
    assert len(set.union(*seen) & {0, 1, 2, 3, 4}) == 5  # each wording is used


def test_included_words_are_seen_and_must_be_among_the_words() -> None:
    words = [word for group in _words("ade20k") for word in group]
    shown = 0
    for start in range(0, 60, 5):
        wanted = words[start : start + 5]
        label = render(words, 240, 320, start, include=wanted).label
        shown += sum(bool((label == words.index(word)).any()) for word in wanted)
    assert shown >= 57
    with pytest.raises(UsageError, match="not among the scene's words: zebra"):
        render(STREET, 64, 64, 0, include=["zebra"])


def test_things_decides_what_gets_an_outline() -> None:
    def share(things: list[str] | None) -> float:
        return float(
            np.mean([(render(["car", "road"], 80, 80, s, things=things).label == 0).mean() for s in range(30)])
        )

    assert share(["road"]) > share(["car"]) + 0.1  # a region fills what the other leaves
    assert abs(share(None) - share(["car"])) < 1e-9


def test_variety_changes_object_size() -> None:
    small, large = (
        np.mean(
            [
                (render(["road", "car"], 96, 96, s, variety=Variety(thing=(size, size))).label == 1).mean()
                for s in range(20)
            ]
        )
        for size in (0.3, 0.9)
    )
    assert large > 3 * small


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        (["sky", "unicron"], (64, 64), "Unknown scene word 'unicron'"),
        ([], (64, 64), "at least one word"),
        (["sky"], (64, 8), "at least 16 pixels, got 64 x 8"),
    ],
)
def test_wrong_input_is_named(words: list[str], size: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(words, *size, 0)


def test_a_list_of_things_alone_still_fills_the_image() -> None:
    label = render(["dog", "cat", "car"], 96, 96, 1).label
    assert len(np.unique(label)) > 1


def test_training_seeds_start_above_what_evaluation_may_use() -> None:
    assert TRAINING_SEEDS.start > 2**32


def test_rendering_is_quick_and_needs_no_torch(run_python: object) -> None:
    render(known_words(), 112, 112, 0)
    began = time.perf_counter()
    for seed in range(30):
        render(STREET, 112, 112, seed)
    assert time.perf_counter() - began < 3.0  # 0.05 s on an idle core
    code = "import sys, ovbench.networks.builtin.scenes as s; s.render(['sky'], 64, 64, 0); sys.exit('torch' in sys.modules)"
    done = run_python("-c", code)  # type: ignore[operator]
    assert done.returncode == 0, done.stderr


def test_looks_are_apart_and_within_bounds() -> None:
    table = appearances.table()
    assert len(table) >= 262
    assert len({word for entry in table for word in entry.words}) == sum(len(entry.words) for entry in table)
    looks = [appearances._look(e.base, e.accent, e.pattern, e.frequency) for e in table]
    nearest = [min(appearances._distance(a, b) for j, b in enumerate(looks) if j != i) for i, a in enumerate(looks)]
    assert min(nearest) > 10.0
    assert all(3 <= entry.frequency <= 8 and entry.place in {"top", "bottom", "any"} for entry in table)


def test_adding_a_word_changes_no_other_line(tmp_path: object) -> None:
    path = tmp_path / "table.json"  # type: ignore[operator]
    path.write_text(appearances.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    appearances.main(["--add", "Unicorn,magic horse", "--thing", "--outline", "animal", "--table", str(path)])
    before, after = appearances.read(), appearances.read(path)
    assert after[:-1] == before
    new = after[-1]
    assert new.words == ("unicorn", "magic horse") and not new.stuff and new.outline == "animal"
    look = appearances._look(new.base, new.accent, new.pattern, new.frequency)
    others = [appearances._look(e.base, e.accent, e.pattern, e.frequency) for e in before]
    assert min(appearances._distance(look, other) for other in others) > 10.0
    with pytest.raises(SystemExit):
        appearances.main(["--add", "unicorn", "--table", str(path)])
    assert appearances.read(path) == after


def test_the_table_is_written_as_it_is_read(tmp_path: object) -> None:
    path = tmp_path / "table.json"  # type: ignore[operator]
    appearances.write(appearances.read(), path)
    assert path.read_bytes() == appearances.TABLE.read_bytes()
