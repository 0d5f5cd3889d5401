"""What a score was measured under, and the file of scores; unlike scores are never set side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import write_json
from engine.config import difference
from eval.statistics import Estimate

JUDGE = 1  # raised whenever the mathematics of a score changes
MATTERS = ("judge", "features", "settings", "size", "crop", "num_real", "num_generated", "reference")
Record = dict[str, Any]


def protocol(**facts: Any) -> dict[str, Any]:
    """The record of a measurement, JSON-ready.

    The keys of MATTERS make two scores alike: `features` (name, sha256 of weights, resize rule), `settings` of the
    score, `size`, `crop`, `num_real`, `num_generated` and `reference` (content of the real images). Anything else, such
    as seeds, sampler, guidance, EMA or raw weights, describes what was scored; it is kept and not compared.
    """
    stated = {"judge": JUDGE, **{key: value for key, value in facts.items() if value is not None}}
    stated = json.loads(json.dumps(stated))
    return {**stated, "hash": protocol_hash(stated), "code": code_version(), "torch": torch.__version__}


def protocol_hash(stated: dict[str, Any]) -> str:
    """16 hexadecimal digits; equal for two protocols just when `comparable` finds no difference."""
    text = json.dumps(_what_matters(stated), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def comparable(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted keys in which two protocols differ and which make their scores unlike; empty: compare them."""
    return list(difference(_what_matters(a), _what_matters(b)))


def record(
    name: str, subject: str, estimate: Estimate | float, *, n: int, protocol: dict[str, Any], tap: str | None = None
) -> Record:
    """One score. `n` is the number of images that it was taken over."""
    value, interval = estimate if isinstance(estimate, Estimate) else (estimate, None)
    bounds = None if interval is None else [float(bound) for bound in interval]
    entry: Record = {"name": name, "subject": subject, "value": float(value), "interval": bounds, "n": n}
    return {**entry, **({"tap": tap} if tap else {}), "protocol": protocol}


def read_scores(path: Path) -> list[Record]:
    """The records of a metrics.json.

    Raises:
        ValueError: the file is missing or is no list of scores.
    """
    if not Path(path).is_file():
        raise ValueError(f"scores {path}: no such file; `tokenloom eval` writes it")
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        whole = all({"name", "subject", "value", "protocol"} <= set(entry) for entry in records)
    except (json.JSONDecodeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"scores {path}: not a list of name, subject, value and protocol; delete it and score again")
    return list(records)


def merge_scores(path: Path, new: Sequence[Record]) -> list[Record]:
    """Put records into a metrics.json, in place of all older ones of their names and subjects.

    Taps of one name and subject stay side by side only if they come together, so a better tap replaces the old one.
    """
    fresh = {(*_key(entry), entry.get("tap")): entry for entry in new}
    replaced = {_key(entry) for entry in new}
    old = read_scores(path) if Path(path).exists() else []
    records = [entry for entry in old if _key(entry) not in replaced] + list(fresh.values())
    write_json(path, records)
    return records


def drop_stale(path: Path, models: Collection[str]) -> None:
    """Remove from a metrics.json the records of models other than those with these fingerprints."""
    drop_scores(path, lambda entry: not _models_of(entry) <= set(models))


def drop_scores(path: Path, unwanted: Callable[[Record], bool]) -> None:
    """Remove records from a metrics.json, if there is one."""
    old = read_scores(path) if Path(path).exists() else []
    kept = [entry for entry in old if not unwanted(entry)]
    if len(kept) < len(old):
        write_json(path, kept)


def _models_of(entry: Record) -> set[str]:
    told = entry["protocol"].get("subject", {})
    return {told[key] for key in ("tokenizer", "generator", "guide", "outside") if key in told}


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows {"name", "subject", "scores": one record per file} of every score that all the files have.

    Raises:
        ValueError: fewer than two files, nothing in common, or a score measured under unlike protocols.
    """
    if len(paths) < 2:
        raise ValueError(f"a comparison needs at least two metrics.json, got {len(paths)}")
    tables = [{_key(entry): entry for entry in read_scores(path)} for path in paths]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise ValueError(f"no score is in all of {', '.join(map(str, paths))}")
    rows = []
    for key in shared:
        scores = [table[key] for table in tables]
        _refuse_unlike(key, paths, scores)
        rows.append({"name": key[0], "subject": key[1], "scores": scores})
    return rows


def comparison_table(paths: Sequence[Path]) -> str:
    """`compare` as aligned lines: subject, score, then value and interval in each file."""
    rows = [("subject", "score", *(str(path) for path in paths))]
    for row in compare(paths):
        rows.append((row["subject"], row["name"], *(_told(score) for score in row["scores"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def code_version() -> str:
    """Version of the installed package."""
    try:
        return version("tokenloom")
    except PackageNotFoundError:
        return "not installed"


def _what_matters(stated: dict[str, Any]) -> dict[str, Any]:
    return {key: stated[key] for key in MATTERS if key in stated}


def _key(entry: Record) -> tuple[str, str]:
    return entry["name"], entry["subject"]


def _told(score: Record) -> str:
    low_high = score["interval"]
    interval = f" ({low_high[0]:.4g} .. {low_high[1]:.4g})" if low_high else ""
    return f"{score['value']:.4g}{interval}" + (f" at {score['tap']}" if "tap" in score else "")


def _refuse_unlike(key: tuple[str, str], paths: Sequence[Path], scores: Sequence[Record]) -> None:
    first = scores[0]["protocol"]
    for path, score in zip(paths[1:], scores[1:], strict=True):
        changes = difference(_what_matters(first), _what_matters(score["protocol"]))
        if changes:
            lines = "".join(f"\n  {name}: {before!r} | {after!r}" for name, (before, after) in changes.items())
            raise ValueError(
                f"{key[0]} of {key[1]} was measured differently in {paths[0]} and {path}:{lines}\n"
                "Score both with the same `eval` section and data"
            )
