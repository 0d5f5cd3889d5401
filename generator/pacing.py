"""When a curriculum goes on to its next stage."""

from __future__ import annotations

import math
from typing import Any

from generator.config import CurriculumConfig


class Pacing:
    """The stage of a curriculum, 1 .. num_stages, moved on by the losses of its steps (Kim et al., 2025, algorithm 1).

    With patience a stage ends once the loss has not fallen below the best of the stage for more than `patience` steps
    in a row. The loss is an exponential average without bias towards its start (Kingma & Ba, 2015, section 3), which
    begins anew with each stage as the best does: the mean loss changes when a cluster joins. The last stage never ends.
    """

    def __init__(self, config: CurriculumConfig, *, num_stages: int) -> None:
        self.config, self.num_stages = config, num_stages
        self.stage = 1
        self._begin()

    def _begin(self) -> None:
        self.steps, self.waited, self.best, self.average = 0, 0, math.inf, 0.0

    def update(self, loss: float) -> bool:
        """Take the loss of a step, the same on every process; tells whether a new stage begins with the next step."""
        self.steps += 1
        if self._over(loss) and self.stage < self.num_stages:
            self.stage += 1
            self._begin()
            return True
        return False

    def _over(self, loss: float) -> bool:
        """Whether the stage should end with this loss."""
        limit = self.config.stage_steps
        expired = self.config.pacing == "patience" and self._expired(loss)
        return expired or (limit is not None and self.steps >= limit)

    def _expired(self, loss: float) -> bool:
        """Whether this loss exhausts the patience."""
        decay = self.config.smoothing
        share = (1 - decay) / (1 - decay**self.steps)  # of the last loss: 1 at first
        # Written so that a loss that stays equal leaves the average to the bit, and a raw loss is itself.
        self.average = loss if share == 1 else self.average + share * (loss - self.average)
        if self.average < self.best - self.config.min_improvement:
            self.best, self.waited = self.average, 0
        else:
            self.waited += 1
        return self.waited > self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {key: getattr(self, key) for key in ("stage", "steps", "waited", "best", "average")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for key in self.state_dict():
            setattr(self, key, state[key])
