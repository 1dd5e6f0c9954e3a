"""Descriptions written by a language model: one question per class and attribute, stored after each class."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ovbench.errors import UsageError
from ovbench.hashing import sha256_of
from ovbench.paths import cache_dir
from ovbench.words.prompts.chat import Chat
from ovbench.words.prompts.check import MOST_WORDS
from ovbench.words.prompts.descriptions import (
    FORMAT,
    VERSION,
    read,
    read_json,
    shipped,
    squeezed,
    with_article,
    write_json,
)

# The question of the LSMSeg thesis; "called" is the class with its article.
QUESTION = "Describe what {called} generally looks like in terms of {attribute}."
# Asked for beside it, since a chat model's usual answer is a page.
SYSTEM = (
    "You describe how things look for an image recognition system. Answer with one short phrase that can be seen in a "
    "photograph. Do not name the thing, and write no whole sentence and no list."
)
LIMIT = " Answer in at most {words} words."
ASKED = {"state": "action or state", "context": "the surroundings in which it is seen"}


def generate(
    words: Sequence[str],
    path: Path,
    chat: Chat,
    *,
    attributes: Sequence[str],
    resume: bool = False,
    on_classes: Callable[[int, int], None] = lambda done, total: None,
    on_message: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Writes descriptions of words into a file, whole after every class.

    Phrases are cached by their question, model and endpoint, so that nothing is asked twice. An answer of more than 12
    words is refused and asked for again with a limit in the question, twice; then it is recorded as missing (null).

    Args:
        words: Class words; equal spellings count once.
        path: JSON file in the format of :mod:`ovbench.words.prompts.descriptions`.
        chat: Who is asked.
        attributes: What is asked about.
        resume: Keep what the file has and ask for the rest, missing answers included.
        on_classes: Progress callback (finished, total).
        on_message: Receives a line for each refused answer.

    Returns:
        The answers that are missing, as "class (attribute)".

    Raises:
        UsageError: The file exists and is not to be resumed, or was made by another model or for other attributes.
        DataError: The file is not in the format.
        RunError: The endpoint fails; finished classes are kept.
    """
    content = _begin(path, chat.model, attributes, resume)
    classes: dict[str, Any] = content["classes"]
    todo = list({squeezed(word): word for word in reversed(words) if squeezed(word)}.values())[::-1]
    known = {squeezed(name): name for name in classes}
    for done, word in enumerate(todo):
        on_classes(done, len(todo))
        name = known.get(squeezed(word), word)
        entry = dict(classes.get(name, {}))
        if all(entry.get(attribute) for attribute in attributes):
            continue
        found = shipped().find(word)  # knows how run-together names are read
        entry.setdefault("called", [found[1] if found else with_article(word)])
        called = entry["called"][0]
        for attribute in attributes:
            entry[attribute] = entry.get(attribute) or _phrase(chat, called, attribute, on_message)
        classes[name] = entry
        write_json(path, content)
    on_classes(len(todo), len(todo))
    return [f"{name} ({key})" for name, entry in classes.items() for key in attributes if not entry.get(key)]


def _begin(path: Path, model: str, attributes: Sequence[str], resume: bool) -> dict[str, Any]:
    """The content to go on from."""
    fresh = {"format": FORMAT, "version": VERSION, "model": model, "attributes": list(attributes), "classes": {}}
    if not path.exists():
        return fresh
    if not resume:
        raise UsageError(f"'{path}' exists already: go on with --resume, or give another --out.")
    read(path)  # complains about what it cannot hold
    content = read_json(path)
    for field in ("model", "attributes"):
        if content.get(field) != fresh[field]:
            raise UsageError(
                f"'{path}' was made with {field} {content.get(field)!r}, not {fresh[field]!r}: resume it with the same, "
                "or give another --out."
            )
    return content


def _phrase(chat: Chat, called: str, attribute: str, on_message: Callable[[str], None]) -> str | None:
    """A phrase of at most 12 words from the cache or the model, or None after answers that are too long."""
    question = QUESTION.format(called=called, attribute=ASKED.get(attribute, attribute))
    kept = cache_dir() / "prompts" / f"{sha256_of([chat.url, chat.model, SYSTEM, question])}.json"
    phrase = _kept(kept)
    if phrase is not None:
        return phrase
    for limit in ("", LIMIT.format(words=MOST_WORDS), LIMIT.format(words=MOST_WORDS - 2)):
        phrase = _tidy(chat.ask(SYSTEM, question + limit))
        count = len(phrase.split())
        if 0 < count <= MOST_WORDS:
            _keep(kept, {"question": question, "model": chat.model, "phrase": phrase})
            return phrase
        on_message(f"{called}, {attribute}: refused an answer of {count} words.")
    return None


def _kept(path: Path) -> str | None:
    """The phrase in a file of the cache, or None where there is none that can be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    phrase = content.get("phrase") if isinstance(content, dict) else None
    return phrase if isinstance(phrase, str) and phrase else None


def _keep(path: Path, content: dict[str, str]) -> None:
    """Store for next time; a cache that cannot be written only costs the next run some questions."""
    with suppress(OSError):
        write_json(path, content)


def _tidy(answer: str) -> str:
    """The phrase in an answer: without quotes, full stop and a capital that only begins a sentence."""
    phrase = answer.strip(" \"'`*").rstrip(" .;:,")
    first = phrase.split(" ", 1)[0]
    return phrase[:1].lower() + phrase[1:] if first[1:].islower() else phrase
