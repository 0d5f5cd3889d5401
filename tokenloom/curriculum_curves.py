"""Charts of the curriculum of a diffusion run: its stage, what was drawn, and the loss of each cluster over time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenloom.charts import Chart, Point, Series, linear_ticks
from tokenloom.heat_map import HeatMap, shade_levels
from tokenloom.panels import MAX_DOTS, Curve, Line, Panel, drawn, number_of

CLUSTER_KEY = re.compile(r"(validation/|)loss_cluster/(\d+)")
CLUSTER_TONES = ("extra-1", "tokenizer", "extra-2", "diffusion", "autoregressive", "plain")
MAX_COLUMNS = 60  # of a heat map
SHARE_LEVELS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # per cent of the draws, at which the shade of a heat map changes


def of_curriculum(key: str) -> bool:
    return key.startswith("curriculum/") or CLUSTER_KEY.fullmatch(key) is not None


def curriculum_panels(lines: Sequence[Line]) -> list[str]:
    """The stage and the draws over time, then the loss of each cluster in training and on test latents.

    Empty where the log has none of them.
    """
    panels = [*_stage_panel(lines), *_draws_panel(lines)]
    numbers = {int(found[2]) for line in lines for found in map(CLUSTER_KEY.fullmatch, line) if found}
    for prefix, title in (("", "Training loss"), ("validation/", "Loss on test latents")):
        panels += _cluster_panels(lines, prefix, title, max(numbers, default=0))
    return panels


def _stage_panel(lines: Sequence[Line]) -> list[str]:
    """A stair for each stage, whose dot tells its first step in the log and the log SNRs it draws from there."""
    told = [(line, stage) for line in lines if math.isfinite(stage := number_of(line, "curriculum/stage"))]
    if not told:
        return []
    begun = [pair for place, pair in enumerate(told) if place == 0 or told[place - 1][1] != pair[1]]
    shown = begun if begun[-1] is told[-1] else [*begun, told[-1]]
    highest = max(stage for _, stage in told)
    top = max(4.0, highest if highest <= 10 else 5.0 * math.ceil(highest / 5))  # whole numbers at the ticks
    series = Series(
        label=f"stage {told[-1][1]:.0f}, {_range_text(told[-1][0])}",
        points=[(float(line["step"]), stage) for line, stage in shown],
        titles=[f"step {line['step']:,}: stage {stage:.0f}, {_range_text(line)}" for line, stage in shown],
        tone="diffusion",
        kind="stairs",
    )
    return [Chart(title="Stage of the curriculum", series=[series], unit="stage", y_range=(0.0, top)).html()]


def _range_text(line: Line) -> str:
    low, high = _active_range(line)
    return f"log SNR {low:z.1f} to {high:z.1f}".replace("-", "\N{MINUS SIGN}")


def _active_range(line: Line) -> Point:
    return number_of(line, "curriculum/lowest_logsnr"), number_of(line, "curriculum/highest_logsnr")


def _draws_panel(lines: Sequence[Line]) -> list[str]:
    """How the drawn log SNRs spread over the range of training; columns hold means of lines."""
    told = [(line, draws) for line in lines if isinstance(draws := line.get("curriculum/draws"), dict)]
    if not told:
        return []
    edges = told[-1][1]["edges"]
    stretches = _stretches([pair for pair in told if pair[1]["edges"] == edges])
    shares = [100 * np.mean([draws["shares"] for _, draws in stretch], axis=0) for stretch in stretches]  # [K][R]
    ranges = [[_active_range(line) for line, _ in stretch] for stretch in stretches]
    bounds = [(min(low for low, _ in each), max(high for _, high in each)) for each in ranges]
    chart = HeatMap(
        title="Noise levels drawn",
        unit="log SNR",
        shade="% of draws",
        levels=[level for level in SHARE_LEVELS if level <= np.max(shares)],
        empty="none drawn",
        tone="diffusion",
        columns=_column_edges([[line for line, _ in stretch] for stretch in stretches]),
        rows=edges,
        cells=[[float(share) or None for share in column] for column in shares],
        ticks=linear_ticks(edges[0], edges[-1], 5),
        bounds=bounds if np.isfinite(bounds).all() else (),
        bounds_label=f"active range, at last {_range_text(told[-1][0])}",
    )
    return [chart.html()]


def _cluster_panels(lines: Sequence[Line], prefix: str, title: str, num_clusters: int) -> list[str]:
    """Curves of a few clusters; of many a heat map over time, and on test latents a profile over all clusters."""
    keys = {number: f"{prefix}loss_cluster/{number:02d}" for number in range(1, num_clusters + 1)}
    told = [line for line in lines if any(math.isfinite(number_of(line, key)) for key in keys.values())]
    found = [number for number, key in keys.items() if any(math.isfinite(number_of(line, key)) for line in told)]
    if not found:
        return []
    if len(found) <= len(CLUSTER_TONES):
        toned = zip(found, CLUSTER_TONES, strict=False)
        curves = tuple(Curve(keys[number], _cluster_text(number), tone) for number, tone in toned)
        return [drawn(Panel(f"{title} of each cluster", "", curves), told, "diffusion")]
    profile = [_profile(told, list(keys.values()), title)] if prefix else []
    return [*([_cluster_map(told, list(keys.values()), title)] if len(told) > 1 else []), *profile]


def _cluster_text(number: int) -> str:
    return "1, least noise:" if number == 1 else f"{number}:"


def _profile(lines: Sequence[Line], keys: Sequence[str], title: str) -> str:
    """The loss of every cluster as it was measured first and last."""
    series = []
    for line, tone in ((lines[0], "plain"), (lines[-1], "diffusion"))[-len(lines) :]:
        values = [number_of(line, key) for key in keys]
        points = [(float(place), value) for place, value in enumerate(values) if math.isfinite(value)]
        titles = [f"cluster {place + 1:.0f}: {value:.4g}" for place, value in points]
        kind, label = "dots" if len(points) <= MAX_DOTS else "line", f"step {line['step']:,}"
        series.append(Series(label=label, points=points, titles=titles, tone=tone, kind=kind))
    names = [str(number) for number in range(1, len(keys) + 1)]
    return Chart(
        title=f"{title}, along the clusters", series=series, x_label="cluster, 1 least noise", names=names
    ).html()


def _cluster_map(lines: Sequence[Line], keys: Sequence[str], title: str) -> str:
    """Each cluster's loss against its first one, the noisiest at the bottom; columns hold means of lines.

    Clusters differ in their loss by orders of magnitude, so that only their own course can share a scale. Losses below
    0, which a learned weight makes, have no ratio: their difference is shown.
    """
    stretches = _stretches(lines)
    table = np.array([[_mean(stretch, key) for key in keys] for stretch in stretches])  # [K, N]
    firsts = np.array([next((value for value in column if math.isfinite(value)), math.nan) for column in table.T])
    ratio = bool((table[np.isfinite(table)] > 0).all())
    relative = table / firsts if ratio else table - firsts  # [K, N]
    num = len(keys)
    return HeatMap(
        title=f"{title} of each cluster",
        unit="cluster, 1 least noise",
        levels=shade_levels(relative[np.isfinite(relative)].tolist()),
        shade="loss / its first" if ratio else "loss \N{MINUS SIGN} its first",
        empty="none drawn",
        tone="diffusion",
        columns=_column_edges(stretches),
        rows=[num + 0.5 - place for place in range(num + 1)],
        cells=[[float(value) if math.isfinite(value) else None for value in column[::-1]] for column in relative],
        ticks=[1.0, *(tick for tick in linear_ticks(1, num, 5) if tick > 1 and tick == round(tick))],
    ).html()


def _stretches(lines: Sequence[Any]) -> list[Sequence[Any]]:
    """At most MAX_COLUMNS runs of lines, equally long but the last."""
    length = -(-len(lines) // MAX_COLUMNS)
    return [lines[first : first + length] for first in range(0, len(lines), length)]


def _column_edges(stretches: Sequence[Sequence[Line]]) -> list[float]:
    """What a line tells is of all steps since the line before."""
    return [0.0, *(float(stretch[-1]["step"]) for stretch in stretches)]


def _mean(lines: Sequence[Line], key: str) -> float:
    values = [value for line in lines if math.isfinite(value := number_of(line, key))]
    return sum(values) / len(values) if values else math.nan
