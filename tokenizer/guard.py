"""Says once, with a remedy, when the figures of training show that it goes wrong."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

COLLAPSE = 0.05  # share of the codes that could be in use
VICTORY = 0.98  # share of images that the discriminator tells apart
PATIENCE = 300  # steps in a row


class Guard:
    """Counts for how many steps in a row each rule has been broken.

    Args:
        kind: of the bottleneck, which decides the remedy.
        reachable: share of the codebook that the tokens behind the figure `usage` could use at most.
    """

    def __init__(self, *, kind: str = "codebook", reachable: float = 1.0) -> None:
        self.reachable, self.remedy = min(1.0, reachable), REMEDIES.get(kind, REMEDIES["codebook"])
        self.streaks = {"collapse": 0, "victory": 0}

    def after_step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that fall due with this step's figures; they are also issued."""
        broken = {
            "collapse": metrics.get("usage", 1.0) < COLLAPSE * self.reachable,
            "victory": metrics.get("discriminator_accuracy", 0.0) > VICTORY,
        }
        self.streaks = {rule: self.streaks[rule] + 1 if broken[rule] else 0 for rule in self.streaks}
        due = [rule for rule, streak in self.streaks.items() if streak == PATIENCE]
        messages = [MESSAGES[rule].format(step=step, remedy=self.remedy, **metrics) for rule in due]
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return messages


MESSAGES = {
    "collapse": (
        f"step {{step}}: the codebook has collapsed, {PATIENCE} steps with few codes in use (now {{usage:.1%}}). "
        "{remedy}, or warm up longer"
    ),
    "victory": (
        "step {step}: the discriminator tells {discriminator_accuracy:.0%} of the images apart and teaches little. "
        "Raise tokenizer.discriminator.r1, lower its learning_rate, add lecam=0.001, or begin later with start_step"
    ),
}

REMEDIES = {
    "codebook": (
        "Lower tokenizer.model.code_dim (8 is safe), keep tokenizer.quantizer.normalize and kmeans_start on and "
        "revive_after above 0"
    ),
    "fsq": "Use fewer tokenizer.quantizer.levels",
    "lfq": "Give tokenizer.loss.entropy a weight, such as 0.1",
    "bsq": "Give tokenizer.loss.entropy a weight, such as 0.1",
    "simvq": "Raise tokenizer.loss.codebook, or lower tokenizer.model.code_dim",
    "residual": "Lower tokenizer.quantizer.depth or tokenizer.model.code_dim",
}
