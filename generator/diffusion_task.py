"""The training of a latent diffusion model.

A draw is u -> lambda = curriculum(u, step) -> z = alpha x0 + sigma eps -> network -> target, all but the network from
`objective` and its like.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.log import Histogram
from engine.optim import build_optimizer
from engine.shards import Shards
from engine.task import Task
from generator.card import generator_card
from generator.condition import preview_rows
from generator.config import DiffusionConfig
from generator.curriculum import Curriculum
from generator.denoiser import DiT
from generator.diffusion import Diffusion, build_denoiser
from generator.path import noised
from generator.schedule import build_schedule
from tokenizer.model import Tokenizer

LOGSNR_EDGES = tuple(range(-19, 20))  # of the histogram of what is drawn: all of the range of training
VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 16


class DiffusionTask(Task):
    """Trains a denoiser on latents; null replaces a share of the conditions, and unknown labels.

    Raises:
        ValueError: labels beyond the shards' class names, latents that the patches do not fit, or settings of sampling
            that the network is not trained for, such as guidance where there is nothing to guide by.
    """

    averaged = ("network",)
    auxiliary = ("uncertainty",)

    def __init__(self, *, config: DiffusionConfig, shards: Shards, test_shards: Shards, tokenizer: Tokenizer) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        card = generator_card(config, shards, tokenizer)
        self.network = build_denoiser(config.model, card)
        warn_if_narrow(config, self.network)
        self.generator = Diffusion(self.network, card)
        self.generator.check_settings(config.sample.previewed)
        self.condition = self.generator.condition
        self.read, self.read_test = (self.condition.reader(source) for source in (shards, test_shards))
        self.objective = self.generator.objective
        self.curriculum = Curriculum(config.curriculum, build_schedule(config.schedule), steps=config.train.steps)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        if config.weight == "learned":
            self.modules["uncertainty"] = Uncertainty()
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: build_optimizer(module, config.train) for name, module in self.modules.items()
        }

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents = batch["latents"].float()
        u, eps = rng.uniform(), rng.normal(*latents.shape[1:])  # [B], [B, C, h, w]
        condition = self.conditions(batch, rng)  # [B, ...]
        logsnr = self.curriculum.draw(u, rng.step)  # [B]
        cluster = self.curriculum.cluster_of(logsnr)  # before the network: the edges' way to a GPU would wait for it
        errors = self.errors(latents, condition, logsnr, eps)
        losses = self.losses(errors, logsnr)
        figures = {"loss": losses.mean(), "error": errors.detach().mean(), "mean_logsnr": logsnr.mean()}
        return {**figures, "draws_by_logsnr": draws_by_logsnr(logsnr), **self._by_cluster(losses.detach(), cluster)}

    def conditions(self, batch: dict[str, Tensor], rng: StepRandom) -> Tensor:
        """Rows of the condition [B, ...] of a training batch, a share of them null."""
        dropped = rng.uniform() < self.config.model.label_dropout  # [B]
        return self.condition.drop(self.read(batch, rng.uniform() if self.condition.draws else None), dropped)

    def _by_cluster(self, losses: Tensor, cluster: Tensor) -> dict[str, Tensor]:
        """Shares of the draws [N] and sums of losses over B [N], of losses [B] in clusters [B] from 1."""
        zeros, index = losses.new_zeros(self.curriculum.config.num_clusters), cluster - 1
        return {
            "draws_by_cluster": zeros.index_add(0, index, torch.full_like(losses, 1 / len(losses))),
            "loss_by_cluster": zeros.index_add(0, index, losses / len(losses)),
        }

    def told(self, step: int, sums: dict[str, list[float]]) -> dict[str, float | Histogram]:
        """Where the curriculum stands, a histogram of the log SNRs, and the mean loss of each cluster drawn from.

        Stage and levels are those that the next step draws from; the others tell of the steps since the last line.
        """
        low, high = self.curriculum.active_levels(step)
        total = sum(sums["draws_by_logsnr"])
        return {
            "curriculum/stage": self.curriculum.stage,
            "curriculum/lowest_logsnr": low,
            "curriculum/highest_logsnr": high,
            "curriculum/draws": Histogram(LOGSNR_EDGES, [count / total for count in sums["draws_by_logsnr"]]),
            **mean_losses(sums["loss_by_cluster"], sums["draws_by_cluster"]),
        }

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        """Every process sees the same loss, so that all begin a stage with the same step."""
        if step + 1 == self.config.train.steps:
            self._warn_if_unfinished(step)  # of the stage that this step drew from, not of one that begins after it
        self.curriculum.after_step(metrics["loss"])

    def _warn_if_unfinished(self, step: int) -> None:
        stage, stages = self.curriculum.stage, self.curriculum.num_stages
        if stage == stages:
            return
        low, high = self.curriculum.active_levels(step)
        untrained = f"log SNRs above {high:z.1f} (clusters 1 .. {stages - stage})"
        if self.config.curriculum.kind == "anti":
            untrained = f"log SNRs below {low:z.1f} (clusters {stage + 1} .. {stages})"
        warnings.warn(
            f"the training ended in stage {stage} of {stages} of its curriculum and never saw {untrained}. Train"
            " longer, or lower diffusion.curriculum.patience, num_clusters or stage_steps",
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state.get("curriculum", {}))

    def errors(self, x0: Tensor, condition: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
        """Mean squared errors of the output [B], of latents and noise [B, C, h, w] at log SNR [B]."""
        seen = self.objective.network_input(noised(x0, eps, logsnr), logsnr)  # [B, C, h, w]
        output = self.modules["network"](seen, logsnr, condition).float()
        return (output - self.objective.target_of(x0, eps, logsnr)).square().flatten(1).mean(1)

    def losses(self, errors: Tensor, logsnr: Tensor) -> Tensor:
        """What is minimised, from the errors [B] at log SNR [B]: weighted, or error / e^u + u with a learned u.

        u(lambda) tends to the logarithm of the level's mean error, so that every level comes to count alike: the error
        is then measured in units of what is usual at its level (Karras et al., 2024, arXiv:2312.02696).
        """
        if "uncertainty" in self.modules:
            u = self.modules["uncertainty"](logsnr)  # [B]
            return errors / u.exp() + u
        return self.objective.weight(logsnr) * errors

    def validate(self) -> dict[str, float]:
        """Loss and error on held-out latents, with the same noise at the same evenly spread levels every time.

        The levels are those of the schedule where the training has it in the end, whichever curriculum leads there.
        """
        measured = []
        for arguments in self._test_batches():
            errors, logsnr = self.errors(*arguments), arguments[2]
            measured.append((self.losses(errors, logsnr), errors, logsnr))
        losses, errors, logsnr = (torch.cat(column) for column in zip(*measured, strict=True))
        sums = self._by_cluster(losses, self.curriculum.cluster_of(logsnr))
        by_cluster = mean_losses(sums["loss_by_cluster"].tolist(), sums["draws_by_cluster"].tolist())
        return {"loss": float(losses.mean()), "error": float(errors.mean()), **by_cluster}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class, from the same seeds every time; of this network alone, without others."""
        sample = self.config.sample.previewed
        guidance = sample.guidance if sample.guide is None else 1.0
        settings = dataclasses.replace(sample, guide=None, outside=None, guidance=guidance)
        told = preview_rows(self.condition, self.read_test, self.test_shards, PREVIEW_IMAGES)
        latents = self.generator.sample(told, range(PREVIEW_IMAGES), **dataclasses.asdict(settings))
        return {"samples": self.tokenizer.to(latents.device).from_latents(latents).cpu()}

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The arguments x0, condition, logsnr, eps of `errors` over evenly spread held-out latents."""
        num = min(VALIDATION_IMAGES, len(self.test_shards))
        indices = np.arange(num) * len(self.test_shards) // num
        generator = torch.Generator().manual_seed(0)
        spread = (torch.randperm(num, generator=generator) + 0.5) / num  # [num]
        device = self.network.positions.device
        for rows in torch.arange(num).split(self.config.sample.batch_size):
            batch = self.test_shards.load(indices[rows.numpy()])
            eps = torch.randn(batch["latents"].shape, generator=generator)
            latents, u = batch["latents"].to(device).float(), spread[rows].to(device)
            yield latents, self.read_test(batch, None).to(device), self.curriculum.final(u), eps.to(device)


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
        angles = logsnr[:, None] * self.frequencies  # [B, F]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # [B, 2 F]
        return (waves * self.weight).sum(1) + self.bias  # [B]


def warn_if_narrow(config: DiffusionConfig, network: DiT) -> None:
    """Warn of patches with more numbers than the network has channels, where it is asked for their noise.

    The output is a linear map of the channels, so that the noise of some directions can never be told.
    """
    size, width = network.patch_size, config.model.shape[1]
    numbers = network.latent_shape[0] * size**2
    if config.objective.kind == "denoising" and config.target != "x0" and numbers > width:
        warnings.warn(
            f"a patch of {size} x {size} x {network.latent_shape[0]} latents has {numbers} numbers, more than the"
            f" {width} channels of the network, and diffusion.target={config.target} asks for the noise of each: use"
            " target=x0, a smaller diffusion.model.patch_size, or a wider model",
            stacklevel=2,
        )


def draws_by_logsnr(logsnr: Tensor) -> Tensor:
    """Shares of the log SNRs [B] between each two of LOGSNR_EDGES."""
    bins = (logsnr.floor().long() - LOGSNR_EDGES[0]).clamp(0, len(LOGSNR_EDGES) - 2)  # [B]
    shares = torch.full_like(logsnr, 1 / len(logsnr))
    return logsnr.new_zeros(len(LOGSNR_EDGES) - 1).index_add(0, bins, shares)


def mean_losses(sums: list[float], draws: list[float]) -> dict[str, float]:
    """Mean loss of each cluster, 01 the least noisy; a cluster that was not drawn from has none."""
    pairs = enumerate(zip(sums, draws, strict=True), start=1)
    return {f"loss_cluster/{number:02d}": total / count for number, (total, count) in pairs if count > 0}
