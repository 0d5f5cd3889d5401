"""Curricula: which part of the schedule is trained now.

A curriculum turns the uniform draws of a step into log SNRs, through the schedule. It is a pure function of the step
and of how many there are in all, so nothing of it needs saving: a run that resumes draws what it would have drawn, and
one that goes on to more steps than it began with draws as a run of that length does there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from generator.config import CurriculumConfig
from generator.schedule import Schedule, trainable

# (configuration, progress from 0 at the first step to 1 at the last) -> log SNR that is added to every draw.
SHIFTS: dict[str, Callable[[CurriculumConfig, float], float]] = {
    "uniform":     lambda config, progress: 0.0,
    "progressive": lambda config, progress: config.start + (config.end - config.start) * progress,
}  # fmt: skip


def final_schedule(config: CurriculumConfig, schedule: Schedule) -> Schedule:
    """The schedule where the last step of the training has it."""
    return dataclasses.replace(schedule, location=schedule.location + SHIFTS[config.kind](config, 1.0))


class Curriculum:
    """A schedule in the course of a training of `steps` steps.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, config: CurriculumConfig, schedule: Schedule, *, steps: int) -> None:
        if config.kind not in SHIFTS:
            raise ValueError(f"diffusion.curriculum.kind={config.kind!r} is unknown; choose one of {', '.join(SHIFTS)}")
        self.config, self.schedule, self.steps = config, schedule, steps

    def draw(self, u: Tensor, step: int) -> Tensor:
        """Uniform draws [B] of a step, counted from 0 -> float32 log SNR [B] in the range of training, rising in u."""
        return trainable(self.schedule.inverse(u) + self.shift(step))

    def final(self, u: Tensor) -> Tensor:
        """What the last step draws."""
        return self.draw(u, self.steps - 1)

    def shift(self, step: int) -> float:
        """By how much log SNR the schedule is moved at a step; past the last step it stays where it is."""
        progress = min(step / (self.steps - 1), 1.0) if self.steps > 1 else 1.0
        return SHIFTS[self.config.kind](self.config, progress)
