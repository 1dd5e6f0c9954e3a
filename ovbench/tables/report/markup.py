"""HTML and SVG elements as text; whatever is not an element already is escaped, so that a record cannot bring markup in."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is markup already and is taken as it is; made by :func:`element` and :func:`join` only."""

    __slots__ = ()


Child = str | Markup | None

# Elements without content; all others get a closing tag.
_VOID = frozenset({"meta", "input", "img", "br", "link"})


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element: text children are escaped, ``None`` is left out.

    Attributes: a trailing underscore goes, others become hyphens; ``True`` is written bare, ``False`` and ``None`` not at
    all.
    """
    opening = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after another: markup as it is, text escaped."""
    return Markup("".join(_child(child) for child in children if child is not None))


def raw(name: str, content: str, /, **attributes: str | bool | None) -> Markup:
    """A ``style`` or ``script`` element of ovbench's own; its content cannot be escaped and must not end the element.

    Raises:
        ValueError: The content holds its closing tag.
    """
    if f"</{name}" in content.lower():
        raise ValueError(f"the content of <{name}> ends the element")
    opening = name + "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup(f"<{opening}>{content}</{name}>")


def _child(child: Child) -> str:
    return child if isinstance(child, Markup) else html.escape(str(child), quote=False)


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
