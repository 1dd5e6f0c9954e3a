"""Writes docs/inferred.md: every choice that is marked as inferred, where it stands, why, and what was looked at.

    python studies/inferred.py            # write the page
    python studies/inferred.py --check    # nothing is written; exit code 1 where the page is old or a mark says too little

A mark is the word "inferred" in a comment or docstring of ``ovbench`` or ``methods``, followed by a sign or the end:
``# inferred: REASON``, ``(inferred)``, and, whatever follows, ``*inferred*``. Followed by a word but "from", "as", "but" and
"and" it is prose and no mark ("inferred for this backbone"). Beside a mark stands a reason. What was looked at follows in the
same comment, argument or paragraph, ``looked at: SOURCES``, or stands once in a module for all of its marks, ``Looked at for
what is inferred: SOURCES`` (to the end of the paragraph). A preset of ``dataset_configs/protocols.json`` has a field
``inferred`` with such a text.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "inferred.md"
MARK = re.compile(
    r"\*inferred\*|(?<!they are )(?<!they were )\binferred\b(?=\s*(?:[:;,.()]|$)| (?:from|as|but|and)\b)", re.IGNORECASE
)
OWN = re.compile(r"looked at: *(.+?)(?:\.\s+(?=[A-Z])|\.?$)", re.IGNORECASE)
SHARED = re.compile(r"looked at for what is inferred: *(.+)$", re.IGNORECASE)
NAME = re.compile(r"^\s*(?:def |class )?[\"']?([A-Za-z_][\w.]*)[\"']?\s*(?:[:=(,]|$)")


@dataclass(frozen=True)
class Mark:
    """One choice that is inferred.

    Attributes:
        file: Path in the repository.
        line: Where the text begins.
        beside: The field, constant, function or class that it is about.
        text: What is inferred, and why.
        looked_at: Sources; empty where the mark does not say.
        shared: Whether the sources are those of the whole module.
    """

    file: str
    line: int
    beside: str
    text: str
    looked_at: str
    shared: bool = False


def comments(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, text and the name beside it of every comment; lines of one comment are joined."""
    lines = source.splitlines()
    found: list[tuple[int, bool, str]] = []  # line, alone on it, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not lines[token.start[0] - 1][: token.start[1]].strip()
            found.append((token.start[0], alone, token.string.lstrip("#: ")))
    index = 0
    while index < len(found):
        line, alone, text = found[index]
        last = line
        while alone and index + 1 < len(found) and found[index + 1][:2] == (last + 1, True):
            index += 1
            last += 1
            text += " " + found[index][2]
        index += 1
        if alone:
            code = next((row for row in lines[last:] if row.strip() and not row.lstrip().startswith("#")), "")
        else:
            code = lines[line - 1]
            if not NAME.match(code):  # a value on a line of its own belongs to the name above
                code = next((row for row in reversed(lines[: line - 1]) if NAME.match(row)), code)
        match = NAME.match(code.split(" = ")[0] if not alone else code)
        yield line, text, match[1] if match else "here"


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, text and name of the paragraphs and the arguments of every docstring."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        name = "the module" if isinstance(node, ast.Module) else node.name
        first = node.body[0].lineno
        start, block = 0, list[str]()
        for number, row in enumerate([*text.splitlines(), ""]):
            entry = re.match(r"^(?:    (\w+): |[-*] |\d+\. )", row)
            if block and (not row.strip() or entry):
                yield first + start, *_block(block, name)
                block = []
            if row.strip():
                start = start if block else number
                block.append(row)


def _block(rows: list[str], name: str) -> tuple[str, str]:
    argument = re.match(r"^    (\w+): ", rows[0])
    text = " ".join(row.strip() for row in rows)
    return (text.removeprefix(f"{argument[1]}: "), argument[1]) if argument else (text, name)


def marks_of(path: Path, repo: Path = REPO) -> list[Mark]:
    """The marks of one module."""
    source = path.read_text(encoding="utf-8")
    texts = [(*found, True) for found in comments(source)] + [
        (*found, False) for found in docstrings(ast.parse(source))
    ]
    shared = [match[1] for _, text, _, _ in texts if (match := SHARED.search(text))]
    marks = []
    for line, text, beside, comment in texts:
        if not MARK.search(SHARED.sub("", text)):
            continue
        own = OWN.search(text)
        said = " ".join((text[: own.start()] if own else SHARED.sub("", text)).split()).rstrip(" ;")
        if not comment:
            said = _sentences(said)
        sources = own[1] if own else " ".join(shared)
        name = path.relative_to(repo).as_posix()
        marks.append(Mark(name, line, beside, said, " ".join(sources.split()), own is None and bool(shared)))
    return sorted(marks, key=lambda mark: mark.line)


def _sentences(text: str) -> str:
    """Of a paragraph, what lies from the first to the last sentence with a mark."""
    parts = re.split(r"(?<=[.])\s+(?=[A-Z*`])", text)
    marked = [index for index, part in enumerate(parts) if MARK.search(part)]
    return " ".join(parts[marked[0] : marked[-1] + 1]) if marked else text


def presets(repo: Path = REPO) -> list[Mark]:
    """The marks of protocol presets."""
    path = repo / "dataset_configs" / "protocols.json"
    found = []
    for name, fields in json.loads(path.read_text(encoding="utf-8")).items():
        if "inferred" in fields:
            said, _, sources = fields["inferred"].partition("; looked at: ")
            found.append(Mark("dataset_configs/protocols.json", 0, name, said, sources))
        elif re.search(r"\binferred\b", fields["summary"]):
            found.append(Mark("dataset_configs/protocols.json", 0, name, fields["summary"], ""))
    return found


def collect(repo: Path = REPO) -> list[Mark]:
    """All marks, file by file."""
    files = [path for room in ("methods", "ovbench") for path in sorted((repo / room).rglob("*.py"))]
    return [mark for path in files for mark in marks_of(path, repo)] + presets(repo)


def page(marks: list[Mark]) -> str:
    """docs/inferred.md."""
    lines = [
        "# What is inferred",
        "",
        "Made by `python studies/inferred.py` from the marks in the code; do not edit. A choice is inferred where neither paper,",
        "public code, an author's word nor a measurement settles it. The first column names the option, constant or part.",
        "",
        f"{len(marks)} marks in {len({mark.file for mark in marks})} files.",
    ]
    for file in dict.fromkeys(mark.file for mark in marks):
        own = [mark for mark in marks if mark.file == file]
        lines += ["", f"## {file}", ""]
        lines += [f"Looked at: {text}\n" for text in dict.fromkeys(mark.looked_at for mark in own if mark.shared)]
        lines += ["| beside | what, and why | looked at |", "|---|---|---|"]
        for mark in own:
            cells = (f"`{mark.beside}`", mark.text, "as above" if mark.shared else mark.looked_at)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def faults(marks: list[Mark], written: str) -> list[str]:
    """What is wrong: marks that do not say what was looked at, and a page that is not of these marks."""
    silent = [
        f"{mark.file}:{mark.line}: '{mark.beside}' is inferred, but what was looked at is not said"
        for mark in marks
        if len(mark.looked_at) < 8
    ]
    silent += [
        f"{mark.file}:{mark.line}: '{mark.beside}' is inferred, but a reason is not given"
        for mark in marks
        if len(MARK.sub("", mark.text)) < 8
    ]
    return silent + ([] if written == page(marks) else [f"{PAGE.name} is old: python studies/inferred.py"])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, tell what is wrong")
    marks = collect()
    if not parser.parse_args().check:
        PAGE.write_text(page(marks), encoding="utf-8")
    found = faults(marks, PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "")
    print("\n".join([*found, f"{len(marks)} marks"]), file=sys.stderr if found else sys.stdout)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
