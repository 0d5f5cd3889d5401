"""The picture of steps.json: optimised schedules beside Karras and log-uniform steps, and how the descent went."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.checkpoint import write_atomic
from generator.steps import solver_levels

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"  # told apart without colour vision
DPI = 100
STYLE: dict[str, Any] = {"fontsize": 9}


def write_steps_plot(path: Path) -> Path:
    """Draw what a steps.json tells into steps.png beside it; returns that."""
    picture = path.with_suffix(".png")
    write_atomic(picture, steps_plot(json.loads(path.read_text(encoding="utf-8"))))
    return picture


def steps_plot(told: dict[str, Any]) -> bytes:
    """PNG with two panels: noise over the share of steps done; bound and distance over the sweeps of the first
    schedule."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_schedules(left, told)
    _draw_descent(right, told)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def noises(stops: Sequence[float]) -> list[float]:
    """Noise over signal, s = sigma / alpha, of log SNRs."""
    return [math.exp(-stop / 2) for stop in stops]


def _draw_schedules(axes: Axes, told: dict[str, Any]) -> None:
    first, finest = told["stages"][0], told["stops"]
    num, ends = first["num_steps"], {"first": finest[0], "last": finest[-1]}
    shares = [100 * place / num for place in range(num + 1)]
    for kind, label, colour in (("karras", "Karras", ORANGE), ("logsnr", "log-uniform", GREEN)):
        levels = solver_levels(kind, num + 1, **ends).tolist()
        axes.plot(shares, noises(levels), "--", color=colour, linewidth=1.3, marker="o", ms=3, label=label)
    fine = [100 * place / (len(finest) - 1) for place in range(len(finest))]
    label = f"aligned, {num} steps" + (f" and {len(finest) - 1}" if len(told["stages"]) > 1 else "")
    axes.plot(fine, noises(finest), "-", color=BLUE, linewidth=1.5, marker=".", ms=3)
    axes.plot(shares, noises(first["stops"]), "o", color=BLUE, ms=5, label=label)
    axes.set_yscale("log")
    axes.set_title("Noise over signal at each stop", **STYLE)
    axes.set_xlabel("steps done, %", **STYLE)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _draw_descent(axes: Axes, told: dict[str, Any]) -> None:
    first = told["stages"][0]
    sweeps = list(range(len(first["bounds"])))
    axes.plot(sweeps, first["bounds"], "-", color=GREY, marker="o", ms=3, label="KLUB, nats")
    axes.set_title(f"Descent of the schedule of {first['num_steps']} steps", **STYLE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("sweeps", **STYLE)
    axes.set_ylabel("KLUB, nats", **STYLE)
    axes.axvline(first["sweeps"], color=BLUE, linewidth=1, linestyle=":", label="kept")
    _plain(axes)
    axes.set_ylim(bottom=0)
    lines, labels = axes.get_legend_handles_labels()
    if first["distances"]:
        other = axes.twinx()
        other.plot(sweeps, first["distances"], "-", color=BLUE, marker="s", ms=3, label=told["distance"])
        other.set_ylabel(told["distance"], **STYLE)
        other.tick_params(labelsize=8)
        other.spines["top"].set_visible(False)
        more = other.get_legend_handles_labels()
        lines, labels = lines + more[0], labels + more[1]
    # Below the panel: inside, some line may always run.
    axes.legend(
        lines, labels, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3
    )  # fmt: skip


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
