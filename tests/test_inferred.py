"""What is inferred says why and what was looked at, and docs/inferred.md is of the marks in the code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def _script():
    spec = importlib.util.spec_from_file_location("inferred_script", REPO / "studies" / "inferred.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


inferred = _script()


def test_every_mark_says_enough_and_the_page_is_of_them():
    assert inferred.faults(inferred.collect(), inferred.PAGE.read_text(encoding="utf-8")) == []


def marks(tmp_path, source):
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    return inferred.marks_of(path, tmp_path)


@pytest.mark.parametrize(
    ("source", "beside", "text", "looked_at"),
    [
        ("width: int = 3  # inferred: half of it; looked at: the paper", "width", "inferred: half of it", "the paper"),
        ("# Inferred: half\n# of it; looked at: the\n# paper\nWIDTH = 3", "WIDTH", "Inferred: half of it", "the paper"),
        ("R = {\n    'lr': 3,  # of all; inferred; looked at: code\n}", "lr", "of all; inferred", "code"),
        ("def f(a):\n    x = a  # half of it; inferred", "x", "half of it; inferred", ""),
        ('class A:\n    """A.\n\n    Args:\n        b: Half (*inferred* from C; looked at: D).\n        c: Else.\n    """',
         "b", "Half (*inferred* from C", "D)"),
        ('"""A. B is so (inferred). C is not.\n\nLooked at for what is inferred: the paper.\n"""', "the module",
         "B is so (inferred).", "the paper."),
        ('"""A."""\n# Looked at for what is inferred: the\n# paper\nX = 1\nY = 2  # half; inferred', "Y",
         "half; inferred", "the paper"),
    ],
)  # fmt: skip
def test_marks_are_found(tmp_path, source, beside, text, looked_at):
    (mark,) = marks(tmp_path, source)
    assert (mark.beside, mark.text, mark.looked_at) == (beside, text, looked_at)


@pytest.mark.parametrize(
    "source",
    [
        "x = 1  # how it was made",
        "x = 'inferred'",
        '"""Told as inferred for this backbone."""',
        '"""The constants, and whether they are inferred."""',
        "# Looked at for what is inferred: the paper\nx = 1",
    ],
)
def test_prose_and_strings_are_no_marks(tmp_path, source):
    assert marks(tmp_path, source) == []


def test_what_says_too_little_is_named(tmp_path):
    found = marks(tmp_path, "a = 1  # half of it; inferred\nb = 2  # inferred; looked at: the paper\n")
    told = inferred.faults(found, inferred.page(found))
    assert told == [
        "module.py:1: 'a' is inferred, but what was looked at is not said",
        "module.py:2: 'b' is inferred, but a reason is not given",
    ]
    good = marks(tmp_path, "a = 1  # half of it; inferred; looked at: the paper")
    assert inferred.faults(good, inferred.page(good)) == []
    assert inferred.faults(good, "") == ["inferred.md is old: python studies/inferred.py"]
