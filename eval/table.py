"""Scores as tables to read on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eval.names import base_name
from eval.protocol import Record, features_of

EVEN = 0.02  # bounds are told as +- if they lie about the value so evenly, as a share of their distance
Line = Sequence[str]


def table(records: Sequence[Record]) -> str:
    """Records as aligned lines: subject, score, value, 95 % interval, images, features, and what real images score.

    The last column is the floor: the same score, on the same features, of real images against other real ones.
    """
    rows = [("subject", "score", "value", "95 % interval", "images", "features", "real images")]
    floors = {_likeness(entry): entry["value"] for entry in records if entry["subject"] == "real"}
    for entry in records:
        low_high, floor = entry.get("interval"), floors.get(_likeness(entry))
        interval = f"{low_high[0]:.4g} .. {low_high[1]:.4g}" if low_high else ""
        name = f"{entry['name']} at {entry['tap']}" if "tap" in entry else entry["name"]
        beside = "" if floor is None or entry["subject"] == "real" else f"{floor:.4g}"
        facts = (interval, f"{entry.get('n') or 0:,}", features_of(entry), beside)
        rows.append((entry["subject"], name, f"{entry['value']:.4g}", *facts))
    return "\n".join(_aligned(rows))


def interval_text(entry: Record) -> str:
    """`+- 0.5` of an interval that lies evenly about its value, `(1.2 .. 2.9)` of another; empty if there is none."""
    low, high = entry.get("interval") or (0.0, 0.0)
    if not entry.get("interval"):
        return ""
    if abs((low + high) / 2 - entry["value"]) <= EVEN * (high - low):
        return f"+- {(high - low) / 2:.2g}"
    return f"({low:.4g} .. {high:.4g})"


def wrapped(rows: Sequence[Line], width: int, *, head: int) -> str:
    """Rows as aligned lines of at most `width` characters, with a rule under the first `head` of them.

    Columns that do not fit follow in further tables, which repeat the first column. No cell is ever cut.
    """
    blocks = []
    for columns in _blocks(rows, width):
        lines = _aligned([[row[column] for column in columns] for row in rows])
        lines = [line for number, line in enumerate(lines) if line or number >= head]  # a head without facts
        told = len(lines) - (len(rows) - head)
        blocks.append("\n".join([*lines[:told], "-" * max(map(len, lines)), *lines[told:]]))
    return "\n\n".join(blocks)


def _blocks(rows: Sequence[Line], width: int) -> Iterator[list[int]]:
    """Columns of each table: the first, and as many others as fit, one at least."""
    widths = _widths(rows)
    taken, total = [0], widths[0]
    for column in range(1, len(widths)):
        if len(taken) > 1 and total + 2 + widths[column] > width:
            yield taken
            taken, total = [0], widths[0]
        taken, total = [*taken, column], total + 2 + widths[column]
    yield taken


def _aligned(rows: Sequence[Line]) -> list[str]:
    widths = _widths(rows)
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _widths(rows: Sequence[Line]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


def _likeness(entry: Record) -> tuple[str, str]:
    return base_name(entry["name"]), features_of(entry)
