"""The picture of difficulty.md: convergence by cluster, steps that it took, and relative entropy over time."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from tokenloom.difficulty_entropies import Entropies
from tokenloom.difficulty_measures import SHARE, Convergence, Difficulty, over_seeds
from tokenloom.study_course import course

COLOURS = "viridis"  # ordered, and told apart without colour vision
LIGHTEST = 0.88  # of it, on white: the noisiest cluster
BLACK, GREY = "#000000", "#767676"
DPI = 100
FEW = 6  # clusters, of which each has its name and its band
ASIDE = 0.12  # of a cluster, between the two measures of it
STYLE: dict[str, Any] = {"fontsize": 9}


def difficulty_plot(told: Difficulty, *, title: str) -> bytes:
    """PNG with four panels: loss and score over steps, steps until converged by cluster, relative entropy by time."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    (left, right), (below, last) = figure.subplots(2, 2)
    _draw_convergence(left, told, told.loss)
    if told.score is None:
        _leave_out(right, "study.curve.score is not set: no score over training")
    else:
        _draw_convergence(right, told, told.score)
    _draw_steps(below, told)
    if told.entropies is None:
        _leave_out(last, "no latents on disk: no relative entropy")
    else:
        _draw_entropies(last, told, told.entropies)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def _colours(told: Difficulty) -> dict[int, Any]:
    """By cluster, dark with little noise and light with much."""
    count = max(1, len(told.clusters) - 1)
    scale = matplotlib.colormaps[COLOURS]
    return {cluster.number: scale(LIGHTEST * place / count) for place, cluster in enumerate(told.clusters)}


def _draw_convergence(axes: Axes, told: Difficulty, measure: Convergence) -> None:
    names = {told.clusters[0].number: " (least noise)", told.clusters[-1].number: " (most noise)"}
    few = len(told.clusters) <= FEW
    for number, colour in _colours(told).items():
        points = course(measure.curves(number))
        if points:
            means = [estimate.value for estimate, _ in points.values()]
            label = f"cluster {number}{names.get(number, '')}" if few or number in names else None
            axes.plot(list(points), means, "-", color=colour, linewidth=1.6, marker="o", ms=2.5, label=label)
            bounds = [estimate.interval for estimate, _ in points.values()]
            if few and all(bounds):
                lows, highs = zip(*(bound for bound in bounds if bound), strict=True)
                axes.fill_between(list(points), lows, highs, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(1 - SHARE, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    axes.set_ylim(-0.35, 1.35)
    axes.set_title(f"{_label(measure)}, from first (1) to last value (0)", **STYLE)
    axes.set_xlabel("training steps", **STYLE)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _draw_steps(axes: Axes, told: Difficulty) -> None:
    """Every seed, mean and interval; loss left of the cluster's place, score right of it."""
    measures = [(told.loss, "o", -ASIDE), *([(told.score, "s", ASIDE)] if told.score else [])]
    colours = _colours(told)
    top = 0.0
    for measure, marker, aside in measures:
        for number, colour in colours.items():
            steps, at = measure.steps(number), number + aside
            found = over_seeds(steps)
            if found is None:
                continue
            top = max(top, *steps.values())
            axes.plot([at] * len(steps), list(steps.values()), marker, color=colour, alpha=0.45, ms=4, linewidth=0)
            axes.plot([at], [found[0].value], marker, color=colour, ms=8, markeredgecolor=BLACK, markeredgewidth=0.7)
            if found[0].interval:
                axes.plot([at, at], found[0].interval, "-", color=colour, linewidth=1.6)
        axes.plot([], [], marker, color=GREY, ms=7, label=_label(measure))
    axes.set_ylim(0, 1.15 * top or 1)
    axes.xaxis.set_major_locator(FixedLocator(list(colours)))
    axes.set_title(f"Steps to {SHARE:.0%} of the whole fall", **STYLE)
    axes.set_xlabel("cluster, from the least noise to the most", **STYLE)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _draw_entropies(axes: Axes, told: Difficulty, found: Entropies) -> None:
    for cluster in told.clusters:
        axes.axvspan(*cluster.times, color=_colours(told)[cluster.number], alpha=0.16, linewidth=0)
    values = [each.value if each.value > 0 else math.nan for each in found.estimates]
    lows = [max(each.value - 2 * each.error, each.value / 10) for each in found.estimates]
    highs = [each.value + 2 * each.error for each in found.estimates]
    axes.fill_between(found.times, lows, highs, color=BLACK, alpha=0.2, linewidth=0)
    label = f"{found.num_latents:,} latents, estimate"
    axes.plot(found.times, values, "-", color=BLACK, linewidth=1.5, marker="o", ms=3, label=label)
    axes.plot(found.times, found.gaussian, "--", color="#D55E00", linewidth=1.4, label="Gaussian of their covariance")
    axes.set_yscale("log")
    axes.set_title("Relative entropy of consecutive marginals, nats per step", **STYLE)
    axes.set_xlabel("time of the schedule, 0 data, 1 noise", **STYLE)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _label(measure: Convergence) -> str:
    return measure.label[:1].upper() + measure.label[1:]


def _leave_out(axes: Axes, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, **STYLE)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
