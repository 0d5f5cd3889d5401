"""What the report tells of the probe: accuracy along the taps of each model, beside baselines, and all in numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from tokenloom.charts import Chart, Point, Series
from tokenloom.page import note, table
from tokenloom.run_files import RunFiles
from tokenloom.score_table import TITLES, find

Row = dict[str, Any]  # of eval/probe.json
PROBED = ("tokenizer", "autoregressive", "diffusion")
PROBE_COLUMNS = {
    "test_top1": "top-1, %",
    "test_top5": "top-5, %",
    "held_out_top1": "held out, %",
    "knn_top1": "k-NN, %",
    "knn_held_out_top1": "k-NN held out, %",
}


def probe_curves(run: RunFiles) -> str:
    """Top-1 accuracy at every tap of each family, the tap that was chosen, the baselines, and all in a table."""
    rows = [row for row in run.probe() if _known(row, "test_top1")]
    if not rows:
        return note("No probe yet: `tokenloom eval` fits it where the images have labels of at least two classes.")
    values = [100 * value for row in rows for value in (row["test_top1"], *_interval(row))]
    values += [100 * row["knn_top1"] for row in rows if _known(row, "knn_top1")]
    reach = max(values) - min(values) or 1.0
    bounds = max(0.0, min(values) - 0.08 * reach), min(100.0, max(values) + 0.08 * reach)
    charts = [_probe_chart(run, family, rows, bounds) for family in PROBED if _of(rows, family, f"{family}_random")]
    charted = f'<div class="charts">{"".join(charts)}</div>' if charts else note("None of the run's models was probed.")
    return f"{charted}<details><summary>Every tap in numbers</summary>{_probe_table(rows)}</details>"


def _probe_chart(run: RunFiles, family: str, rows: Sequence[Row], bounds: Point) -> str:
    """The curve of a family along its taps and that of its untrained twin, over the levels of what needs neither."""
    curves = [
        _probe_curve(run, family, rows, ("chosen", "top-1 on test images"), tone=family),
        _knn_curve(run, family, rows),
        _probe_curve(run, f"{family}_random", rows, ("untrained, chosen", "untrained"), tone="extra-2"),
    ]
    levels = [_probe_level(run, "pixels", rows, "raw pixels", tone="plain")]
    if family != "tokenizer":
        levels.append(_probe_level(run, "tokenizer", rows, "tokenizer,", tone="tokenizer"))
    ours = {"pixels", *PROBED, *(f"{each}_random" for each in PROBED)}
    others = dict.fromkeys(row["family"] for row in rows if row["family"] not in ours)
    levels += [_probe_level(run, other, rows, other, tone="ink") for other in others]
    taps = dict.fromkeys(_short(row["tap"]) for row in _of(rows, family, f"{family}_random"))
    names = [re.sub(r"^block(?=\d)", "", tap) for tap in taps]
    series = [each for each in (*curves, *levels) if each.points]
    title = TITLES[family]
    return Chart(title=title, unit="top-1, %", x_label="tap", series=series, names=names, y_range=bounds).html()


def _probe_curve(run: RunFiles, family: str, rows: Sequence[Row], labels: tuple[str, str], *, tone: str) -> Series:
    """Accuracy at each tap; the label, the first if it is known which tap was chosen, names that tap."""
    mine, chosen = _of(rows, family), _chosen(run, family, rows)
    titles = [_tap_text(row) for row in mine]
    return Series(
        label=labels[1] if chosen is None else f"{labels[0]} {_tap_text(chosen)}",
        points=[(place, 100 * row["test_top1"]) for place, row in enumerate(mine)],
        spans=[(100 * low, 100 * high) for low, high in (_interval(row) for row in mine)],
        titles=titles,
        tone=tone,
        kind="dots",
        marked=None if chosen is None else mine.index(chosen),
    )


def _knn_curve(run: RunFiles, family: str, rows: Sequence[Row]) -> Series:
    """Accuracy of k-NN at each tap that it was tried at."""
    mine = [(place, row) for place, row in enumerate(_of(rows, family)) if _known(row, "knn_top1")]
    record = find(run.scores(), family, "knn_top1")
    places = [number for number, (_, row) in enumerate(mine) if record and record.get("tap") == row["tap"]]
    return Series(
        label=f"k-NN, chosen {_tap_text(mine[places[0]][1], 'knn_top1')}" if places else "k-NN",
        points=[(place, 100 * row["knn_top1"]) for place, row in mine],
        titles=[_tap_text(row, "knn_top1") for _, row in mine],
        tone="extra-1",
        kind="dots",
        marked=places[0] if places else None,
    )


def _probe_level(run: RunFiles, family: str, rows: Sequence[Row], label: str, *, tone: str) -> Series:
    """The chosen tap of another family, or its only one, as a line across the chart."""
    mine = _of(rows, family)
    row = _chosen(run, family, rows) or (mine[0] if len(mine) == 1 else None)
    if row is None:
        return Series(label=label, points=[], tone=tone, kind="level")
    told = f"{label} {_tap_text(row)}" if len(mine) > 1 else f"{label} {100 * row['test_top1']:.1f} %"
    return Series(label=told, points=[(0, 100 * row["test_top1"])], tone=tone, kind="level")


def _probe_table(rows: Sequence[Row]) -> str:
    """All taps with all that was measured at them."""
    columns = {key: head for key, head in PROBE_COLUMNS.items() if any(_known(row, key) for row in rows)}
    lines = []
    for row in rows:
        cells = (f"{100 * row[key]:.1f}" if _known(row, key) else "\N{EN DASH}" for key in columns)
        family = TITLES.get(row["family"], str(row["family"]))
        lines.append((f"{escape(str(row['tap']))}<small>{escape(family)}</small>", *cells))
    return table(("tap", *columns.values()), lines)


def _chosen(run: RunFiles, family: str, rows: Sequence[Row]) -> Row | None:
    """The row of the tap that was chosen on held-out training images."""
    record = find(run.scores(), family, "probe_top1")
    return next((row for row in _of(rows, family) if record and record.get("tap") == row["tap"]), None)


def _tap_text(row: Row, key: str = "test_top1") -> str:
    return f"{_short(row['tap'])}: {100 * row[key]:.1f} %"


def _short(tap: str) -> str:
    """A tap without the name of its model: a chart is of one model."""
    return re.sub(r"^(tokenizer|vim|vim_random|dit)\.(?=.)", "", tap)


def _of(rows: Sequence[Row], *families: str) -> list[Row]:
    return [row for row in rows if row["family"] in families]


def _known(row: Row, key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def _interval(row: Row) -> Point:
    """Bounds of top-1 accuracy; the value itself where there are none."""
    low, high = (math.nan if bound is None else bound for bound in row.get("interval") or (None, None))
    value = row["test_top1"]
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (value, value)
