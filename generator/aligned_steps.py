"""steps.json beside a diffusion model: where a solver best stops, as `tokenloom steps` has found it for its network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.checkpoint import write_json
from generator.config import DiffusionConfig

FILE = "steps.json"
REMEDY = "run `tokenloom steps --config ...` again, or choose other diffusion.sample.steps, such as karras"


@dataclass(frozen=True)
class AlignedSteps:
    """An optimised schedule, or why there is none that could be used."""

    stops: tuple[float, ...] = ()
    """Log SNRs of the finest schedule and of the end of its last step, rising."""
    problem: str = ""

    def usable(self) -> tuple[float, ...]:
        """The stops.

        Raises:
            ValueError: the file is damaged, or the steps are those of another network.
        """
        if self.problem:
            raise ValueError(f"diffusion.sample.steps=aligned: {self.problem}; {REMEDY}")
        return self.stops


def read_aligned(folder: Path) -> AlignedSteps | None:
    """The steps that lie beside the model in a folder; None if there are none.

    They are of its trained weights, and serve snapshots and averages of the same training too.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        told, card = read_told(folder), json.loads((folder / "model.json").read_text(encoding="utf-8"))
        stops, model, beside = tuple(map(float, told["stops"])), told["model"], card["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return AlignedSteps(problem=f"{path} is damaged ({error!r})")
    if len(stops) < 2 or any(not here < there for here, there in pairwise(stops)):
        return AlignedSteps(problem=f"{path} is damaged: its stops must rise")
    if model != beside:
        return AlignedSteps(problem=f"{path} was made for the network {model}, but here is {beside}")
    return AlignedSteps(stops=stops)


def read_told(folder: Path) -> dict[str, Any]:
    """All that steps.json tells; empty if there is none, or it is damaged."""
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def check_coming(config: DiffusionConfig, folder: Path) -> None:
    """Raise ValueError if samples are to be drawn in optimised steps that are not there, nor will be after training."""
    if config.sample.steps == "aligned" and config.align is None and read_aligned(folder) is None:
        raise ValueError(
            "diffusion.sample.steps=aligned, but no steps will be optimised: add the section diffusion.align (`align:"
            " {}` takes its defaults), or run `tokenloom steps --config ...` between training and sampling"
        )


def copy_aligned(folder: Path, out: Path, fingerprint: str) -> None:
    """Put the steps of the model in `folder`, if it has any of its own, beside a copy of it with this fingerprint."""
    found = read_aligned(folder)
    if found is not None and not found.problem:
        write_json(out / FILE, {**read_told(folder), "model": fingerprint})
