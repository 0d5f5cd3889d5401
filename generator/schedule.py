"""Training schedules: which log SNR to train on, and how often.

A schedule is a distribution over lambda = log SNR: a standard family, moved and stretched, or a mixture of two such.
(One that is learned along with the network is in `learned_schedule`.)
A uniform u becomes lambda = location + scale * inverse(u), so lambda grows with u and the time of the papers is
t = 1 - u (Hang & Gu, 2024, section 3). What is trained on is clamped to flow times in [1e-4, 1 - 1e-4], |lambda| <=
18.42; `inverse`, `cdf` and `pdf` are those of the unclamped distribution, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from generator.config import MixedScheduleConfig, ScheduleConfig

MIN_TIME = 1e-4
MAX_LOGSNR = 2 * math.log((1 - MIN_TIME) / MIN_TIME)
NUM_STEPS = 1000  # of DDPM and iDDPM


def trainable(logsnr: Tensor) -> Tensor:
    """Any log SNR -> the nearest float32 that networks are trained on."""
    return logsnr.clamp(-MAX_LOGSNR, MAX_LOGSNR).float()


@dataclass(frozen=True)
class Family:
    """A distribution on the real line; three functions of one float64 tensor of any shape."""

    inverse: Callable[[Tensor], Tensor]
    cdf: Callable[[Tensor], Tensor]
    pdf: Callable[[Tensor], Tensor]


# Standard families, location 0 and scale 1. Tails are written such that neither end loses digits.

SECANT = Family(
    inverse=lambda u: 2 * torch.log(torch.tan(u * (math.pi / 2))),
    cdf=lambda z: torch.atan(torch.exp(z / 2)) * (2 / math.pi),
    pdf=lambda z: 1 / (2 * math.pi * torch.cosh(z / 2)),
)
LOGISTIC = Family(
    inverse=torch.logit,
    cdf=torch.sigmoid,
    pdf=lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
)
NORMAL = Family(
    inverse=torch.special.ndtri,
    cdf=torch.special.ndtr,
    pdf=lambda z: torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi),
)
LAPLACE = Family(
    inverse=lambda u: torch.where(u < 0.5, torch.log(2 * u), -torch.log(2 * (1 - u))),
    cdf=lambda z: torch.where(z < 0, torch.exp(-z.abs()) / 2, 1 - torch.exp(-z.abs()) / 2),
    pdf=lambda z: torch.exp(-z.abs()) / 2,
)
CAUCHY = Family(
    inverse=lambda u: torch.where(u < 0.5, -1 / torch.tan(math.pi * u), 1 / torch.tan(math.pi * (1 - u))),
    cdf=lambda z: torch.atan2(torch.ones_like(z), -z) / math.pi,
    pdf=lambda z: 1 / (math.pi * (1 + z.square())),
)


# The discrete schedules, made continuous


def tabulated(logsnr: Tensor) -> Family:
    """Uniform time between knots: T falling log SNRs, of which the first has time 0 and the last time 1.

    Step i of T (0 is the least noisy) has time i / (T - 1), and lambda is linear in time between two of them. If the
    last is -inf, its interval is linear in alpha / sigma instead, so that lambda goes to -inf with time to 1.
    """
    knots, intervals = logsnr.double().flip(0), len(logsnr) - 1

    def ends(index: Tensor) -> tuple[Tensor, Tensor]:
        on_device = knots.to(index.device)
        return on_device[index], on_device[index + 1]

    def inverse(u: Tensor) -> Tensor:
        position = u * intervals
        index = position.long().clamp(0, intervals - 1)
        share, (low, high) = position - index, ends(index)
        return torch.where(low.isinf(), high + 2 * share.log(), low + share * (high - low))

    def interval(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = (torch.searchsorted(knots.to(z.device), z.contiguous(), right=True) - 1).clamp(0, intervals - 1)
        return index, *ends(index)

    def cdf(z: Tensor) -> Tensor:
        index, low, high = interval(z)
        share = torch.where(low.isinf(), torch.exp((z - high) / 2), (z - low) / (high - low))
        return (index + share.clamp(0, 1)) / intervals

    def pdf(z: Tensor) -> Tensor:
        _, low, high = interval(z)
        density = torch.where(low.isinf(), torch.exp((z - high) / 2) / 2, 1 / (high - low)) / intervals
        return torch.where((z >= low) & (z <= high), density, 0.0)

    return Family(inverse=inverse, cdf=cdf, pdf=pdf)


def ddpm_log_alphas_bar() -> Tensor:
    """ln(alpha-bar) after each of DDPM's steps: beta from 1e-4 to 0.02, linear (Ho et al., 2020, section 4)."""
    return torch.log1p(-torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)).cumsum(0)


def iddpm_log_alphas_bar() -> Tensor:
    """ln(alpha-bar) of iDDPM's cosine with offset 0.008 and beta <= 0.999 (Nichol & Dhariwal, 2021, equation 17)."""
    time = torch.arange(NUM_STEPS + 1, dtype=torch.float64) / NUM_STEPS
    bar = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)).square()
    return torch.log1p(-(1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumsum(0)


def step_logsnr(log_alphas_bar: Tensor, *, zero_terminal: bool) -> Tensor:
    """Log SNR [T] of discrete steps from ln(alpha-bar) [T]; zero_terminal shifts and stretches sqrt(alpha-bar).

    The rescaling makes the last sqrt(alpha-bar) zero and keeps the first (Lin et al., 2024, algorithm 1).
    """
    if zero_terminal:
        root = torch.exp(log_alphas_bar / 2)
        log_alphas_bar = 2 * torch.log((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    return log_alphas_bar - torch.log(-torch.expm1(log_alphas_bar))


DISCRETE: dict[str, Callable[[], Tensor]] = {"ddpm": ddpm_log_alphas_bar, "iddpm": iddpm_log_alphas_bar}


def discrete(kind: str, *, zero_terminal: bool = False) -> Family:
    """The family of a discrete schedule, one of DISCRETE."""
    return tabulated(step_logsnr(DISCRETE[kind](), zero_terminal=zero_terminal))


# name: family, location, scale.
SCHEDULES: dict[str, tuple[Family, float, float]] = {
    "ddpm":         (discrete("ddpm"), 0.0, 1.0),
    "iddpm":        (discrete("iddpm"), 0.0, 1.0),
    "cosine":       (SECANT, 0.0, 1.0),    # lambda = 2 ln cot(pi t / 2); p = sech(lambda / 2) / (2 pi)
    "laplace":      (LAPLACE, 0.0, 0.5),   # p = exp(-|lambda - mu| / b) / (2 b); b = 0.5 (Hang & Gu)
    "cauchy":       (CAUCHY, 0.0, 1.0),    # p = gamma / (pi ((lambda - mu)^2 + gamma^2)) (Hang & Gu)
    "edm":          (NORMAL, 2.4, 2.4),    # ln sigma ~ N(-1.2, 1.2^2), lambda = -2 ln sigma (Karras et al., 2022)
    "uniform_time": (LOGISTIC, 0.0, 2.0),  # lambda = 2 ln((1 - t) / t); p = sech^2(lambda / 4) / 8; FM-OT
    "logit_normal": (NORMAL, 0.0, 2.0),    # flow time t = sigmoid(m + s z): location -2 m, scale 2 s (Esser et al.)
}  # fmt: skip


# Mixtures


def mixture(first: Schedule, second: Schedule, share: float) -> Family:
    """`share` of the draws come from the second schedule, the others from the first."""

    def mixed(of_first: Tensor, of_second: Tensor) -> Tensor:
        return (1 - share) * of_first + share * of_second

    def cdf(z: Tensor) -> Tensor:
        return mixed(first.cdf(z), second.cdf(z))

    def pdf(z: Tensor) -> Tensor:
        return mixed(first.pdf(z), second.pdf(z))

    def inverse(u: Tensor) -> Tensor:
        """A quantile of the mixture lies between those of its parts."""
        low, high = (function(first.inverse(u), second.inverse(u)) for function in (torch.minimum, torch.maximum))
        inner = low.isfinite() & high.isfinite()
        root = crossing(cdf, pdf, u, torch.where(inner, low, 0.0), torch.where(inner, high, 0.0))
        return torch.where(inner, root, torch.where(u < 0.5, low, high))

    return Family(inverse=inverse, cdf=cdf, pdf=pdf)


def crossing(
    cdf: Callable[[Tensor], Tensor], pdf: Callable[[Tensor], Tensor], u: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Where cdf = u between `low` and `high`, to 1e-10 or what float64 can tell.

    Newton's steps while each is at most half as long as the last; else the interval around the root is halved.
    """
    point, last = (low + high) / 2, high - low
    for _ in range(400):
        excess, density, tolerance = cdf(point) - u, pdf(point), 1e-10 * (1 + point.abs())
        low, high = torch.where(excess <= 0, point, low), torch.where(excess >= 0, point, high)
        done = (excess.abs() <= tolerance * density) | (high - low <= tolerance)
        if bool(done.all()):
            break
        step, middle = excess / density, (low + high) / 2
        newton = point - step
        good = (newton >= low) & (newton <= high) & (step.abs() <= last / 2)
        point = torch.where(done, point, torch.where(good, newton, middle))
        last = torch.where(good, step.abs(), (high - low) / 2)
    return point


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A distribution over log SNR; tensors of any shape in, the same shape out."""

    family: Family
    location: float
    scale: float

    def __call__(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1) -> float32 log SNR in [-MAX_LOGSNR, MAX_LOGSNR], increasing in u."""
        return trainable(self.inverse(u))

    def inverse(self, u: Tensor) -> Tensor:
        """Quantile: u in [0, 1) -> log SNR, unclamped, in float64 because float32's pi / 2 lies beyond a pole."""
        return self.location + self.scale * self.family.inverse(u.double())

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Share of the draws below this log SNR: undoes `inverse`."""
        return self.family.cdf((logsnr.double() - self.location) / self.scale)

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Density of the draws at this log SNR, per unit of log SNR."""
        return self.family.pdf((logsnr.double() - self.location) / self.scale) / self.scale


# Of a learned schedule: u itself, from which `generator.learned_schedule` computes the log SNR
OWN_TIME = Family(inverse=lambda u: u, cdf=lambda z: z.clamp(0, 1), pdf=lambda z: ((z >= 0) & (z <= 1)).double())


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule of a configuration; location and scale default to those of its row in SCHEDULES.

    A learned one is part of a network. What stands for it here draws u = 1 - t in the place of log SNRs, which is all
    that a curriculum over time must know.

    Raises:
        ValueError: an unknown kind.
    """
    if config.kind == "learned":
        return Schedule(family=OWN_TIME, location=0.0, scale=1.0)
    schedule = _single(config, zero_terminal=config.zero_terminal)
    if config.mixed is None:
        return schedule
    family = mixture(schedule, _single(config.mixed), config.mixed.share)
    return Schedule(family=family, location=0.0, scale=1.0)


def _single(config: ScheduleConfig | MixedScheduleConfig, *, zero_terminal: bool = False) -> Schedule:
    if config.kind not in SCHEDULES:
        raise ValueError(f"diffusion.schedule.kind={config.kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    family, location, scale = SCHEDULES[config.kind]
    return Schedule(
        family=discrete(config.kind, zero_terminal=True) if zero_terminal else family,
        location=location if config.location is None else config.location,
        scale=scale if config.scale is None else config.scale,
    )
