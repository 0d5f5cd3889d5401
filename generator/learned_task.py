"""The training of a latent diffusion model along with its noise schedule.

A draw is u -> t = 1 - u -> lambda = schedule(t, condition) -> z -> network -> target; the error goes back through z and
lambda into the schedule, whose own penalties hold it in shape.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batches import StepRandom
from engine.log import Histogram
from generator.diffusion_task import DiffusionTask, draws_by_logsnr, mean_losses
from generator.learned_schedule import LearnedSchedule
from generator.path import noised
from generator.schedule import MAX_LOGSNR

CURVE_TIMES = tuple(step / 20 for step in range(21))  # at which the curve of gamma is logged
CURVE_IMAGES = 8  # of each part of a batch, over whose numbers it is told
CURVES = {"gamma_low": 0.1, "gamma": 0.5, "gamma_high": 0.9}  # quantiles over the numbers of latents


class LearnedScheduleTask(DiffusionTask):
    """Trains a denoiser and its schedule; what `DiffusionTask` calls a level is here u, of which t = 1 - u is the time.

    The schedule is a part of the network: the same optimizer moves it, in part faster, and averages, snapshots and
    models hold it.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        schedule = self.network.learned_schedule
        assert schedule is not None
        self.schedule: LearnedSchedule = schedule
        self._quicken(self.optimizers["network"])

    def _quicken(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the schedule's functions of time a group with a learning rate of their own."""
        fast = self.schedule.of_time()
        moved = {id(parameter) for parameter in fast}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
        rate = self.config.train.learning_rate * self.schedule.config.learning_rate_factor
        optimizer.add_param_group({"params": fast, "weight_decay": 0.0, "peak_lr": rate})

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents = batch["latents"].float()
        drawn, eps = rng.uniform(), rng.normal(*latents.shape[1:])  # [B], [B, C, h, w]
        condition = self.conditions(batch, rng)  # [B, ...]
        u = self.curriculum.draw(drawn, rng.step)  # [B]
        cluster = self.curriculum.cluster_of(u)
        rates = self.schedule.rates(condition)
        logsnr = self.schedule.logsnr(1 - u, rates)  # [B] or [B, C, h, w]
        errors = self.errors_at(latents, condition, logsnr, eps)
        held, figures = self.penalties(latents, drawn, rates)  # at all times, whatever the stage of a curriculum
        levels = logsnr.detach().flatten()
        return {
            "loss": errors.mean() + held,
            "error": errors.detach().mean(),
            "mean_logsnr": levels.mean(),
            **figures,
            "draws_by_logsnr": draws_by_logsnr(levels),
            **self._by_cluster(errors.detach(), cluster),
            **gamma_curves(self.schedule, rates.detach()[:CURVE_IMAGES]),
        }

    def penalties(self, latents: Tensor, u: Tensor, rates: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the schedule adds to the loss, at the times 1 - u [B], and the figures that tell of it."""
        course = self.schedule.course(1 - u, rates)
        found = self.schedule.penalties(course, rates, latents)
        figures = {
            "residual": course.residual.abs().mean(),
            "constraint": found.constraint.mean(),
            "prior": found.prior.mean(),
            "roughness": found.roughness.mean(),
            "gamma_at_end": self.schedule.gamma(u.new_ones(1), rates).mean(),
        }
        told = {f"learned_schedule/{name}": figure.detach() for name, figure in figures.items()}
        return found.weighted(self.schedule.config).mean(), told

    def errors_at(self, x0: Tensor, condition: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
        """Mean squared errors of the output [B], of latents and noise [B, C, h, w] at the levels of `logsnr`."""
        seen = self.objective.network_input(noised(x0, eps, logsnr), logsnr)  # [B, C, h, w]
        output = self.modules["network"](seen, logsnr, condition).float()
        return (output - self.objective.target_of(x0, eps, logsnr)).square().flatten(1).mean(1)

    def told(self, step: int, sums: dict[str, list[float]]) -> dict[str, float | Histogram]:
        """Beside what `DiffusionTask` tells, what part of the signal each stretch of time takes away.

        One minus their running sum is the curve of gamma, by which the stage's times have their log SNRs too.
        """
        curves = {name: [value / sums[name][0] for value in sums[name]] for name in CURVES}  # gamma(0) = 1 in each step
        low, high = self.curriculum.active_levels(step)  # of u
        levels = np.interp([1 - low, 1 - high], CURVE_TIMES, curves["gamma"])
        ends = {"lowest": levels[0], "highest": levels[1]}
        return {
            **super().told(step, sums),
            **{f"curriculum/{name}_logsnr": _logit(float(gamma)) for name, gamma in ends.items()},
            **{
                f"learned_schedule/{name}": Histogram(CURVE_TIMES, (-np.diff(curve)).tolist())
                for name, curve in curves.items()
            },
        }

    def validate(self) -> dict[str, float]:
        """Loss, error and what is left of the constraint on held-out latents, at the same evenly spread times."""
        measured, clusters = [], []
        for latents, condition, u, eps in self._test_batches():
            rates = self.schedule.rates(condition)
            held, figures = self.penalties(latents, u, rates)
            errors = self.errors_at(latents, condition, self.schedule.logsnr(1 - u, rates), eps)
            told = torch.stack([held, figures["learned_schedule/residual"]])
            measured.append(torch.cat([errors[:, None], told.expand(len(u), -1)], dim=1))
            clusters.append(self.curriculum.cluster_of(u))
        rows = torch.cat(measured)  # [num, 3]
        error, penalty, residual = rows.mean(0).tolist()
        sums = self._by_cluster(rows[:, 0], torch.cat(clusters))
        return {
            "loss": error + penalty,
            "error": error,
            "learned_schedule/residual": residual,
            **mean_losses(sums["loss_by_cluster"].tolist(), sums["draws_by_cluster"].tolist()),
        }

    def _warn_if_unfinished(self, step: int) -> None:
        stage, stages = self.curriculum.stage, self.curriculum.num_stages
        if stage == stages:
            return
        low, high = self.curriculum.active_levels(step)  # of u
        untrained = f"above {1 - low:.2f}" if self.config.curriculum.kind == "anti" else f"below {1 - high:.2f}"
        warnings.warn(
            f"the training ended in stage {stage} of {stages} of its curriculum and never saw times {untrained} of its"
            " learned schedule. Train longer, or lower diffusion.curriculum.patience, num_clusters or stage_steps",
            stacklevel=2,
        )


@torch.no_grad()
def gamma_curves(schedule: LearnedSchedule, rates: Tensor) -> dict[str, Tensor]:
    """Quantiles of gamma over the numbers of the latents of these rates: [T] at CURVE_TIMES under each of CURVES."""
    shares = torch.tensor(list(CURVES.values()), device=rates.device)
    points = torch.quantile(rates.flatten(), shares)  # [3]; gamma falls with the rate
    times = torch.tensor(CURVE_TIMES, device=rates.device)
    curves = schedule.elapsed(times)[0] * points.flip(0)[:, None]  # [3, T]
    return dict(zip(CURVES, torch.exp(-curves), strict=True))


def _logit(gamma: float) -> float:
    """The log SNR of a share of the signal's variance, in the range of training."""
    if not 0 < gamma < 1:
        return MAX_LOGSNR if gamma >= 1 else -MAX_LOGSNR
    return max(-MAX_LOGSNR, min(MAX_LOGSNR, math.log(gamma) - math.log1p(-gamma)))
