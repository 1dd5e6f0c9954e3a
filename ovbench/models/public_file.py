"""Public checkpoints of mmsegmentation's layout: what such a file says of itself beside its weights.

mmseg 0.x leaves the names of the classes as ``meta["CLASSES"]`` and its config as text in ``meta["config"]``, mmseg 1.x as
``meta["dataset_meta"]["classes"]`` and ``meta["cfg"]``. The text is read as literals, never run. Which network a file is
of, a method says: :meth:`ovbench.models.closed_set.ClosedSetMethod.public_file`.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ovbench import benchmarks
from ovbench.errors import OvbenchWarning, WeightsError

_LONGEST = 1 << 20  # characters of a config that are read
# Benchmarks by the dataset's type in mmseg's configs, for files without names of classes.
_DATASETS = {
    "ADE20KDataset": "ade20k", "CityscapesDataset": "cityscapes", "PascalContextDataset59": "context59",
    "PascalContextDataset": "context60", "COCOStuffDataset": "coco_stuff", "PascalVOCDataset": "voc21",
}  # fmt: skip


@dataclass(frozen=True)
class PublicFile:
    """What a public checkpoint is of.

    Attributes:
        file: Its name.
        method: Method id of the network.
        arches: Encoders that it can be of, the likeliest first; one where the file tells.
        options: Options of the method that it needs.
        num_classes: K of its classifier.
        class_names: Classes in label order; None where nothing tells them.
        dataset: Benchmark with these classes; None where none has them.
    """

    file: str
    method: str
    arches: tuple[str, ...]
    options: Mapping[str, Any]
    num_classes: int
    class_names: tuple[str, ...] | None
    dataset: str | None

    def require_method(self, method: str) -> None:
        """Nothing, if the weights are of that method.

        Raises:
            WeightsError: They are of another, or of the host without the add-on.
        """
        if method == self.method:
            return
        own = f"'{self.file}' is of '{self.method}' on {self.arches[0]}"
        if method.endswith(f"-{self.method}"):
            raise WeightsError(
                f"{own}, without what '{method}' puts around it: evaluate it with --method {self.method}, or train "
                f"'{method}' from it with 'ovbench train --init'."
            )
        raise WeightsError(f"{own}, not of '{method}': use --method {self.method}.")

    def encoder(self, arch: str | None) -> str:
        """The encoder: the one given, where the weights can be of it, else the likeliest, which is said where others can be.

        Raises:
            WeightsError: The weights are of another.
        """
        if arch is None:
            if len(self.arches) > 1:
                warnings.warn(
                    f"'{self.file}' does not tell the strides of its encoder: taken for {self.arches[0]}, as mmseg's "
                    f"'{self.method}' has it. Otherwise: --arch {' or '.join(self.arches[1:])}.",
                    OvbenchWarning,
                    stacklevel=2,
                )
            return self.arches[0]
        if arch in self.arches:
            return arch
        raise WeightsError(f"The weights have the encoder '{self.arches[0]}': leave '--arch {arch}' away.")

    def require_classes(self, names: Sequence[str]) -> None:
        """Nothing, if these are the classes of the weights, in their order.

        Raises:
            WeightsError: They are others; says which benchmark has the right ones.
        """
        require_names(self.file, self.class_names, names, self.dataset, self.num_classes)


def require_names(
    file: str, theirs: Sequence[str] | None, ours: Sequence[str], dataset: str | None, count: int | None = None
) -> None:
    """Nothing, if a file's classes are those asked for, in their order.

    Args:
        file: Its name, for the message.
        theirs: Its classes; None where only their number is known.
        ours: The classes asked for.
        dataset: Benchmark that has the file's.
        count: Number of its classes; None: of ``theirs``.

    Raises:
        WeightsError: They are others.
    """
    known = list(theirs or ())
    count = len(known) if count is None else count
    if count == len(ours) and all(map(same_name, known, ours)):
        return
    remedy = f": --dataset {dataset} has them" if dataset is not None else ""
    if count != len(ours):
        what = f"'{file}' tells {count} classes apart, not {len(ours)}"
    else:
        index = next(at for at in range(count) if not same_name(known[at], ours[at]))
        what = f"Class {index} of '{file}' is '{known[index]}', here it is '{ours[index]}'"
    raise WeightsError(f"{what}: a closed-set network knows the classes it was trained on, in their order{remedy}.")


def class_names_of(
    meta: Mapping[str, Any], config: Mapping[str, Any], count: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """Names of the classes and the benchmark that has them, each None where it is not known.

    Args:
        meta: The file's own facts.
        config: See :func:`config_of`.
        count: K of its classifier.

    Raises:
        WeightsError: As many names as the classifier has no outputs.
    """
    inner = meta.get("dataset_meta")
    given = (inner.get("classes") or inner.get("CLASSES")) if isinstance(inner, Mapping) else meta.get("CLASSES")
    if isinstance(given, (list, tuple)) and given and all(isinstance(name, str) for name in given):
        if len(given) != count:
            raise WeightsError(f"The file names {len(given)} classes, but its classifier has {count}.")
        names = tuple(name.strip() for name in given)
        return names, benchmark_of(names)
    dataset = _DATASETS.get(str(config.get("dataset_type")))
    if dataset is None or benchmarks.get(dataset).num_classes != count:
        return None, None
    return tuple(benchmarks.get(dataset).class_names), dataset


def benchmark_of(names: Sequence[str]) -> str | None:
    """The first benchmark of ours with these classes in this order; None where none has them."""
    for name in benchmarks.names():
        ours = benchmarks.get(name).class_names
        if len(ours) == len(names) and all(map(same_name, ours, names)):
            return name
    return None


def config_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The top level of the config that a file was trained with, as far as it is literals; empty where there is none."""
    text = meta.get("config") or meta.get("cfg")
    if not isinstance(text, str) or len(text) > _LONGEST:
        return {}
    found: dict[str, Any] = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = _literal(node.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # cut off, or not a config at all
        return {}
    return found


def _literal(node: ast.expr) -> Any:
    """A value of a config, which writes mappings as ``dict(key=value)``; None for what is no literal."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        inner = _literal(node.args[0]) if node.args else {}
        own = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        return {**(inner if isinstance(inner, dict) else {}), **own}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def tensors_below(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }


def named_settings(path: Path) -> dict[str, int]:
    """What the name of a published file tells: ``stride`` of a ResNet (``-d8_``) and ``side`` of square crops (``769x769``)."""
    found = {}
    if match := re.search(r"-d(8|16|32)(?=[-_.]|$)", path.stem):
        found["stride"] = int(match[1])
    if match := re.search(r"[_-](\d{3})x\1(?=[_-]|$)", path.stem):
        found["side"] = int(match[1])
    return found


def same_name(one: str, other: str) -> bool:
    """Whether two names of a class are the same; mmseg's list of ADE20K has a blank at the end of one."""
    return one.strip().lower() == other.strip().lower()
