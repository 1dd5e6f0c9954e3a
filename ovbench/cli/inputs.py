"""What the options of several verbs mean, once: methods and solvers, weights, classes, devices, KEY=VALUE, data roots."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ovbench.cli.console import say
from ovbench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from ovbench.words.class_list import ClassEntry

SPLITS = ("val", "train", "all")
_ALIKE = 0.8  # as alike as this, a single word may have been meant as a benchmark's name
_EXAMPLES = {"--set": "lr=0.01", "--slurm": "partition=gpu"}


def choose(
    method: str | None,
    solver: str | None,
    base: str | None,
    attention: str | None,
    attention_weights: str | None,
    options: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The method id and its options from ``--method``, ``--solver`` and what goes with them.

    ``--method sc-clip --solver op`` and ``--base sc-clip --solver op`` are ``discrepancy-op`` with ``base=sc-clip``.

    Raises:
        UsageError: No method, or options that contradict each other.
    """
    from ovbench.registry import SOLVER, method_info, solver_names

    options = dict(options)
    if solver is not None:
        if solver not in solver_names():
            raise unknown_name("solver", solver, solver_names())
        if method is not None and method.startswith(SOLVER):
            raise UsageError(
                f"--method {method} is a solver already: leave --solver away, or name its base with --base."
            )
        if method is not None and base is not None:
            raise UsageError("Beside --solver, --method and --base say the same: give one of them.")
        method, base = SOLVER + solver, base or method
    if method is None:
        raise UsageError("Which method? Give --method NAME ('ovbench list methods'), or --solver op --base NAME.")
    if base is not None:
        if not method.startswith(SOLVER):
            raise UsageError(f"--base is for a solver: add --solver op, or leave it away beside --method {method}.")
        method_info(base)
        options["base"] = base
    for name, value in (("attention", attention), ("attention_weights", attention_weights)):
        if value is not None:
            options[name] = value
    return method, options


def weights_of(weights: str | None, pretrained: str | None, default: str = "openai") -> str:
    """Where weights come from, by ``--weights`` or ``--pretrained``.

    Raises:
        UsageError: Both.
    """
    if weights and pretrained:
        raise UsageError("--weights and --pretrained both say where the weights come from: give one of them.")
    return weights or pretrained or default


def method_told(weights: str) -> str | None:
    """The method that a weights file says it is of; None for other weights.

    Raises:
        WeightsError: A file that cannot be read.
    """
    from ovbench.paths import user_path

    if not user_path(weights).is_file():
        return None
    from ovbench.models.build import method_of

    return method_of(weights)


def overrides_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol among a verb's parameters; None is "not set".

    Raises:
        UsageError: ``--scales`` is no list of numbers.
    """
    from ovbench.spec import Protocol

    found = {name: given[name] for name in Protocol.model_fields if name in given}
    if "scales" in found:
        found["scales"] = parse_scales(found["scales"])
    return found


def parse_options(pairs: Sequence[str] | None, flag: str = "--option", *, hint: str = "") -> dict[str, Any]:
    """``["beta=0.3"]`` as ``{"beta": "0.3"}``; the method converts to its own types.

    Args:
        pairs: As given; None is none.
        flag: The option, for the message.
        hint: What a value without "=" may have been meant as.

    Raises:
        UsageError: Not KEY=VALUE.
    """
    options = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            example = _EXAMPLES.get(flag, "beta=0.3")
            raise UsageError(f"{flag} {pair!r}: give KEY=VALUE, e.g. {flag} {example}.{hint and f' {hint}'}")
        options[key.strip()] = value.strip()
    return options


def parse_window_batch(text: str) -> int | None:
    """``"auto"`` as None, a number as it is.

    Raises:
        UsageError: Neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--window-batch {text!r}: give auto or a number from 1 up.")
    return int(text)


def parse_scales(text: str | None) -> tuple[float, ...] | None:
    """``"0.5,1"`` as (0.5, 1.0).

    Raises:
        UsageError: Not numbers.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--scales {text!r}: give factors, e.g. --scales 0.5,1,1.5.") from None


def parse_names(text: str | None, option: str) -> list[str] | None:
    """``"a, b"`` as ["a", "b"], each once; None when the option was not given.

    Raises:
        UsageError: Nothing in it.
    """
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{option} is empty. Give names separated by commas, or leave it out.")
    return names


@dataclass(frozen=True)
class Classes:
    """What ``--classes`` names, or a file of weights.

    Attributes:
        kind: What it was taken for.
        entries: The classes.
        benchmark: The benchmark's name, where it is one.
    """

    kind: Literal["file", "benchmark", "words", "weights"]
    entries: list[ClassEntry]
    benchmark: str | None = None

    @property
    def words(self) -> list[list[str]]:
        """The words of each class."""
        return [list(entry.words) for entry in self.entries]


def read_classes(given: str) -> Classes:
    """The classes of a file, else of a benchmark (also one's own, by its path), else words; says on stderr which it was.

    Raises:
        UsageError: Nothing in it, or a file that is not there.
        DataError: The benchmark of one's own is damaged.
    """
    from ovbench import benchmarks
    from ovbench.benchmarks import own
    from ovbench.paths import user_path
    from ovbench.words import class_list

    is_file = class_list.is_file(user_path(given)) and not given.endswith(".py")
    known = [] if is_file or "," in given else benchmarks.names()
    is_own = own.is_path(given) and not is_file and (given.endswith(".py") or os.path.exists(user_path(given)))
    if given in known or is_own:
        benchmark = benchmarks.get(given)
        wording = benchmark.wordings[0]
        pairs = zip(benchmark.class_names, benchmark.words(wording), strict=True)
        entries = [class_list.ClassEntry(name, tuple(words)) for name, words in pairs]
        say(f"Classes: the {len(entries)} of the benchmark {benchmark.name}, in the wording '{wording}'.")
        return Classes("benchmark", entries, given)
    entries = class_list.read(given)
    count = f"{len(entries)} class{'' if len(entries) == 1 else 'es'}"
    if is_file:
        say(f"Classes: {count} from the file '{given}'.")
        return Classes("file", entries)
    say(f"Classes: {count} given in words.")
    near = difflib.get_close_matches(given.strip().lower().replace("-", "").replace(" ", ""), known, 3, _ALIKE)
    if near:
        say(f"'{given}' is taken as a word: there is no benchmark of that name. Did you mean: {', '.join(near)}?")
    return Classes("words", entries)


def classes_of_weights(method: str, weights: str, options: Mapping[str, Any], given: str | None) -> Classes:
    """The classes of a prediction: those given, else those that the weights of a closed-set method say they know.

    A closed-set method knows its classes by name, so that words beside a name are left away.

    Raises:
        UsageError: None are given, and nothing tells them.
        WeightsError: The weights cannot be read, or are of another method.
    """
    from ovbench.models.resolve import resolve
    from ovbench.registry import method_info
    from ovbench.words.class_list import ClassEntry

    closed = not method_info(method).takes_words
    if given is not None:
        found = read_classes(given)
        entries = [ClassEntry(entry.name, (entry.name,)) for entry in found.entries] if closed else found.entries
        return replace(found, entries=entries)
    resolved = resolve(method, weights, options) if closed else None
    if resolved is None or resolved.class_names is None:
        why = (
            f"'{weights}' does not say on which classes '{method}' was trained" if closed else f"'{method}' reads words"
        )
        raise UsageError(
            f"Which classes? {why}: give --classes with words, a file with one class per line, or a benchmark's name, "
            "e.g. --classes ade20k (its classes in their order; 'ovbench list datasets')."
        )
    names = resolved.class_names
    say(f"Classes: the {len(names)} of the weights{f', those of {resolved.dataset}' if resolved.dataset else ''}.")
    return Classes("weights", [ClassEntry(name, (name,)) for name in names], resolved.dataset)


def palette_of(classes: Classes) -> list[tuple[int, int, int]]:
    """A colour for each class: the benchmark's own where the classes are those of one, else far apart."""
    from ovbench import benchmarks
    from ovbench.benchmarks import colours

    names = [entry.name for entry in classes.entries]
    if classes.benchmark in benchmarks.names():
        benchmark = benchmarks.get(str(classes.benchmark))
        if len(benchmark.palette) == len(names):
            return list(benchmark.palette)
    return list(colours.for_classes(names))


def default_device() -> str:
    """``cuda`` where torch sees a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def local_rank() -> int:
    """This process' number among those of its machine; 0 where it is alone."""
    # slurm's own name as well: torchrun's is set when the processes are joined
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def own_device(given: str | None, launcher: str) -> str:
    """The device as given or found; a GPU that is named, or this process' own among several, is torch's current one from now.

    Raises:
        UsageError: It is not there.
    """
    device = given or default_device()
    kind, _, index = device.partition(":")
    if kind != "cuda" or (launcher == "none" and not index):
        return device
    import torch

    from ovbench.models.build import require_device

    require_device(device)
    # With one visible GPU per task it is the first.
    torch.cuda.set_device(int(index) if index else local_rank() % torch.cuda.device_count())
    return kind


def require_split(split: str) -> None:
    """Nothing, if it is a split or all of them.

    Raises:
        UsageError: It is neither.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)


def root_of(name: str, given: Path | None, own: Path | None) -> Path:
    """The data root of a command: what was given, or what a benchmark of one's own brings along."""
    root = given or own
    if root is None:
        raise UsageError(f"Where is the {name} data? Give its folder with --data-root DIR.")
    return root


def require_own_scenes(demo: bool, data_root: Path | None) -> None:
    """Nothing, if ``--demo`` and ``--data-root`` are not given together.

    Raises:
        UsageError: They are.
    """
    if demo and data_root is not None:
        raise UsageError("--demo makes its own scenes: leave --data-root away, or leave --demo away.")


def thread_count(workers: int | None) -> int | None:
    """``--workers`` of what works in threads: 0 is this one alone, which is one."""
    return None if workers is None else max(1, workers)
