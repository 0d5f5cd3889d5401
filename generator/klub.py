"""How far sampling in steps strays from its SDE at most: the bound of Align Your Steps (Sabour et al., 2024).

A solver stops at t_n > ... > t_0, where t = sigma / alpha is the noise of x_t = x0 + t eps, and holds the estimate D of
x0 from each stop to the next. By Girsanov's theorem what it samples then has a Kullback-Leibler divergence (upper
bound: KLUB) from what the SDE would sample of at most

    sum_i  int_{t_{i-1}}^{t_i}  t^-3  E |D(x_t, t) - D(x_{t_i}, t_i)|^2  dt    nats    (equation 10),

one term for each step. For Gaussian data of deviation c in d dimensions the expectation is c^4 d gap(t), with
gap(t) = 1 / (t^2 + c^2) - 1 / (t_i^2 + c^2) (lemma 3.3; no square). So t is drawn in proportion to gap(t) / t^3, and
|D - D'|^2 / gap(t) averaged, times the normaliser: the paper's algorithm 2 leaves it out, but it depends on the stops
that are compared, and without it all stops would be alike for Gaussian data.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from generator.path import beside, noise_to_signal, noised
from generator.solvers import Denoise

Noise = TypeVar("Noise", float, np.ndarray)
GRID = 2048  # noise levels between which the distribution function is interpolated


def gap(noise: np.ndarray, start: float, sigma_data: float) -> np.ndarray:
    """1 / (t^2 + c^2) - 1 / (t_i^2 + c^2) at noise levels t up to `start`, t_i."""
    squares, variance = noise**2, sigma_data**2
    return (start - noise) * (start + noise) / ((squares + variance) * (start**2 + variance))


def normaliser(end: float, start: Noise, sigma_data: float) -> Noise:
    """int gap(t) / t^3 dt over a step from noise `start` to `end` <= `start`; times c^4 d the KLUB of Gaussian data."""
    a, b, c = end**2, start**2, sigma_data**2
    difference = (start - end) * (start + end)
    return (difference / (a * c) + (b + c) / c**2 * np.log1p(-c * difference / ((a + c) * b))) / (2 * (b + c))


def draw_noise(u: Tensor, end: float, start: float, sigma_data: float) -> Tensor:
    """Noise levels t between `end` and `start`, float64 [B], of a density in proportion to gap(t) / t^3; u in [0, 1).

    By the inverse of the distribution function, which is known in closed form, on a grid of log t.
    """
    logs = np.linspace(math.log(end), math.log(start), GRID)
    shares = np.maximum.accumulate(_share_below(np.exp(logs), end, start, sigma_data))  # rounding must not make it fall
    return torch.from_numpy(np.exp(np.interp(u.double().numpy(), shares, logs))).clamp(end, start)


def anchors(denoise: Denoise, x0: Tensor, eps: Tensor, start: float) -> Tensor:
    """D(x_{t_i}, t_i) of latents and noise [B, C, h, w] at the stop with log SNR `start`: [B, C, h, w]."""
    logsnr = x0.new_full((len(x0),), start)
    return denoise(noised(x0, eps, logsnr), logsnr)


def step_bounds(
    denoise: Denoise,
    anchor: Tensor,
    draws: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    start: float,
    end: float,
    sigma_data: float,
) -> Tensor:
    """Unbiased estimates of the KLUB of the step from log SNR `start` to `end` > `start`, nats, float64 [B].

    Args:
        denoise: estimate of x0 from z = alpha x0 + sigma eps; rows are at different levels.
        anchor: `anchors` of the same latents and noise at `start`.
        draws: latents x0, noise eps of the stop and fresh noise, each [B, C, h, w], and uniform numbers [B], float64.
        sigma_data: c, the deviation of the latents; another one than theirs costs precision alone.

    The noise between is that of the stop seen backwards: given x0 and t_i eps, x_t - x0 is normal with mean
    (t / t_i)^2 t_i eps and variance t^2 (1 - t^2 / t_i^2), so that x_{t_i} = x_t + sqrt(t_i^2 - t^2) eps' as asked.
    """
    x0, eps, fresh, u = draws
    high, low = (float(noise_to_signal(torch.tensor(logsnr, dtype=torch.float64))) for logsnr in (start, end))
    noise = draw_noise(u, low, high, sigma_data)  # [B]
    kept = (noise / high).to(x0)
    between = beside(kept, x0) * eps + beside((1 - kept.square()).clamp(min=0).sqrt(), x0) * fresh
    logsnr = (-2 * noise.log()).to(x0)
    moved = (denoise(noised(x0, between, logsnr), logsnr) - anchor).double().square().flatten(1).sum(1).cpu()
    return normaliser(low, high, sigma_data) * moved / torch.from_numpy(gap(noise.numpy(), high, sigma_data))


def _share_below(noise: np.ndarray, end: float, start: float, sigma_data: float) -> np.ndarray:
    """The distribution function: the share of `normaliser` that lies between `end` and each noise level."""
    # The gap to `start` is that to the level, and the level's own to `start`, with which t^-3 alone is integrated.
    rest = gap(noise, start, sigma_data) * (noise - end) * (noise + end) / (2 * (noise * end) ** 2)
    return (normaliser(end, noise, sigma_data) + rest) / normaliser(end, start, sigma_data)
