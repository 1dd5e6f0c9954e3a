"""The file format of class descriptions: reading it, what it must hold, and finding a class by any spelling."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ovbench.errors import DataError
from ovbench.paths import config_dir

FORMAT, VERSION = "ovbench-prompts", 1
# The nine of the LSMSeg thesis, Table 5.3; its "action/state" is here "state".
ATTRIBUTES = ("colour", "shape", "size", "texture", "material", "position", "pattern", "state", "context")
_TOP = {"format", "version", "vocabulary", "model", "attributes", "classes"}
_VOWEL_SOUND = re.compile(r"(?!uni|use|uten|uri|eu|ewe|one\b|once)[aeiou]|hour|heir|honest", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """What is written about one class.

    Attributes:
        name: Its key in the file: the class as vocabularies spell it, e.g. ``"wall-brick"``.
        called: How a sentence names it, with the article; synonyms follow: ``("a sofa bed", "a bed settee")``.
        attributes: Attribute to phrase, e.g. ``"colour"`` to ``"red or green skin"``; an attribute may be missing.
        sentences: Whole sentences, used as they are; then there are no attributes.
        file: Where it stands.
    """

    name: str
    called: tuple[str, ...]
    attributes: Mapping[str, str]
    sentences: tuple[str, ...]
    file: Path


@dataclass(frozen=True)
class Descriptions:
    """Entries that can be found by any spelling of their class.

    Attributes:
        source: What messages call them: ``lsmseg``, or the file.
        attributes: The attributes that the entries may have.
        entries: In the order of the files.
    """

    source: str
    attributes: tuple[str, ...]
    entries: tuple[Entry, ...]
    _index: Mapping[str, tuple[Entry, str]] = field(repr=False, compare=False)

    def find(self, word: str) -> tuple[Entry, str] | None:
        """The entry of a class word and how a sentence names it, or None.

        Case, spaces and hyphens do not matter: ``chestofdrawers`` finds ``chest of drawers``. A synonym finds its
        entry and is named as itself, e.g. ``"an automobile"``.
        """
        return self._index.get(squeezed(word))


def squeezed(word: str) -> str:
    """A word with only its letters and digits, in lower case: equal for all spellings of the suite."""
    return "".join(character for character in word.lower() if character.isalnum())


def with_article(name: str) -> str:
    """A name with "a" or "an" by its first sound; for nouns that take one."""
    return f"an {name}" if _VOWEL_SOUND.match(name) else f"a {name}"


def without_article(phrase: str) -> str:
    """``"an old sofa"`` as ``"old sofa"``."""
    return re.sub(r"^(an?|the) ", "", phrase)


def described_in(source: str, attributes: tuple[str, ...], entries: Iterable[Entry]) -> Descriptions:
    """Entries with their index.

    Raises:
        DataError: Two entries are the same class, or share a synonym.
    """
    entries = tuple(entries)
    index: dict[str, tuple[Entry, str]] = {}
    for entry in entries:
        before = index.setdefault(squeezed(entry.name), (entry, entry.called[0]))[0]
        if before is not entry:
            raise DataError(f"'{entry.file}': the class '{entry.name}' is written in '{before.file.name}' already.")
    for entry in entries:
        for phrase in entry.called:
            before = index.setdefault(squeezed(without_article(phrase)), (entry, phrase))[0]
            # A class of its own comes before another one's synonym; two synonyms cannot be told apart.
            if before is not entry and squeezed(before.name) != squeezed(without_article(phrase)):
                raise DataError(f"'{entry.file}': '{entry.name}' and '{before.name}' are both called '{phrase}'.")
    return Descriptions(source, attributes, entries, index)


@cache
def shipped() -> Descriptions:
    """The descriptions that come with ovbench, ``dataset_configs/prompts/lsmseg``: every class of every benchmark.

    Raises:
        DataError: A damaged file.
    """
    found = [read(path) for path in sorted((config_dir() / "prompts" / "lsmseg").glob("*.json"))]
    return described_in("lsmseg", ATTRIBUTES, (entry for part in found for entry in part.entries))


def read(path: Path) -> Descriptions:
    """The descriptions in a JSON file; see docs/prompts.md for the format.

    Raises:
        DataError: Not to be read, or not in the format; the message names file and class.
    """
    content = read_json(path)
    if set(content) - _TOP:
        raise DataError(f"'{path}': unknown field '{min(set(content) - _TOP)}'. Known: {', '.join(sorted(_TOP))}.")
    given = content.get("attributes", list(ATTRIBUTES))
    if not isinstance(given, list) or not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise DataError(f"'{path}': 'attributes' is a list of names, e.g. [\"colour\", \"shape\"].")
    attributes = tuple(given)
    entries = [_entry(path, name, written, attributes) for name, written in content["classes"].items()]
    return described_in(str(path), attributes, entries)


def read_json(path: Path) -> dict[str, Any]:
    """The raw content of a file in the format: an object with at least format, version and some classes.

    Raises:
        DataError: Anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(path, pairs))
    except OSError as error:
        raise DataError(f"Cannot read the prompts '{path}': {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 alike
        raise DataError(f"The prompts '{path}' are no JSON: {error}.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f'\'{path}\' has no "format": "{FORMAT}". docs/prompts.md shows how such a file looks.')
    if content.get("version") != VERSION:
        raise DataError(f"'{path}' has version {content.get('version')!r}; this ovbench reads version {VERSION}.")
    if not isinstance(content.get("classes"), dict):
        raise DataError(f"'{path}' has no object 'classes' with one entry per class.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that the file is the old one or the new one, whole, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp lets only the owner read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no key is in it twice: JSON would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise DataError(f"'{path}' has '{twice}' twice.")
    return found


def _entry(path: Path, name: str, written: Any, attributes: tuple[str, ...]) -> Entry:
    """One entry, checked."""
    if not squeezed(name):
        raise DataError(f"'{path}': a class has no name.")
    where = f"'{path}', class '{name}'"
    if isinstance(written, str):
        written = [written]
    if isinstance(written, list):
        if not written or not all(_is_text(sentence) for sentence in written):
            raise DataError(f"{where}: give a sentence, or a list of sentences, without empty ones.")
        return Entry(name, (with_article(name),), {}, tuple(written), path)
    if not isinstance(written, dict):
        raise DataError(f"{where}: an entry is an object of attributes, a sentence, or a list of sentences.")
    called = written.get("called", [with_article(name)])
    if not isinstance(called, list) or not called or not all(_is_text(phrase) for phrase in called):
        raise DataError(f"{where}: 'called' is a list of names with their article, e.g. [\"a chest of drawers\"].")
    found = {}
    for attribute, phrase in written.items():
        if attribute == "called" or phrase is None:  # null: asked for, and no usable answer
            continue
        if attribute not in attributes:
            raise DataError(f"{where}: unknown attribute '{attribute}'. Known: {', '.join(attributes)}.")
        if not _is_text(phrase):
            raise DataError(f"{where}: '{attribute}' must be a text without blanks around it, or null.")
        found[attribute] = phrase
    return Entry(name, tuple(called), found, (), path)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value == " ".join(value.split())
