"""What is wrong with descriptions, and how long their sentences are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ovbench.words.prompts.descriptions import Descriptions, Entry
from ovbench.words.prompts.sentences import Described

FEWEST_WORDS, MOST_WORDS = 3, 12  # of a phrase: fewer say little, four longer ones may not fit the text encoder
MOST_CLASSES = 3  # that may share a phrase: what more of them have says nothing about one
MOST_TOKENS = 77  # of a sentence, begin and end included: CLIP's context

TokenCount = Callable[[str], int]


@dataclass(frozen=True)
class Statistics:
    """How the sentences of one vocabulary are.

    Attributes:
        name: Benchmark.
        words: Different words, synonyms included.
        described: Those with a sentence.
        mean_tokens: Mean length of a sentence; None where there is none.
        most_tokens: The longest sentence's length.
        longest: Its word.
    """

    name: str
    words: int
    described: int
    mean_tokens: float | None
    most_tokens: int | None
    longest: str | None


def phrase_problems(descriptions: Descriptions) -> list[str]:
    """What is wrong with single phrases, one line each: missing, too short or long, not plain, or used too often."""
    found = []
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in descriptions.entries:
        if entry.sentences:
            continue
        for attribute in descriptions.attributes:
            phrase = entry.attributes.get(attribute)
            if phrase is None:
                found.append(f"{_place(entry)}: no {attribute}")
                continue
            users[attribute, phrase].append(entry.name)
            if not phrase.isascii():
                found.append(f"{_place(entry)}: {attribute} is not plain ASCII: {phrase!r}")
            if not FEWEST_WORDS <= len(phrase.split()) <= MOST_WORDS:
                found.append(f"{_place(entry)}: {attribute} has {len(phrase.split())} words, not 3..12: {phrase!r}")
            if phrase[-1] in ".;:," or ";" in phrase:
                found.append(f"{_place(entry)}: {attribute} is no phrase of a sentence: {phrase!r}")
    for (attribute, phrase), names in users.items():
        if len(names) > MOST_CLASSES:
            found.append(f"the {attribute} {phrase!r} is said of {len(names)} classes: {', '.join(names)}")
    return found


def missing_words(descriptions: Descriptions, vocabularies: Mapping[str, Sequence[str]]) -> list[str]:
    """The words of vocabularies that have no entry, one line each."""
    return [
        f"{name}: no entry for '{word}'"
        for name, words in vocabularies.items()
        for word in dict.fromkeys(words)
        if descriptions.find(word) is None
    ]


def long_sentences(prompts: Described, tokens: TokenCount) -> list[str]:
    """The sentences with more tokens than CLIP reads, one line each."""
    found = []
    for entry in prompts.descriptions.entries:
        if entry.sentences or set(prompts.attributes) <= set(entry.attributes):
            for sentence in prompts.sentences([entry.name])[0]:
                if tokens(sentence) > MOST_TOKENS:
                    found.append(f"{_place(entry)}: {tokens(sentence)} tokens, not {MOST_TOKENS}: {sentence!r}")
    return found


def statistics(prompts: Described, vocabularies: Mapping[str, Sequence[str]], tokens: TokenCount) -> list[Statistics]:
    """Lengths of the sentences of each vocabulary's words."""
    rows = []
    for name, words in vocabularies.items():
        lengths: list[tuple[int, str]] = []
        described = 0
        for word in dict.fromkeys(words):
            found = prompts.descriptions.find(word)
            if found is None or not (found[0].sentences or set(prompts.attributes) <= set(found[0].attributes)):
                continue
            described += 1
            lengths += [(tokens(sentence), word) for sentence in prompts.sentences([word])[0]]
        most, longest = max(lengths, default=(None, None))
        mean = sum(length for length, _ in lengths) / len(lengths) if lengths else None
        rows.append(Statistics(name, len(dict.fromkeys(words)), described, mean, most, longest))
    return rows


def clip_tokens() -> TokenCount:
    """The number of tokens that CLIP's tokenizer makes of a text, begin and end included."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return lambda text: len(tokenizer.encode(text)) + 2


def _place(entry: Entry) -> str:
    return f"{entry.file.name}, '{entry.name}'"
