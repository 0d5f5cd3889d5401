"""A noise schedule that is learned along with the network (CVDM, della Maggiora et al., 2024, arXiv:2312.02246).

With time t from 0, data, to 1, noise, the share of the signal's variance is

    gamma(t) = exp(-Lambda rho(t)),    rho(0) = 0, rho growing,    log SNR = ln(gamma / (1 - gamma)),

and noise comes in at the rate beta(t) = Lambda tau(t), so that gamma' = -beta gamma must hold: rho and tau are two
functions, which `penalties` bring together. Lambda may differ by channel or by pixel, and then depends on an image if
the generator is told one.
Everything is float32, under autocast too, with derivatives in closed form.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.flops import forward_flops
from generator.learned_config import LearnedScheduleConfig
from generator.path import beside
from generator.schedule import NUM_STEPS, Schedule, tabulated, trainable

LEAST_EXPONENT = 1e-9  # -ln(gamma) below which the log SNR lies beyond the range of training, and so its slope is lost
SLOPE = 10.0  # of the sigmoids at the start: each rises in about a third of the time


@dataclass(frozen=True)
class Course:
    """gamma, its first and second derivative by time, and beta: [B], or [B, C, h, w] up to sides of 1."""

    gamma: Tensor
    slope: Tensor
    bend: Tensor
    beta: Tensor

    @property
    def residual(self) -> Tensor:
        """gamma' + beta gamma, which is 0 where both functions agree."""
        return self.slope + self.beta * self.gamma


@dataclass(frozen=True)
class Penalties:
    """What the fit of a schedule minimises beside the error of the network, each [B], a mean over the numbers of a row.

    constraint: (gamma' + beta gamma)^2 + (gamma(margin) - 1)^2 + gamma(1 - margin)^2.
    prior: KL(q(z_1 | x0) || N(0, 1)), from what is left of the data at t = 1 to pure noise; nats per number.
    roughness: gamma''^2, which holds the noise from coming all at once.
    """

    constraint: Tensor
    prior: Tensor
    roughness: Tensor

    def weighted(self, config: LearnedScheduleConfig) -> Tensor:
        """Their sum [B] as the section weighs them."""
        kept = config.constraint * self.constraint + config.prior * self.prior
        return kept + config.regularisation * self.roughness


class MonotoneTime(nn.Module):
    """f(t) = t (a t + b + sum_k c_k sigmoid(w_k t + d_k)) with a, b, c, w > 0: grows with t >= 0 from f(0) = 0."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.tensor([_before_softplus(1.0), _before_softplus(0.1)]))  # a, b
        self.heights = nn.Parameter(torch.full((hidden,), _before_softplus(3.0 / hidden)))  # c
        self.slopes = nn.Parameter(torch.full((hidden,), _before_softplus(SLOPE)))  # w
        self.offsets = nn.Parameter(-SLOPE * (torch.arange(hidden) + 0.5) / hidden)  # d, centres spread over the time

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, f' and f'' at times [...], each of that shape."""
        (a, b), c, w = F.softplus(self.line), F.softplus(self.heights), F.softplus(self.slopes)
        rise = torch.sigmoid(time[..., None] * w + self.offsets)  # [..., K]
        fall = rise * (1 - rise)
        inner = a * time + b + (c * rise).sum(-1)
        first = a + (c * w * fall).sum(-1)
        second = (c * w.square() * fall * (1 - 2 * rise)).sum(-1)
        return time * inner, inner + time * first, 2 * first + time * second


class ImageRates(nn.Module):
    """Lambda of every pixel, positive, from the latents of an image: [B, C, h, w] -> [B, C, h, w], all 1 at first.

    With `pooled` that of every channel, [B, C, 1, 1], from the mean over its pixels.
    """

    def __init__(self, channels: int, hidden: int, *, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.third = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, _before_softplus(1.0))

    def forward(self, image: Tensor) -> Tensor:
        seen = F.silu(self.first(image))
        seen = seen + F.silu(self.second(seen))
        seen = seen + F.silu(self.third(seen))
        found = self.last(seen)
        return F.softplus(found.mean((2, 3), keepdim=True) if self.pooled else found)


class LearnedSchedule(nn.Module):
    """The schedule of latents [C, h, w]. Times are [B]; rates are what `rates` makes of the condition, once a batch.

    `told_image` says that the condition is an image, which per=pixel needs and per=channel then reads.
    """

    def __init__(self, config: LearnedScheduleConfig, latent_shape: Sequence[int], *, told_image: bool) -> None:
        super().__init__()
        self.config, self.latent_shape = config, tuple(latent_shape)
        channels = latent_shape[0]
        self.elapsed, self.speed = MonotoneTime(config.hidden), MonotoneTime(config.hidden)  # rho, tau
        self.of_image: ImageRates | None = None
        if told_image and self.is_map:
            self.of_image = ImageRates(channels, config.channels, pooled=config.per == "channel")
        else:
            assert config.per != "pixel", "rates of pixels need an image"
            size = (1,) if config.per == "scalar" else (1, channels, 1, 1)
            self.scale = nn.Parameter(torch.full(size, _before_softplus(1.0)))

    def of_time(self) -> list[nn.Parameter]:
        """The parameters of all but the rates of an image."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("of_image.")]

    @property
    def is_map(self) -> bool:
        """Whether levels differ within an image."""
        return self.config.per != "scalar"

    def rates(self, condition: Tensor) -> Tensor:
        """Lambda, positive: [1] or [1, C, 1, 1]; of images [B, C, h, w] [B, C, 1, 1] or [B, C, h, w]."""
        if self.of_image is None:
            return F.softplus(self.scale)
        with torch.autocast(condition.device.type, enabled=False):
            return self.of_image(condition.to(self.of_image.last.weight.dtype))

    def forward(self, time: Tensor, condition: Tensor) -> Tensor:
        """Log SNR of times [B] under a condition, as `logsnr`."""
        return self.logsnr(time, self.rates(condition))

    def logsnr(self, time: Tensor, rates: Tensor) -> Tensor:
        """Log SNR in the range of training, falling with time: [B], or a map [B, C, h, w]."""
        exponent = self.exponent(time, rates).clamp(min=LEAST_EXPONENT)
        levels = trainable(_logsnr(exponent))
        return levels.expand(-1, *self.latent_shape) if self.is_map else levels

    def gamma(self, time: Tensor, rates: Tensor) -> Tensor:
        """Share of the signal's variance at times [B]: from 1 at 0, falling; [B], or [B, C, h, w] up to sides of 1."""
        return torch.exp(-self.exponent(time, rates))

    def exponent(self, time: Tensor, rates: Tensor) -> Tensor:
        """Lambda rho(t) = -ln(gamma)."""
        return rates * beside(self.elapsed(time)[0], rates)

    def course(self, time: Tensor, rates: Tensor) -> Course:
        """gamma with its derivatives, and beta, at times [B]."""
        value, first, second = (rates * beside(each, rates) for each in self.elapsed(time))
        gamma = torch.exp(-value)
        beta = rates * beside(self.speed(time)[0], rates)
        return Course(gamma=gamma, slope=-first * gamma, bend=(first.square() - second) * gamma, beta=beta)

    def penalties(self, course: Course, rates: Tensor, x0: Tensor) -> Penalties:
        """Those of a course at times [B], of latents x0 [B, C, h, w]."""
        start, end, last = x0.new_tensor([[self.config.margin], [1 - self.config.margin], [1.0]])  # 3 x [1]
        ends = (self.gamma(start, rates) - 1).square() + self.gamma(end, rates).square()
        exponent = beside(self.exponent(last, rates), x0)
        left = torch.exp(-exponent)
        # Of N(sqrt(gamma) x0, 1 - gamma) to N(0, 1): (gamma x0^2 - gamma - ln(1 - gamma)) / 2.
        prior = (left * (x0.square() - 1) - torch.log(-torch.expm1(-exponent))) / 2
        count = len(x0)
        return Penalties(
            constraint=by_row(course.residual.square() + ends, count),
            prior=by_row(prior, count),
            roughness=by_row(course.bend.square(), count),
        )

    @torch.no_grad()
    def as_schedule(self) -> Schedule:
        """The distribution of log SNR that uniform times have, of a schedule per=scalar: a table of NUM_STEPS times.

        The time of its first row is a little above 0, where the log SNR has no end.
        """
        times = torch.linspace(0, 1, NUM_STEPS, dtype=torch.float64)
        times[0] = times[1] / NUM_STEPS
        exact = copy.deepcopy(self).to("cpu", torch.float64)
        exponent = exact.exponent(times, exact.rates(times))
        return Schedule(family=tabulated(_logsnr(exponent)), location=0.0, scale=1.0)


def rate_flops(schedule: LearnedSchedule | None, condition: Tensor) -> int:
    """Operations that the rates of conditions [B, ...] take beside the network, whose own count leaves them out."""
    return 0 if schedule is None or schedule.of_image is None else forward_flops(schedule.of_image, condition)


def by_row(values: Tensor, count: int) -> Tensor:
    """Means [count] over the numbers of each row; what is the same in all rows may come as one."""
    return values.flatten(1).mean(1).expand(count) if values.ndim > 1 else values.expand(count)


def _logsnr(exponent: Tensor) -> Tensor:
    """ln(gamma / (1 - gamma)) of -ln(gamma) > 0, without losing digits at either end."""
    return -exponent - torch.log(-torch.expm1(-exponent))


def _before_softplus(value: float) -> float:
    """The number whose softplus, ln(1 + e^x), this is."""
    return math.log(math.expm1(value))
