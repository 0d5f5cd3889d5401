"""The charts of a learned schedule tell the curve that the log holds."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest

from tokenloom.learned_curve import CURVES, gamma_points, learned_curve_panels, of_learned_curve

TIMES = [0.0, 0.25, 0.5, 0.75, 1.0]


def line(step: int, gammas: list[float], spread: float = 0.0) -> dict[str, Any]:
    """A line of the log with gamma at TIMES; `spread` is how far the tenths lie from the median."""
    told: dict[str, Any] = {"step": step, "loss": 1.0}
    for key, shift in zip(CURVES, (0.0, -spread, spread), strict=True):
        moved = [gammas[0], *(gamma + shift for gamma in gammas[1:])]
        shares = [before - after for before, after in itertools.pairwise(moved)]
        told[key] = {"edges": TIMES, "shares": shares}
    return told


FIRST, LAST = line(50, [1.0, 0.9, 0.6, 0.3, 0.1]), line(100, [1.0, 0.8, 0.5, 0.2, 0.05], spread=0.04)


def test_gamma_is_what_the_stretches_of_time_have_left() -> None:
    points = gamma_points(LAST, CURVES[0])
    assert [time for time, _ in points] == TIMES
    assert [gamma for _, gamma in points] == pytest.approx([1.0, 0.8, 0.5, 0.2, 0.05])


def test_both_charts_have_the_first_and_the_last_curve_and_the_spread() -> None:
    gamma, logsnr = learned_curve_panels([{"step": 1, "loss": 2.0}, FIRST, LAST])
    for html in (gamma, logsnr):
        legend = re.findall(r"<li[^>]*>.*?</i>([^<]*)</li>", html)
        assert legend == ["cosine", "step 50", "lowest tenth", "highest tenth", "step 100"]
    assert "step 100: from 1 to 0.05" in gamma
    ends = math.log(0.8 / 0.2), math.log(0.05 / 0.95)
    assert f"step 100: from {ends[0]:.4g} to {ends[1]:.4g} log SNR, 4 points" in logsnr  # gamma = 1 has none


def test_one_line_is_drawn_once_and_one_schedule_for_all_has_no_spread() -> None:
    gamma, _ = learned_curve_panels([FIRST])
    assert re.findall(r"</i>([^<]*)</li>", gamma) == ["cosine", "step 50"]


def test_a_log_without_curves_has_no_charts() -> None:
    assert learned_curve_panels([]) == learned_curve_panels([{"step": 1, "loss": 1.0}]) == []
    assert [key for key in (*CURVES, "loss", "learned_schedule/residual") if of_learned_curve(key)] == list(CURVES)
