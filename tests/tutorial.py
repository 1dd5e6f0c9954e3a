"""Runs the fenced blocks of a Markdown page in order, as a reader would."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from warm import Started, ovbench, python

FENCE = re.compile(r"^```(\w+)(?: +(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is the content of, and its text."""

    language: str
    file: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(language, file or None, text) for language, file, text in found]


def follow(page: Path, folder: Path) -> list[str]:
    """Writes the files and runs the ``sh`` and ``python`` blocks in ``folder``; the output of each that was run.

    Every command is a process of its own, see :mod:`warm`.

    Raises:
        AssertionError: A command ended with another status than 0, or a block holds one that is not ``ovbench``.
    """
    outputs = []
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            outputs.append(_output(Started(python, block.text, cwd=folder), f"{page.name}:\n{block.text}"))
        elif block.language == "sh":
            lines = block.text.replace("\\\n", " ").splitlines()
            commands = [words for line in lines if (words := shlex.split(line, comments=True))]
            plain = not set(block.text) & set("$|&;<>*~`") and all(words[0] == "ovbench" for words in commands)
            assert plain, f"{page.name} needs more than calls of ovbench:\n{block.text}"
            done = [_output(Started(ovbench, words[1:], cwd=folder), f"{page.name}: {words}") for words in commands]
            outputs.append("".join(done))
    return outputs


def _output(process: Started, what: str) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{what}\n{out}\n{err}"
    return out
