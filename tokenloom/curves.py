"""What the charts of a report show: training of each stage with its curriculum, use of the codes."""

from __future__ import annotations

from html import escape

import numpy as np

from engine.shards import Shards
from tokenloom.charts import LOG_RATIO, Chart, Series
from tokenloom.curriculum_curves import curriculum_panels, of_curriculum
from tokenloom.learned_curve import learned_curve_panels, of_learned_curve
from tokenloom.page import facts, note
from tokenloom.panels import Curve, Panel, drawn, pair, points_of
from tokenloom.run_files import RunFiles
from tokenloom.score_table import share_text

MAX_BARS = 512
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
    if stage != "diffusion":
        return panels
    return panels + learned_curve_panels(lines) + curriculum_panels(lines)


def other_panels(run: RunFiles, stage: str) -> list[str]:
    """A chart for everything else that the stage logged and that was not always 0."""
    lines = run.metrics(stage)
    shown = {curve.key for panel in PANELS[stage] for curve in panel.curves}
    found = {key for line in lines for key, value in line.items() if value}
    keys = sorted(key for key in found - shown - {"step"} if not of_curriculum(key) and not of_learned_curve(key))
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


def throughput(run: RunFiles, stage: str) -> str:
    """Steps and speed of a stage in words."""
    done, total = run.progress(stage)
    rates = sorted(value for _, value in points_of(run.metrics(stage), "samples_per_second", 1.0))
    steps = f"{done:,} steps" if run.state(stage) == "done" or not total else f"step {done:,} of {total:,}"
    speed = f", {rates[len(rates) // 2]:,.0f} images/s" if rates else ""
    return escape(steps + speed)
