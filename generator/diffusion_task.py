"""The training of a latent diffusion model.

A draw is u -> lambda = curriculum(u, step) -> z = alpha x0 + sigma eps -> network -> target, all but the network from
`objective` and its like.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.config import to_dict
from engine.optim import adamw
from engine.shards import Shards
from engine.task import Task
from generator.card import generator_card
from generator.condition import spread_labels, training_labels
from generator.config import DiffusionConfig
from generator.curriculum import Curriculum
from generator.diffusion import Diffusion, build_denoiser
from generator.objective import Objective
from generator.path import noised
from generator.schedule import build_schedule
from tokenizer.model import Tokenizer

VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 16


class DiffusionTask(Task):
    """Trains a denoiser on latents; the null label replaces a share of the labels, and unknown ones.

    Raises:
        ValueError: labels beyond the shards' class names, latents that the patches do not fit, or settings of sampling
            that the network is not trained for, such as guidance where there is nothing to guide by.
    """

    averaged = ("network",)
    auxiliary = ("uncertainty",)

    def __init__(
        self, *, config: DiffusionConfig, shards: Shards, test_shards: Shards, tokenizer: Tokenizer
    ) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        card = generator_card(config, shards, tokenizer)
        self.network = build_denoiser(config.model, card)
        self.generator = Diffusion(self.network, card)
        self.generator.check_settings(config.sample)
        self.objective = Objective.from_config(to_dict(config))
        self.curriculum = Curriculum(config.curriculum, build_schedule(config.schedule), steps=config.train.steps)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        if config.weight == "learned":
            self.modules["uncertainty"] = Uncertainty()
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: adamw(module, config.train) for name, module in self.modules.items()
        }

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents, labels = batch["latents"].float(), batch["labels"]
        u, eps = rng.uniform(), rng.normal(*latents.shape[1:])                     # [B], [B, C, h, w]
        dropped = rng.uniform() < self.config.model.label_dropout                  # [B]
        logsnr = self.curriculum.draw(u, rng.step)                                 # [B]
        errors = self.errors(latents, labels.masked_fill(dropped, -1), logsnr, eps)
        losses = self.losses(errors, logsnr)
        return {"loss": losses.mean(), **figures(losses.detach(), errors.detach(), u), "mean_logsnr": logsnr.mean()}

    def errors(self, x0: Tensor, labels: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
        """Mean squared errors of the output [B], of latents and noise [B, C, h, w] at log SNR [B]."""
        rows = training_labels(labels, self.network.num_classes)                   # [B]
        seen = self.objective.network_input(noised(x0, eps, logsnr), logsnr)       # [B, C, h, w]
        output = self.modules["network"](seen, logsnr, rows).float()
        return (output - self.objective.target_of(x0, eps, logsnr)).square().flatten(1).mean(1)

    def losses(self, errors: Tensor, logsnr: Tensor) -> Tensor:
        """What is minimised, from the errors [B] at log SNR [B]: weighted, or error / e^u + u with a learned u.

        u(lambda) tends to the logarithm of the level's mean error, so that every level comes to count alike: the error
        is then measured in units of what is usual at its level (Karras et al., 2024, arXiv:2312.02696).
        """
        if "uncertainty" in self.modules:
            u = self.modules["uncertainty"](logsnr)                                # [B]
            return errors / u.exp() + u
        return self.objective.weight(logsnr) * errors

    def validate(self) -> dict[str, float]:
        """Loss and error on held-out latents, with the same noise at the same evenly spread levels every time.

        The levels are those that the last step of the training draws.
        """
        measured = []
        for *arguments, u in self._test_batches():
            errors = self.errors(*arguments)
            measured.append((self.losses(errors, arguments[2]), errors, u))
        losses, errors, u = (torch.cat(column) for column in zip(*measured, strict=True))
        return {key: float(value) for key, value in {"loss": losses.mean(), **figures(losses, errors, u)}.items()}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class, from the same seeds every time; a guide would be another run's network."""
        labels, sample = spread_labels(PREVIEW_IMAGES, self.generator.num_classes), self.config.sample
        settings = sample if sample.guide is None else dataclasses.replace(sample, guide=None, guidance=1.0)
        latents = self.generator.sample(labels, range(PREVIEW_IMAGES), **dataclasses.asdict(settings))
        return {"samples": self.tokenizer.to(latents.device).from_latents(latents).cpu()}

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The arguments x0, labels, logsnr, eps of `errors`, then u [B], over evenly spread held-out latents."""
        num = min(VALIDATION_IMAGES, len(self.test_shards))
        indices = np.arange(num) * len(self.test_shards) // num
        generator = torch.Generator().manual_seed(0)
        spread = (torch.randperm(num, generator=generator) + 0.5) / num            # [num]
        device = self.network.positions.device
        for rows in torch.arange(num).split(self.config.sample.batch_size):
            batch = self.test_shards.load(indices[rows.numpy()])
            eps = torch.randn(batch["latents"].shape, generator=generator)
            latents, u = batch["latents"].to(device).float(), spread[rows].to(device)
            yield latents, batch["labels"].to(device), self.curriculum.final(u), eps.to(device), u


class Uncertainty(nn.Module):
    """u(lambda), a smooth function of log SNR [B] -> [B]: one linear layer over waves, zero at first.

    Written as products and a sum, which keep their precision under autocast.
    """

    FREQUENCIES = 0.05, 2.0  # radians per unit of log SNR: from a third of a wave over |lambda| <= 18.42 on

    def __init__(self, num_frequencies: int = 32) -> None:
        super().__init__()
        lowest, highest = (math.log10(frequency) for frequency in self.FREQUENCIES)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(lowest, highest, num_frequencies), persistent=False)
        self.weight = nn.Parameter(torch.zeros(2 * num_frequencies))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, logsnr: Tensor) -> Tensor:
        angles = logsnr[:, None] * self.frequencies                                # [B, F]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)                     # [B, 2 F]
        return (waves * self.weight).sum(1) + self.bias                            # [B]


def figures(losses: Tensor, errors: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Beside the mean loss: the mean error, which no weight changes, and the loss by quarter of u; all given [B]."""
    return {"error": errors.mean(), **loss_by_quarter(losses, u)}


def loss_by_quarter(losses: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Loss in each quarter of the schedule's draws u [B], 1 the least noisy.

    Four times each quarter's part of the mean: unlike a mean over the quarter's own samples it exists when a small
    batch has none there, and averages over parts and processes to the right number.
    """
    quarter = 4 - (4 * u).long()                                                   # [B], in 1 .. 4
    return {f"loss_quarter_{q}": 4 * (losses * (quarter == q)).mean() for q in range(1, 5)}
