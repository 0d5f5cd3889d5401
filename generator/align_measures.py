"""What an optimisation of steps measures of a trained generator: the bound of each step, how far samples are off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.batches import StepRandom, global_indices, mix
from engine.device import Device, exact_products
from engine.shards import Shards
from generator.config import DiffusionSampleConfig
from generator.diffusion import Diffusion, served_levels
from generator.klub import anchors, step_bounds
from generator.solvers import Denoise

STREAM = 6  # of the random draws of a run; others are of its training
BOUND, PROBE = 0, 1  # which training images, and draws, serve for what


class Judge(Protocol):
    """Tells samples from real images."""

    name: str

    def see(self, latents: Tensor) -> Tensor:
        """Features float32 [n, D] on the CPU, of samples as latents [n, C, h, w]."""

    def distance(self, features: Tensor) -> float:
        """How far all samples together, as features [N, D], are from real images; the smaller the better."""


class Bound:
    """The KLUB of one step after the other: a `Cost`, in nats, over fixed latents, conditions and noise.

    All candidates meet the same draws, so that their order is not left to chance and the sum never rises. Every process
    must call it; each has a share of the latents.
    """

    def __init__(
        self, generator: Diffusion, settings: DiffusionSampleConfig, shards: Shards, device: Device,
        *, num: int, seed: int, sigma_data: float,
    ) -> None:  # fmt: skip
        self.generator, self.settings, self.device, self.sigma_data = generator, settings, device, sigma_data
        latents, self.rows, random = _training_images(generator, shards, num, seed, BOUND)
        noise, fresh = (random.normal(*latents.shape[1:]) for _ in range(2))
        u = (torch.arange(num) + random.uniform().double()) / num  # one in each n-th part of [0, 1)
        self.draws = (latents, noise, fresh, u)
        self.parts = list(enumerate(torch.arange(num).split(settings.batch_size)))[device.rank :: device.world]
        self.known: dict[tuple[float, float], float] = {}
        self.anchored: tuple[float, list[Tensor]] = (math.nan, [])

    def __call__(self, start: float, end: float) -> float:
        if (start, end) not in self.known:
            with torch.inference_mode(), exact_products(self.device.device):
                self.known[start, end] = self._measure(start, end)
        return self.known[start, end]

    def _measure(self, start: float, end: float) -> float:
        sums = []
        for (number, part), anchor in zip(self.parts, self._anchors(start), strict=True):
            denoise, draws = self._denoise(part), self._draws(part)
            values = step_bounds(denoise, anchor, draws, start=start, end=end, sigma_data=self.sigma_data)
            sums.append((number, math.fsum(values.tolist())))
        return math.fsum(value for _, value in sorted(self.device.collect(sums))) / len(self.draws[0])

    def _anchors(self, start: float) -> list[Tensor]:
        """Estimates at a stop for each part; those of the last stop are kept, as its candidates come together."""
        if self.anchored[0] != start:
            found = []
            for _, part in self.parts:
                x0, noise, *_ = self._draws(part)
                found.append(anchors(self._denoise(part), x0, noise, start))
            self.anchored = start, found
        return self.anchored[1]

    def _draws(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x0, noise, fresh, u = (each[part] for each in self.draws)
        place = self.device.device
        return x0.to(place), noise.to(place), fresh.to(place), u

    def _denoise(self, part: Tensor) -> Denoise:
        return at_any_levels(self.generator, self.settings, self.rows[part].to(self.device.device))


class Probe:
    """The distance of samples that are drawn at given stops, from the same noise every time.

    Every process must call it; each draws a share of the samples.
    """

    def __init__(
        self, generator: Diffusion, settings: DiffusionSampleConfig, shards: Shards, device: Device,
        *, num: int, seed: int, judge: Judge,
    ) -> None:  # fmt: skip
        self.generator, self.settings, self.device, self.judge = generator, settings, device, judge
        _, self.rows, _ = _training_images(generator, shards, num, seed, PROBE)
        self.seeds = [mix(seed, STREAM, number) for number in range(num)]
        self.parts = list(enumerate(torch.arange(num).split(settings.batch_size)))[device.rank :: device.world]

    def __call__(self, stops: Sequence[float]) -> float:
        settings = listed(self.settings, stops)
        self.generator.check_settings(settings)
        seen = []
        for number, part in self.parts:
            seeds = [self.seeds[row] for row in part.tolist()]
            latents = self.generator.sample_rows(self.rows[part], seeds, settings)
            seen.append((number, self.judge.see(latents)))
        features = torch.cat([rows for _, rows in sorted(self.device.collect(seen), key=lambda pair: pair[0])])
        return self.device.collect([self.judge.distance(features)])[0]  # that of the first process, for all


def listed(settings: DiffusionSampleConfig, stops: Sequence[float]) -> DiffusionSampleConfig:
    """The settings with these stops; where the last step ends the solver has clean latents, so that is no level."""
    return dataclasses.replace(settings, steps="list", levels=tuple(stops[:-1]), rho=7.0, from_zero_snr=False)


def at_any_levels(generator: Diffusion, settings: DiffusionSampleConfig, rows: Tensor) -> Denoise:
    """The estimate that samples are drawn with, for rows [B, ...] of the condition, here at different levels.

    Guidance within an interval and networks of single clusters ask for rows at one level: they get those apart that
    lie on different sides of where they change.
    """
    ends = [settings.guidance_first, settings.guidance_last]
    ends += served_levels(generator.card) if settings.outside is not None else ()
    edges = torch.tensor(sorted(end for end in ends if end is not None and math.isfinite(end)))

    def denoise(z: Tensor, logsnr: Tensor) -> Tensor:
        # The edges themselves are regions, too: each belongs to one side or the other.
        region = sum(torch.bucketize(logsnr, edges.to(logsnr), right=right) for right in (False, True))
        estimate = torch.empty_like(z)
        for number in torch.unique(region):
            chosen = region == number
            estimate[chosen] = generator.denoiser(rows[chosen], settings)(z[chosen], logsnr[chosen])
        return estimate

    return denoise


def _training_images(
    generator: Diffusion, shards: Shards, num: int, seed: int, turn: int
) -> tuple[Tensor, Tensor, StepRandom]:
    """Latents [N, C, h, w] of training images with their conditions [N, ...], and the random draws that go with them.

    With fewer images than asked some come again, which then meet other noise.
    """
    batch = shards.load(global_indices(len(shards), num, seed, turn))
    random = StepRandom(seed, turn, num, stream=STREAM)
    condition = generator.condition
    rows = condition.reader(shards)(batch, random.uniform() if condition.draws else None)
    return batch["latents"].float(), rows, random
