"""What the training loop drives: the contract between it and a room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.log import Histogram


class Task:
    """Networks, their optimizers and a loss. A room subclasses it."""

    modules: dict[str, nn.Module]
    """Networks that are trained; the loop replaces them by their distributed form, so call them through this table."""
    optimizers: dict[str, torch.optim.Optimizer]
    """An optimizer for each network, under the same name."""
    averaged: tuple[str, ...] = ()
    """Names of the networks whose weights are averaged (EMA)."""
    auxiliary: tuple[str, ...] = ()
    """Names of small networks that serve training alone: every process holds a copy, they are never compiled, and their
    gradients are not clipped."""

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        """Scalars of one part of a batch: `loss`, which is back-propagated, and whatever is worth logging.

        Vectors are summed over the steps for `told`, which says what is logged of them.
        """
        raise NotImplementedError

    def before_step(self) -> None:
        """Runs before the first part of every step, also after one that was skipped."""

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        """Runs after each good optimizer step; `metrics` are this step's, averaged over its parts and processes."""

    def told(self, step: int, sums: dict[str, list[float]]) -> dict[str, float | Histogram]:
        """What to log before a step of the vectors, from their sums over the good steps since the last line of the log.

        Parts and processes have been averaged; how many steps there were does not show, so use ratios.
        """
        return {}

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, measured with averaged weights in evaluation mode."""
        return {}

    def preview(self) -> dict[str, Tensor]:
        """Pictures to look at, name -> uint8 [N, 3, H, W], made with averaged weights in evaluation mode."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart beyond the networks and optimizers: tensors and primitives only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
