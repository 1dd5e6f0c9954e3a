"""Benchmarks of the user, named by a path instead of an id.

A folder needs no Python: ``images/``, ``labels/`` with index PNGs of the same names, ``classes.txt``, and optionally
``dataset.json``. A ``.py`` file is a config like those in ``dataset_configs/``, with its word list beside it; it is read
as data and never run.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.config import Words, read_config, read_words, validate_config
from ovbench.benchmarks.definition import fields_of
from ovbench.benchmarks.labels import IGNORE_INDEX
from ovbench.benchmarks.layout import resolve_root
from ovbench.errors import DataError, UsageError
from ovbench.hashing import sha256_of
from ovbench.paths import trusted, user_path
from ovbench.words.class_list import ClassEntry, background_in, read_file, require_different

IMAGE_DIR, LABEL_DIR, CLASS_FILE, FACT_FILE = "images", "labels", "classes.txt", "dataset.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
WORDING = "own"
_FACTS: dict[str, tuple[type, ...]] = {
    "name": (str,), "title": (str,), "version": (int,), "background": (bool, str), "reduce_zero_label": (bool,),
}  # fmt: skip
_SYNTH: dict[str, Any] = {
    "home": "",
    "stems": ["scene_{i:04d}"],
    "short": 336,
    "long": 448,
    "portraits": True,
    "label_mode": "L",
    "void": "none",
    "things": "any",
}


# Entries of a config that name files besides ``data_prefix``.
_NAMES = ("ann_file", "img_suffix", "seg_map_suffix")
# The datasets of mmsegmentation 1.2 that have one image and one label map (``mmseg/datasets/__init__.py``).
TYPES = (
    "ADE20KDataset",
    "BDD100KDataset",
    "BaseSegDataset",
    "COCOStuffDataset",
    "ChaseDB1Dataset",
    "CityscapesDataset",
    "DRIVEDataset",
    "DarkZurichDataset",
    "DecathlonDataset",
    "HRFDataset",
    "ISPRSDataset",
    "LIPDataset",
    "LoveDADataset",
    "NYUDataset",
    "NightDrivingDataset",
    "PascalContextDataset",
    "PascalContextDataset59",
    "PascalVOCDataset",
    "PotsdamDataset",
    "REFUGEDataset",
    "STAREDataset",
    "SynapseDataset",
    "iSAIDDataset",
)


@dataclass(frozen=True)
class OwnBenchmark(Benchmark):
    """A benchmark defined by the user's files.

    Attributes:
        origin: The path as it was given.
        home: Its data root, where the definition tells: the folder itself, or the folder that a config lies in.
    """

    origin: str = ""
    home: Path | None = None

    @property
    def command_name(self) -> str:
        """The path, as it was given."""
        return self.origin

    def resolve_root(self, path: Path | str) -> Path:
        """As :meth:`Benchmark.resolve_root`, with the path in messages that name commands."""
        return resolve_root(self.layout, self.origin, self.labels_from, path)

    def fingerprint(self, root: Path | str, *, incomplete: bool = False) -> str:
        """sha256 (hex) over the files, as for every benchmark, and over the definition, which no release pins."""
        rule: list[Any] = [self.class_names, self.has_background, self.reduce_zero_label, self.word_lists]
        named = 0 if self.has_background else background_in(self.class_names)
        if self.background is not None and self.background != named:  # the names do not tell
            rule.append(self.background)
        return sha256_of([super().fingerprint(root, incomplete=incomplete), rule])


def is_path(name: str) -> bool:
    """Whether a dataset is given as a path: it has a separator, ends in ``.py``, or is ``.``, ``..`` or ``~``."""
    separators = {"/", os.sep, os.altsep} - {None}
    return name in {".", "..", "~"} or name.endswith(".py") or any(str(mark) in name for mark in separators)


def read(name: str) -> OwnBenchmark:
    """The benchmark that a folder or a config file defines.

    Raises:
        UsageError: Nothing there.
        DataError: Something is missing from the definition or does not fit together; the message names it.
    """
    path = Path(os.path.abspath(user_path(name)))
    if path.is_dir():
        return _from_folder(path, name)
    if path.is_file() and path.suffix == ".py":
        return _from_config(path, name)
    if path.is_file():
        raise UsageError(f"The dataset '{name}' is a file, but neither a .py config nor a folder.")
    raise UsageError(
        f"There is no dataset at '{name}'. Give a folder with {IMAGE_DIR}/, {LABEL_DIR}/ and {CLASS_FILE}, a .py config, "
        "or the id of a benchmark (see 'ovbench list datasets')."
    )


def _from_folder(folder: Path, origin: str) -> OwnBenchmark:
    missing = [f"{part}/" for part in (IMAGE_DIR, LABEL_DIR) if not (folder / part).is_dir()]
    missing += [CLASS_FILE] if not (folder / CLASS_FILE).is_file() else []
    if missing:
        raise DataError(
            f"The dataset folder '{origin}' has no {' and no '.join(missing)}. It needs {IMAGE_DIR}/, {LABEL_DIR}/ (PNGs "
            f"of the same names, one class number per pixel) and {CLASS_FILE} (one class per line, 'name: synonym, "
            "synonym')."
        )
    facts = _facts(folder / FACT_FILE)
    reduced = facts.get("reduce_zero_label", False)
    entries = _entries(folder / CLASS_FILE)
    image_suffix, count = _suffix(folder, IMAGE_DIR, IMAGE_SUFFIXES)
    label_suffix, _ = _suffix(folder, LABEL_DIR, (".png",))
    first = 1 if reduced else 0
    values = {
        "benchmark": {
            "title": facts.get("title", facts.get("name", folder.name)),
            "version": facts.get("version", 1),
            "num_classes": len(entries),
            **_background(facts.get("background"), [entry.name for entry in entries], folder / FACT_FILE),
            "expected_images": count,
            "labels_from": f"Every picture {IMAGE_DIR}/NAME{image_suffix} needs {LABEL_DIR}/NAME{label_suffix} with one "
            f"class number per pixel: {first} is the first line of {CLASS_FILE}, "
            f"{'0 and 255 are' if reduced else '255 is'} not counted",
        },
        "dataset": {
            "data_prefix": {"img_path": IMAGE_DIR, "seg_map_path": LABEL_DIR},
            "img_suffix": image_suffix,
            "seg_map_suffix": label_suffix,
            "reduce_zero_label": reduced,
        },
    }
    fields = fields_of(_id(facts.get("name", folder.name), origin), _complete(values, origin), _lists(entries))
    return OwnBenchmark(**fields, origin=origin, home=folder)


def _from_config(path: Path, origin: str) -> OwnBenchmark:
    values = read_config(path)
    facts, dataset = values.get("benchmark"), values.get("dataset")
    if not isinstance(facts, dict) or not isinstance(dataset, dict):
        raise DataError(f"The dataset config '{origin}' needs 'benchmark = dict(...)' and 'dataset = dict(...)'.")
    places = [path.with_suffix(".txt"), path.with_suffix(".json"), path.parent / "words" / f"{path.stem}.json"]
    source = next((place for place in places if place.is_file()), None)
    if source is None:
        looked = ", ".join(place.relative_to(path.parent).as_posix() for place in places)
        raise DataError(f"The dataset config '{origin}' has no word list beside it: looked for {looked}.")
    facts = {"title": path.stem, "version": 1, "labels_from": f"The label files are described in {path.name}", **facts}
    lists = None
    if source.suffix == ".txt":
        lists = _lists(_entries(source))
        names = lists["class_names"]
        facts = {"num_classes": len(names), "has_background": background_in(names) == 0, **facts}
    values = _complete({**values, "benchmark": facts}, origin)
    if lists is None:
        lists = read_words(source, name=path.stem, version=facts["version"], num_classes=facts["num_classes"])
    elif len(lists["class_names"]) != facts["num_classes"]:
        found = len(lists["class_names"])
        raise DataError(
            f"'{source.name}' has {found} classes, but {path.name} says num_classes={facts['num_classes']}."
        )
    lies_here = (path.parent / dataset["data_prefix"]["img_path"]).is_dir()
    fields = fields_of(_id(path.stem, origin), values, lists)
    return OwnBenchmark(**fields, origin=origin, home=path.parent if lies_here else None)


def _complete(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """The content of a config with what the user left open, checked."""
    facts = {
        "order": 1000,
        "homes": [""],
        "zero_in_most": False,  # nothing is known, so 'data check' draws no conclusions
        "has_255": True,
        **values["benchmark"],
    }
    dataset = {
        "type": "BaseSegDataset",
        "ann_file": "",
        "reduce_zero_label": False,
        "ignore_index": IGNORE_INDEX,
        **values["dataset"],
    }
    synth = values.get("synth", {})
    if isinstance(values.get("train"), dict):
        values = {**values, "train": {"ann_file": "", "stems": ["train_{i:04d}"], **values["train"]}}
    complete = {**values, "benchmark": facts, "dataset": dataset}
    complete["synth"] = {**_SYNTH, **synth} if isinstance(synth, dict) else synth
    validate_config(complete, origin)
    _require_harmless(complete, origin)
    most = dataset["ignore_index"] - dataset["reduce_zero_label"]
    if facts["num_classes"] > most:
        bits = 8 if dataset["ignore_index"] == IGNORE_INDEX else 16
        raise DataError(f"'{origin}' has {facts['num_classes']} classes, but {bits}-bit label files tell {most} apart.")
    return complete


def _require_harmless(values: dict[str, Any], origin: str) -> None:
    """Nothing, if a config of strangers names only places below its data root, and a dataset that mmseg has.

    Raises:
        DataError: A path leads out, unless the user trusts it; or a type is none of mmseg's, which mmengine would import.
    """
    if values["dataset"]["type"] not in TYPES:
        known = ", ".join(TYPES)
        raise DataError(f"'{origin}': dataset.type is {values['dataset']['type']!r}; it must be one of {known}.")
    if trusted():
        return
    named = {"synth.home": [values["synth"]["home"]], "benchmark.homes": values["benchmark"]["homes"]}
    for name in ("dataset", "train"):
        section = values.get(name) or {}
        prefix = section.get("data_prefix", {})
        named |= {f"{name}.data_prefix.{key}": [place] for key, place in prefix.items()}
        named |= {f"{name}.{key}": [section[key]] for key in _NAMES if key in section}
    for name, places in named.items():
        for place in places:
            if _leads_out(place, plain=name.endswith("suffix")):
                raise DataError(
                    f"'{origin}': {name} is {place!r}, which leads out of the data root. If you trust this config, run "
                    "'ovbench --trust ...'."
                )


def _leads_out(place: str, *, plain: bool) -> bool:
    """Whether a path from a config is absolute or goes up; a suffix must not be a path at all."""
    parts = place.replace("\\", "/").split("/")
    return "\0" in place or ".." in parts or Path(place).is_absolute() or (plain and len(parts) > 1)


def _id(name: str, origin: str) -> str:
    """A name for records and folders: letters, digits, '.', '_' and '-'."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    if not plain:
        raise DataError(f"'{origin}' gives no name for the dataset: rename the folder, or set 'name' in {FACT_FILE}.")
    return plain


def _facts(path: Path) -> dict[str, Any]:
    """The checked content of ``dataset.json``; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"'{path}' must hold an object, e.g. {{\"reduce_zero_label\": true}}.")
    if found.pop("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise DataError(
            f"'{path}': ignore_index is always 255. Write 255 into the label files where nothing is labelled, or set "
            '"reduce_zero_label": true if 0 means that.'
        )
    faults = [f"unknown key '{key}'" for key in found if key not in _FACTS]
    faults += [
        f"{key} is {found[key]!r}, not a {' or a '.join(kind.__name__ for kind in kinds)}"
        for key, kinds in _FACTS.items()
        if key in found and (type(found[key]) not in kinds or found[key] == "")
    ]
    if faults:
        raise DataError(f"'{path}' is not valid: {'; '.join(faults)}. Known keys: {', '.join(_FACTS)}.")
    return found


def _entries(path: Path) -> list[ClassEntry]:
    try:
        entries = read_file(path)
        require_different(entries, f"'{path}'")
    except UsageError as error:
        raise DataError(str(error)) from None
    return entries


def _lists(entries: list[ClassEntry]) -> dict[str, Any]:
    """Class names, colours and two wordings of a class list: with synonyms, and the names alone."""
    from ovbench.benchmarks.colours import for_classes

    names = tuple(entry.name for entry in entries)
    own: Words = tuple(entry.words for entry in entries)
    plain: Words = tuple((name,) for name in names)
    return {"class_names": names, "palette": tuple(for_classes(names)), "wordings": {WORDING: own, "plain": plain}}


def _background(told: bool | str | None, names: list[str], source: Path) -> dict[str, Any]:
    """The facts of a config that say which class is the background: as told, else the one called so."""
    if isinstance(told, str) and told not in names:
        raise DataError(
            f"'{source}': background is {told!r}, which is no class of {CLASS_FILE}. Give a name, true or false."
        )
    index = (
        background_in(names) if told is None else names.index(told) if isinstance(told, str) else 0 if told else None
    )
    return {"has_background": index == 0, "background": index}


def _suffix(folder: Path, part: str, allowed: tuple[str, ...]) -> tuple[str, int]:
    """The one suffix of the files below ``folder/part``, as written there, and how many files have it.

    Raises:
        DataError: No such file, or several suffixes, which mmseg's datasets cannot read together.
    """
    found: Counter[str] = Counter()
    example: dict[str, str] = {}
    other = None
    for base, _, files in os.walk(folder / part, followlinks=True):
        for name in sorted(files):
            suffix = os.path.splitext(name)[1]
            if name.startswith("."):
                continue
            if suffix.lower() in allowed:
                found[suffix] += 1
                example.setdefault(suffix, (Path(base) / name).relative_to(folder).as_posix())
            else:
                other = other or (Path(base) / name).relative_to(folder).as_posix()
    if not found:
        there = f" (there is '{other}')" if other else ""
        raise DataError(f"No {', '.join(allowed)} files in '{folder / part}'{there}.")
    if len(found) > 1:
        kinds = ", ".join(f"{number} {suffix} ('{example[suffix]}')" for suffix, number in found.most_common())
        raise DataError(
            f"'{folder / part}' holds files of several kinds: {kinds}. Keep one suffix, upper and lower case included."
        )
    return found.most_common()[0]
