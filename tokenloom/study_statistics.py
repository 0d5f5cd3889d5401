"""Means over seeds with Student's t intervals, and differences paired by seed: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.special

from eval.statistics import Estimate

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of independent values and its interval mean -+ t s / sqrt(n), n - 1 degrees of freedom (Student 1908).

    There is no interval with fewer than two values.

    Raises:
        ValueError: no value at all.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean over seeds needs at least one value")
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    reach = float(scipy.special.stdtrit(n - 1, (1 + confidence) / 2)) * spread / math.sqrt(n)
    return Estimate(mean, (mean - reach, mean + reach))


def geometric_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Geometric mean of positive values, with the interval of the mean of their logarithms taken back.

    Raises:
        ValueError: no value at all, or one that is not positive.
    """
    if min(values, default=1.0) <= 0:
        raise ValueError(f"a geometric mean takes positive values alone, not {min(values)}")
    mean, interval = mean_interval([math.log(value) for value in values], confidence)
    return Estimate(math.exp(mean), interval and (math.exp(interval[0]), math.exp(interval[1])))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> tuple[Estimate, int] | None:
    """Mean difference from the baseline over the seeds that both have, its interval, and how many seeds those are.

    A seed gives both rows the same order of the data, so what it does to both cancels. None: no seed in common.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    return (mean_interval(differences, confidence), len(differences)) if differences else None


def excludes_zero(estimate: Estimate) -> bool:
    """Whether the whole interval lies on one side of 0."""
    return estimate.interval is not None and (estimate.interval[0] > 0 or estimate.interval[1] < 0)


def stated(result: tuple[Estimate, int] | None) -> dict[str, Any] | None:
    """A mean, its interval and the number of its seeds, JSON-ready."""
    if result is None:
        return None
    (value, interval), n = result
    return {"value": value, "interval": list(interval) if interval else None, "n": n}
