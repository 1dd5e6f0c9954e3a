"""Class lists of the user: one class per line, with synonyms, read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovbench.errors import UsageError
from ovbench.paths import user_path

Classes = Sequence[str | Sequence[str]]  # each a word or a list of words
BACKGROUND = "background"
LIST_SUFFIXES = {".txt", ".csv", ".lst"}


@dataclass(frozen=True)
class ClassEntry:
    """One class.

    Attributes:
        name: Shown in legends and tables.
        words: What the text encoder is given, the name first; a pixel's score is that of the best word.
    """

    name: str
    words: tuple[str, ...]


def parse_lines(text: str, source: str = "class list") -> list[ClassEntry]:
    """The classes of a text: ``name``, ``name: synonym, synonym`` or ``name, synonym`` per line.

    Empty lines and lines that begin with ``#`` are skipped.

    Args:
        text: Lines of the list.
        source: The file, for messages.

    Raises:
        UsageError: No class, or a line without a word.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        head, colon, rest = content.partition(":")
        if colon and not _words(head):
            raise UsageError(f"{source} line {number}: '{content}' has no class name before the colon.")
        words = _words(head) + [word for word in _words(rest) if word not in _words(head)]
        if not words:
            raise UsageError(f"{source} line {number}: '{content}' has no word.")
        entries.append(ClassEntry(words[0], tuple(words)))
    if not entries:
        raise UsageError(f"The class list is empty: {source} has no line with a class, e.g. 'sky: cloud, clear sky'.")
    return entries


def read_file(path: Path) -> list[ClassEntry]:
    """The classes of a UTF-8 text file, see :func:`parse_lines`.

    Raises:
        UsageError: The file cannot be read, or holds no class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(f"Cannot read the class list '{path}': {reason}.") from None
    return parse_lines(text, str(path))


def read(classes: str) -> list[ClassEntry]:
    """Classes from a file, or from words with commas between them.

    Raises:
        UsageError: Nothing in it, or a file that is not there.
    """
    path = user_path(classes)
    if is_file(path):
        return read_file(path)
    if path.suffix in LIST_SUFFIXES or "/" in classes:
        raise UsageError(
            f"No class list '{classes}'. Give words with commas between them, a benchmark's name, or a file with one class per line."
        )
    entries = [ClassEntry(word, (word,)) for word in _words(classes)]
    if not entries:
        raise UsageError("The class list is empty: give at least one class, e.g. --classes 'road, car, sky'.")
    return entries


def require_different(entries: Sequence[ClassEntry], source: str) -> None:
    """Nothing, if every class has a name of its own.

    Raises:
        UsageError: Two classes have one name.
    """
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise UsageError(f"{source} has the class '{entry.name}' twice: give each class one line.")
        seen.add(entry.name)


def background_in(classes: Classes) -> int | None:
    """The index of the class called "background" (its name, or its first word); None where there is none."""
    names = [entry if isinstance(entry, str) else entry[0] for entry in classes if entry]
    return next((index for index, name in enumerate(names) if name.strip().lower() == BACKGROUND), None)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def is_file(path: Path) -> bool:
    """Whether a file of that name is there; a long list of words is no name."""
    try:
        return path.is_file()
    except OSError:
        return False


def class_words(classes: Classes) -> list[list[str]]:
    """Each class as a list of words (a class may be given as one word).

    Raises:
        UsageError: No class, or a class without a word.
    """
    words = [[entry] if isinstance(entry, str) else list(entry) for entry in classes]
    words = [[word.strip() for word in entry if word.strip()] for entry in words]
    if not words:
        raise UsageError("The class list is empty: give at least one class, e.g. --classes 'road, car, sky'.")
    bare = next((index for index, entry in enumerate(words) if not entry), None)
    if bare is not None:
        raise UsageError(f"Class {bare} of the class list has no word.")
    return words
