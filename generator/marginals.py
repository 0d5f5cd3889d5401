"""Relative entropy of consecutive marginals of the noising, KL(q(x_t) || q(x_{t-1})): what a step of noise changes.

Kim et al. (2025, arXiv:2403.10348) take it for a measure of how hard the denoising of a step is. It depends on the
coordinates of the path, x_t = a x0 + s eps, since two consecutive marginals are scaled differently: a^2 + s^2 = 1 (vp,
gvp), a + s = 1 (flow), a = 1 (ve). All in float64 and in nats per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from generator.path import linear_flow, noise_to_signal, variance_preserving
from generator.schedule import MAX_LOGSNR, NUM_STEPS, Schedule

BLOCK = 2**22  # log densities in memory at a time
MOST_BY_RATIO = 2.0  # nats, above which a thousand draws hardly ever meet the large r that make up its mean

COORDINATES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "vp":   variance_preserving,
    "gvp":  variance_preserving,
    "flow": linear_flow,
    "ve":   lambda logsnr: (torch.ones_like(logsnr), noise_to_signal(logsnr)),
}  # fmt: skip


class Measured(NamedTuple):
    """A Monte-Carlo estimate and its standard error."""

    value: float
    error: float


def even_times(schedule: Schedule, num: int = NUM_STEPS) -> tuple[Tensor, Tensor]:
    """`num` even times of a schedule, rising from data to noise, and their log SNRs, falling: float64 [T], [T].

    The times are i / (T - 1) where the schedule has a least noise, which makes them DDPM's own steps there; where it
    goes on for ever they are (i + 1/2) / T. Log SNRs are clamped to the range of training.
    """
    index = torch.arange(num, dtype=torch.float64)
    bounded = bool(schedule.inverse(torch.ones(1, dtype=torch.float64)).isfinite())
    times = index / (num - 1) if bounded else (index + 0.5) / num
    return times, schedule.inverse(1 - times).clamp(-MAX_LOGSNR, MAX_LOGSNR)


def gaussian_divergence(
    noisier: Tensor, cleaner: Tensor, variances: Tensor, means: Tensor | None = None, *, path: str
) -> Tensor:
    """Closed form for Gaussian data: log SNRs of x_t [K] and of x_{t-1} [K], variances c^2 and means [D] -> nats [K].

    v = a^2 c^2 + s^2; each dimension adds (v_t / v_{t-1} - 1 - ln(v_t / v_{t-1})) / 2 and, with a mean m,
    (a_t - a_{t-1})^2 m^2 / (2 v_{t-1}). Correlated data come in the coordinates of their principal axes.
    """
    (a, s), (a_before, s_before) = (_coefficients(level[:, None], path) for level in (noisier, cleaner))  # [K, 1]
    before = a_before.square() * variances + s_before.square()  # [K, D]
    change = ((a - a_before) * (a + a_before) * variances + (s - s_before) * (s + s_before)) / before
    divergence = (change - torch.log1p(change)) / 2
    if means is not None:
        divergence = divergence + (a - a_before).square() * means.square() / (2 * before)
    return divergence.sum(1)


def mixture_divergence(
    noisier: float, cleaner: float, points: Tensor, *, path: str, draws: int, generator: torch.Generator
) -> Measured:
    """Estimate for data that are M points [M, D], q(x_t) = 1/M sum_j N(a x_j, s^2 I), at two log SNRs.

    With r = q(x_{t-1}) / q(x_t) at draws of x_t there are two unbiased estimates of E[-ln r]. One is the mean of
    r - 1 - ln r, never negative, which is precise where a step changes little; where it changes much, r is nearly
    always 0, and mean and standard error come out too small. The other takes from -ln r the same logarithm for the one
    component that x_t was drawn around, and adds its known mean: exact where components do not overlap. The one with
    the smaller standard error counts, the first up to MOST_BY_RATIO alone.
    """
    points = points.double()
    levels = torch.tensor([noisier, cleaner], dtype=torch.float64)
    (a, a_before), (s, s_before) = (values.tolist() for values in _coefficients(levels, path))
    size, dim = points.shape
    chosen = points[torch.arange(draws) * size // draws]  # [K, D]: all parts of the data alike
    eps = torch.randn(draws, dim, dtype=torch.float64, generator=generator)  # [K, D]
    x = a * chosen + s * eps
    log_ratio = _log_ratios(x, points, (a, s), (a_before, s_before))  # [K]: ln r

    shift = (x - a_before * chosen).square().sum(1) / s_before**2  # [K]
    scale = dim * torch.log(torch.tensor((s_before / s) ** 2, dtype=torch.float64))
    own = (shift - eps.square().sum(1) + scale) / 2  # of the one component, -ln r
    ratio = (s / s_before) ** 2
    own_mean = (dim * (ratio - 1) + scale + (a - a_before) ** 2 * chosen.square().sum(1) / s_before**2) / 2
    by_ratio, by_component = _mean(log_ratio.expm1() - log_ratio), _mean(own_mean - log_ratio - own)
    return by_ratio if by_ratio.value <= MOST_BY_RATIO and by_ratio.error < by_component.error else by_component


def principal(points: Tensor) -> tuple[Tensor, Tensor]:
    """Variances along the principal axes of points [M, D], and their mean in these axes: float64 [D], [D]."""
    points = points.double()
    mean = points.mean(0)
    variances, axes = torch.linalg.eigh((points - mean).T @ (points - mean) / len(points))
    return variances.clamp(min=0), mean @ axes


def _coefficients(logsnr: Tensor, path: str) -> tuple[Tensor, Tensor]:
    if path not in COORDINATES:
        raise ValueError(f"diffusion.path={path!r} is unknown; choose one of {', '.join(COORDINATES)}")
    return COORDINATES[path](logsnr.double())


def _log_ratios(x: Tensor, points: Tensor, now: tuple[float, float], before: tuple[float, float]) -> Tensor:
    """ln q(x_{t-1}) - ln q(x_t) at x [K, D], each level given by its a and s: [K]."""
    lengths, ratios = points.square().sum(1), []
    for part in x.split(max(1, BLOCK // len(points))):
        products, length = part @ points.T, part.square().sum(1, keepdim=True)  # [k, M], [k, 1]

        def log_density(a: float, s: float, products: Tensor = products, length: Tensor = length) -> Tensor:
            exponents = (length - 2 * a * products + a**2 * lengths) / (-2 * s**2)
            return exponents.logsumexp(1) - x.shape[1] * torch.log(torch.tensor(s, dtype=torch.float64))

        ratios.append(log_density(*before) - log_density(*now))
    return torch.cat(ratios)


def _mean(values: Tensor) -> Measured:
    return Measured(float(values.mean()), float(values.std() / len(values) ** 0.5))
