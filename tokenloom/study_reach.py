"""After how many training steps a row's score is as good as the baseline's final one, seed by seed.

One rule for rows and baseline: a run has reached a score at the first snapshot that is at least as good; between that
snapshot and the one before, the score is taken to go along a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eval.statistics import Estimate
from tokenloom.study_course import Line
from tokenloom.study_statistics import geometric_interval

REACH_RULE = (
    "A run has reached the last score of the baseline's run of its seed at its first snapshot that is at least as "
    "good; between that and the snapshot before, scores are taken to follow a straight line. If its very first "
    "snapshot is good enough, that one's step counts. The baseline goes by the same rule, and rows are held against "
    "its steps, not against its whole training: where it had its last score before its end, the score had levelled "
    "off or swung, and to be there early says less. The baseline always reaches its own last score; a row that is "
    "just as good may miss it by chance. Means are geometric, with 95 % intervals by Student's t on "
    "logarithms, paired by seed, bold where they leave out 1. A row that misses the score with any seed has no mean."
)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """A row against a baseline, over the seeds of which both have scores."""

    total: int
    """Steps of the row's training."""
    steps: dict[int, float | None]
    """By seed, when the row has reached the final score of the baseline's run of that seed; None: it never has."""
    baseline_steps: dict[int, float]
    """By seed, when that run itself first had it."""
    price: float = 1.0
    """What a step of the row costs, in steps of the baseline."""
    at_once: int = 0
    """In how many seeds the row's first snapshot is good enough: it may have been so before."""

    @property
    def reached(self) -> int:
        """In how many seeds the row reaches it."""
        return sum(step is not None for step in self.steps.values())

    @property
    def mean_steps(self) -> Estimate | None:
        """Geometric mean over seeds, with its interval; None unless all seeds reach it."""
        steps = [step for step in self.steps.values() if step is not None]
        return geometric_interval(steps) if steps and len(steps) == len(self.steps) else None

    @property
    def speed_up(self) -> Estimate | None:
        """How many times sooner, or cheaper, than the baseline the row gets there, paired by seed; None as above."""
        steps = {seed: step for seed, step in self.steps.items() if step is not None}
        if not steps or len(steps) < len(self.steps):
            return None
        return geometric_interval([self.baseline_steps[seed] / (self.price * step) for seed, step in steps.items()])

    @property
    def differs(self) -> bool:
        """Whether the interval of the speed-up leaves out 1."""
        interval = self.speed_up.interval if self.speed_up else None
        return interval is not None and not interval[0] <= 1 <= interval[1]


def reach(
    row: Mapping[int, Line], baseline: Mapping[int, Line], *, last: int, total: int, higher: bool, price: float = 1.0
) -> Reach | None:
    """A row's curves by seed against those of a baseline, whose last scores are those at the step `last`.

    Args:
        total: steps of the row's training.
        higher: whether higher scores are better.
        price: what a step of the row costs, in steps of the baseline.

    Returns:
        None where no seed has the row's curve and the baseline's last score.
    """
    seeds = [seed for seed in sorted(row) if row[seed] and last in baseline.get(seed, {})]
    if not seeds:
        return None
    targets = {seed: baseline[seed][last] for seed in seeds}
    own = {seed: first_reached(baseline[seed], targets[seed], higher=higher) for seed in seeds}
    steps = {seed: first_reached(row[seed], targets[seed], higher=higher) for seed in seeds}
    return Reach(
        total=total, price=price, steps=steps, at_once=sum(steps[seed] == next(iter(row[seed])) for seed in seeds),
        baseline_steps={seed: step for seed, step in own.items() if step is not None},
    )  # fmt: skip


def first_reached(line: Line, target: float, *, higher: bool) -> float | None:
    """The step at which a curve, steps rising, first is at least as good as the target; None if it never is.

    Linear between the points before and at the first that is good enough. If that is the first point of all, its step:
    there the curve may have been as good before.
    """
    sign = 1 if higher else -1
    before: tuple[int, float] | None = None
    for step, value in line.items():
        lead = sign * (value - target)
        if lead >= 0:
            return float(step) if before is None else before[0] + (step - before[0]) * before[1] / (before[1] - lead)
        before = step, lead
    return None


def told_reach(name: str, baseline: str, score: str, found: Reach | None) -> str:
    """One sentence on a row, or on the baseline itself."""
    if found is None:
        return f"`{name}`: no seed yet of which it and `{baseline}` have been scored."
    goal, seeds = f"the final {score} of `{baseline}`", len(found.steps)
    steps, speed_up = found.mean_steps, found.speed_up
    if steps is None or speed_up is None:
        missed = f"in {seeds - found.reached} of {seeds} seeds" if seeds > 1 else "with its one seed"
        return f"`{name}` does not reach {goal} {missed}."
    after = f"after {span(steps, '{:,.0f}')} of {found.total:,} steps{_told_at_once(found)}"
    if name == baseline:
        return f"`{name}` itself first has its final {score} {after}."
    compared = f"{_times(speed_up)} {_sooner(speed_up.value, found.price)} than `{baseline}` itself"
    if speed_up.interval is None:
        return f"`{name}` reaches {goal} {after}, {compared} (one seed, no interval)."
    if not found.differs:
        told = f"speed-up and its 95 % interval: {span(speed_up, '{:.2f}')}"
        return f"`{name}` reaches {goal} {after}; no difference from `{baseline}` itself can be told ({told})."
    low, high = sorted(bound if speed_up.value >= 1 else 1 / bound for bound in speed_up.interval)
    return f"`{name}` reaches {goal} {after}, {compared} (95 %: {low:.2f} to {high:.2f})."


def span(estimate: Estimate, form: str) -> str:
    """`700 (650 to 750)`, each number in the form."""
    low_high = " to ".join(form.format(bound) for bound in estimate.interval or ())
    return form.format(estimate.value) + (f" ({low_high})" if low_high else "")


def _told_at_once(found: Reach) -> str:
    if not found.at_once:
        return ""
    seeds = f"in {found.at_once} of {len(found.steps)} seeds " if len(found.steps) > 1 else ""
    return f", {seeds}at the first snapshot already"


def _times(speed_up: Estimate) -> str:
    return f"{max(speed_up.value, 1 / speed_up.value):.2f} times"


def _sooner(speed_up: float, price: float) -> str:
    words = ("sooner", "later") if math.isclose(price, 1.0) else ("cheaper", "dearer")
    return words[0] if speed_up >= 1 else words[1]


def reach_table(baseline: str, found: Mapping[str, Reach | None]) -> list[list[str]]:
    """Head and lines of a table: the baseline's own line first, then the other rows."""
    price = next((each.price for each in found.values() if each and not math.isclose(each.price, 1.0)), 1.0)
    lines = [["row", "reached by", "after steps", f"times {_sooner(1.0, price)} than {baseline}"]]
    for name, each in sorted(found.items(), key=lambda item: item[0] != baseline):
        steps, speed_up = (each.mean_steps, each.speed_up) if each else (None, None)
        times = "" if name == baseline or speed_up is None else span(speed_up, "{:.2f}")
        lines.append([
            name,
            f"{each.reached} of {len(each.steps)}" if each else "\N{EN DASH}",
            f"{span(steps, '{:,.0f}')} of {each.total:,}" if each and steps else "\N{EN DASH}",
            (f"**{times}**" if each and each.differs else times) or "\N{EN DASH}",
        ])  # fmt: skip
    return lines
