"""Recipes: what a method declares, a file replaces and the command line sets."""

from __future__ import annotations

import pytest

from ovbench.errors import UsageError
from ovbench.registry import CLOSED_SET, closed_set_class, method_names
from ovbench.train.recipe import ANY, Recipe, recipe

DECLARED = {
    "ade20k": {"lr": 0.02, "weight_decay": 5e-4, "iters": 160000, "batch": 16, "crop": 512},
    ANY: {"lr": 0.001, "weight_decay": 1e-4, "epochs": 110, "batch": 16, "crop": 480},
}


def test_own_recipe_before_the_one_for_all():
    assert recipe(DECLARED, "ade20k")[0].lr == 0.02
    assert recipe(DECLARED, "context59")[0].epochs == 110


def test_changes_are_told():
    found, moved = recipe(
        DECLARED, "ade20k", changes={"lr": "0.01", "batch": "16", "ratio_range": "0.5,1.75", "flip": "0"}
    )
    assert (found.lr, found.ratio_range, found.flip, moved) == (0.01, (0.5, 1.75), 0.0, ("flip", "lr", "ratio_range"))


def test_iterations_and_epochs_replace_each_other():
    assert recipe(DECLARED, "ade20k", changes={"epochs": "2"})[0].iterations(100) == 13  # ceil(100 / 16 * 2)
    assert recipe(DECLARED, "context59", changes={"iters": "7"})[0].iterations(100) == 7
    with pytest.raises(UsageError, match="either iters or epochs"):
        recipe(DECLARED, "ade20k", changes={"iters": "7", "epochs": "7"})


@pytest.mark.parametrize(
    ("name", "text"), [("mine.json", '{"lr": 0.5, "grad_clip": 1}'), ("mine.yaml", "lr: 0.5\ngrad_clip: 1\n")]
)
def test_a_file_replaces_fields(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found, moved = recipe(DECLARED, "ade20k", tmp_path / name, {"lr": "0.25"})
    assert (found.lr, found.grad_clip, found.batch, moved) == (0.25, 1.0, 16, ("grad_clip", "lr"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning": "1"}, "Unknown field of a recipe 'learning'"),
        ({"lr": "-1"}, "--lr: .*greater than 0"),
        ({"lr": "fast"}, "--lr"),
        ({"optimizer": "lion"}, "'sgd' or 'adamw'"),
        ({"ratio_range": "2,1"}, "smaller first"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(UsageError, match=message):
        recipe(DECLARED, "ade20k", changes=changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "fields and values"), ("a: [", "neither JSON nor YAML"), ("!!python/object:os.x {}", "neither")],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        recipe(DECLARED, "ade20k", tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="Cannot read the recipe"):
        recipe(DECLARED, "ade20k", tmp_path / "none.yaml")


def test_no_recipe_at_all():
    with pytest.raises(UsageError, match=r"no recipe for voc21.*ade20k"):
        recipe({"ade20k": DECLARED["ade20k"]}, "voc21")


@pytest.mark.parametrize("name", method_names(CLOSED_SET))
def test_declared_recipes_are_complete(name):
    """Thesis: ADE20K lr .02 (ECAC .01), 160k (130 epochs); others .001, weight decay 1e-4, 60k (110 epochs)."""
    found = {key: Recipe(**fields) for key, fields in closed_set_class(name).RECIPES.items()}
    ade, context = found["ade20k"], found.get("context59", found.get(ANY))
    ecac = name.startswith("ecac-")
    assert (ade.lr, ade.weight_decay, ade.batch, ade.crop) == (0.01 if ecac else 0.02, 5e-4, 16, 512)
    assert (ade.epochs, ade.iters) == ((130, None) if ecac else (None, 160000))
    assert (context.lr, context.weight_decay) == (0.001, 1e-4)
    assert (context.epochs, context.iters) == ((110, None) if ecac else (None, 60000))
    assert context.crop == (480 if ecac else 512) and context.ratio_range == (0.5, 1.75) and context.power == 0.9
