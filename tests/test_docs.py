"""The commands in README.md and docs/*.md against the real command line.

Collected are all lines of fenced and indented blocks in which ``ovbench VERB`` is called: as it is, through ``python -m`` or
``torchrun ... -m``, after variables, in a pipeline; comments, redirections and a bare ``...`` are cut off. New pages are
found by themselves.

Parsed are all of them: verb, options and arguments by the real parser, the names of methods, benchmarks, protocols, solvers
and papers in them; of ``run`` and ``sweep`` also whether the options go together (the spec is made).

Executed, each once, in a temporary folder, in this process, are those that need no real data or can be given generated data:

* ``list``, ``schema``, ``env``, ``table``, ``prompts check``: as they stand (``table`` without ``--paper`` on the runs made here);
* ``data synth``: with one image per split and small;
* ``data check``: on generated data in place of its data root;
* ``run`` of training-free methods: with the built-in CLIP, on generated scenes of that benchmark, one image, attention from
  CLIP. Commands that use the same options of the same method count as one, whatever the benchmark;
* ``predict``: on a generated picture with the built-in CLIP.

Only parsed are ``train``, ``profile``, ``compare``, ``verify``, ``report``, ``sweep``, ``data prepare``, ``data frequencies``,
``prompts generate``, and runs of trained methods: other tests run those verbs. Pages that are followed step by step as
tutorials (``own-method.md``, ``own-dataset.md``) are executed by their own tests and only parsed here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from ovbench import benchmarks
from ovbench.cli.app import app, run_command
from ovbench.cli.run import spec_of
from ovbench.errors import OvbenchError
from ovbench.registry import CLOSED_SET, MASK_BASED, method_info
from ovbench.spec import protocol_names

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
TUTORIALS = {"own-method.md", "own-dataset.md"}
TRAINED = {"cat-seg", "lsmseg"}  # need weights of their own
# What comes before the command on its line, and what ends it.
_CALL = re.compile(r"(?:^|[\s;&|(])(?:\S*/)?ovbench ((?:[a-z]|-).*)$")
_BEFORE = re.compile(r"^(?:\$)?\s*(?:(?:[A-Z_]+=\S*|torchrun|srun|python3?|time)\b.*|.*\bdo)?$")
_ENDS = {"|", ">", ">>", "<", "2>", "&&", ";", "&", "||"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|\$\w+|\.\.\.")


@dataclass(frozen=True)
class Command:
    """A command of a page: its arguments behind ``ovbench``."""

    page: str
    line: int
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ovbench {shlex.join(self.arguments)}"


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of the lines of code blocks; a line that ends in a backslash is joined to the next."""
    fence, open_line = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence and line.strip() == fence:
            fence = ""
        elif fence or line.startswith("    "):
            joined = open_line + line.strip()
            open_line = joined[:-1] if joined.endswith("\\") else ""
            if not open_line:
                yield number, joined


def commands_of(page: str, text: str) -> list[Command]:
    """The calls of ovbench in the code blocks of a page."""
    found = []
    for number, line in code_lines(text):
        call = _CALL.search(line)
        if call is None or not _BEFORE.match(line[: call.start()].rstrip()):
            continue
        lexer = shlex.shlex(call[1], posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        arguments = []
        for token in lexer:
            if token in _ENDS:
                break
            if token != "...":
                arguments.append(token)
        found.append(Command(page, number, tuple(arguments)))
    return found


COMMAND: Any = typer.main.get_command(app)
COMMANDS = [command for path in PAGES for command in commands_of(path.name, path.read_text(encoding="utf-8"))]


def parsed(arguments: tuple[str, ...], *, elliptic: bool = False) -> tuple[str, dict[str, Any]]:
    """The verb and the values of its parameters; raises what the parser complains of."""
    command: Any = COMMAND
    verb, rest = [], list(arguments)
    while hasattr(command, "commands"):
        if not rest or rest[0].startswith("-"):
            return " ".join(verb), {}
        if rest[0] not in command.commands:
            raise ValueError(f"no verb '{rest[0]}'")
        verb.append(rest[0])
        command = command.commands[rest.pop(0)]
    return " ".join(verb), command.make_context(" ".join(verb), rest, resilient_parsing=elliptic).params


def is_file(name: str) -> bool:
    return "/" in name or name.endswith((".py", ".yaml", ".json")) or ".py:" in name


def names_in(verb: str, params: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, name) of all registered names among the parameters."""
    for key in ("method", "base"):
        if params.get(key):
            yield "method", params[key]
    if params.get("dataset"):
        yield "dataset", params["dataset"]
    if verb in {"data synth", "data check", "data prepare", "data frequencies"}:
        value = next((params[key] for key in ("names", "name", "dataset", "datasets") if params.get(key)), ())
        yield from (("dataset", name) for name in ((value,) if isinstance(value, str) else value))
    if params.get("protocol"):
        yield "protocol", params["protocol"]


def require_known(verb: str, params: dict[str, Any]) -> None:
    for kind, name in names_in(verb, params):
        if PLACEHOLDER.fullmatch(name) or is_file(name) or name == "all":
            continue
        if kind == "method":
            method_info(name)
        elif kind == "dataset":
            if name not in benchmarks.names():
                benchmarks.get(name)
        else:
            assert name in {*protocol_names(), "paper"}, name


def test_there_are_commands() -> None:
    pages = {command.page for command in COMMANDS}
    assert len(COMMANDS) > 60 and {"README.md", "install.md", "sweep.md", "datasets.md", "own-method.md"} <= pages


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_every_command_is_one_of_ours(page: str) -> None:
    wrong = []
    for command in COMMANDS:
        if command.page != page:
            continue
        text = (REPO / page if page == "README.md" else REPO / "docs" / page).read_text(encoding="utf-8")
        elliptic = " ... " in f"{text.splitlines()[command.line - 1]} "
        try:
            verb, params = parsed(command.arguments, elliptic=elliptic)
            require_known(verb, params)
            whole = not elliptic and not any(map(PLACEHOLDER.fullmatch, command.arguments))
            if verb == "run" and whole and not any(is_file(params[key] or "") for key in ("method", "dataset")):
                spec_of(command.arguments[1:])
            if verb == "sweep" and params["methods"] and not params["paper"]:
                from ovbench.cli.sweep import _grids
                from ovbench.evaluate.sweep.plan import _combinations
                from ovbench.spec import flags

                grids = _grids(
                    None, params["methods"], params["datasets"], params["data_root"], params["demo"],
                    params["settings"] or [], params["vary"] or [],
                )  # fmt: skip
                first = next(iter(_combinations(grids[0])))
                spec_of(["-m", first[0], "-d", first[1], *flags(first[4])])
        except Exception as error:
            said = error.format_message() if hasattr(error, "format_message") else error
            wrong.append(f"{command}\n    {said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("    ovbench run -m clip   # a comment", ["run -m clip"]),
        ("```sh\nHF_HOME=x ovbench list | head\n$ ovbench env > env.txt\n```\novbench no code", ["list", "env"]),
        ("    torchrun -n 2 -m ovbench train ... --resume", ["train --resume"]),
        ("    ovbench run \\\n        -m clip", ["run -m clip"]),
        ("    python3 -m venv $W/ovbench && x\n    import ovbench\n    pip install ovbench\n    the ovbench run", []),
        ("    for a in b; do ovbench table; done", ["table"]),
    ],
)
def test_commands_are_found(text: str, found: list[str]) -> None:
    assert [shlex.join(command.arguments) for command in commands_of("page", text)] == found


@pytest.mark.parametrize(
    "arguments",
    [("rnu",), ("run", "--methd", "clip"), ("run", "-m", "clip"), ("run", "-m", "clp", "-d", "voc21"),
     ("data", "check", "voc22"), ("table", "--nothing")],
)  # fmt: skip
def test_wrong_commands_are_noticed(arguments: tuple[str, ...]) -> None:
    with pytest.raises(Exception) as caught:  # typer has no public names for its errors
        require_known(*parsed(arguments))
    assert isinstance(caught.value, OvbenchError | ValueError) or hasattr(caught.value, "format_message")


def test_links_lead_somewhere() -> None:
    broken = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert not broken
    index = (REPO / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in PAGES[1:] if path.name != "README.md" and f"({path.name})" not in index]
    assert not missing, f"docs/README.md does not list {missing}"


# Commands that are really executed


@cache
def executable() -> dict[tuple[str, ...], Command]:
    """Commands to execute, rewritten where they need data, and the first that each stands for."""
    found: dict[tuple[str, ...], Command] = {}
    alike: set[tuple[Any, ...]] = set()
    for command in COMMANDS:
        if command.page in TUTORIALS or any(map(PLACEHOLDER.fullmatch, command.arguments)):
            continue
        try:
            verb, params = parsed(command.arguments)
        except Exception:  # reported by the test that parses
            continue
        rewritten = _rewritten(verb, params, list(command.arguments))
        if rewritten is None:
            continue
        key: tuple[Any, ...] = tuple(rewritten)
        if verb == "run":
            given = {token for token in rewritten if token.startswith("-")}
            key = (params["method"], params["solver"], params["base"], *sorted(given))
        if key not in alike:
            alike.add(key)
            found[tuple(rewritten)] = command
    return found


def _rewritten(verb: str, params: dict[str, Any], arguments: list[str]) -> list[str] | None:
    """The command as it is executed; None for those that are only parsed."""
    own = any(is_file(token) for token in arguments)
    if verb in {"list", "schema", "env", "prompts check"} or (verb == "table" and not params["paper"]):
        return None if own else arguments
    if verb == "data synth":
        kept = _without(arguments, {"--images": 1, "--train-images": 1, "--size": 1, "--out": 1})
        train = ["--train-images", "1"] if "--split" in arguments else []
        return [*kept, "--images", "1", *train, "--size", "64x80", "--out", "synth"]
    if verb == "data check":
        return [*_without(arguments, {"--data-root": 1}), "--data-root", "DATA"]
    if verb == "predict":
        kept = _without(arguments, {"--weights": 1, "--pretrained": 1, "--device": 1, "--prompts": 1, "--templates": 1})
        pictures = [token for token in kept[1:] if token.endswith((".jpg", ".png")) and Path(token).parent == Path(".")]
        if not params["classes"] or kept[1] not in pictures:
            return None
        kept[1] = "street.png"
        return [*kept, "--weights", "builtin", "--device", "cpu"]
    if verb != "run":
        return None
    method = params["method"] or params["base"] or "kk"
    if is_file(method) or is_file(params["dataset"]) or method in TRAINED or method_info(method).track == CLOSED_SET:
        return None
    if params["track"] or params["dump_config"] or params["compile_mode"] != "off" or params["activation"] != "auto":
        return None
    if any(is_file(str(params[key] or "")) for key in ("wording", "templates")):
        return None
    single = {
        "--data-root": 1, "--weights": 1, "--pretrained": 1, "--arch": 1, "--device": 1, "--attention": 1, "--limit": 1,
        "--batch": 1, "--workers": 1, "--demo": 0, "--launcher": 1,
    }  # fmt: skip
    attention = ["--attention", "clip"] if params["attention"] or params["solver"] or method == "proxyclip" else []
    if method_info(method).track == MASK_BASED:
        small = ["--square", "64"] if method_info(method).protocol == "fisa" else []
        attention += ["-o", "generator=grid", "--short-side", "64", *small]
    return [
        *_without(arguments, single), *attention, "--data-root", f"DATA/{params['dataset']}", "--weights", "builtin",
        "--limit", "1", "--workers", "0", "--device", "cpu", "--no-check",
    ]  # fmt: skip


def _without(arguments: list[str], options: dict[str, int]) -> list[str]:
    """Arguments without some options, each with its number of values."""
    kept, skip = [], 0
    for token in arguments:
        if skip:
            skip -= 1
        elif token.partition("=")[0] in options:
            skip = 0 if "=" in token else options[token]
        else:
            kept.append(token)
    return kept


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, in which the commands are executed one after the other."""
    from PIL import Image
    from tiny_clip import photo

    folder = tmp_path_factory.mktemp("docs")
    Image.fromarray(photo(64, 80).permute(1, 2, 0).numpy()).save(folder / "street.png")
    (folder / "masks").mkdir()
    own = np.zeros((2, 64, 80), bool)
    own[0, :30], own[1, 30:] = True, True
    np.savez(folder / "masks" / "street.npz", masks=own)
    return folder


@pytest.mark.parametrize("arguments", list(executable()), ids=" ".join)
def test_a_command_runs(
    arguments: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ovbench.benchmarks.synth.copies import synth

    monkeypatch.chdir(workplace)
    verb, params = parsed(arguments)
    for name in [name for kind, name in names_in(verb, params) if kind == "dataset" and verb in {"run", "data check"}]:
        synth(name, workplace / "data" / name, images=1, size=(64, 80))
    root = f"data/{next(iter(names_in(verb, params)))[1]}" if verb == "data check" else "data"
    given = [token.replace("DATA", root) for token in arguments]
    status = run_command(given)
    captured = capsys.readouterr()
    assert status == 0, f"{executable()[arguments]}\nwas run as: ovbench {shlex.join(given)}\n{captured.err}"


def test_what_is_executed_is_not_little() -> None:
    verbs = {parsed(arguments)[0] for arguments in executable()}
    assert {"list", "env", "run", "predict", "data synth", "data check", "prompts check", "table"} <= verbs
