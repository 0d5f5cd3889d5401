"""The pieces of a self-contained HTML page: style, tiles, tables, key-value lists. Knows nothing of runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tokenloom.style import STYLE

# The policy makes the browser itself refuse anything that is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(*, title: str, header: str, sections: Sequence[str], footer: str) -> str:
    """The whole page; all arguments but the title are HTML."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>{header}</header>\n"
        f"<main>\n{body}\n</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *content: str, intro: str = "") -> str:
    """A chapter with the anchor `name`; title and intro are plain text."""
    opening = f'<p class="soft">{prose(intro)}</p>' if intro else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{opening}{"".join(content)}</section>'


def note(text: str) -> str:
    """What is not there, in words of plain text."""
    return f'<p class="note">{prose(text)}</p>'


def prose(text: str) -> str:
    """Plain text, with what stands between backticks set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def figures(cards: Iterable[tuple[str, str, str, str]]) -> str:
    """Large numbers: label, value, unit, aside; all plain text."""
    rows = (
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}<small>{escape(unit)}</small></dd>'
        f'<dd class="aside">{escape(aside)}</dd></div>'
        for label, value, unit, aside in cards
    )
    return f'<dl class="figures">{"".join(rows)}</dl>'


def picture(uri: str, alt: str) -> str:
    """One embedded picture; its text is also shown on hovering."""
    return f'<img src="{uri}" alt="{escape(alt)}" title="{escape(alt)}">'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, both plain text, as a list in two columns."""
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{"".join(rows)}</dl>'


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested values as text, each with the keys that lead to it."""
    leaves: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves += flattened(value, f"{prefix}{key} \N{MIDDLE DOT} ")
        else:
            leaves.append((f"{prefix}{key}", plain(value)))
    return leaves


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box that scrolls by itself. The head is plain text, cells are HTML; the first of a row names it."""
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{_cells(rest)}</tr>' for first, *rest in rows)
    return f'<div class="box"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(contents: Iterable[str]) -> str:
    return "".join(f"<td>{content}</td>" for content in contents)


def plain(value: Any) -> str:
    """A value as a reader writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return "none" if value is None or value == {} else f"{value:,.10g}" if isinstance(value, float) else str(value)
