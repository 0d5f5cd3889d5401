"""Pictures of a study: plot.png with every seed and interval, curves.png with the course of the training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tokenloom.dry_run import quantity
from tokenloom.score_table import kind_of
from tokenloom.study_config import GroupConfig, MetricConfig
from tokenloom.study_plan import Row
from tokenloom.study_results import Found, grouped, key_of, label_of, scale_of

# Okabe & Ito (2008): told apart without colour vision. The baseline is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
DASHES = ("-", "--", ":", "-.")
BLACK, GREY = "#000000", "#767676"
COLUMNS = 3
PANEL = 3.7  # inches
DPI = 100
BAR_DISTANCE = 0.006  # of the axis
WIDE_RATIO = 8  # values of x that span more get a logarithmic axis
STEEP_RATIO = 3  # scores over the training that span more get a logarithmic axis
STYLE: dict[str, Any] = {"fontsize": 9}


def plot(found: Found) -> bytes:
    """PNG: a panel of rows for each metric, then for each group with an x a panel of lines for each metric."""
    metrics, lines = found.study.metrics, [group for group in grouped(found.study) if group.x]
    columns = 2 if len(metrics) == 4 else min(COLUMNS, len(metrics))
    deep = -(-len(metrics) // columns)
    places = _places(found)
    tall = 0.9 + 0.24 * (max(places.values()) + 1)
    heights = [tall] * deep + [2.7] * deep * len(lines)
    figure = Figure(figsize=(columns * PANEL + 0.5, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for number, axes in enumerate(grid.flat):
        section, index = divmod(number, deep * columns)
        if index >= len(metrics):
            axes.set_axis_off()
        elif section == 0:
            _draw_rows(axes, found, metrics[index], places, named=index % columns == 0)
        else:
            _draw_line(axes, found, metrics[index], lines[section - 1])
    figure.suptitle(found.study.title, fontsize=11, fontweight="bold")
    return _png(figure)


def curves(found: Found) -> bytes:
    """PNG: the study's curve against what the training has cost, mean over seeds; a panel for each group of rows.

    Scores, of which there are a few, come with the intervals of their means.
    """
    groups = grouped(found.study)
    columns = min(2, len(groups))
    deep = -(-len(groups) // columns)
    figure = Figure(figsize=(columns * 5.2 + 0.4, deep * 3.5), layout="constrained")
    grid = figure.subplots(deep, columns, squeeze=False, sharey=True)
    for axes, group in zip(grid.flat, groups, strict=False):
        _draw_curves(axes, found, group)
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    return _png(figure)


def _places(found: Found) -> dict[tuple[str, str], float]:
    """Height of each group's heading, under the row name "", and of its rows, from the top down."""
    places, at = {}, 0.0
    for number, group in enumerate(grouped(found.study)):
        at += 0.4 if number else 0
        for name in ("", *group.rows):
            places[group.title, name] = at
            at += 1
    return places


def _draw_rows(
    axes: Axes, found: Found, metric: MetricConfig, places: dict[tuple[str, str], float], *, named: bool
) -> None:
    key = key_of(metric)
    scale = scale_of(found.names[key])
    baselines = {group.title: found.study.baseline_of(group) for group in grouped(found.study)}
    for title, reference in baselines.items():
        base, heights = found.mean(key, reference), [at for (group, _), at in places.items() if group == title]
        if base is not None:
            ends = [min(heights) - 0.7, max(heights) + 0.7]
            axes.plot([scale * base[0].value] * 2, ends, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    for (title, row), at in places.items():
        colour = BLACK if row == baselines[title] else COLOURS[0]
        values = found.values[key].get(row, {}).values()
        axes.plot([scale * value for value in values], [at] * len(values), "o", color=colour, alpha=0.45, ms=4)
        mean = found.mean(key, row)
        if mean is not None:
            _whisker(axes, scale * mean[0].value, at, [scale * bound for bound in mean[0].interval or ()], colour)
    axes.set_xlim(*_limits(found, key, scale))
    axes.set_title(label_of(found, metric), **STYLE)
    axes.set_ylim(max(places.values()) + 0.7, -0.7)
    _name_rows(axes, places, named=named)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    _plain(axes)


def _limits(found: Found, key: str, scale: float) -> tuple[float | None, float | None]:
    """Ends of an axis that shows all values; a whisker longer than all values are apart runs out of the panel."""
    values = [scale * value for table in found.values[key].values() for value in table.values()]
    means = [found.mean(key, row.name) for row in found.rows]
    return _window(values, [scale * bound for mean in means if mean for bound in mean[0].interval or ()])


def _window(values: Sequence[float], bounds: Sequence[float]) -> tuple[float | None, float | None]:
    """Ends of an axis with all values, and of the bounds around them what lies no further off than they are apart."""
    if not values or min(values) == max(values):
        return None, None
    low, high = min(values), max(values)
    reach, margin = high - low, 0.05 * (high - low)
    return max(low - reach, min([low, *bounds])) - margin, min(high + reach, max([high, *bounds])) + margin


def _whisker(axes: Axes, mean: float, at: float, interval: Sequence[float], colour: str) -> None:
    if interval:
        axes.plot(interval, [at, at], "-", color=colour, linewidth=1.4)
    axes.plot([mean], [at], "|", color=colour, ms=10, markeredgewidth=2.2)


def _name_rows(axes: Axes, places: dict[tuple[str, str], float], *, named: bool) -> None:
    axes.set_yticks([at for (_, row), at in places.items() if row])
    axes.set_yticklabels([row for _, row in places if row] if named else [])
    axes.tick_params(axis="y", length=0)
    if named:
        for (title, row), at in places.items():
            if not row:
                axes.annotate(
                    title, (0, at), xycoords=("axes fraction", "data"), xytext=(-4, 0), textcoords="offset points",
                    ha="right", va="center", fontsize=8, fontweight="bold",
                )  # fmt: skip


def _draw_line(axes: Axes, found: Found, metric: MetricConfig, group: GroupConfig) -> None:
    """The group's rows over the values of its key."""
    key, reference = key_of(metric), found.study.baseline_of(group)
    scale = scale_of(found.names[key])
    xs = {row.name: number_at(row, group.x or "") for row in found.rows if row.name in group.rows}
    names = sorted((name for name in xs if found.mean(key, name)), key=xs.__getitem__)
    means = [found.mean(key, name) for name in names]
    axes.plot([xs[name] for name in names], [scale * mean[0].value for mean in means if mean], "-", color=COLOURS[0])
    for name, mean in zip(names, means, strict=True):
        assert mean is not None
        colour = BLACK if name == reference else COLOURS[0]
        values = found.values[key][name].values()
        axes.plot([xs[name]] * len(values), [scale * value for value in values], "o", color=colour, alpha=0.45, ms=4)
        if mean[0].interval:
            axes.plot([xs[name]] * 2, [scale * bound for bound in mean[0].interval], "-", color=colour, linewidth=1.4)
    axes.set_ylim(*_limits(found, key, scale))
    _number_axis(axes, sorted(set(xs.values())))
    axes.set_title(label_of(found, metric), **STYLE)
    axes.set_xlabel((group.x or "").split(".")[-1], **STYLE)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    _plain(axes)


def number_at(row: Row, key: str) -> float:
    """The number at a dotted key of the row's experiment.

    Raises:
        ValueError: there is none.
    """
    value: Any = row.experiment
    for name in key.split("."):
        value = getattr(value, name, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"study.groups: x={key} is {value!r} in the row {row.name!r}, not a number")
    return float(value)


def _number_axis(axes: Axes, values: Sequence[float]) -> None:
    if values and values[0] > 0 and values[-1] / values[0] > WIDE_RATIO:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_curves(axes: Axes, found: Found, group: GroupConfig) -> None:
    reference, curve = found.study.baseline_of(group), found.study.curve
    names = [reference, *(name for name in group.rows if name != reference)]
    by_name = {row.name: row for row in found.rows}
    scale = scale_of(curve.name.split("/")[-1])
    for number, name in enumerate(names):
        points = found.courses[name]
        colour = BLACK if name == reference else COLOURS[(number - 1) % len(COLOURS)]
        dashes = DASHES[max(0, number - 1) // len(COLOURS) % len(DASHES)]
        if points:
            xs = [_cost(found, by_name[name], step) for step in points]
            shown = [scale * estimate.value for estimate, _ in points.values()]
            axes.plot(xs, shown, dashes, color=colour, label=name, linewidth=1.5, marker="o", ms=2.5)
            aside = BAR_DISTANCE * xs[-1] * (number - (len(names) - 1) / 2)  # bars of several rows, side by side
            for x, (estimate, _) in zip(xs, points.values(), strict=True):
                if curve.score is not None and estimate.interval:
                    bounds = [scale * bound for bound in estimate.interval]
                    axes.plot([x + aside] * 2, bounds, "-", color=colour, linewidth=1.0, alpha=0.6)
    if curve.score is not None:
        if found.courses[reference]:  # what the others are to reach
            last = list(found.courses[reference].values())[-1][0].value
            axes.axhline(scale * last, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
        told = [estimate for line in found.courses.values() for estimate, _ in line.values()]
        values = [scale * estimate.value for estimate in told]
        if values and min(values) > 0 and max(values) / min(values) > STEEP_RATIO:
            logarithmic(axes, min(values) / 1.15, max(values) * 1.15)
        else:
            axes.set_ylim(*_window(values, [scale * bound for estimate in told for bound in estimate.interval or ()]))
    axes.set_title(group.title, fontsize=9, fontweight="bold")
    cost = "training steps" if found.study.budget == "steps" else f"training FLOPs of the {curve.stage}"
    axes.set_xlabel(cost, **STYLE)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    label = curve.metric if curve.score is None else f"{curve.stage}: {kind_of(curve.score).label}"
    axes.set_ylabel(label + (", %" if scale != 1 else ""), **STYLE)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False, ncols=2 if len(names) > 6 else 1)
    _plain(axes)


def logarithmic(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis between two positive ends, so that a bad beginning does not flatten all that follows."""
    axes.set_yscale("log")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    axes.yaxis.set_major_locator(FixedLocator([part * 10.0**each for each in decades for part in (1, 1.5, 2, 3, 5, 7)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(low, high)


def _cost(found: Found, row: Row, step: int) -> float:
    """What the axis of costs shows at a step."""
    return step if found.study.budget == "steps" else row.costs[found.study.curve.stage].total(step)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()
