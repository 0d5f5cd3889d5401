"""Curricula: which part of the schedule is trained now.

A curriculum turns the uniform draws of a step into other draws of u, and those into log SNRs through the schedule, so
that it goes with any schedule, path, target and weight. Staged curricula stay within the clusters of their stage, which
the losses of the training move on (`pacing`); all others are pure functions of the step and of how many there are in
all, so that a run that goes on to more steps than it began with draws as a run of that length does there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generator.clusters import cluster_edges
from generator.config import STAGED, CurriculumConfig
from generator.pacing import Pacing
from generator.path import variance_preserving
from generator.schedule import NUM_STEPS, Schedule, trainable


class Curriculum:
    """A schedule in the course of a training of `steps` steps.

    Clusters are numbered from 1, the least noise, to N; `edges` are their N + 1 edges in u, rising from noise to data.

    Raises:
        ValueError: clusters that the schedule does not draw from.
    """

    def __init__(self, config: CurriculumConfig, schedule: Schedule, *, steps: int) -> None:
        self.config, self.schedule, self.steps = config, schedule, steps
        self.edges = cluster_edges(config, schedule)  # [N + 1]
        self.edge_levels = trainable(schedule.inverse(self.edges))  # [N + 1]
        self.pacing = Pacing(config, num_stages=config.num_clusters) if config.kind in STAGED else None
        self.place = PLACES[config.kind](self)

    def draw(self, u: Tensor, step: int) -> Tensor:
        """Uniform draws [B] of a step, counted from 0 -> float32 log SNR [B] in the range of training, rising in u."""
        return trainable(self.schedule.inverse(self.place(u.double())) + self.shift(step))

    def final(self, u: Tensor) -> Tensor:
        """What the schedule draws where the training has it in the end, all clusters by their own shares."""
        return final_schedule(self.config, self.schedule)(u)

    def shift(self, step: int) -> float:
        """By how much log SNR the schedule is moved at a step; past the last step it stays where it is."""
        progress = min(step / (self.steps - 1), 1.0) if self.steps > 1 else 1.0
        return _shift(self.config, progress)

    @property
    def stage(self) -> int:
        """From 1 to `num_stages`, which is 1 where there are no stages."""
        return self.pacing.stage if self.pacing else 1

    @property
    def num_stages(self) -> int:
        return self.pacing.num_stages if self.pacing else 1

    @property
    def active(self) -> tuple[float, float]:
        """The interval of u that the present stage draws from."""
        if self.config.kind == "single":
            return float(self.edges[-1 - self.config.cluster]), float(self.edges[-self.config.cluster])
        if self.stage == self.num_stages:
            return 0.0, 1.0
        if self.config.kind == "anti":
            return float(self.edges[-1 - self.stage]), 1.0
        return 0.0, float(self.edges[self.stage])

    def active_levels(self, step: int) -> tuple[float, float]:
        """The log SNRs between which the step draws, in the range of training."""
        ends = trainable(self.schedule.inverse(torch.tensor(self.active, dtype=torch.float64)) + self.shift(step))
        return float(ends[0]), float(ends[1])

    def cluster_of(self, logsnr: Tensor) -> Tensor:
        """The cluster, int64 1 .. N, of each log SNR [B]."""
        inner = self.edge_levels[1:-1].to(logsnr.device)
        return self.config.num_clusters - torch.bucketize(logsnr, inner)

    def after_step(self, loss: float) -> bool:
        """Take the loss of a step, the same on every process; tells whether a new stage begins with the next step."""
        return self.pacing.update(loss) if self.pacing else False

    def state_dict(self) -> dict[str, Any]:
        """What the losses so far have moved; empty for curricula that they do not move."""
        return self.pacing.state_dict() if self.pacing else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        if self.pacing:
            self.pacing.load_state_dict(state)


def final_schedule(config: CurriculumConfig, schedule: Schedule) -> Schedule:
    """The schedule where the training has it in the end."""
    return dataclasses.replace(schedule, location=schedule.location + _shift(config, 1.0))


def _shift(config: CurriculumConfig, progress: float) -> float:
    """Log SNR that is added to every draw, by progress from 0 at the first step to 1 at the last."""
    return config.start + (config.end - config.start) * progress if config.kind == "progressive" else 0.0


# Where in u the uniform draws of a step go: float64 [B] -> [B], rising

Place = Callable[[Tensor], Tensor]


def everywhere(curriculum: Curriculum) -> Place:
    """The draws stay where they are."""
    return lambda u: u


def within_active(curriculum: Curriculum) -> Place:
    """The draws are spread over the active interval: a uniform draw, given that it lies there."""

    def place(u: Tensor) -> Tensor:
        low, high = curriculum.active
        return low + (high - low) * u

    return place


def asymmetric(curriculum: Curriculum) -> Place:
    """Times below `threshold` are drawn `ratio` times as often, and half of all draws are then mirrored.

    This is the sampling of SpeeD (Wang et al., 2025, arXiv:2405.17403, section 3 and code), without its loss weight. A
    time t is mirrored to |m - t|, m from `end_of_change`. The code mirrors one half of each batch; here each draw is of
    the distribution that the two halves make together, piecewise constant over time.
    """
    times, masses = asymmetric_distribution(
        curriculum.config.threshold, curriculum.config.ratio, end_of_change(curriculum.schedule)
    )
    levels, knots = torch.from_numpy(1 - times[::-1].copy()), torch.from_numpy(1 - masses[::-1].copy())

    def place(u: Tensor) -> Tensor:
        """Linear between the knots of the cumulative distribution."""
        x, y = knots.to(u.device), levels.to(u.device)
        index = (torch.searchsorted(x, u, right=True) - 1).clamp(0, len(x) - 2)
        return y[index] + (u - x[index]) / (x[index + 1] - x[index]) * (y[index + 1] - y[index])

    return place


def asymmetric_distribution(threshold: float, ratio: float, mirror: float) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the cumulative distribution of time: times [K] from 0 to 1, and the mass [K] up to each."""
    ends = np.array([0, 1, threshold, mirror, mirror - threshold, threshold - mirror, 1 - mirror])
    times = np.unique(ends[(ends >= 0) & (ends <= 1)])
    middle = (times[:-1] + times[1:]) / 2

    def density(time: np.ndarray) -> np.ndarray:
        inside = (time >= 0) & (time <= 1)
        return inside * np.where(time < threshold, ratio, 1.0) / (ratio * threshold + 1 - threshold)

    mirrored = density(mirror - middle) + density(mirror + middle)
    masses = np.concatenate([[0.0], (np.diff(times) * (density(middle) + mirrored) / 2).cumsum()])
    return times, masses / masses[-1]


def end_of_change(schedule: Schedule, slowest: float = 1e-4) -> float:
    """The time from which sigma grows by less than `slowest` per step of NUM_STEPS: 0 if always, 1 if never.

    As in SpeeD's code for DDPM. Slow growth at the data end, as of Cauchy, does not count.
    """
    times = torch.arange(NUM_STEPS, dtype=torch.float64) / (NUM_STEPS - 1)
    _, sigma = variance_preserving(schedule.inverse(1 - times))
    fast = (torch.gradient(sigma)[0] >= slowest).nonzero()
    return min((int(fast[-1]) + 2) / NUM_STEPS, 1.0) if len(fast) else 0.0


PLACES: dict[str, Callable[[Curriculum], Place]] = {
    "uniform":      everywhere,
    "easy_to_hard": within_active,
    "anti":         within_active,
    "asymmetric":   asymmetric,
    "progressive":  everywhere,
    "single":       within_active,
}  # fmt: skip
