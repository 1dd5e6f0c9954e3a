"""Runs the fenced blocks of a Markdown page in order, as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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

    Raises:
        AssertionError: A block ended with another status than 0.
    """
    commands = folder.parent / "commands"
    commands.mkdir()
    for name, call in (("ovbench", "-m ovbench"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (commands / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    outputs = []
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language in ("sh", "python"):
            shell = ["sh", "-e", "-c"] if block.language == "sh" else ["python", "-c"]
            done = subprocess.run(
                [*shell, block.text],
                capture_output=True,
                text=True,
                cwd=folder,
                env=environment,
                timeout=600,
                check=False,
            )
            assert done.returncode == 0, f"{page.name}:\n{block.text}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout)
    return outputs
