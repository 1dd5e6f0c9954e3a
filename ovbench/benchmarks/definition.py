"""From the data of a definition, a config and its word list, to the fields of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ovbench.benchmarks.benchmark import Split, SynthRules
from ovbench.benchmarks.config import id_list
from ovbench.benchmarks.layout import Layout
from ovbench.benchmarks.panoptic_files import Panoptic
from ovbench.words.class_list import background_in


def fields_of(name: str, values: dict[str, Any], lists: dict[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`Benchmark`.

    Args:
        name: Its id.
        values: Validated content of a config.
        lists: Class names, palette and wordings, as :func:`ovbench.benchmarks.config.read_words` gives them.
    """
    facts, dataset, synth = values["benchmark"], values["dataset"], values["synth"]
    rules: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in synth.items()}
    splits = {"val": _split(values, {"expected_images": facts["expected_images"], "stems": synth["stems"]})}
    if values.get("train") is not None:
        splits["train"] = _split(values, values["train"])
    return {
        "name": name,
        "title": facts["title"],
        "version": facts["version"],
        "num_classes": facts["num_classes"],
        "class_names": lists["class_names"],
        "has_background": facts["has_background"],
        "background": _background(facts, lists["class_names"]),
        "reduce_zero_label": dataset["reduce_zero_label"],
        "ignore_index": dataset["ignore_index"],
        "raw_ids": tuple(dataset.get("raw_ids", ())),
        "group": facts.get("group", "own"),
        "expected_images": facts["expected_images"],
        "palette": lists["palette"],
        "wordings": tuple(lists["wordings"]),
        "labels_from": facts["labels_from"],
        "zero_in_most": facts["zero_in_most"],
        "has_255": facts["has_255"],
        "ignored_in_most": facts.get("ignored_in_most", False),
        "raw_gaps": tuple(facts.get("raw_gaps", ())),
        "layout": splits["val"].layout,
        "splits": splits,
        "synth_rules": SynthRules(**rules),
        "dataset_type": dataset["type"],
        "word_lists": lists["wordings"],
        "panoptic": None if values.get("panoptic") is None else _panoptic(values["panoptic"]),
        "downloads": {split: tuple(files) for split, files in values.get("downloads", {}).items()},
    }


def _background(facts: dict[str, Any], names: Sequence[str]) -> int | None:
    """Class 0 where the config says so, else the class that it says, else the one called "background"."""
    if facts["has_background"]:
        return 0
    found = facts.get("background", background_in(names))
    return found or None  # class 0 is none where the config says so


def _panoptic(given: dict[str, Any]) -> Panoptic:
    return Panoptic(id_list(given["category_ids"]), tuple(sorted(id_list(given["things"]))), given["exact_areas"])


def _split(values: dict[str, Any], given: dict[str, Any]) -> Split:
    """One split; what its section leaves out is as in ``dataset``."""
    section = {**values["dataset"], **given}
    layout = Layout(
        image_dir=section["data_prefix"]["img_path"],
        label_dir=section["data_prefix"]["seg_map_path"],
        split_file=section["ann_file"],
        image_suffix=section["img_suffix"],
        label_suffix=section["seg_map_suffix"],
        homes=tuple(values["benchmark"]["homes"]),
        panoptic_file=section.get("panoptic_file", ""),
    )
    return Split(layout, section["expected_images"], tuple(section["stems"]))
