"""A comparison to read: tables for a terminal with notes below them, or JSON."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from engine.config import difference
from eval.comparison import BASELINES, FLOOR, Comparison, Model, brief, told_changes
from eval.names import ON_INCEPTION, better, parts_of
from eval.protocol import Record, features_of
from eval.table import interval_text, wrapped

UNWRAPPED = 100_000
STAR = "* better than all other models in the column: the 95 % intervals do not touch."


def comparison_text(comparison: Comparison, width: int | None = None) -> str:
    """A table for each chapter, then notes on scores that were measured differently.

    Args:
        width: characters of a line; None: those of the terminal, and no limit where there is none.
    """
    width = width or shutil.get_terminal_size(fallback=(UNWRAPPED, 24)).columns
    notes: dict[str, str] = {}
    for unlike in comparison.unlike.values():
        notes.setdefault(f"unlike {unlike.first}: {told_changes(unlike.changes)}", f"[{len(notes) + 1}]")
    parts = [_chapter(comparison, title, notes, width) for title in comparison.columns]
    if notes:
        parts.append(
            "Measured differently, so no comparison:\n" + "\n".join(f"{n} {note}" for note, n in notes.items())
        )
    return "\n\n".join(parts)


def comparison_json(comparison: Comparison) -> str:
    """The tables and what the models tell of themselves as JSON; a cell unlike its column's first says in what."""
    tables = []
    for title, columns in comparison.columns.items():
        rows = [_json_row(comparison, model, columns) for model in comparison.rows(title)]
        told = descriptions(comparison.rows(title), columns)
        tables.append({"title": title, "scores": columns, "rows": rows, "descriptions": told})
    return json.dumps(_finite({"tables": tables}), indent=1, allow_nan=False)


def best(comparison: Comparison, column: str) -> str:
    """Label of the model whose 95 % interval is apart from those of all others, on the better side; empty if none is,
    or if a score was measured differently. Real images do not compete.
    """
    found = [model for model in comparison.models if column in model.scores and model.subject != FLOOR]
    spans = {model.label: model.scores[column].get("interval") or (math.nan, math.nan) for model in found}
    way = better(column.partition(" at ")[0])
    if len(spans) < 2 or any((label, column) in comparison.unlike for label in spans):
        return ""
    for label, (low, high) in spans.items() if way else ():
        others = [span for other, span in spans.items() if other != label]
        if all(low > top if way == "higher" else high < bottom for bottom, top in others):
            return label
    return ""


def descriptions(rows: Sequence[Model], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By label, what protocols tell of the models and of how they were sampled, as far as the models differ in it."""
    told = {model.label: _description(model, columns) for model in rows if model.subject not in BASELINES}
    keys = dict.fromkeys(key for each in told.values() for key in each)
    apart = [key for key in keys if len({brief(each.get(key)) for each in told.values()}) > 1]
    return {label: {key: each.get(key) for key in apart} for label, each in told.items()} if apart else {}


def _description(model: Model, columns: Sequence[str]) -> dict[str, Any]:
    """Dotted keys with values: the subject without its own fingerprint, the crop, and the code that judged."""
    told: dict[str, Any] = {}
    for entry in (model.scores[column] for column in columns if column in model.scores):
        stated = entry["protocol"]
        told |= {key: value for key, value in (stated.get("subject") or {}).items() if key != "generator"}
        told |= {key: stated[key] for key in ("crop", "code", "torch") if key in stated}
    return {key: value for key, (_, value) in difference({}, told).items()}


def _chapter(comparison: Comparison, title: str, notes: dict[str, str], width: int) -> str:
    """Title, table, which way is better, and in what the models' own descriptions differ."""
    rows, columns = comparison.rows(title), comparison.columns[title]
    heads = [_name(rows, column) for column in columns]
    lines = [["", *heads], ["", *(_facts(rows, column) for column in columns)]]
    stars = {column: best(comparison, column) for column in columns}
    for model in rows:
        cells = (_cell(comparison, model, column, notes, starred=stars[column] == model.label) for column in columns)
        lines.append([model.label, *cells])
    told = descriptions(rows, columns)
    notes_below = [_ways(columns, heads), STAR if any(stars.values()) else ""]
    below = [textwrap.fill(note, width, break_on_hyphens=False) for note in notes_below] + [_told_apart(told, width)]
    return "\n".join(filter(None, [title, wrapped(lines, width, head=2), *below]))


def _name(rows: Sequence[Model], column: str) -> str:
    """Name of a column, with the number of images where all rows agree in it."""
    names = {model.scores[column]["name"] for model in rows if column in model.scores}
    _, at, tap = column.partition(" at ")
    return f"{names.pop()}{at}{tap}" if len(names) == 1 else column


def _facts(rows: Sequence[Model], column: str) -> str:
    """Features and number of images, as far as all rows agree in them and the name does not tell."""
    entries = [model.scores[column] for model in rows if column in model.scores]
    features = {features_of(entry) for entry in entries}
    named = parts_of(column).features or parts_of(column).score in ON_INCEPTION.values()
    told = [*(features if len(features) == 1 and not named else ()), f"n {entries[0].get('n') or 0:,}"]
    return ", ".join(filter(None, told if _one_n(rows, column) else told[:-1]))


def _one_n(rows: Sequence[Model], column: str) -> bool:
    return len({model.scores[column].get("n") for model in rows if column in model.scores}) == 1


def _cell(comparison: Comparison, model: Model, column: str, notes: dict[str, str], *, starred: bool) -> str:
    """Value, interval, tap, what is particular to it, and the mark of a note."""
    if column not in model.scores:
        return "-"
    entry, unlike = model.scores[column], comparison.unlike.get((model.label, column))
    parts = [f"{entry['value']:.4g}", interval_text(entry)]
    parts += [f"at {entry['tap']}"] if "tap" in entry and " at " not in column else []
    parts += [] if _one_n(comparison.models, column) else [f"n {entry.get('n') or 0:,}"]
    parts += [notes[f"unlike {unlike.first}: {told_changes(unlike.changes)}"]] if unlike else []
    return " ".join(filter(None, [*parts, "*" if starred else ""]))


def _ways(columns: Sequence[str], heads: Sequence[str]) -> str:
    """Which way the scores are better, in a line."""
    ways = [better(column.partition(" at ")[0]) for column in columns]
    told = {way: [head for head, mine in zip(heads, ways, strict=True) if mine == way] for way in ("lower", "higher")}
    return " ".join(f"{way.capitalize()} is better: {', '.join(names)}." for way, names in told.items() if names)


def _told_apart(told: dict[str, dict[str, Any]], width: int) -> str:
    """A paragraph for each model of what the models' own descriptions differ in; that is no obstacle."""
    if not told:
        return ""
    edge = max(map(len, told)) + 2
    lines = ["How these models differ:"]
    for label, facts in told.items():
        stated = (f"{key.removeprefix('settings.')} {brief(facts[key])}" for key in facts if facts[key] is not None)
        text = f"{label.ljust(edge)}{', '.join(stated) or 'says nothing'}"
        lines += textwrap.wrap(text, max(width, edge + 20), subsequent_indent=" " * edge, break_on_hyphens=False)
    return "\n".join(lines)


def _json_row(comparison: Comparison, model: Model, columns: Sequence[str]) -> dict[str, Any]:
    scores = {column: _json_cell(model.scores[column]) for column in columns if column in model.scores}
    for column, cell in scores.items():
        if unlike := comparison.unlike.get((model.label, column)):
            cell["unlike"] = {key: list(values) for key, values in unlike.changes.items()}
    return {"model": model.label, "file": str(model.path), "subject": model.subject, "scores": scores}


def _json_cell(entry: Record) -> dict[str, Any]:
    cell: dict[str, Any] = {key: entry[key] for key in ("name", "value", "interval", "n", "tap") if key in entry}
    return {**cell, "protocol": entry["protocol"].get("hash")}


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, as JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
