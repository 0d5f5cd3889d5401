"""Two measures of how hard the noise levels of a study are, both of Kim et al. (2025, arXiv:2403.10348).

How soon a copy of the model converges that trains on one cluster of levels alone, by its loss and by the score of its
samples where it serves these levels inside another, fixed model; and the relative entropy of consecutive marginals of
the noising (`difficulty_entropies`). Clusters are numbered from 1, the least noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.statistics import Estimate
from tokenloom.difficulty_entropies import Entropies, curriculum_of, entropies_on_disk
from tokenloom.rank_order import Order, rank_order
from tokenloom.run_files import RunFiles
from tokenloom.score_table import kind_of
from tokenloom.study_config import StudyConfig
from tokenloom.study_course import Line, line_of
from tokenloom.study_jobs import finished
from tokenloom.study_plan import Row, Run
from tokenloom.study_statistics import mean_interval, paired_difference

SHARE = 0.9  # of its whole fall, after which a curve counts as converged
REACH = 2  # lines of the log on each side that smooth a training loss
HELD_OUT = "held-out loss"
Lines = dict[int, dict[int, Line]]
"""Curves by cluster and seed."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of noise levels and the row that trains on it alone."""

    number: int
    row: str
    times: tuple[float, float]
    """Of the schedule, 0 data and 1 noise."""
    levels: tuple[float, float]
    """Log SNRs."""


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How the copies converge by one measure, which falls in the course of the training."""

    name: str
    lines: Lines

    @property
    def label(self) -> str:
        """What it is called in a sentence."""
        return self.name if "loss" in self.name else kind_of(self.name).label

    def steps(self, cluster: int) -> dict[int, float]:
        """Training steps until SHARE of the fall, by seed; seeds whose curve does not fall are left out."""
        found = {seed: steps_to_fall(line) for seed, line in self.lines.get(cluster, {}).items()}
        return {seed: steps for seed, steps in found.items() if steps is not None}

    def falls(self, cluster: int) -> dict[int, float]:
        """First value minus last, by seed."""
        ends = {seed: list(line.values()) for seed, line in self.lines.get(cluster, {}).items() if line}
        return {seed: values[0] - values[-1] for seed, values in ends.items()}

    def curves(self, cluster: int) -> list[Line]:
        """From 1 at the first step to 0 at the last, of each seed whose curve falls."""
        found = map(normalised, self.lines.get(cluster, {}).values())
        return [line for line in found if line]

    @property
    def order(self) -> Order | None:
        """Rank correlation between a cluster's number and its steps; None where there is nothing to compare."""
        seeds = sorted({seed for lines in self.lines.values() for seed in lines})
        found = {number: self.steps(number) for number in self.lines}
        return rank_order({seed: {number: steps[seed] for number, steps in found.items() if seed in steps}
                           for seed in seeds})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """All that is told of a study's noise levels."""

    clusters: list[Cluster]
    loss: Convergence
    score: Convergence | None
    """None: the study has no score over training."""
    gaps: dict[int, tuple[Estimate, int]]
    """By cluster, final score of the copy inside the fixed model minus that of the fixed model alone, over seeds."""
    fixed: str | None
    """The row of the fixed model."""
    entropies: Entropies | None
    missing: list[str]


def check_copies(study: StudyConfig, rows: Sequence[Row]) -> None:
    """Raise ValueError unless the rows train clusters one by one, and draw the scored samples inside one model.

    As `copies`; without `outside` a copy would draw samples from levels that it was not trained on.
    """
    found = copies(rows)
    outside = {row.experiment.diffusion.sample.outside for row in found.values() if row.experiment.diffusion}
    if study.curve.score is not None and (len(outside) > 1 or None in outside):
        told = "set diffusion.sample.outside of all rows of one cluster to one model, such as row:<name>"
        raise ValueError(
            f"study.difficulty=true with study.curve.score={study.curve.score} scores copies inside one model: {told}"
        )


def copies(rows: Sequence[Row]) -> dict[int, Row]:
    """Rows that train on one cluster alone, by its number, rising.

    Raises:
        ValueError: fewer than three, two of one cluster, or rows that do not divide one noise axis alike.
    """
    found: dict[int, Row] = {}
    for row in rows:
        diffusion = row.experiment.diffusion
        if diffusion is None or diffusion.curriculum.kind != "single":
            continue
        number = diffusion.curriculum.cluster
        if number in found:
            raise ValueError(f"study.difficulty=true: {found[number].name} and {row.name} both train cluster {number}")
        found[number] = row
    if len(found) < 3:
        told = f"rows with diffusion.curriculum.kind=single, at least three, but there are {len(found)}"
        raise ValueError(f"study.difficulty=true compares {told}; see configs/study-difficulty.yaml")
    if len({str(_axis(row)) for row in found.values()}) > 1:
        told = "curriculum.num_clusters, curriculum.clusters, schedule and path of diffusion"
        raise ValueError(f"study.difficulty=true takes rows with one noise axis: give all of them the same {told}")
    return dict(sorted(found.items()))


def measure(study: StudyConfig, rows: Sequence[Row], runs: Sequence[Run], left_out: Sequence[str] = ()) -> Difficulty:
    """Read and compute all measures from the finished runs, but those named in `left_out`."""
    found, done = copies(rows), [run for run in runs if finished(run) and run.name not in left_out]
    clusters = [_cluster(number, row) for number, row in found.items()]
    of_rows = {number: [run for run in done if run.row == row.name] for number, row in found.items()}
    fixed = fixed_row(found)
    entropies = entropies_on_disk(found[clusters[0].number], done)
    loss, score = losses(of_rows), _scores(study, of_rows)
    level = [*_level(loss, of_rows), *(_level(score, of_rows) if score else [])]
    missing = [*_missing(found, runs, done, fixed), *level]
    if entropies is None:
        missing.append("relative entropy: no latents on disk")
    return Difficulty(
        clusters=clusters, loss=loss, score=score,
        gaps=_gaps(study, of_rows, [run for run in done if run.row == fixed]),
        fixed=fixed, entropies=entropies, missing=missing,
    )  # fmt: skip


def fixed_row(found: Mapping[int, Row]) -> str | None:
    """The row whose model all copies serve inside of; None if there is no such row."""
    names = {row.taken.get("outside") for row in found.values()}
    return names.pop() if len(names) == 1 else None


# Convergence


def losses(runs: Mapping[int, Sequence[Run]]) -> Convergence:
    """The held-out loss of each copy's own cluster, or its training loss, smoothed, where a copy was not validated."""
    held_out: Lines = {number: {} for number in runs}
    trained: Lines = {number: {} for number in runs}
    for number, each in runs.items():
        for run in each:
            lines = RunFiles(run.folder).metrics("diffusion")
            held_out[number][run.seed] = _values(lines, f"validation/loss_cluster/{number:02d}")
            trained[number][run.seed] = smoothed(_values(lines, "loss"))
    if all(len(line) > 1 for by_seed in held_out.values() for line in by_seed.values()):
        return Convergence(name=HELD_OUT, lines=held_out)
    return Convergence(name="training loss, smoothed", lines=trained)


def normalised(line: Line) -> Line:
    """(L(k) - L_last) / (L_first - L_last) by step k; empty if the curve does not fall."""
    values = list(line.values())
    if len(values) < 2 or not values[0] > values[-1]:
        return {}
    return {step: (value - values[-1]) / (values[0] - values[-1]) for step, value in line.items()}


def steps_to_fall(line: Line, share: float = SHARE) -> float | None:
    """The first step, interpolated, at which a curve has had this share of its whole fall; None if it does not fall.

    The fall is counted from the first value on, whose step is no part of it: what lies before is unknown.
    """
    goal, before = 1 - share, None
    for step, value in normalised(line).items():
        if before is not None and value <= goal:
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - value)
        before = step, value
    return None


def smoothed(line: Line, reach: int = REACH) -> Line:
    """Mean of each value and up to `reach` on each side, as many on one as on the other, so that slopes stay."""
    steps, values, last = list(line), list(line.values()), len(line) - 1
    widths = [min(reach, index, last - index) for index in range(len(values))]
    means = (np.mean(values[index - width : index + width + 1]) for index, width in enumerate(widths))
    return dict(zip(steps, map(float, means), strict=True))


def _scores(study: StudyConfig, runs: Mapping[int, Sequence[Run]]) -> Convergence | None:
    if study.curve.score is None:
        return None
    lines = {number: {run.seed: line_of(study.curve, run) for run in each} for number, each in runs.items()}
    scored = {number: {seed: line for seed, line in each.items() if line} for number, each in lines.items()}
    return Convergence(name=study.curve.score, lines=scored)


def _gaps(
    study: StudyConfig, runs: Mapping[int, Sequence[Run]], fixed: Sequence[Run]
) -> dict[int, tuple[Estimate, int]]:
    """Differences of the final scores, paired by seed."""
    if study.curve.score is None:
        return {}

    def ends(each: Sequence[Run]) -> dict[int, float]:
        lines = {run.seed: list(line_of(study.curve, run).values()) for run in each}
        return {seed: values[-1] for seed, values in lines.items() if values}

    found = {number: paired_difference(ends(each), ends(fixed)) for number, each in runs.items()}
    return {number: gap for number, gap in found.items() if gap is not None}


def over_seeds(values: Mapping[int, float]) -> tuple[Estimate, int] | None:
    """Mean over seeds with its interval, and their number."""
    return (mean_interval(list(values.values())), len(values)) if values else None


def _values(lines: Sequence[Mapping[str, object]], key: str) -> Line:
    """A key of a log by step, rising; what is not finite is left out."""
    found = {int(str(line["step"])): line.get(key) for line in lines if key in line}
    finite = {step: value for step, value in found.items() if isinstance(value, float | int) and math.isfinite(value)}
    return dict(sorted(finite.items()))


# Clusters


def _cluster(number: int, row: Row) -> Cluster:
    assert row.experiment.diffusion is not None
    curriculum = curriculum_of(row.experiment.diffusion)
    low, high = curriculum.active
    return Cluster(number=number, row=row.name, times=(1 - high, 1 - low), levels=curriculum.active_levels(0))


def _axis(row: Row) -> tuple[object, ...]:
    """What decides the clusters of a row."""
    diffusion = row.experiment.diffusion
    assert diffusion is not None
    return diffusion.curriculum.num_clusters, diffusion.curriculum.clusters, diffusion.schedule, diffusion.path


def _missing(found: Mapping[int, Row], runs: Sequence[Run], done: Sequence[Run], fixed: str | None) -> list[str]:
    """What the measures lack: clusters without a row, and runs that are not finished or were left out."""
    diffusion = next(iter(found.values())).experiment.diffusion
    assert diffusion is not None
    untrained = [number for number in range(1, diffusion.curriculum.num_clusters + 1) if number not in found]
    names = {*(row.name for row in found.values()), fixed}
    undone = [run.name for run in runs if run.row in names and run not in done]
    return [
        *(f"cluster {number}: no row trains it" for number in untrained),
        *(f"{name}: no result" for name in undone),
    ]


def _level(measure: Convergence, runs: Mapping[int, Sequence[Run]]) -> list[str]:
    """Runs whose curve does not fall, of which no steps can be told."""
    told = f"its {measure.label} does not fall from its first value to its last, so that it has no steps"
    level = [run for number, each in runs.items() for run in each if run.seed not in measure.steps(number)]
    return [f"{run.name}: {told}" for run in level]
