"""What the charts of a report show: training of each stage with its curriculum, use of the codes, the linear probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from engine.shards import Shards
from tokenloom.charts import LOG_RATIO, Chart, Point, Series
from tokenloom.curriculum_curves import curriculum_panels, of_curriculum
from tokenloom.page import facts, note
from tokenloom.panels import Curve, Panel, drawn, pair, points_of
from tokenloom.run_files import RunFiles
from tokenloom.score_table import TITLES, find, share_text

MAX_BARS = 512
Row = dict[str, Any]  # of eval/probe.json
PROBED = ("tokenizer", "autoregressive", "diffusion")


PANELS = {
    "tokenizer": (
        Panel("Loss", "", (Curve("loss", "training"),)),
        Panel("Reconstruction quality", "PSNR, dB", pair("psnr", "training", "test images")),
        Panel("Codebook usage", "% of codes", pair("usage", "training", "test images"), 100),
    ),
    "autoregressive": (
        Panel(
            "Negative log likelihood",
            "nats per code",
            (
                *pair("loss", "training", "test images", "nll"),
                Curve("validation/unigram_entropy", "code frequencies alone", "extra-2", "level"),
            ),
        ),
    ),
    "diffusion": (Panel("Loss", "", pair("loss", "training", "test latents")),),
}


def training_panels(run: RunFiles, stage: str) -> list[str]:
    """The main charts of a stage."""
    lines = run.metrics(stage)
    panels = [drawn(panel, lines, stage) for panel in PANELS[stage]]
    return panels + (curriculum_panels(lines) if stage == "diffusion" else [])


def other_panels(run: RunFiles, stage: str) -> list[str]:
    """A chart for everything else that the stage logged and that was not always 0."""
    lines = run.metrics(stage)
    shown = {curve.key for panel in PANELS[stage] for curve in panel.curves}
    found = {key for line in lines for key, value in line.items() if value and not of_curriculum(key)}
    keys = sorted(found - shown - {"step"})
    names = dict.fromkeys(key.removeprefix("validation/") for key in keys)
    panels = (Panel(name.replace("_", " "), "", pair(name, "training", "held out")) for name in names)
    return [drawn(panel, lines, stage) for panel in panels]


def code_usage(run: RunFiles) -> str:
    """How often each code occurs, by rank, for both splits, with usage and perplexity."""
    opened = {split: run.codes(split) for split in ("train", "test")}
    counts = {split: _histogram(shards) for split, shards in opened.items()}
    whole = {split: found for split, found in counts.items() if found is not None and found.sum()}
    if any(opened.values()) and not whole:
        return note("The latents of this tokenizer have no codes.")
    if not whole:
        return note("No codes yet: `tokenloom encode` writes them once the tokenizer is trained.")
    names = {"train": "training images", "test": "test images"}
    charts = [_rank_chart(f"Codes of the {names[split]}", found) for split, found in whole.items()]
    told = [("codes in the vocabulary", f"{len(next(iter(whole.values()))):,}")]
    for split, found in whole.items():
        used = found > 0
        told.append((f"tokens, {names[split]}", f"{found.sum():,}"))
        told.append((f"codes used, {names[split]}", f"{used.sum():,}, {share_text(float(used.mean()))}"))
        told.append((f"perplexity, {names[split]}", f"{perplexity(found):,.1f}"))
    card = f'<figure class="chart"><figcaption>In numbers</figcaption>{facts(told)}</figure>'
    return f'<div class="charts">{"".join(charts)}{card}</div>'


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of code frequencies."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _histogram(shards: Shards | None) -> np.ndarray | None:
    try:
        return None if shards is None else shards.histogram()
    except (ValueError, OSError):
        return None


def _rank_chart(title: str, counts: np.ndarray) -> str:
    """Frequencies of the used codes in falling order as steps, beside the height that all would have if equal."""
    shares = 100 * np.sort(counts[counts > 0])[::-1] / counts.sum()
    ends = np.unique(np.linspace(0, len(shares), min(MAX_BARS, len(shares)) + 1).astype(int))[1:]
    starts = np.concatenate([[0], ends[:-1]])
    heights = [float(shares[first:last].mean()) for first, last in zip(starts, ends, strict=True)]
    equal, points = 100 / len(counts), list(zip(ends.tolist(), heights, strict=True))
    series = [
        Series(label="frequency", tone="tokenizer", kind="steps", points=points),
        Series(label=f"all alike, {equal:.2g} %", tone="plain", kind="level", points=[(len(counts), equal)]),
    ]
    steep = heights[0] > LOG_RATIO * heights[-1]
    bounds = None if steep else (0.0, 1.06 * max(*heights, equal))
    return Chart(title=title, unit="% of tokens", x_label="codes by frequency", series=series, y_range=bounds).html()


def probe_curves(run: RunFiles) -> str:
    """Top-1 accuracy at every tap of each family, the tap that was chosen, and the baselines."""
    rows = [row for row in run.probe() if math.isfinite(row.get("test_top1", math.nan))]
    if not rows:
        return note("No probe yet: `tokenloom eval` fits it where the images have labels of at least two classes.")
    values = [100 * value for row in rows for value in (row["test_top1"], *_interval(row))]
    reach = max(values) - min(values) or 1.0
    bounds = max(0.0, min(values) - 0.08 * reach), min(100.0, max(values) + 0.08 * reach)
    charts = [_probe_chart(run, family, rows, bounds) for family in PROBED if _of(rows, family, f"{family}_random")]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else note("Only raw pixels were probed.")


def _probe_chart(run: RunFiles, family: str, rows: Sequence[Row], bounds: Point) -> str:
    """The curve of a family along its taps and that of its untrained twin, over the levels of what needs neither."""
    curves = [
        _probe_curve(run, family, rows, ("chosen", "top-1 on test images"), tone=family),
        _probe_curve(run, f"{family}_random", rows, ("untrained, chosen", "untrained"), tone="extra-2"),
    ]
    levels = [_probe_level(run, "pixels", rows, "raw pixels", tone="plain")]
    if family != "tokenizer":
        levels.append(_probe_level(run, "tokenizer", rows, "tokenizer,", tone="tokenizer"))
    taps = list(dict.fromkeys(row["tap"] for row in _of(rows, family, f"{family}_random")))
    series = [each for each in (*curves, *levels) if each.points]
    return Chart(title=TITLES[family], unit="top-1, %", x_label="tap", series=series, names=taps, y_range=bounds).html()


def _probe_curve(run: RunFiles, family: str, rows: Sequence[Row], labels: tuple[str, str], *, tone: str) -> Series:
    """Accuracy at each tap; the label, the first if it is known which tap was chosen, names that tap."""
    mine, chosen = _of(rows, family), _chosen(run, family, rows)
    titles = [_tap_text(row) for row in mine]
    return Series(
        label=labels[1] if chosen is None else f"{labels[0]} {_tap_text(chosen)}",
        points=[(place, 100 * row["test_top1"]) for place, row in enumerate(mine)],
        spans=[(100 * low, 100 * high) for low, high in map(_interval, mine)],
        titles=titles,
        tone=tone,
        kind="dots",
        marked=None if chosen is None else mine.index(chosen),
    )


def _probe_level(run: RunFiles, family: str, rows: Sequence[Row], label: str, *, tone: str) -> Series:
    """The chosen tap of another family, or its only one, as a line across the chart."""
    mine = _of(rows, family)
    row = _chosen(run, family, rows) or (mine[0] if len(mine) == 1 else None)
    if row is None:
        return Series(label=label, points=[], tone=tone, kind="level")
    told = f"{label} {_tap_text(row)}" if len(mine) > 1 else f"{label} {100 * row['test_top1']:.1f} %"
    return Series(label=told, points=[(0, 100 * row["test_top1"])], tone=tone, kind="level")


def _chosen(run: RunFiles, family: str, rows: Sequence[Row]) -> Row | None:
    """The row of the tap that was chosen on held-out training images."""
    record = find(run.scores(), family, "probe_top1")
    return next((row for row in _of(rows, family) if record and record.get("tap") == row["tap"]), None)


def _tap_text(row: Row) -> str:
    return f"{row['tap']}: {100 * row['test_top1']:.1f} %"


def _of(rows: Sequence[Row], *families: str) -> list[Row]:
    return [row for row in rows if row["family"] in families]


def _interval(row: Row) -> Point:
    low, high = row.get("interval") or (math.nan, math.nan)
    value = row["test_top1"]
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (value, value)


def throughput(run: RunFiles, stage: str) -> str:
    """Steps and speed of a stage in words."""
    done, total = run.progress(stage)
    rates = sorted(value for _, value in points_of(run.metrics(stage), "samples_per_second", 1.0))
    steps = f"{done:,} steps" if run.state(stage) == "done" or not total else f"step {done:,} of {total:,}"
    speed = f", {rates[len(rates) // 2]:,.0f} images/s" if rates else ""
    return escape(steps + speed)
