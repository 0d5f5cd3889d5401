"""The discriminator's side of training: when it enters the game, what both sides lose, what must survive a restart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenizer.config import DiscriminatorConfig
from tokenizer.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, gradient_penalty, lecam

SMOOTHING = 0.99  # of the pixel loss whose standstill starts the game
PROGRESS = 0.99  # it has improved if it falls below so much of the best
LECAM_DECAY = 0.999


def passes_per_step(config: DiscriminatorConfig) -> float:
    """Forward passes that cost as much as what the discriminator computes in a training step, per image.

    To learn, it judges a real and a reconstructed image, forwards and backwards (2 x 3); to teach, one forwards and
    back to the pixels (2); every r1_every-th step differentiates the gradient at the pixels once more (6).
    """
    return 8 + (6 / config.r1_every if config.r1 else 0)


class Adversary:
    """A discriminator that judges reconstructions.

    Attributes:
        network: the discriminator itself, not wrapped for several processes.
        begun: whether it plays; from the first step on, or once training has come far enough.
    """

    def __init__(self, network: nn.Module, config: DiscriminatorConfig) -> None:
        self.network, self.config = network, config
        self.begun = config.start_step == 0 and config.start_patience == 0
        self.smoothed, self.best, self.waited = math.nan, math.inf, 0
        self.mean_real, self.mean_fake, self.r1 = 0.0, 0.0, 0.0

    def generator_loss(self, images: Tensor) -> Tensor:
        """What reconstructions [B, 3, H, W] lose before the discriminator, whose weights count as constants here."""
        constants = {name: value.detach() for name, value in self.network.named_parameters()}
        return GENERATOR_LOSSES[self.config.objective](functional_call(self.network, constants, (images,)))

    def discriminator_losses(self, judge: nn.Module, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """`discriminator`, the loss of telling real from reconstructed images, and what is worth logging about it.

        Args:
            judge: the discriminator as the processes share it.
            real, fake: [B, 3, H, W] in [-1, 1]; no gradient reaches them.
            step: every r1_every-th one has the gradient penalty (arXiv 1801.04406) `r1`, times as much.
        """
        config = self.config
        logits = judge(torch.cat([real, fake.detach()]), parts=2).float()
        on_real, on_fake = logits.chunk(2)
        loss = DISCRIMINATOR_LOSSES[config.objective](on_real, on_fake)
        told = {"logits_real": on_real.mean(), "logits_fake": on_fake.mean()}
        told["discriminator_accuracy"] = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        if config.lecam:
            told["lecam"] = lecam(on_real, on_fake, self.mean_real, self.mean_fake)
            loss = loss + config.lecam * told["lecam"]
        if config.r1 and step % config.r1_every == 0:
            told["r1"] = gradient_penalty(self.network, real)
            loss = loss + config.r1 / 2 * config.r1_every * told["r1"]
        return {"discriminator": loss, **told}

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        """Take in a good step's figures; `metrics` gets the last known gradient penalty in steps without one."""
        if self.begun:
            if self.config.r1:
                self.r1 = metrics["r1"] = metrics.get("r1", self.r1)
            for name in ("real", "fake"):
                old, new = getattr(self, f"mean_{name}"), metrics[f"logits_{name}"]
                setattr(self, f"mean_{name}", LECAM_DECAY * old + (1 - LECAM_DECAY) * new)
        else:
            self._wait(step, metrics["l2"])

    def _wait(self, step: int, pixel_loss: float) -> None:
        """Begin with the next step if it is time and the pixel loss has come to a standstill."""
        last = pixel_loss if math.isnan(self.smoothed) else self.smoothed
        self.smoothed = SMOOTHING * last + (1 - SMOOTHING) * pixel_loss
        improved = self.smoothed < PROGRESS * self.best
        self.waited = 0 if improved else self.waited + 1
        self.best = self.smoothed if improved else self.best
        self.begun = step + 1 >= self.config.start_step and self.waited >= self.config.start_patience

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])


STATE = ("begun", "smoothed", "best", "waited", "mean_real", "mean_fake", "r1")
