"""Scores of several models side by side; those that were measured differently are refused, or marked if one insists."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from eval.names import answers_to, base_name, chapter_of, rank
from eval.protocol import IF_STATED, Record, read_scores, unlikeness

FLOOR = "real"  # real images against other real ones: beside the models, and best of nothing
BASELINES = (FLOOR, "pixels", "enlarged")  # alike in all runs on the same images
HASH = re.compile("[0-9a-f]{32,}")
Changes = dict[str, tuple[Any, Any]]  # dotted key of a protocol: the value compared with, the own value


class Unlike(NamedTuple):
    """In what a score was measured otherwise than that of the first model in its column."""

    first: str
    changes: Changes


class Model(NamedTuple):
    """A row: one subject of one file; `scores` by column, which is a score's name without its number of images."""

    label: str
    path: Path
    subject: str
    scores: dict[str, Record]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows, columns by chapter, and which cells, by label and column, were measured differently."""

    models: list[Model]
    columns: dict[str, list[str]]
    unlike: dict[tuple[str, str], Unlike]

    def rows(self, title: str) -> list[Model]:
        """The models that have any score of a chapter, baselines first."""
        found = [model for model in self.models if model.scores.keys() & set(self.columns[title])]
        return sorted(found, key=lambda model: model.subject not in BASELINES)


def compare(paths: Sequence[Path], *, only: Sequence[str] = (), force: bool = False) -> Comparison:
    """All models of some metrics.json, or of run folders, beside each other; of one file alone, the models in it.

    Real images are marked but stop nothing: where models are held against all there are, they can only be held against
    a part of themselves.

    Args:
        only: names of scores to show, with or without their number of images and features; empty: all.
        force: also take scores that were measured differently; `unlike` then tells them.

    Raises:
        ValueError: a file is missing or broken, nothing is shared, `only` finds nothing, or scores are unlike.
    """
    files = list(dict.fromkeys(map(scores_file, paths)))
    models = [model for path, name in zip(files, run_names(files), strict=True) for model in _models(path, name)]
    wanted = _wanted(models, only)
    kept = [model._replace(scores={c: e for c, e in model.scores.items() if c in wanted}) for model in models]
    models = _codes_apart(_without_repeats([model for model in kept if model.scores]))
    columns = list(dict.fromkeys(column for model in models for column in model.scores))
    if not any(sum(column in model.scores for model in models) > 1 for column in columns):
        raise ValueError(f"no score is in more than one model of {', '.join(map(str, files))}: nothing to compare")
    unlike = {(label, column): told for column in columns for label, told in _unlike(column, models)}
    floors = {model.label for model in models if model.subject == FLOOR}
    refused = {cell: told for cell, told in unlike.items() if cell[0] not in floors}
    if refused and not force:
        raise ValueError(_refusal(refused))
    return Comparison(models=models, columns=_by_chapter(columns), unlike=unlike)


def scores_file(path: Path) -> Path:
    """The metrics.json of a run folder, or of a folder that holds one; a file is taken as it is."""
    path = Path(path)
    if not path.is_dir():
        return path
    inside = (path / "eval" / "metrics.json", path / "metrics.json")
    return next((each for each in inside if each.is_file()), inside[0])


def run_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each file: its run's, with as many folders above it as tell all of them apart."""
    if len(paths) < 2:
        return [""] * len(paths)
    homes = [_home(path).parts for path in paths]
    depths = range(1, max(map(len, homes)) + 1)
    found = (["/".join(home[-depth:]) for home in homes] for depth in depths)
    return next((names for names in found if len(set(names)) == len(names)), [str(path) for path in paths])


def _home(path: Path) -> Path:
    """runs/x of runs/x/eval/metrics.json, x of x/metrics.json, a of a.json."""
    path = path.absolute()
    if path.name != "metrics.json":
        return path.with_suffix("")
    return path.parent.parent if path.parent.name == "eval" else path.parent


def _models(path: Path, name: str) -> Iterator[Model]:
    """The subjects of a file, as they come; where a subject has a score at several taps, each has its column."""
    records = read_scores(path)
    counts = Counter((entry["subject"], base_name(entry["name"])) for entry in records)
    found: dict[str, dict[str, Record]] = {}
    for entry in records:
        column = base_name(entry["name"])
        factor = (entry["protocol"].get("settings") or {}).get("low_resolution")
        if factor:  # of an image restored from a smaller one, not from codes
            column += f" at 1/{factor}"
        if counts[entry["subject"], base_name(entry["name"])] > 1 and "tap" in entry:
            column += f" at {entry['tap']}"
        found.setdefault(entry["subject"], {})[column] = entry
    for subject, scores in found.items():
        yield Model(f"{name}/{subject}" if name else subject, path, subject, scores)


def _wanted(models: Sequence[Model], only: Sequence[str]) -> set[str]:
    """The columns that `only` asks for: those that fit each name best."""
    names = {column: entry["name"] for model in models for column, entry in model.scores.items()}
    chosen: set[str] = set() if only else set(names)
    for wish in only:
        fits = {column: answers_to(name, base_name(wish)) for column, name in names.items()}
        exact = {column for column, fit in fits.items() if fit >= 2}
        chosen |= exact or {column for column, fit in fits.items() if fit}
        if not any(fits.values()):
            raise ValueError(f"--only {wish}: no such score; there are {', '.join(sorted(set(names)))}")
    return chosen


def _codes_apart(models: Sequence[Model]) -> list[Model]:
    """Likelihoods of the codes of several tokenizers in a column each: they are of different things, and no mistake."""
    tokenizers = {_tokenizer(model) for model in models if "nll" in model.scores}
    if len(tokenizers) < 2:
        return list(models)
    return [
        model._replace(
            scores={f"nll at codes {_tokenizer(model)[:6]}" if c == "nll" else c: e for c, e in model.scores.items()}
        )
        for model in models
    ]


def _tokenizer(model: Model) -> str:
    """Whose codes a model's likelihood is of."""
    told = model.scores["nll"]["protocol"].get("settings") or {} if "nll" in model.scores else {}
    return str(told.get("tokenizer", "unknown"))


def _without_repeats(models: Sequence[Model]) -> list[Model]:
    """Baselines that are the same in all files are told once, without the name of a run."""
    kept = list(models)
    for subject in BASELINES:
        same = [model for model in kept if model.subject == subject]
        if len(same) > 1 and all(_figures(model) == _figures(same[0]) for model in same):
            place = kept.index(same[0])
            kept = [model for model in kept if model.subject != subject]
            kept.insert(place, same[0]._replace(label=subject))
    return kept


def _figures(model: Model) -> dict[str, tuple[Any, ...]]:
    scores = model.scores.items()
    return {c: (e["value"], e.get("interval"), e.get("tap"), e["protocol"].get("hash")) for c, e in scores}


def _by_chapter(columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns in the order of CHAPTERS, those of one kind as they come."""
    chapters: dict[str, list[str]] = {}
    for column in sorted(columns, key=lambda column: rank(_name(column))):
        chapters.setdefault(chapter_of(_name(column)), []).append(column)
    return chapters


def _name(column: str) -> str:
    return column.partition(" at ")[0]


def _reference(column: str, models: Sequence[Model]) -> tuple[Model, dict[str, Any]]:
    """The first model of a column, real images only if there is no other, and the protocol that the rest must have.

    What counts only if it is stated is that of the first model that states it.
    """
    having = [model for model in models if column in model.scores]
    first = next((model for model in having if model.subject != FLOOR), having[0])
    stated: dict[str, Any] = {}
    for model in (first, *having):
        told = _protocol(model, column)
        stated = {**{key: told[key] for key in IF_STATED if key in told}, **stated}
    return first, {**_protocol(first, column), **stated}


def _protocol(model: Model, column: str) -> dict[str, Any]:
    """What a score was measured under; the scheme of labels is of no meaning for real images."""
    told = model.scores[column]["protocol"]
    return {key: value for key, value in told.items() if model.subject != FLOOR or key not in IF_STATED}


def _unlike(column: str, models: Sequence[Model]) -> Iterator[tuple[str, Unlike]]:
    """Labels of the models whose score was measured otherwise than the first one's, and in what."""
    first, stated = _reference(column, models)
    for model in models:
        if column in model.scores and (changes := unlikeness(stated, _protocol(model, column))):
            yield model.label, Unlike(first.label, changes)


def _refusal(unlike: Mapping[tuple[str, str], Unlike]) -> str:
    """Which scores of which models are unlike, in what, and what can be done; scores with the same story together."""
    stories: dict[tuple[str, str, str], list[str]] = {}
    for (label, column), (first, changes) in unlike.items():
        stories.setdefault((label, first, told_changes(changes)), []).append(column)
    lines = [
        f"\n  {', '.join(columns)} of {label} unlike {first}: {changes}"
        for (label, first, changes), columns in stories.items()
    ]
    return (
        f"scores that were measured differently are not set side by side:{''.join(lines)}\n"
        "Score these models alike (the same `eval` section, data and code), choose other scores with --only, or see"
        " them marked with --force"
    )


def told_changes(changes: Changes) -> str:
    """`num_generated 5000 | 500`: the value of the first row, then the own one."""
    return "; ".join(f"{key} {brief(before)} | {brief(after)}" for key, (before, after) in changes.items())


def brief(value: Any) -> str:
    """A value of a protocol on a line: a hash by its first digits, a long list by its length, range and checksum."""
    if isinstance(value, list) and len(value) > 4:
        numbers = all(isinstance(each, int | float) for each in value)
        span = f" in {min(value):g}..{max(value):g}" if numbers else ""
        return f"{len(value)} values{span} ({crc32(json.dumps(value).encode()):08x})"
    if isinstance(value, list):
        return ", ".join(map(brief, value)) or "none"
    if isinstance(value, str) and HASH.fullmatch(value):
        return f"{value[:8]}.."
    return "none" if value is None else str(value)
