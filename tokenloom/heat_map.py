"""A heat map over training steps as inline SVG, with the scale of its shades."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from tokenloom.charts import (
    BOTTOM,
    HEIGHT,
    LETTER,
    LOG_RATIO,
    TOP,
    Axis,
    Point,
    figure,
    frame,
    linear_ticks,
    log_ticks,
    number_axis,
    tick_labels,
    without_figures,
)


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A titled drawing of shaded cells over steps, with the scale of its shades, as HTML."""

    title: str
    columns: Sequence[float]
    """Rising steps [K + 1] between which the columns lie."""
    rows: Sequence[float]
    """Values [R + 1] between which the rows lie, from the bottom to the top, evenly spaced."""
    cells: Sequence[Sequence[float | None]]
    """A number for each column and row [K][R]; None leaves the cell empty."""
    tone: str
    unit: str
    """Of the rows."""
    shade: str
    """What the shades tell."""
    levels: Sequence[float]
    """Rising numbers that part the shades."""
    empty: str
    """What an empty cell tells."""
    ticks: Sequence[float]
    bounds: Sequence[Point] = ()
    """Two values on the axis of the rows for each column [K], drawn as dashed lines."""
    bounds_label: str = ""

    def html(self) -> str:
        """A <figure>; one line of words if there is nothing to draw."""
        if not self._values():
            return without_figures(self.title)
        low, high, labels = self.rows[0], self.rows[-1], tick_labels(self.ticks)
        y = Axis(low=low, high=high, first=HEIGHT - BOTTOM, last=TOP, ticks=self.ticks, labels=labels)
        x = number_axis(self.columns, 12 + LETTER * max(len(label) for label in y.labels))
        axes = frame(x, y, unit=self.unit, x_label="step")
        drawn = f'{axes}<g class="tone-{self.tone}">{self._shaded(x, y)}{self._bounded(x, y)}</g>'
        return figure(self.title, legend=self._legend(), drawn=drawn, spoken=self._spoken())

    def _values(self) -> list[float]:
        return sorted(value for column in self.cells for value in column if value is not None)

    def _shaded(self, x: Axis, y: Axis) -> str:
        """One path for each shade; neighbours of a row that share a shade are one rectangle, to keep pages small."""
        paths = [""] * (len(self.levels) + 1)
        for (bottom, top), row in zip(pairwise(self.rows), zip(*self.cells, strict=True), strict=True):
            shades = [None if value is None else bisect_right(self.levels, value) for value in row]
            for shade, run in groupby(range(len(shades)), key=shades.__getitem__):
                columns = list(run)
                if shade is not None:
                    left, right = (x.place(self.columns[place]) for place in (columns[0], columns[-1] + 1))
                    outline = f"M{left:.1f} {y.place(bottom):.1f}H{right:.1f}V{y.place(top):.1f}H{left:.1f}Z"
                    paths[shade] += outline
        drawn = zip(_opacities(self.levels), paths, strict=True)
        return "".join(f'<path class="cells" fill-opacity="{each:.2f}" d="{path}"/>' for each, path in drawn if path)

    def _bounded(self, x: Axis, y: Axis) -> str:
        """Both bounds as stairs, held to the rows that are shown."""
        low, high = sorted((self.rows[0], self.rows[-1]))
        drawn = ""
        for values in zip(*self.bounds, strict=True):
            path = f"M{x.place(self.columns[0]):.1f}"
            for place, value in enumerate(values):
                join = " " if place == 0 else "V"
                path += f"{join}{y.place(min(max(value, low), high)):.1f}H{x.place(self.columns[place + 1]):.1f}"
            drawn += f'<path class="bound halo" d="{path}"/><path class="bound" d="{path}"/>'
        return drawn

    def _legend(self) -> str:
        shades = zip(_opacities(self.levels), shade_labels(self.levels, self._values()), strict=True)
        entries = [f"<li>{escape(self.shade)}</li>"]
        entries += [f'<li><i class="key shade" style="opacity:{each:.2f}"></i>{label}</li>' for each, label in shades]
        if any(value is None for column in self.cells for value in column):
            entries.append(f'<li><i class="key empty"></i>{escape(self.empty)}</li>')
        if self.bounds:
            entries.append(f'<li class="tone-ink"><i class="key level"></i>{escape(self.bounds_label)}</li>')
        return f'<ul class="legend tone-{self.tone}">{"".join(entries)}</ul>'

    def _spoken(self) -> str:
        values, last = self._values(), f"{self.columns[-1]:,.10g}"
        parts = [f"{self.shade}: from {values[0]:.4g} to {values[-1]:.4g}, {len(self.cells)} columns up to step {last}"]
        parts += [self.bounds_label] if self.bounds else []
        return f"{self.title}. " + "; ".join(parts)


def shade_levels(values: Sequence[float]) -> list[float]:
    """Round numbers that part values into shades; the outermost fiftieths do not stretch the scale."""
    values = sorted(values)
    tail = len(values) // 50
    low, high = values[tail], values[-1 - tail]
    if high - low <= 1e-9 * abs(high):
        return []
    return log_ticks(low, high) if low > 0 and high / low > LOG_RATIO else linear_ticks(low, high, 5)


def shade_labels(levels: Sequence[float], values: Sequence[float]) -> list[str]:
    """What each shade stands for, from the lightest on; a value at a level has the darker shade."""
    if not levels:
        return [f"{values[len(values) // 2]:.3g}"]
    even = len(levels) < 3 or math.isclose(levels[1] - levels[0], levels[2] - levels[1])
    told = tick_labels(levels) if even else [f"{level:,.10g}" for level in levels]
    between = [f"{low} to {high}" for low, high in pairwise(told)]
    return [f"below {told[0]}", *between, f"{told[-1]} or more"]


def _opacities(levels: Sequence[float]) -> list[float]:
    """Of the shades between levels: the lightest still differs from an empty cell."""
    return [0.15 + 0.85 * place / len(levels) for place in range(len(levels) + 1)] if levels else [0.5]
