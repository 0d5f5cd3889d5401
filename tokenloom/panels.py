"""One chart of a stage's log: curves of its keys over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenloom.charts import Chart, Point, Series, thinned

MAX_DOTS = 40
Line = dict[str, Any]  # of metrics.jsonl


class Curve(NamedTuple):
    """One key of metrics.jsonl as it is drawn; the legend adds the last value."""

    key: str
    label: str
    tone: str = ""
    kind: str = "line"


class Panel(NamedTuple):
    """One chart of a stage; values are multiplied by `factor` before they are drawn."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    factor: float = 1.0


def pair(key: str, training: str, held_out: str, validation: str = "") -> tuple[Curve, ...]:
    return Curve(key, training, "plain"), Curve(f"validation/{validation or key}", held_out, "", "dots")


def number_of(line: Line, key: str) -> float:
    """NaN where there is no finite number: the log keeps others as strings."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def drawn(panel: Panel, lines: Sequence[Line], stage: str) -> str:
    found = [(curve, points_of(lines, curve.key, panel.factor)) for curve in panel.curves]
    found = [(curve, points) for curve, points in found if points]
    alone = len(found) == 1
    series = [
        Series(
            label=f"{curve.label} {points[-1][1]:.4g}",
            points=thinned(points),
            tone=stage if alone else curve.tone or stage,
            kind=_kind(curve, points),
        )
        for curve, points in found
    ]
    return Chart(title=panel.title, unit=panel.unit, series=series).html()


def _kind(curve: Curve, points: Sequence[Point]) -> str:
    """A single point must be a dot to be seen; many dots are better a line."""
    if curve.kind == "level":
        return "level"
    return "dots" if len(points) == 1 or (curve.kind == "dots" and len(points) <= MAX_DOTS) else "line"


def points_of(lines: Sequence[Line], key: str, factor: float) -> list[Point]:
    """Finite values only."""
    found = ((float(line["step"]), number_of(line, key)) for line in lines)
    return [(step, factor * value) for step, value in found if math.isfinite(value)]
