"""What a score was measured under, and the file of scores; unlike scores are never set side by side."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import write_json
from engine.config import difference
from eval.names import base_name
from eval.statistics import Estimate

JUDGE = 2  # raised whenever the mathematics of a score changes
MATTERS = ("judge", "features", "settings", "size", "num_real", "num_generated", "reference")
IF_STATED = ("labels",)  # matter too, but only between two protocols that both have them
Record = dict[str, Any]


def protocol(**facts: Any) -> dict[str, Any]:
    """The record of a measurement, JSON-ready. Facts that are None are left out.

    These make two scores alike or unlike: `judge` (version of the mathematics, set here), `features` (name, sha256 of
    weights, resize rule), `settings` of the score, `size`, `num_real`, `num_generated`, `reference` (hash of what it
    was held against); and, where both protocols have it, `labels`, the scheme of the classes that were drawn: balanced
    or unbalanced.

    Anything else is kept and not compared: `data`, `crop` (that of real images shows in the hash of their pixels, and
    samples need none), `subject` (what was scored: its fingerprints, seeds, sampler, steps, guidance, rounding, EMA or
    raw weights), `code` and `torch` (versions, set here).
    """
    stated = {"judge": JUDGE, **{key: value for key, value in facts.items() if value is not None}}
    stated = json.loads(json.dumps(stated))
    return {**stated, "hash": protocol_hash(stated), "code": code_version(), "torch": torch.__version__}


def protocol_hash(stated: dict[str, Any]) -> str:
    """16 hexadecimal digits; equal for two protocols just when their keys of MATTERS are."""
    matters = {key: stated[key] for key in MATTERS if key in stated}
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:16]


def unlikeness(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two protocols differ and which make their scores unlike, with both values."""
    keys = [*MATTERS, *(key for key in IF_STATED if key in a and key in b)]
    mine, theirs = ({key: stated[key] for key in keys if key in stated} for stated in (a, b))
    return difference(mine, theirs)


def comparable(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The keys of `unlikeness`; empty: the scores may be compared."""
    return list(unlikeness(a, b))


def record(
    name: str, subject: str, estimate: Estimate | float, *, n: int, protocol: dict[str, Any], tap: str | None = None
) -> Record:
    """One score. `n` is the number of images that it was taken over."""
    value, interval = estimate if isinstance(estimate, Estimate) else (estimate, None)
    bounds = None if interval is None else [float(bound) for bound in interval]
    entry: Record = {"name": name, "subject": subject, "value": float(value), "interval": bounds, "n": n}
    return {**entry, **({"tap": tap} if tap else {}), "protocol": protocol}


def features_of(entry: Record) -> str:
    """Name of the features behind a score; empty where it has none."""
    return str((entry["protocol"].get("features") or {}).get("name", ""))


def read_scores(path: Path) -> list[Record]:
    """The records of a metrics.json.

    Raises:
        ValueError: the file is missing or is no list of scores.
    """
    if not Path(path).is_file():
        raise ValueError(f"scores {path}: no such file; `tokenloom eval` writes it")
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        records = None
    if not isinstance(records, list) or not all(map(_is_score, records)):
        raise ValueError(f"scores {path}: not a list of name, subject, value and protocol; delete it and score again")
    return records


def _is_score(entry: Any) -> bool:
    kinds = {"name": str, "subject": str, "value": int | float, "protocol": dict}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def merge_scores(path: Path, new: Sequence[Record]) -> list[Record]:
    """Put records into a metrics.json, in place of all older ones of their names and subjects.

    The number of images in a name does not count: a subject has one FID, the newest, so that `fid5k` takes the place of
    `fid500` and of `fid`. Taps of one name and subject stay side by side only if they come together, so a better tap
    replaces the old one.
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


@functools.cache
def code_version() -> str:
    """Version of the package, and of a checkout its commit when this was first asked: `0.1.0 at 97c85d3bda12`.

    The commit is the one that was checked out; whether files were changed since is not told.
    """
    try:
        told = version("tokenloom")
    except PackageNotFoundError:
        told = "not installed"
    commit = checked_out(Path(__file__).parents[1])
    return f"{told} at {commit}" if commit else told


def checked_out(folder: Path) -> str:
    """12 digits of the commit that a git work tree is at, from git's own files; empty if they do not tell."""
    try:
        git = folder / ".git"
        if git.is_file():  # a linked work tree: the file names the folder
            git = folder / git.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        commit = _commit_of(git, head.removeprefix("ref: ")) if head.startswith("ref: ") else head
    except (OSError, UnicodeDecodeError):
        return ""
    return commit[:12] if re.fullmatch("[0-9a-f]{40,64}", commit) else ""


def _commit_of(git: Path, branch: str) -> str:
    """What a branch points at: a file of its own, or a line of packed-refs."""
    common = git / "commondir"
    home = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
    if (home / branch).is_file():
        return (home / branch).read_text(encoding="utf-8").strip()
    lines = (line.split(" ") for line in (home / "packed-refs").read_text(encoding="utf-8").splitlines())
    return next((line[0] for line in lines if line[1:] == [branch]), "")


def _key(entry: Record) -> tuple[str, str]:
    return base_name(entry["name"]), entry["subject"]
