"""One definition per option: a letter and a name mean the same in every verb, and help says what there really is."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from tiny_clip import photo

from ovbench import benchmarks
from ovbench.cli import known
from ovbench.cli import options as shared
from ovbench.cli.app import app, run_command
from ovbench.cli.inputs import SPLITS, choose, parse_window_batch, read_classes
from ovbench.cli.run import spec_of
from ovbench.errors import UsageError
from ovbench.evaluate.ranks import LAUNCHERS
from ovbench.networks.attention import source_names
from ovbench.registry import solver_names
from ovbench.results import store
from ovbench.spec import DTYPES, RunSpec, long_dtype, protocol_names
from ovbench.tables import published

REPO = Path(__file__).resolve().parents[1]

# What may differ between verbs, and why. Everything else is a fault.
LETTERS = {  # the same thing, of which these two verbs take several
    "-m": {"--method", "--methods"},
    "-d": {"--dataset", "--datasets"},
}
DEFAULTS = {
    "--method": "training has no customary method; elsewhere a solver or a record may stand for it",
    "--dataset": "run and train are about one; elsewhere it is an extra",
    "--out": "every verb makes something else, or prints it where nothing is said",
    "--split": "scores are of val, frequencies of train; what is prepared is all that there is",
}
TYPES = {
    "--method": "required in train",
    "--dataset": "required in run and train; 'prompts check' takes several",
    "--out": "never None where there is a default",
}


def verbs(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every verb and its command."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, inner in command.commands.items():
        yield from verbs(inner, (*path, name))


VERBS = dict(verbs())


def options(command: Any) -> Iterator[tuple[Any, Any]]:
    """The options of a command with their annotated types."""
    types = typing.get_type_hints(inspect.unwrap(command.callback))
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            yield parameter, types[parameter.name]


def by_name() -> dict[str, dict[str, tuple[Any, Any]]]:
    """(option, type) by long name and verb."""
    found: dict[str, dict[str, tuple[Any, Any]]] = defaultdict(dict)
    for verb, command in VERBS.items():
        for parameter, kind in options(command):
            for name in parameter.opts:
                if name.startswith("--"):
                    found[name][verb] = (parameter, kind)
    return found


def test_a_letter_stands_for_one_name_everywhere() -> None:
    letters: dict[str, set[str]] = defaultdict(set)
    for _, command in verbs():
        for parameter, _ in options(command):
            long = next(name for name in parameter.opts if name.startswith("--"))
            for name in parameter.opts:
                if not name.startswith("--"):
                    letters[name].add(long)
    assert {letter: names for letter, names in letters.items() if len(names) > 1} == LETTERS
    assert letters["-o"] == {"--option"}


@pytest.mark.parametrize("name", sorted(name for name, found in by_name().items() if len(found) > 1))
def test_a_name_means_the_same_everywhere(name: str) -> None:
    found = by_name()[name]
    for what, values, exceptions in (
        ("help", {verb: known.filled(option.help) for verb, (option, _) in found.items()}, {}),
        ("names", {verb: str((option.opts, option.secondary_opts)) for verb, (option, _) in found.items()}, {}),
        ("metavar", {verb: str(option.metavar) for verb, (option, _) in found.items()}, {}),
        ("panel", {verb: str(option.rich_help_panel) for verb, (option, _) in found.items()}, {}),
        ("type", {verb: str(kind) for verb, (_, kind) in found.items()}, TYPES),
        ("limits", {verb: str((option.min, option.max)) for verb, (option, _) in found.items()}, {}),
        ("default", {verb: str(option.default) for verb, (option, _) in found.items()}, DEFAULTS),
    ):
        assert len(set(values.values())) == 1 or name in exceptions, f"{what} of {name}: {values}"


def test_no_exception_is_stale() -> None:
    found = by_name()
    for name in TYPES:
        assert len({str(kind) for _, kind in found[name].values()}) > 1, name
    for name in DEFAULTS:
        required = {option.required for option, _ in found[name].values()}
        assert len({str(option.default) for option, _ in found[name].values()} | required) > 2 or len(required) > 1, (
            name
        )


def test_what_two_verbs_have_is_written_once() -> None:
    """No option of two verbs is spelled out in a verb's file."""
    several = {name for name, found in by_name().items() if len(found) > 1}
    for path in sorted((REPO / "ovbench" / "cli").glob("*.py")):
        if path.name != "options.py":
            again = several & set(re.findall(r'typer\.Option\([^)]*?"(--[a-z-]+)"', path.read_text(encoding="utf-8")))
            assert not again, f"{path.name}: {again}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_and_names_what_there_is(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"ovbench {verb}" in text.split("Examples:")[1]
    assert not re.search(r"\{[a-z_]+\}", text.split("Examples:")[1])


def test_names_in_help_come_from_where_they_are_defined() -> None:
    run = {option.name: known.filled(option.help) for option, _ in options(VERBS["run"])}
    for field, names in (
        ("solver", solver_names()),
        ("attention", source_names()),
        ("dtype", [*DTYPES, *DTYPES.values()]),
        ("launcher", LAUNCHERS),
        ("mode", ("slide", "whole")),
        ("pos_interp", ("offset", "size", "bilinear")),
        ("compile_mode", ("off", "default", "reduce-overhead", "max-autotune")),
        ("track", ("tensorboard", "mlflow", "wandb")),
    ):
        assert all(re.search(rf"(?<![\w-]){name}(?![\w-])", run[field]) for name in names), run[field]
    table = {option.name: known.filled(option.help) for option, _ in options(VERBS["table"])}
    assert all(name in table["paper"] for name in published.papers())
    source = (REPO / "ovbench" / "cli" / "options.py").read_text(encoding="utf-8")
    typed = [name for name in (*source_names(), *published.papers(), *protocol_names()) if f"{name}, " in source]
    assert typed == []


def test_shared_constants_are_those_of_their_owners() -> None:
    assert shared.RUNS == store.DEFAULT_ROOT and SPLITS[:2] == ("val", "train")


def test_every_option_that_moved_is_gone_and_its_new_name_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for (verb, old), new in known.MOVED.items():
        names = {name for option, _ in options(VERBS[verb]) for name in option.opts}
        assert old not in names and new.split()[0] in names
        arguments = [action.metavar or action.name for action in VERBS[verb].params if action.required]
        assert run_command([*verb.split(), old, "3", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"Error: '{old}' is called {new} now."), err


@pytest.mark.parametrize("verb", sorted(by_name()["--option"]))
def test_o_is_option(verb: str) -> None:
    option, kind = by_name()["--option"][verb]
    assert option.opts == ["--option", "-o"] and kind == list[str] | None


def test_o_of_predict_was_overlay(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["predict", "street.jpg", "--classes", "road", "-o", "overlay.png"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in ("--overlay", "--out", "KEY=VALUE", "'overlay.png'"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options") / "street.png"
    Image.fromarray(photo(64, 80).permute(1, 2, 0).numpy()).save(path)
    return path


def predict(picture: Path, *arguments: str) -> list[str]:
    common = ("-m", "clip", "--weights", "builtin", "--device", "cpu", "--short-side", "64", "--prompts", "plain")
    return ["predict", str(picture), *common, *arguments]


def test_window_batch_is_read_alike(monkeypatch: pytest.MonkeyPatch, picture: Path, capsys: Any) -> None:
    assert {verb for verb, (_, kind) in by_name()["--window-batch"].items() if kind is str} == {
        "run", "predict", "profile",
    }  # fmt: skip
    assert (parse_window_batch("auto"), parse_window_batch("3")) == (None, 3)
    runs = [spec_of(["-m", "clip", "-d", "voc20", "--window-batch", text]).window_batch for text in ("auto", "3")]
    assert runs == [None, 3]
    specs: list[Any] = []

    def stop(spec: Any, **how: Any) -> None:
        specs.append(spec)
        raise UsageError("stop")

    monkeypatch.setattr("ovbench.measure.profile.launch.profile", stop)
    shares = []
    for text in ("auto", "3"):
        assert run_command(["profile", "-m", "clip", "--window-batch", text]) == 2
        capsys.readouterr()
        assert run_command(predict(picture, "--classes", "road, sky", "--window-batch", text, "--json")) == 0
        shares.append(json.loads(capsys.readouterr().out)["classes"])
    assert [spec.window_batch for spec in specs] == [None, 3] and shares[0] == shares[1]
    for verb in (["run", "-d", "voc20"], ["profile"], ["predict", str(picture), "--classes", "a"]):
        for wrong in ("0", "all", "-1"):
            assert run_command([*verb, "-m", "clip", f"--window-batch={wrong}"]) == 2
            assert f"--window-batch '{wrong}': give auto or a number" in capsys.readouterr().err


def test_classes_are_a_file_a_benchmark_or_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    voc = benchmarks.get("voc21")
    found = read_classes("voc21")
    assert (found.kind, found.benchmark) == ("benchmark", "voc21") and found.words == voc.words(voc.wordings[0])
    assert [entry.name for entry in found.entries] == list(voc.class_names)
    assert "the 21 of the benchmark voc21" in capsys.readouterr().err

    found = read_classes("road, clear sky")
    assert (found.kind, found.words) == ("words", [["road"], ["clear sky"]])
    assert capsys.readouterr().err == "Classes: 2 classes given in words.\n"

    # a word near a benchmark's name is a word, and a hint
    for near in ("voc12", "VOC-21", "cityscape"):
        assert read_classes(near).kind == "words"
        assert "Did you mean: " in capsys.readouterr().err
    for far in ("sky", "cat", "road, voc12"):
        assert read_classes(far).kind == "words"
        assert "Did you mean" not in capsys.readouterr().err

    # an existing file wins over a benchmark's name, a benchmark over a word
    Path("voc21").write_text("cat: kitten\ndog\n", encoding="utf-8")
    found = read_classes("voc21")
    assert (found.kind, found.words) == ("file", [["cat", "kitten"], ["dog"]])
    assert "2 classes from the file 'voc21'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="No class list"):
        read_classes("none.txt")

    # a benchmark of one's own, by its path
    for folder, mode in (("images", "RGB"), ("labels", "L")):
        (tmp_path / "mine" / folder).mkdir(parents=True)
        Image.new(mode, (8, 8)).save(tmp_path / "mine" / folder / "a.png")
    (tmp_path / "mine" / "classes.txt").write_text("grass\nsea: ocean\n", encoding="utf-8")
    found = read_classes("./mine")
    assert (found.kind, found.words) == ("benchmark", [["grass"], ["sea", "ocean"]])
    assert read_classes("grass, " * 400).kind == "words"  # longer than the name of any file


def test_classes_of_predict(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(predict(picture, "--classes", "voc20", "--json")) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)["classes"]] == list(benchmarks.get("voc20").class_names)
    assert "the 20 of the benchmark voc20" in err


def test_classes_of_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specs: list[Any] = []

    def stop(spec: Any, **how: Any) -> None:
        specs.append(spec)
        raise UsageError("stop")

    monkeypatch.setattr("ovbench.measure.profile.launch.profile", stop)
    file = tmp_path / "classes.txt"
    file.write_text("cat: kitten, tom\ndog\n", encoding="utf-8")
    for given, expected in (
        (["--classes", "voc20"], ("voc20", None, None)),
        (["--classes", "a, b, c"], (None, 3, 3)),
        (["--classes", str(file)], (None, 2, 4)),
        (["--num-classes", "7"], (None, 7, None)),
        (["--dataset", "voc20", "--classes", "a, b"], ("voc20", 2, 2)),
    ):
        assert run_command(["profile", "-m", "clip", *given]) == 2
        spec = specs.pop()
        assert (spec.dataset, spec.classes, spec.words) == expected
    from ovbench.measure.profile.subject import _classes

    words = _classes(spec.model_copy(update={"dataset": None, "classes": 2, "words": 4}))
    assert [len(entry) for entry in words] == [1, 3]
    capsys.readouterr()
    for given, message in (
        (["--classes", "21"], "--num-classes 21 now"),
        (["--classes", "a", "--num-classes", "2"], "give one of them"),
        (["--classes", "voc20", "--dataset", "voc21"], "both name a benchmark"),
    ):
        assert run_command(["profile", "-m", "clip", *given]) == 2
        assert message in capsys.readouterr().err
    assert specs == []


def test_classes_of_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def generate(words: list[str], *rest: Any, **how: Any) -> list[str]:
        asked.append(list(words))
        return []

    monkeypatch.setattr("ovbench.words.prompts.generate.generate", generate)
    common = [
        "prompts",
        "generate",
        "--endpoint",
        "http://localhost:1/v1",
        "--model",
        "m",
        "--out",
        str(tmp_path / "p.json"),
    ]
    assert run_command([*common, "--classes", "voc20"]) == 0
    assert run_command([*common, "--dataset", "voc20"]) == 0
    assert run_command([*common, "--classes", "fox, hare"]) == 0
    assert asked[0] == asked[1] and len(asked[0]) >= 20 and asked[2] == ["fox", "hare"]
    assert "the 20 of the benchmark voc20" in capsys.readouterr().err


def test_groups_of_table_are_what_is_recorded_of_them() -> None:
    from ovbench.cli.table import _chosen
    from ovbench.registry import expand_methods, method_names

    recorded = {"sc-clip", "clip", "psp", "mine:Own"}
    assert _chosen(None, recorded, expand_methods) is None
    assert _chosen(["all"], recorded, expand_methods) == ["clip", "sc-clip"]
    assert _chosen(["closed-set", "mine:Own", "naclip"], recorded, expand_methods) == ["psp", "mine:Own", "naclip"]
    assert _chosen(["all"], set(), expand_methods) == method_names()
    assert set(_chosen(["eight"], {"voc21", "pets"}, benchmarks.expand) or ()) == {"voc21"}
    for expand, unknown in ((expand_methods, "clp"), (benchmarks.expand, "voc22")):
        with pytest.raises(UsageError, match="Did you mean"):
            _chosen([unknown], recorded, expand)


@pytest.mark.parametrize("name", DTYPES)
def test_precisions_have_short_names(name: str) -> None:
    short = spec_of(["-m", "clip", "-d", "voc20", "--device", "cpu", "--dtype", DTYPES[name]])
    assert short.dtype == name and long_dtype(name) == name
    assert short.spec_hash() == RunSpec(method="clip", dataset="voc20", device="cpu", dtype=name).spec_hash()
    from ovbench.measure.profile.record import ProfileSpec
    from ovbench.train.recipe import Recipe

    assert ProfileSpec(method="clip", dtype=DTYPES[name]).dtype == name  # type: ignore[arg-type]
    if name != "float32":
        made = Recipe(lr=1, weight_decay=0, iters=1, batch=1, crop=8, amp=DTYPES[name])  # type: ignore[arg-type]
        assert made.amp == name


def test_a_model_takes_short_names_of_precisions() -> None:
    from ovbench.models.build import build_model

    assert build_model("clip", classes=["a"], weights="builtin", templates="plain", dtype="bf16").dtype == "bfloat16"  # type: ignore[arg-type]


def test_an_unknown_precision_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "-m", "clip", "-d", "voc20", "--dtype", "int8"]) == 2
    assert "--dtype" in capsys.readouterr().err


def test_solvers_are_the_registered_ones() -> None:
    assert solver_names() and all(choose("clip", name, None, None, None, {}) for name in solver_names())
    with pytest.raises(UsageError, match="Unknown solver"):
        choose("clip", "none", None, None, None, {})
