"""Reads a benchmark's data files: ``dataset_configs/<name>.py`` as text, ``dataset_configs/words/<name>.json``.

The configs are also mmengine configs, but neither mmengine nor Python runs them here: only literals and ``dict(...)``
are understood, so reading one cannot execute anything and takes no time.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovbench.errors import DataError

_PATTERN = re.compile(r"[^{}]*\{i(:0?\d{1,2}d)?\}[^{}]*")

Words = tuple[tuple[str, ...], ...]


def _literal(node: ast.expr, where: str) -> Any:
    """The value of a literal or of ``dict(key=literal, ...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise DataError(f"{where}:{node.lineno}: dict(...) takes only key=value here.")
        return {str(keyword.arg): _literal(keyword.value, where) for keyword in node.keywords}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, where) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_literal(key, where) for key in node.keys if key is not None]
        return dict(zip(keys, (_literal(value, where) for value in node.values), strict=True))
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = f"{where}:{node.lineno}: '{ast.unparse(node)}' is not data (only literals and dict(...) are allowed)."
        raise DataError(text) from None


def read_config(path: Path) -> dict[str, Any]:
    """The top-level assignments of a data-only Python file; the file is parsed, never run.

    Raises:
        DataError: The file is missing, is not Python or holds anything but a docstring and ``name = data``.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested without end
        raise DataError(f"The dataset config '{path}' cannot be read: {error}.") from error
    values: dict[str, Any] = {}
    for position, node in enumerate(tree.body):
        if position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _literal(node.value, path.name)
        else:
            raise DataError(f"{path.name}:{node.lineno}: a dataset config holds only 'name = data' lines.")
    return values


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= 255 for item in value)


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_order(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value) and set(value) == set(range(len(value)))


def id_list(text: str) -> tuple[int, ...]:
    """The numbers of ``"1-3, 5"``: (1, 2, 3, 5).

    Raises:
        ValueError: Anything else.
    """
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low = int(first)
        ids += range(low, (int(last) if dash else low) + 1)
    return tuple(ids)


def _is_id_list(value: object) -> bool:
    try:
        ids = id_list(value) if isinstance(value, str) else ()
    except ValueError:
        return False
    return len(ids) > 0 and len(set(ids)) == len(ids)


def _is_patterns(value: object) -> bool:
    """File stems with one ``{i}`` or ``{i:06d}``: a format string of strangers can ask for more."""
    return _is_strings(value) and value != [] and all(map(_PATTERN.fullmatch, value))  # type: ignore[call-overload]


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_prefix(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"img_path", "seg_map_path"} and all(map(_is_name, value.values()))


def _is_class(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_one_of(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value in allowed


# Sections that a config may leave out.
_OPTIONAL = ("train", "panoptic", "downloads")
# section -> key -> (required, test)
_SCHEMA: Mapping[str, Mapping[str, tuple[bool, Callable[[object], bool]]]] = {
    "benchmark": {
        "title": (True, _is_name),
        "version": (True, _is_size),
        "order": (True, _is_size),
        "group": (False, _is_name),
        "num_classes": (True, _is_size),
        "has_background": (True, _is_flag),
        "background": (False, _is_class),
        "expected_images": (True, _is_size),
        "homes": (True, _is_strings),
        "labels_from": (True, _is_name),
        "zero_in_most": (True, _is_flag),
        "has_255": (True, _is_flag),
        "ignored_in_most": (False, _is_flag),
        "raw_gaps": (False, _is_ids),
    },
    "dataset": {
        "type": (True, _is_name),
        "data_prefix": (True, _is_prefix),
        "ann_file": (True, _is_text),
        "img_suffix": (True, _is_name),
        "seg_map_suffix": (True, _is_name),
        "reduce_zero_label": (True, _is_flag),
        # The largest value of 8-bit and of 16-bit files.
        "ignore_index": (True, _is_one_of(255, 65535)),
        "raw_ids": (False, _is_order),
        "panoptic_file": (False, _is_name),
    },
    # Labels that are segments: numbers as in "1-11, 13-25".
    "panoptic": {
        "category_ids": (True, _is_id_list),
        "things": (True, _is_id_list),
        "exact_areas": (True, _is_flag),
    },
    "train": {
        "data_prefix": (True, _is_prefix),
        "ann_file": (True, _is_text),
        "expected_images": (True, _is_size),
        "img_suffix": (False, _is_name),
        "seg_map_suffix": (False, _is_name),
        "stems": (True, _is_patterns),
        "panoptic_file": (False, _is_name),
    },
    # Names of files of ``dataset_configs/downloads``.
    "downloads": {
        "val": (True, _is_strings),
        "train": (False, _is_strings),
    },
    "synth": {
        "home": (True, _is_text),
        "stems": (True, _is_patterns),
        "short": (True, _is_size),
        "long": (True, _is_size),
        "portraits": (True, _is_flag),
        "label_mode": (True, _is_one_of("L", "P", "I;16", "RGB")),
        "void": (True, _is_one_of("none", "border", "patch", "strip")),
        "things": (True, _is_one_of("foreground", "any")),
        "always_zero": (False, _is_flag),
        "zero_words": (False, _is_strings),
    },
}


def validate_config(values: Mapping[str, Any], where: str) -> None:
    """Raises ``DataError`` with every fault of a benchmark config: missing, unknown or ill-typed keys."""
    faults = [f"unknown section '{name}'" for name in values if name not in _SCHEMA]
    for section, keys in _SCHEMA.items():
        given = values.get(section)
        if given is None and section in _OPTIONAL:
            continue
        if not isinstance(given, dict):
            faults.append(f"section '{section} = dict(...)' is missing")
            continue
        faults += [f"unknown key {section}.{key}" for key in given if key not in keys]
        for key, (required, test) in keys.items():
            if key not in given:
                if required:
                    faults.append(f"{section}.{key} is missing")
            elif not test(given[key]):
                faults.append(f"{section}.{key} is {given[key]!r}")
    if not faults:
        faults = _contradictions(values)
    if faults:
        raise DataError(f"The dataset config '{where}' is not valid: {'; '.join(faults)}.")


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What does not fit together in a config whose keys are all fine."""
    classes, dataset = values["benchmark"]["num_classes"], values["dataset"]
    raw_ids, wide = dataset.get("raw_ids"), dataset["ignore_index"] > 255
    faults = []
    background = values["benchmark"].get("background")
    if background is not None and (background >= classes or values["benchmark"]["has_background"] != (background == 0)):
        faults.append(f"benchmark.background must be one of 0..{classes - 1}, and 0 where has_background is True only")
    if raw_ids is not None and (len(raw_ids) != classes or dataset["reduce_zero_label"]):
        faults.append(f"dataset.raw_ids must order 0..{classes - 1}, and cannot be combined with reduce_zero_label")
    if wide and (dataset["reduce_zero_label"] or raw_ids is not None):
        faults.append("16-bit labels (ignore_index 65535) are read as they are: no reduce_zero_label, no raw_ids")
    if wide and "train" in values:
        faults.append("16-bit labels can be evaluated, not trained on: mmseg's transforms would not crop them")
    return faults + _panoptic_contradictions(values)


def _panoptic_contradictions(values: Mapping[str, Any]) -> list[str]:
    """What does not fit together where labels are segments, or are said to be in one place only."""
    classes, dataset, panoptic = values["benchmark"]["num_classes"], values["dataset"], values.get("panoptic")
    parts = {"dataset": dataset, "train": values.get("train")}
    has_file = {name: "panoptic_file" in part for name, part in parts.items() if part is not None}
    rgb = values["synth"]["label_mode"] == "RGB"
    if panoptic is None:
        faults = [f"{name}.panoptic_file needs a section panoptic" for name, there in has_file.items() if there]
        return faults + (["synth.label_mode RGB is for labels that are segments"] if rgb else [])
    faults = [f"{name}.panoptic_file is missing" for name, there in has_file.items() if not there]
    if len(id_list(panoptic["category_ids"])) != classes:
        faults.append(f"panoptic.category_ids must have an id for each of {classes} classes")
    if not set(id_list(panoptic["things"])) <= set(range(classes)):
        faults.append(f"panoptic.things must be labels 0..{classes - 1}")
    if dataset["type"] != "PanopticDataset" or dataset["reduce_zero_label"] or dataset["ignore_index"] != 255:
        faults.append("labels that are segments need type PanopticDataset, reduce_zero_label False, ignore_index 255")
    if dataset.get("raw_ids") is not None or dataset["ann_file"]:
        faults.append("labels that are segments have neither raw_ids nor an ann_file")
    return faults if rgb else [*faults, "synth.label_mode must be RGB"]


def read_words(path: Path, *, name: str, version: int, num_classes: int) -> dict[str, Any]:
    """The checked content of a word list: ``class_names``, ``palette`` and ``wordings`` as nested tuples.

    A wording given as the name of another one is that one's list.

    Raises:
        DataError: Missing or unreadable file, another benchmark or version, or lists that do not have one entry with
            at least one word for each of the ``num_classes`` classes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"The word list '{path}' of benchmark '{name}' cannot be read: {error}.") from error
    where = f"The word list '{path.name}'"
    if not isinstance(content, dict) or set(content) != {"benchmark", "version", "class_names", "palette", "wordings"}:
        raise DataError(f"{where} must have exactly the keys benchmark, version, class_names, palette, wordings.")
    if (content["benchmark"], content["version"]) != (name, version):
        found = f"{content['benchmark']} version {content['version']}"
        raise DataError(f"{where} is for {found}, but the config is {name} version {version}.")
    names, palette = content["class_names"], content["palette"]
    if not _is_strings(names) or len(names) != num_classes or len(set(names)) != num_classes:
        raise DataError(f"{where} must name {num_classes} different classes.")
    if not isinstance(palette, list) or len(palette) != num_classes:
        raise DataError(f"{where} must have {num_classes} colours in its palette.")
    if not all(_is_ids(colour) and len(colour) == 3 for colour in palette):
        raise DataError(f"{where} has a palette entry that is not [r, g, b] with values 0..255.")
    wordings = {key: _wording(content["wordings"], key, num_classes, where) for key in content["wordings"]}
    if not wordings:
        raise DataError(f"{where} has no wording.")
    return {"class_names": tuple(names), "palette": tuple(map(tuple, palette)), "wordings": wordings}


def _wording(wordings: Mapping[str, Any], key: str, num_classes: int, where: str) -> Words:
    given = wordings[key]
    if isinstance(given, str):
        if not isinstance(wordings.get(given), list):
            raise DataError(f"{where}: wording '{key}' refers to '{given}', which is not a list of words there.")
        given = wordings[given]
    if not isinstance(given, list) or len(given) != num_classes:
        raise DataError(f"{where}: wording '{key}' must have {num_classes} entries.")
    for index, words in enumerate(given):
        if not _is_strings(words) or not words or not all(word.strip() for word in words):
            raise DataError(f"{where}: wording '{key}' has no words for class {index}: {words!r}.")
    return tuple(map(tuple, given))
