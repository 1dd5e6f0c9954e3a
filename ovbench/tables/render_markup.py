"""Writes a table as LaTeX (booktabs) or as one HTML page; equal tables give equal bytes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby

from ovbench.tables.layout import Section, Table
from ovbench.tables.render import MISSING, Leaf, leaves

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    MISSING: "--",
    "×": r"$\times$",
    "±": r"$\pm$",
}


def to_latex(table: Table) -> str:
    """One ``tabular`` per section for the booktabs package, notes below it as text; ends with a line break."""
    blocks = [_latex_section(section) for section in table.sections]
    blocks += [_latex(note) for note in table.left_out]
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(blocks) + "\n"


def _latex_section(section: Section) -> str:
    columns = leaves(section)
    first = len(section.settings) + 1
    groups = _groups(columns)
    lines = [
        rf"\textbf{{{_latex(section.title)}}}\\",
        rf"\begin{{tabular}}{{{'l' * len(section.settings)}{'r' * len(columns)}}}",
    ]
    lines.append(r"\toprule")
    spans = [rf"\multicolumn{{{count}}}{{c}}{{{_latex(name)}}}" for name, count in groups]
    lines.append(" & ".join([*("" for _ in section.settings), *spans]) + r" \\")
    start = first
    rules = []
    for _, count in groups:
        rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    lines.append("".join(rules))
    lines.append(_latex_row([*section.settings, *(leaf.heading for leaf in columns)]))
    lines.append(r"\midrule")
    for index, row in enumerate(section.rows):
        lines.append(_latex_row([*row.settings, *(leaf.texts[index] for leaf in columns)]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par{{\footnotesize {_latex(note)}}}" for note in section.notes]
    return "\n".join(lines)


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(map(_latex, texts)) + r" \\"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _groups(columns: Sequence[Leaf]) -> list[tuple[str, int]]:
    """Headings over the columns, each with the number of columns below it."""
    return [
        (name, len(list(items))) for (_, name), items in groupby(columns, key=lambda leaf: (leaf.column, leaf.group))
    ]


_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem}"
    "div{overflow-x:auto}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:.2rem .6rem;text-align:left;white-space:nowrap}"
    "td.n,th.n{text-align:right}"
    "thead tr:last-child th,tbody{border-bottom:1px solid}"
    "thead tr:first-child th{border-top:1px solid}"
    "td.p,td.d{opacity:.7}"
    "p,li{max-width:60rem}"
)


def to_html(table: Table, explained: Sequence[str] = ()) -> str:
    """One page that needs nothing else; each number of ours names its runs in its tooltip."""
    parts = [_html_section(section) for section in table.sections]
    parts += [f"<p>{html.escape(note)}</p>" for note in table.left_out]
    if explained:
        text = html.escape("\n".join(explained))
        parts.append(f"<details open><summary>Where each cell comes from</summary><pre>{text}</pre></details>")
    title = html.escape(table.sections[0].title if table.sections else "ovbench table")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_section(section: Section) -> str:
    columns = leaves(section)
    lines = [f"<h2>{html.escape(section.title)}</h2>", "<div><table>", "<thead>"]
    groups = "".join(f'<th class="n" colspan="{count}">{html.escape(name)}</th>' for name, count in _groups(columns))
    lines.append(f'<tr><th colspan="{len(section.settings)}"></th>{groups}</tr>')
    names = "".join(f"<th>{html.escape(name)}</th>" for name in section.settings)
    names += "".join(f'<th class="n">{html.escape(leaf.heading)}</th>' for leaf in columns)
    lines += [f"<tr>{names}</tr>", "</thead>", "<tbody>"]
    kinds = {"published": "n p", "difference": "n d"}
    for index, row in enumerate(section.rows):
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in row.settings)
        for leaf in columns:
            sources = " ".join(row.cells[leaf.column].sources) if leaf.heading in ("", "ours") else ""
            hint = f' title="{html.escape(sources)}"' if sources else ""
            cells += f'<td class="{kinds.get(leaf.heading, "n")}"{hint}>{html.escape(leaf.texts[index])}</td>'
        lines.append(f"<tr>{cells}</tr>")
    lines += ["</tbody>", "</table></div>"]
    if section.notes:
        lines.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in section.notes) + "</ul>")
    return "\n".join(lines)
