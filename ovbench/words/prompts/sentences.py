"""Class words to sentences: which attributes are said, in which order and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ovbench.errors import UsageError, unknown_name
from ovbench.hashing import sha256_of
from ovbench.paths import user_path
from ovbench.words.prompts.descriptions import Descriptions, Entry, read, shipped, without_article

DEFAULT_ATTRIBUTES = ("size", "shape", "texture", "colour")  # the best row of the thesis' Table 5.4
SHIPPED, FILE_SUFFIX = "lsmseg", ".json"
NAME = "name"  # in place of attributes: the bare class name
# What comes before a phrase that does not say by itself what it is about.
_LEAD = {"material": "made of ", "context": "typical of "}


class Prompts(Protocol):
    """How class words become sentences for the text encoder."""

    def sentences(self, words: Sequence[str]) -> list[list[str]]:
        """At least one sentence for each word.

        Raises:
            UsageError: A word has none; the message lists all of these.
        """

    def sha256(self, words: Sequence[str]) -> str:
        """The hash (hex) of what the sentences of these words are made of."""


@dataclass(frozen=True)
class Described:
    """Sentences from descriptions: a :class:`Prompts`.

    Attributes:
        descriptions: Where the phrases come from.
        attributes: Which are said, in this order; empty for the bare name.
    """

    descriptions: Descriptions
    attributes: tuple[str, ...] = DEFAULT_ATTRIBUTES

    def sentences(self, words: Sequence[str]) -> list[list[str]]:
        """The sentences of each word.

        Raises:
            UsageError: Words without an entry, or entries without a chosen attribute.
        """
        source = self.descriptions.source
        found = {word: self.descriptions.find(word) for word in words}
        unknown = [word for word, entry in found.items() if entry is None]
        if unknown:
            raise UsageError(
                f"{source} describes {len(found) - len(unknown)} of {len(found)} words, but not {_listed(unknown)}. "
                "Write these into a file of your own (docs/prompts.md), or have them written "
                "('ovbench prompts generate --help'), and give it with --prompts FILE."
            )
        entries = {word: entry for word, entry in found.items() if entry is not None}
        bare = [
            f"{word} ({', '.join(missing)})"
            for word, (entry, _) in entries.items()
            if not entry.sentences and (missing := [name for name in self.attributes if name not in entry.attributes])
        ]
        if bare:
            raise UsageError(
                f"{source} lacks attributes: {_listed(bare, quote='')}. Fill them in, or choose others with "
                f"--prompts {source}:{'+'.join(DEFAULT_ATTRIBUTES[:2])}."
            )
        return [list(_sentences(*entries[word], self.attributes)) for word in words]

    def sha256(self, words: Sequence[str]) -> str:
        """The hash over each different word with its sentences."""
        return sha256_of(dict(zip(words, self.sentences(words), strict=True)))


def sentence(called: str, attributes: Sequence[str], entry: Entry) -> str:
    """One sentence, e.g. "A photo of a fox: dog-sized; slender body with ...; soft thick fur; orange-red with ...".

    The phrases stand beside each other after a colon, so that each reads well whatever its grammar and whichever
    others are chosen. Without attributes it is the bare name.

    Args:
        called: The class with its article.
        attributes: Those to be said, in this order; the entry has them.
        entry: Where the phrases are.
    """
    if not attributes:
        return without_article(called)
    return f"A photo of {called}: {'; '.join(_LEAD.get(name, '') + entry.attributes[name] for name in attributes)}."


def described(name: str) -> Described | None:
    """The prompts of a name, ``lsmseg`` or ``FILE.json``, each with ``:ATTRIBUTES`` or not; None for other names.

    Args:
        name: E.g. ``lsmseg``, ``lsmseg:colour+shape``, ``lsmseg:name``, ``mine.json:texture``.

    Raises:
        UsageError: Unknown or repeated attributes.
        DataError: A file that is not in the format.
    """
    source, colon, chosen = name.rpartition(":")
    if not colon or not (source == SHIPPED or source.endswith(FILE_SUFFIX)):
        source, chosen = name, ""
    if source == SHIPPED:
        descriptions = shipped()
    elif source.endswith(FILE_SUFFIX):
        descriptions = read(user_path(source))
    else:
        return None
    if colon and source != name and not chosen:
        raise UsageError(f"--prompts '{name}': name attributes after the colon, e.g. {source}:colour+shape.")
    if chosen:
        return Described(descriptions, parse_attributes(chosen, descriptions.attributes))
    # A file may hold fewer attributes than the default says; then it is said with those.
    usual = set(DEFAULT_ATTRIBUTES) <= set(descriptions.attributes)
    return Described(descriptions, DEFAULT_ATTRIBUTES if usual else descriptions.attributes)


def parse_attributes(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """``"colour+shape"`` as ("colour", "shape"), ``"name"`` as ().

    Raises:
        UsageError: Unknown or repeated attributes.
    """
    if text == NAME:
        return ()
    names = tuple(part.strip() for part in text.split("+"))
    for part in names:
        if part not in known:
            raise unknown_name("attribute", part, [*known, NAME], "ovbench prompts show --help")
    if len(set(names)) < len(names):
        raise UsageError(f"Attributes '{text}': each can be said once.")
    return names


def _sentences(entry: Entry, called: str, attributes: Sequence[str]) -> Sequence[str]:
    if entry.sentences and attributes:
        return entry.sentences
    return [sentence(called, attributes, entry)]


def _listed(words: Sequence[str], quote: str = "'", most: int = 20) -> str:
    shown = ", ".join(f"{quote}{word}{quote}" for word in words[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most} more"
