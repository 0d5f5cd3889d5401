"""The training of a latent diffusion model.

A draw is u -> lambda = schedule(u) -> alpha, sigma = path(lambda) -> x_t = alpha x + sigma eps -> network -> target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.optim import adamw
from engine.shards import Shards
from engine.task import Task
from generator.card import generator_card
from generator.condition import spread_labels, training_labels
from generator.config import DiffusionConfig
from generator.diffusion import Diffusion, build_denoiser, over_latents
from generator.objective import WEIGHTS, target_of, x0_gain
from generator.path import PATHS
from generator.schedule import build_schedule
from tokenizer.model import Tokenizer

VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 16


class DiffusionTask(Task):
    """Trains a denoiser on latents; the null label replaces a share of the labels, and unknown ones.

    Raises:
        ValueError: labels beyond the shards' class names, latents that the patches do not fit, or guidance where there
            is nothing to guide by.
    """

    averaged = ("network",)

    def __init__(
        self, *, config: DiffusionConfig, shards: Shards, test_shards: Shards, tokenizer: Tokenizer
    ) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        card = generator_card(config, shards, tokenizer)
        self.network = build_denoiser(config.model, card)
        self.generator = Diffusion(self.network, card)
        self.generator.check_guidance(config.sample.guidance)
        schedule = config.schedule
        self.schedule = build_schedule(schedule.kind, location=schedule.location, scale=schedule.scale)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"network": adamw(self.network, config.train)}

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents, labels = batch["latents"].float(), batch["labels"]
        u, eps = rng.uniform(), rng.normal(*latents.shape[1:])                     # [B], [B, C, h, w]
        dropped = rng.uniform() < self.config.model.label_dropout                  # [B]
        errors = self.errors(latents, labels.masked_fill(dropped, -1), self.schedule(u), eps)
        return {"loss": errors.mean(), **loss_by_quarter(errors.detach(), u)}

    def errors(self, x: Tensor, labels: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
        """Weighted mean squared errors in target space [B], of latents and noise [B, C, h, w] at log SNR [B]."""
        kind, (alpha, sigma) = self.config.target, PATHS[self.config.path](logsnr)
        weight = WEIGHTS[self.config.weight](logsnr, x0_gain(kind, alpha, sigma))  # [B]
        alpha, sigma = over_latents(alpha), over_latents(sigma)                    # [B, 1, 1, 1]
        rows = training_labels(labels, self.network.num_classes)                   # [B]
        output = self.modules["network"](alpha * x + sigma * eps, logsnr, rows)
        return weight * (output.float() - target_of(kind, x, eps, alpha, sigma)).square().flatten(1).mean(1)

    def validate(self) -> dict[str, float]:
        """Loss on held-out latents, with the same noise at the same evenly spread levels every time."""
        measured = [(self.errors(*arguments), u) for *arguments, u in self._test_batches()]
        errors, u = (torch.cat(column) for column in zip(*measured, strict=True))
        return {key: float(value) for key, value in {"loss": errors.mean(), **loss_by_quarter(errors, u)}.items()}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class, from the same seeds every time."""
        labels = spread_labels(PREVIEW_IMAGES, self.generator.num_classes)
        latents = self.generator.sample(labels, range(PREVIEW_IMAGES), **dataclasses.asdict(self.config.sample))
        return {"samples": self.tokenizer.to(latents.device).from_latents(latents).cpu()}

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The arguments x, labels, logsnr, eps of `errors`, then u [B], over evenly spread held-out latents."""
        num = min(VALIDATION_IMAGES, len(self.test_shards))
        indices = np.arange(num) * len(self.test_shards) // num
        generator = torch.Generator().manual_seed(0)
        spread = (torch.randperm(num, generator=generator) + 0.5) / num            # [num]
        device = self.network.positions.device
        for rows in torch.arange(num).split(self.config.sample.batch_size):
            batch = self.test_shards.load(indices[rows.numpy()])
            eps = torch.randn(batch["latents"].shape, generator=generator)
            u = spread[rows].to(device)
            yield batch["latents"].to(device).float(), batch["labels"].to(device), self.schedule(u), eps.to(device), u


def loss_by_quarter(errors: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Loss in each quarter of the schedule's draws u [B], 1 the least noisy.

    Four times each quarter's part of the mean: unlike a mean over the quarter's own samples it exists when a small
    batch has none there, and averages over parts and processes to the right number.
    """
    quarter = 4 - (4 * u).long()                                                   # [B], in 1 .. 4
    return {f"loss_quarter_{q}": 4 * (errors * (quarter == q)).mean() for q in range(1, 5)}
