"""Rows that sample with the trained network of another row too: `row:<name>` in the place of a folder.

It stands for the diffusion model of that row's run with the same seed. A study keeps the name, a run gets the folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenloom.experiment import Experiment
from tokenloom.study_config import check_names

MARK = "row:"
KEYS = ("guide", "outside")  # of diffusion.sample: each names the folder of a trained diffusion model
Taken = Mapping[str, str]
"""Names of rows, by the key of diffusion.sample that takes their networks."""


def taken_by(experiment: Experiment) -> dict[str, str]:
    """The rows whose networks an experiment takes; empty for most."""
    if experiment.diffusion is None:
        return {}
    values = {key: getattr(experiment.diffusion.sample, key) or "" for key in KEYS}
    return {key: value.removeprefix(MARK) for key, value in values.items() if value.startswith(MARK)}


def check_taken(rows: Mapping[str, Experiment]) -> None:
    """Raise ValueError if a row, of these by name, takes the network of no row, of one without it, or in a circle."""
    taken = {name: taken_by(experiment) for name, experiment in rows.items()}
    for name, keys in taken.items():
        for key, provider in keys.items():
            where = f"study.rows.{name}.diffusion.sample.{key}={MARK}{provider}"
            check_names([provider], list(rows), where)
            diffusion = rows[provider].diffusion
            if diffusion is None:
                raise ValueError(f"{where}: the row {provider} trains no diffusion model; name another one")
            if key == "outside" and diffusion.curriculum.kind == "single":
                raise ValueError(
                    f"{where}: the row {provider} trains on one cluster alone; name one that trains on all"
                )
            if name in with_taken([provider], taken):
                told = "itself" if provider == name else f"{provider}, which needs {name} first"
                raise ValueError(f"{where}: {name} would wait for {told}; name a row that does not take {name}")


def with_taken(names: Collection[str], taken: Mapping[str, Taken]) -> set[str]:
    """Rows of these names, and all whose networks they take, directly or through others."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += taken.get(name, {}).values()
    return found


def with_folders(experiment: Experiment, folders: Mapping[str, Path]) -> Experiment:
    """The experiment with a folder, by the key of diffusion.sample, in the place of each `row:<name>`."""
    if not folders:
        return experiment
    assert experiment.diffusion is not None
    paths: dict[str, Any] = {key: str(path) for key, path in folders.items()}
    sample = dataclasses.replace(experiment.diffusion.sample, **paths)
    return dataclasses.replace(experiment, diffusion=dataclasses.replace(experiment.diffusion, sample=sample))


def without_taken(experiment: Experiment) -> Experiment:
    """The experiment with samples that no row's network helps to draw: what can be checked before there are any.

    Where a row guides, guidance is switched off, as it needs no null label there. So it is in variants, unless they
    name a guide or none themselves.
    """
    taken = taken_by(experiment)
    if not taken:
        return experiment
    assert experiment.diffusion is not None
    plain: dict[str, Any] = {"guidance": 1.0} if "guide" in taken else {}
    nothing: dict[str, Any] = dict.fromkeys(taken)
    sample = dataclasses.replace(experiment.diffusion.sample, **nothing, **plain)
    off = {f"diffusion.sample.{key}": value for key, value in plain.items()}
    variants = {
        name: values if "diffusion.sample.guide" in values or not _is_of("diffusion", values) else {**values, **off}
        for name, values in experiment.eval.variants.items()
    }
    scored = dataclasses.replace(experiment.eval, variants=variants)
    diffusion = dataclasses.replace(experiment.diffusion, sample=sample)
    return dataclasses.replace(experiment, diffusion=diffusion, eval=scored)


def told_taken(rows: Sequence[tuple[str, Taken]]) -> list[str]:
    """Lines of a dry run: which rows wait for which."""
    lines: dict[str, list[str]] = {}
    for name, taken in rows:
        for provider in dict.fromkeys(taken.values()):
            lines.setdefault(provider, []).append(name)
    told = "its network is taken in the sampling of"
    return [f"{provider} comes first: {told} {', '.join(names)}" for provider, names in lines.items()]


def _is_of(family: str, values: Mapping[str, object]) -> bool:
    return next(iter(values), "").split(".")[0] == family
