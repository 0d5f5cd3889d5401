"""Charts of a learned noise schedule: gamma and log SNR over time, at first and at last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from tokenloom.charts import Chart, Point, Series
from tokenloom.panels import Line

CURVES = ("learned_schedule/gamma", "learned_schedule/gamma_low", "learned_schedule/gamma_high")
LEAST = 1e-4  # of gamma and of 1 - gamma, beyond which no log SNR is drawn


def of_learned_curve(key: str) -> bool:
    """Whether a key of the log holds one of these curves."""
    return key in CURVES


def learned_curve_panels(lines: Sequence[Line]) -> list[str]:
    """gamma, then log SNR, over time; empty where the log has no curves.

    A schedule of each pixel or channel has its median, and the ends of the eight tenths around it.
    """
    told = [line for line in lines if all(isinstance(line.get(key), dict) for key in CURVES)]
    if not told:
        return []
    first, last = told[0], told[-1]
    middle, low, high = (gamma_points(last, key) for key in CURVES)
    spread = any(abs(above - below) > 1e-6 for (_, above), (_, below) in zip(high, low, strict=True))
    found = [
        ("cosine", [(time, math.cos(time * math.pi / 2) ** 2) for time, _ in middle], "plain"),
        (f"step {first['step']:,}", gamma_points(first, CURVES[0]), "extra-1"),
        *([("lowest tenth", low, "extra-2"), ("highest tenth", high, "extra-2")] if spread else []),
        (f"step {last['step']:,}", middle, "diffusion"),
    ]
    found = [each for place, each in enumerate(found) if place != 1 or first is not last]
    gamma = [Series(label=label, points=points, tone=tone) for label, points, tone in found]
    logsnr = [Series(label=label, points=_logsnr_points(points), tone=tone) for label, points, tone in found]
    return [
        Chart(
            title="Learned schedule: share of the signal", series=gamma, unit="gamma", x_label="time", y_range=(0, 1)
        ).html(),
        Chart(title="Learned schedule: log SNR", series=logsnr, unit="log SNR", x_label="time").html(),
    ]


def gamma_points(line: Line, key: str) -> list[Point]:
    """Times and gamma there, from what each stretch of time takes away."""
    told = line[key]
    taken = accumulate(told["shares"], initial=0.0)
    return [(time, 1 - gone) for time, gone in zip(told["edges"], taken, strict=True)]


def _logsnr_points(points: Sequence[Point]) -> list[Point]:
    """Only where neither signal nor noise is almost gone."""
    return [(time, math.log(gamma / (1 - gamma))) for time, gamma in points if LEAST < gamma < 1 - LEAST]
