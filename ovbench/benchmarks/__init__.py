"""The benchmarks: which images, which classes under which words, and how label files become training ids.

Importing this module needs neither torch nor mmengine nor cv2; see ``readers`` for the mmseg datasets.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ovbench.benchmarks.benchmark import Benchmark, SynthRules
from ovbench.benchmarks.config import read_config, read_words, validate_config
from ovbench.benchmarks.layout import Layout, Pair
from ovbench.errors import unknown_name
from ovbench.paths import config_dir

__all__ = ["Benchmark", "Layout", "Pair", "get", "names"]


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """The validated content of every ``dataset_configs/<name>.py`` by name, in the customary order."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(config_dir().glob("[!_]*.py")):
        values = read_config(path)
        validate_config(values, path.name)
        found[path.stem] = values
    return dict(sorted(found.items(), key=lambda item: (item[1]["benchmark"]["order"], item[0])))


def names() -> list[str]:
    """The ids of all benchmarks in the order in which papers print them: with background first."""
    return list(_configs())


@cache
def get(name: str) -> Benchmark:
    """The benchmark of that id.

    Raises:
        UsageError: No benchmark is called that; the message names the nearest.
        DataError: Its config or word list is damaged.
    """
    if name not in _configs():
        raise unknown_name("dataset", name, names(), "ovbench list datasets")
    values = _configs()[name]
    facts, dataset, synth = values["benchmark"], values["dataset"], values["synth"]
    rules: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in synth.items()}
    path = config_dir() / "words" / f"{name}.json"
    lists = read_words(path, name=name, version=facts["version"], num_classes=facts["num_classes"])
    return Benchmark(
        name=name,
        title=facts["title"],
        version=facts["version"],
        num_classes=facts["num_classes"],
        class_names=lists["class_names"],
        has_background=facts["has_background"],
        reduce_zero_label=dataset["reduce_zero_label"],
        expected_images=facts["expected_images"],
        palette=lists["palette"],
        wordings=tuple(lists["wordings"]),
        labels_from=facts["labels_from"],
        zero_in_most=facts["zero_in_most"],
        has_255=facts["has_255"],
        raw_gaps=tuple(facts.get("raw_gaps", ())),
        layout=Layout(
            image_dir=dataset["data_prefix"]["img_path"],
            label_dir=dataset["data_prefix"]["seg_map_path"],
            split_file=dataset["ann_file"],
            image_suffix=dataset["img_suffix"],
            label_suffix=dataset["seg_map_suffix"],
            homes=tuple(facts["homes"]),
        ),
        synth_rules=SynthRules(**rules),
        dataset_type=dataset["type"],
        word_lists=lists["wordings"],
    )
