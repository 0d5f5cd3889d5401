"""Charts as inline SVG that take their colours from the page, and the choice of their ticks.

Every chart is drawn 360 units wide and shown about 360 pixels wide, so that its text keeps its size on any screen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 360, 216
TOP, BOTTOM, RIGHT = 22, 36, 16
LETTER = 6.3  # width of a digit at the size of tick labels
LOG_RATIO = 20.0  # a curve that spans more than this gets a logarithmic axis
MAX_POINTS = 240


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. `tone` names its colour in the style sheet; `spans` are intervals, one for each point."""

    label: str
    points: Sequence[Point]
    tone: str
    kind: str = "line"
    """A key of SHAPES: `line`, `dots` (joined, with hover titles), `level` (dashed, at the last value), `steps`,
    `stairs` (each value holds until the next point; with hover titles)."""
    spans: Sequence[Point] = ()
    titles: Sequence[str] = ()
    marked: int | None = None
    """Index of a point to emphasise."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to places on the drawing, and says where its ticks are."""

    low: float
    high: float
    first: float
    last: float
    ticks: Sequence[float]
    labels: Sequence[str]
    log: bool = False

    def place(self, value: float) -> float:
        """Drawing units of a value."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.first + (value - low) / (high - low) * (self.last - self.first)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A titled drawing with its legend, as HTML."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    x_label: str = "step"
    names: Sequence[str] = field(default=())
    """Names of the places 0, 1, ... on the horizontal axis, instead of numbers."""
    y_range: Point | None = None

    def html(self) -> str:
        """A <figure>; one line of words if there is nothing to draw."""
        if not any(each.points for each in self.series):
            return without_figures(self.title)
        y = self._y_axis()
        left = 12 + LETTER * max(len(label) for label in y.labels)
        x = self._x_axis(left)
        drawn = "".join(_drawn(each, x, y) for each in self.series if each.points)
        axes = frame(x, y, unit=self.unit, x_label=self.x_label)
        return figure(self.title, legend=self._legend(), drawn=f"{axes}{drawn}", spoken=self._spoken())

    def _y_axis(self) -> Axis:
        values = [y for each in self.series for _, y in each.points]
        values += [bound for each in self.series for span in each.spans for bound in span]
        low, high = self.y_range or (min(values), max(values))
        log = self.y_range is None and low > 0 and high / low > LOG_RATIO
        low, high = (low / 1.15, high * 1.15) if log else _padded(low, high, fixed=self.y_range is not None)
        ticks = log_ticks(low, high) if log else linear_ticks(low, high, 5)
        labels = [f"{tick:,.10g}" for tick in ticks] if log else tick_labels(ticks)
        return Axis(low=low, high=high, first=HEIGHT - BOTTOM, last=TOP, ticks=ticks, labels=labels, log=log)

    def _x_axis(self, left: float) -> Axis:
        right = WIDTH - RIGHT
        if self.names:
            ticks, labels = _named_ticks(self.names, right - left)
            return Axis(low=-0.5, high=len(self.names) - 0.5, first=left, last=right, ticks=ticks, labels=labels)
        return number_axis([x for each in self.series for x, _ in each.points], left)

    def _legend(self) -> str:
        entries = (
            f'<li class="tone-{each.tone}"><i class="key {each.kind}"></i>{escape(each.label)}</li>'
            for each in self.series
            if each.points
        )
        return f'<ul class="legend">{"".join(entries)}</ul>'

    def _spoken(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        parts = []
        for each in self.series:
            ys = [y for _, y in each.points]
            if ys and each.kind == "level":
                parts.append(f"{each.label}: {ys[-1]:.4g}{unit}")
            elif ys:
                parts.append(f"{each.label}: from {ys[0]:.4g} to {ys[-1]:.4g}{unit}, {len(ys)} points")
        return f"{self.title}. " + "; ".join(parts)


def figure(title: str, *, legend: str, drawn: str, spoken: str) -> str:
    """A drawing under its title and legend; `spoken` is what a screen reader says of it."""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">{drawn}</svg></figure>'
    )


def without_figures(title: str) -> str:
    note = '<p class="note">no figures yet</p>'
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{note}</figure>'


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers in [low, high], a step of 1, 2, 2.5 or 5 times a power of ten apart."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about evenly spread in the logarithm."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor * 10.0**decade:.10g}") for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break
    return ticks[:: -(-len(ticks) // 6)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as their distance needs, thousands separated; very small or large ones as 1e-09."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    if 0 < step < 1e-5 or max(map(abs, ticks), default=0) >= 1e7:
        return [f"{tick:.6g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
    return [f"{tick:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]


def step_labels(ticks: Sequence[float]) -> list[str]:
    """As `tick_labels`, with tens of thousands as 10k and millions as 1M."""
    most = max(ticks, default=0.0)
    unit, letter = (1e6, "M") if most >= 1e6 else (1e3, "k") if most >= 1e4 else (1.0, "")
    labels = tick_labels([tick / unit for tick in ticks])
    return [f"{label}{letter}" if tick else "0" for tick, label in zip(ticks, labels, strict=True)]


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """A long curve as the means of equal stretches."""
    if len(points) <= most:
        return list(points)
    stretch = -(-len(points) // most)
    parts = (points[first : first + stretch] for first in range(0, len(points), stretch))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def number_axis(values: Sequence[float], left: float) -> Axis:
    """The horizontal axis, from 0 or below."""
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    ticks = linear_ticks(low, high, 4)
    return Axis(low=low, high=high, first=left, last=WIDTH - RIGHT, ticks=ticks, labels=step_labels(ticks))


def _padded(low: float, high: float, *, fixed: bool) -> Point:
    reach = high - low or abs(high) or 1.0
    return (low, high) if fixed else (low - 0.06 * reach, high + 0.06 * reach)


def _named_ticks(names: Sequence[str], width: float) -> tuple[list[float], list[str]]:
    """Names without the word before their number, thinned so that none touch."""
    short = [re.sub(r"^[a-z]+[._](?=\d)", "", name) for name in names]
    every = math.ceil((LETTER * max(map(len, short)) + 8) * len(names) / width)
    chosen = range(0, len(names), every)
    return [float(place) for place in chosen], [short[place] for place in chosen]


def frame(x: Axis, y: Axis, *, unit: str, x_label: str) -> str:
    """Grid, ticks and names of both axes."""
    parts = []
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = y.place(tick)
        parts.append(f'<line class="grid" x1="{x.first:.1f}" x2="{x.last:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.first - 6:.1f}" y="{at + 3.6:.1f}" text-anchor="end">{escape(label)}</text>')
    parts.append(f'<line class="axis" x1="{x.first:.1f}" x2="{x.last:.1f}" y1="{y.first}" y2="{y.first}"/>')
    for tick, label in zip(x.ticks, x.labels, strict=True):
        parts.append(f'<text x="{x.place(tick):.1f}" y="{y.first + 15}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<text x="{x.last:.1f}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="0" y="10">{escape(unit)}</text>')
    return "".join(parts)


def _drawn(series: Series, x: Axis, y: Axis) -> str:
    return f'<g class="tone-{series.tone}">{SHAPES[series.kind](series, x, y)}</g>'


def _line(series: Series, x: Axis, y: Axis, look: str = "curve") -> str:
    places = " ".join(f"{x.place(px):.1f},{y.place(py):.1f}" for px, py in series.points)
    return f'<polyline class="{look}" points="{places}"/>'


def _dots(series: Series, x: Axis, y: Axis) -> str:
    parts = []
    for (px, _), span in zip(series.points, series.spans, strict=False):
        at, (low, high) = x.place(px), map(y.place, span)
        parts.append(f'<line class="span" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    return "".join(parts) + _line(series, x, y, look="curve thin") + _circles(series, x, y)


def _circles(series: Series, x: Axis, y: Axis) -> str:
    """The points, with their titles."""
    parts, titles = [], series.titles or [f"{px:,.10g}: {py:.4g}" for px, py in series.points]
    for index, ((px, py), title) in enumerate(zip(series.points, titles, strict=True)):
        look = 'class="marked" r="5.5"' if index == series.marked else 'r="2.8"'
        place = f'cx="{x.place(px):.1f}" cy="{y.place(py):.1f}"'
        parts.append(f"<circle {place} {look}><title>{escape(title)}</title></circle>")
    return "".join(parts)


def _level(series: Series, x: Axis, y: Axis) -> str:
    at = y.place(series.points[-1][1])
    return f'<line class="curve level" x1="{x.first:.1f}" x2="{x.last:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _steps(series: Series, x: Axis, y: Axis) -> str:
    """A filled outline whose point (n, y) covers n - 1 .. n."""
    path = f"M{x.place(series.points[0][0] - 1):.1f} {y.first}"
    for px, py in series.points:
        path += f"V{y.place(py):.1f}H{x.place(px):.1f}"
    return f'<path class="area" d="{path}V{y.first}Z"/>'


def _stairs(series: Series, x: Axis, y: Axis) -> str:
    """A line that keeps each value until the next point, and the first from the left edge on."""
    path = f"M{x.first:.1f} {y.place(series.points[0][1]):.1f}"
    for px, py in series.points:
        path += f"H{x.place(px):.1f}V{y.place(py):.1f}"
    return f'<path class="curve" d="{path}"/>{_circles(series, x, y)}'


SHAPES: dict[str, Callable[[Series, Axis, Axis], str]] = {
    "line": _line,
    "dots": _dots,
    "level": _level,
    "steps": _steps,
    "stairs": _stairs,
}
