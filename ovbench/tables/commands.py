"""From a paper's table to the commands that make its rows, and why a row has none.

The same rules that say which run may stand beside a number say what to run for it: there is no second list.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ovbench.errors import DataError
from ovbench.registry import method_info, method_names
from ovbench.results.measured import Measured, metric
from ovbench.tables import published
from ovbench.tables.match import TRAINED_ON, TRAINING_OVERRIDES, judge
from ovbench.tables.method_defaults import changed_options, default_option, option_names
from ovbench.tables.paper import RowKey, printed_rows
from ovbench.tables.published import Printed, Wanted

DATA = "$DATA"  # stands for the folder of the datasets
_OPTION, _PROTOCOL = "method_options.", "protocol."
_TRAINING = (TRAINED_ON, TRAINING_OVERRIDES)
_NO_WEIGHTS = ("none", "clip", "grid", "random", "None", "files")  # of a further network that a method may have


@dataclass(frozen=True)
class Training:
    """What a command's weights come from.

    Attributes:
        method: Method id.
        dataset: Benchmark whose training split it is.
        arch: Encoder or architecture; None is the method's own.
        options: Options of the method.
        overrides: Fields of the recipe, ``iters=10000``.
        prompts: How words become sentences; None is the method's own.
        encoder: File of the encoder's weights that it starts from; None for methods that start from CLIP.
    """

    method: str
    dataset: str
    arch: str | None
    options: tuple[tuple[str, str], ...]
    overrides: tuple[str, ...]
    prompts: str | None
    encoder: str | None = None

    def arguments(self) -> tuple[str, ...]:
        """Of ``ovbench``."""
        words = ["train", "--method", self.method, "--dataset", self.dataset, "--data-root", DATA]
        words += ["--arch", self.arch] if self.arch else []
        words += ["--prompts", self.prompts] if self.prompts else []
        words += ["--weights", self.encoder] if self.encoder else []
        words += [word for name, value in self.options for word in ("--option", f"{name}={value}")]
        words += [word for text in self.overrides for word in ("--set", text)]
        return (*words, "--no-eval")

    @property
    def file(self) -> str:
        """A name for the weights where there are none yet."""
        parts = [
            self.method,
            self.arch or "",
            self.dataset,
            *(value for _, value in self.options),
            *self.overrides,
            self.prompts or "",
        ]
        text = "-".join(filter(None, parts))
        return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in text) + ".safetensors"

    def find(self, root: Path) -> Path | None:
        """The weights of the newest whole training of this kind under a folder of trainings."""
        from ovbench.train import record as trainings

        found = []
        for path in root.glob(f"*/{trainings.RECORD}"):
            try:
                one = trainings.read(path)
            except DataError:  # of another version, or damaged: not one to build on
                continue
            if one.status == "ok" and not one.spec.demo and one.spec.limit_iters is None and self._is(one.spec):
                found.append((one.started, path.with_name(trainings.WEIGHTS)))
        return max(found)[1] if found else None

    def _is(self, spec: Any) -> bool:
        told = changed_options(spec.method, spec.method_options, spec.arch) or {}
        asked = {name: value for name, value in self.options if str(default_option(self.method, name)) != value}
        return (
            (spec.method, spec.dataset) == (self.method, self.dataset)
            and sorted(f"{name}={getattr(spec.recipe, name)}" for name in spec.overrides) == sorted(self.overrides)
            and (self.arch is None or published.plain_arch(spec.arch) == published.plain_arch(self.arch))
            and {name: _text(value) for name, value in told.items()} == asked
            and (self.prompts is None or spec.templates == self.prompts)
            and (self.encoder is None or spec.weights != "random")
        )


@dataclass(frozen=True)
class Command:
    """One command that makes numbers of a row.

    Attributes:
        verb: ``run`` or ``profile``.
        method: Method id.
        dataset: Benchmark id.
        settings: Options of the verb by name; ``option.NAME`` is an option of the method.
        weights: What is read besides the data, in words.
        training: What makes the weights; None where they are published or random.
        entries: The printed numbers that it stands beside.
    """

    verb: str
    method: str
    dataset: str
    settings: tuple[tuple[str, str], ...]
    weights: tuple[str, ...] = ()
    training: Training | None = None
    entries: tuple[Printed, ...] = field(default=(), compare=False)

    def arguments(self, weights: str | None = None) -> tuple[str, ...]:
        """Of ``ovbench``.

        Args:
            weights: File of the trained weights; None is a name for it.
        """
        from ovbench.spec import flags

        words = [self.verb, "--method", self.method, "--dataset", self.dataset, *flags(self.settings)]
        if self.verb == "profile":
            return (*words, "--save")
        words += ["--data-root", DATA]
        if self.training is not None:
            words += ["--weights", weights or self.training.file]
        return tuple(words)


@dataclass(frozen=True)
class RowCommands:
    """A row and what makes it.

    Attributes:
        key: The row.
        commands: In the order of its numbers.
        reasons: Why some or all of its numbers have no command.
    """

    key: RowKey
    commands: tuple[Command, ...]
    reasons: tuple[str, ...]

    @property
    def label(self) -> str:
        """The row in words."""
        return ", ".join(filter(None, self.key))


def table_commands(paper: str, table: str | None) -> list[RowCommands]:
    """The rows of a table with their commands; None is the only table.

    Raises:
        UsageError: No such paper or table.
    """
    rows = printed_rows(published.table_numbers(paper, published.table_of(paper, table)))
    return [_row(key, list(entries.values())) for key, entries in rows.items()]


def _row(key: RowKey, entries: Sequence[Printed]) -> RowCommands:
    found: dict[Command, list[Printed]] = {}
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if published.is_mean(entry.dataset):
            continue
        want = published.wanted(entry)
        why = _why_not(entry, want)
        if why is not None:
            reasons.setdefault(why, []).append(f"{entry.dataset} {metric(entry.metric, want.classes).label}")
            continue
        for command in _commands(entry, want):
            found.setdefault(command, []).append(entry)
    merged = _merged([replace(command, entries=tuple(which)) for command, which in found.items()])
    told = [
        why if not merged and len(reasons) == 1 else f"{why} ({', '.join(which)})" for why, which in reasons.items()
    ]
    return RowCommands(key, tuple(merged), tuple(told))


def _why_not(entry: Printed, want: Wanted) -> str | None:
    """Why a number has no command; None where it has one."""
    if want.unknown:
        return want.unknown
    if not want.method:
        return "published only: a method that is not ours"
    if want.method not in method_names(None):
        return f"'{want.method}' is not built"
    base = want.require.get(_OPTION + "base", want.method)
    if base not in method_names(None):
        return f"its base '{base}' is not built"
    if not metric(entry.metric, want.classes).measured:
        return f"no run or profile tells {metric(entry.metric).label}"
    if want.arch and arch_name(want) is None:
        return f"no network of ours is a {entry.backbone}"
    if want.accuracy and _needs_training(want) and _trained_on(want) is None:
        return f"what {want.method} was trained on is not printed"
    return None


@cache
def _arch_names() -> dict[str, str]:
    return {published.plain_arch(name): name for name in published.arch_names()}


def arch_name(want: Wanted) -> str | None:
    """The name on our command line of a printed backbone; None where there is none."""
    return next((_arch_names()[name] for name in want.arch if name in _arch_names()), None)


def _commands(entry: Printed, want: Wanted) -> Iterable[Command]:
    """What measures a number; several where it has two benchmarks to be measured on."""
    arch = arch_name(want)
    options = {
        name.removeprefix(_OPTION): _text(value)
        for name, value in want.require.items()
        if name.startswith(_OPTION) and name.removeprefix(_OPTION) not in _TRAINING
    }
    for name, value in want.prefer.items():
        option = name.removeprefix(_OPTION)
        if name.startswith(_OPTION) and default_option(want.method, option) != value and want.accuracy:
            options[option] = _text(value)
    dataset = want.datasets[0]
    settings: dict[str, str] = {} if arch is None else {"arch": arch}
    settings |= _protocol(want, dataset)
    settings |= {f"option.{name}": value for name, value in options.items()}
    if want.accuracy:
        yield _run(want, dataset, settings, options, arch)
    else:
        others = {**want.prefer, **want.require}
        settings |= {
            {"classes": "num_classes"}.get(name, name): _text(others[name])
            for name in ("part", "features", "classes", "count", "dtype")
            if name in others
        }
        # Parameters do not depend on what is fed: whatever else is measured of the row decides.
        if entry.metric == "params":
            settings = {name: value for name, value in settings.items() if name not in ("features", "mode")}
            settings["params-only"] = "true"
        yield Command("profile", want.method, dataset, tuple(settings.items()), ("random: the cost is the same",))


def _run(want: Wanted, dataset: str, settings: dict[str, str], options: dict[str, str], arch: str | None) -> Command:
    further = tuple(_further(want.method, options))
    if not _needs_training(want):
        tag = want.weights or "openai"
        return Command(
            "run", want.method, dataset, (*settings.items(), ("pretrained", tag)), (f"CLIP '{tag}'", *further)
        )
    source = _trained_on(want)
    assert source is not None  # _why_not has seen to it
    overrides = tuple(want.require.get(_OPTION + TRAINING_OVERRIDES) or ())
    prompts = settings.get("prompts")
    closed = not method_info(want.method).takes_words
    encoder = f"{arch or 'encoder'}-imagenet.pth" if closed else None
    training = Training(want.method, source or dataset, arch, tuple(options.items()), overrides, prompts, encoder)
    told = f"trained on {training.dataset}" + (f" with {', '.join(overrides)}" if overrides else "")
    told += f", from an encoder pretrained on ImageNet ({encoder})" if encoder else ", from CLIP 'openai'"
    # The file says which network it is of.
    kept = tuple((name, value) for name, value in settings.items() if name != "arch")
    return Command("run", want.method, dataset, kept, (told, *further), training)


def _needs_training(want: Wanted) -> bool:
    return not method_info(want.method).takes_words or want.method in published.trained_methods()


def _trained_on(want: Wanted) -> str | None:
    """The benchmark that weights are trained on: '' is the one of the run; None where nothing says which."""
    told = {**want.assume, **want.require}.get(_OPTION + TRAINED_ON)
    if told is None and not method_info(want.method).takes_words:
        return ""
    return told


def _protocol(want: Wanted, dataset: str) -> dict[str, str]:
    """The preset and what differs from it."""
    from ovbench.spec import protocol

    preset = protocol(want.protocol or "paper", dataset, method=want.method)
    settings = {"protocol": want.protocol} if want.protocol else {}
    for name, value in want.require.items():
        if not name.startswith(_PROTOCOL):
            continue
        name = name.removeprefix(_PROTOCOL)
        if json.loads(json.dumps(getattr(preset, name))) != value:
            settings["prompts" if name == "templates" else name.replace("_", "-")] = _text(value)
    return settings


def _further(method: str, options: Mapping[str, str]) -> Iterable[str]:
    """The further networks that a method reads weights of, by its options ``NAME`` and ``NAME_weights``."""
    for name in option_names(method):
        kind = name.removesuffix("_weights")
        if kind != name:
            value = options.get(kind, str(default_option(method, kind)))
            if value not in _NO_WEIGHTS:
                yield f"{kind} '{value}'"


def _merged(commands: Sequence[Command]) -> list[Command]:
    """Profiles of one row as one where their settings do not contradict each other."""
    kept: list[Command] = []
    for command in commands:
        for index, other in enumerate(kept):
            both = {**dict(other.settings), **dict(command.settings)}
            same = (command.verb, command.method, command.dataset) == (other.verb, other.method, other.dataset)
            if not (same and command.verb == "profile"):
                continue
            if both != {**dict(command.settings), **dict(other.settings)}:
                continue
            if not all("params-only" in dict(one.settings) for one in (command, other)):
                both.pop("params-only", None)
            kept[index] = replace(other, settings=tuple(both.items()), entries=(*other.entries, *command.entries))
            break
        else:
            kept.append(command)
    return kept


def recorded_by(command: Command, measured: Sequence[Measured]) -> str | None:
    """Id of the newest profile that stands beside all numbers of a command; None where none does."""
    for item in sorted(measured, key=lambda item: item.finished, reverse=True):
        wants = [(published.wanted(entry), entry.unit) for entry in command.entries]
        if item.method == command.method and all(judge(item, want, unit, None).fits for want, unit in wants):
            return item.id
    return None


def _text(value: Any) -> str:
    """As it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return str(value)


def script(rows: Sequence[RowCommands], paper: str, trainings: Path) -> str:
    """The commands of a table as a shell script; comments say what each needs, and which rows have none."""
    lines = [
        f"# {published.title(paper)}",
        '# DATA is the folder of the datasets; "ovbench sweep --paper" runs these.',
        "",
    ]
    for row in rows:
        lines.append(f"# {row.label}")
        lines += [f"#   cannot run: {why}" for why in row.reasons]
        for training in dict.fromkeys(command.training for command in row.commands):
            needs = {word: None for one in row.commands if one.training == training for word in one.weights}
            lines.append(f"#   weights: {'; '.join(needs)}")
            found = None if training is None else training.find(trainings)
            if training is not None and found is None:
                lines.append(f"{line(training.arguments())}  # its model.safetensors is {training.file} below")
            lines += [
                line(one.arguments(None if found is None else str(found)))
                for one in row.commands
                if one.training == training
            ]
        lines.append("")
    return "\n".join(lines)


def line(arguments: Sequence[str]) -> str:
    """As it is typed in a shell, where :data:`DATA` is a variable."""
    return shlex.join(["ovbench", *arguments]).replace(f"'{DATA}'", f'"{DATA}"')
