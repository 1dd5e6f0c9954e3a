"""``ovbench prompts``: descriptions of classes shown, checked and generated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_rich, print_text, progress, say
from ovbench.cli.inputs import read_classes
from ovbench.cli.known import Verb
from ovbench.errors import DataError, UsageError

if TYPE_CHECKING:
    from ovbench.words.prompts import Described

app = typer.Typer(
    name="prompts", help="Show, check or generate descriptions of classes (--prompts lsmseg).", no_args_is_help=True
)

PROBLEMS_SHOWN = 40


@app.command(cls=Verb)
def show(
    words: Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="Class words.")] = None,
    dataset: o.Dataset = None,
    attributes: o.Attributes = None,
    file: Annotated[Path | None, typer.Option(help="Descriptions of your own (.json) instead of lsmseg.")] = None,
    json: o.Json = False,
) -> None:
    """Shows the sentences of words, as --prompts gives them to the text encoder, and what is known of each.

    \b
    Examples:
    ovbench prompts show fox "chest of drawers"
    ovbench prompts show fox --attributes colour+shape
    ovbench prompts show --dataset voc20 --json
    """
    if bool(words) == bool(dataset):
        raise UsageError("Which words? Name some, or all of a benchmark with --dataset NAME.")
    prompts = _prompts(file, attributes)
    chosen = list(dict.fromkeys(words or _vocabulary(str(dataset), every_wording=False)))
    entries = list(_entries(prompts, chosen))
    if json:
        print_json(entries)
        return
    for entry in entries:
        print_text(f"{entry['word']}: {' '.join(entry['sentences'])}")
        if words:
            for attribute, phrase in entry["attributes"].items():
                print_text(f"  {attribute:9s} {phrase}")


def _entries(prompts: Described, words: list[str]) -> Iterator[dict[str, Any]]:
    for word, sentences in zip(words, prompts.sentences(words), strict=True):
        found = prompts.descriptions.find(word)
        assert found is not None  # a word without an entry is an error of sentences()
        yield {"word": word, "called": found[1], "sentences": sentences, "attributes": dict(found[0].attributes)}


@app.command(cls=Verb)
def check(
    file: Annotated[
        Path | None, typer.Argument(help="Descriptions of your own (.json); else those of ovbench.")
    ] = None,
    dataset: o.SeveralDatasets = None,
    attributes: o.Attributes = None,
    json: o.Json = False,
) -> None:
    """Checks descriptions: format, every word and attribute present, lengths in CLIP's tokens, repeated phrases.

    Of ovbench's own the words of all benchmarks must be there, of a file those of --dataset, which may be given several times.

    \b
    Examples:
    ovbench prompts check
    ovbench prompts check mine.json --dataset voc20
    ovbench prompts check --attributes colour+material+context
    """
    from ovbench import benchmarks
    from ovbench.words.prompts import check as checks

    prompts = _prompts(file, attributes)
    required = list(dataset or ([] if file else benchmarks.names()))
    vocabularies = {name: _vocabulary(name) for name in required or benchmarks.names()}
    tokens = checks.clip_tokens()
    rows = checks.statistics(prompts, vocabularies, tokens)
    everything = {"all entries": [entry.name for entry in prompts.descriptions.entries]}
    rows += checks.statistics(prompts, everything, tokens)
    problems = [
        *checks.missing_words(prompts.descriptions, {name: vocabularies[name] for name in required}),
        *checks.phrase_problems(prompts.descriptions),
        *checks.long_sentences(prompts, tokens),
    ]
    if json:
        print_json({"vocabularies": [vars(row) for row in rows], "problems": problems})
    else:
        from rich.table import Table

        said = "+".join(prompts.attributes) or "name"
        table = Table(title=f"{prompts.descriptions.source}: {said}", title_justify="left")
        table.add_column("vocabulary")
        for head in ("words", "described", "mean tokens", "max"):
            table.add_column(head, justify="right")
        table.add_column("longest")
        for row in rows:
            mean = "-" if row.mean_tokens is None else f"{row.mean_tokens:.1f}"
            most = "-" if row.most_tokens is None else str(row.most_tokens)
            table.add_row(row.name, str(row.words), str(row.described), mean, most, row.longest or "-")
        print_rich(table)
        for problem in problems[:PROBLEMS_SHOWN]:
            say(problem)
    if problems:
        raise DataError(f"{len(problems)} problem(s) in {prompts.descriptions.source}. --json lists all.")
    if not json:
        print_text("No problems.")


@app.command(cls=Verb)
def generate(
    endpoint: Annotated[
        str,
        typer.Option(
            metavar="URL", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. There is no default."
        ),
    ],
    model: Annotated[str, typer.Option(help="Model, as the endpoint calls it.")],
    classes: o.Classes = None,
    dataset: o.Dataset = None,
    attributes: o.Attributes = None,
    out: o.DefaultOut = Path("prompts.json"),
    resume: o.Resume = False,
    key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key, if one is needed.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for one answer.")] = 120.0,
) -> None:
    """Has a language model describe classes: one question per class and attribute, the thesis' own.

    Nothing is sent anywhere but to the endpoint that you name. The file is whole after every class; answers are cached.
    With --resume what is missing is asked for again. Read what was written before you use it: models invent.

    \b
    Examples:
    ovbench prompts generate --classes "walrus, sea otter" --endpoint http://localhost:8000/v1 --model my-model
    ovbench prompts generate --classes classes.txt --endpoint https://host/v1 --model NAME --key-env API_KEY --resume
    ovbench prompts check prompts.json
    ovbench predict shore.jpg --classes "walrus, sea otter" --prompts prompts.json
    """
    from ovbench.words.prompts import ATTRIBUTES
    from ovbench.words.prompts import generate as write
    from ovbench.words.prompts.chat import Chat
    from ovbench.words.prompts.sentences import parse_attributes

    if (classes is None) == (dataset is None):
        raise UsageError("Which classes? Give --classes, or --dataset NAME.")
    chosen = ATTRIBUTES if attributes in (None, "all") else parse_attributes(attributes, ATTRIBUTES)
    if not chosen:
        raise UsageError("--attributes name: there is nothing to ask about a bare name.")
    if classes is not None:
        words = [word for words in read_classes(classes).words for word in words]
    else:
        words = _vocabulary(str(dataset), every_wording=False)
    key = None
    if key_env is not None:
        key = os.environ.get(key_env)
        if not key:
            raise UsageError(f"The environment variable '{key_env}' (--key-env) is empty: set it to the API key.")
    chat = Chat(endpoint, model, key, timeout)
    with progress("classes", "asking") as on_classes:
        missing = write.generate(
            words, out, chat, attributes=chosen, resume=resume, on_classes=on_classes, on_message=say
        )
    if missing:
        say(f"{len(missing)} missing answer(s): {', '.join(missing[:PROBLEMS_SHOWN])}. Ask again with --resume.")
    print_text(str(out))


def _prompts(file: Path | None, attributes: str | None) -> Described:
    """The prompts of a file or of ovbench under chosen attributes."""
    from ovbench.words.prompts import ATTRIBUTES, described
    from ovbench.words.prompts.sentences import FILE_SUFFIX, SHIPPED

    if attributes == "all":
        attributes = "+".join(ATTRIBUTES)

    if file is not None and file.suffix != FILE_SUFFIX:
        raise UsageError(f"'{file}': descriptions are a {FILE_SUFFIX} file, see docs/prompts.md.")
    source = SHIPPED if file is None else str(file)
    found = described(source if attributes is None else f"{source}:{attributes}")
    assert found is not None  # the name is of one of the two kinds
    return found


def _vocabulary(dataset: str, *, every_wording: bool = True) -> list[str]:
    """The words of a benchmark, in all its wordings or in the customary one."""
    from ovbench import benchmarks

    benchmark = benchmarks.get(dataset)
    names = benchmark.wordings if every_wording else benchmark.wordings[:1]
    return [word for name in names for words in benchmark.words(name) for word in words]
