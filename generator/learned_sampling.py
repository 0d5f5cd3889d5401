"""Sampling where every number of the latents has a noise level of its own: DDIM's step, number by number.

Between two times the posterior of a number follows from its own two levels alone, whatever those of the others. The
levels are gamma at the times themselves. CVDM's code multiplies alpha_t = 1 - beta(t) / T instead, whose product is
gamma up to O(1 / T) if T steps are taken, and if gamma' = -beta gamma holds exactly; with gamma itself the levels are
those of training at any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from generator.path import variance_preserving
from generator.solvers import Denoise, Noise


def solve_map(
    denoise: Denoise, noise: Noise, logsnr: Callable[[float], Tensor], *, num_steps: int, eta: float = 1.0
) -> Tensor:
    """Clean latents float32 [B, C, h, w] from noise, over equal steps of time from 1 to 0.

    Args:
        denoise: estimate of x0 from z = alpha x0 + sigma eps and a map of log SNRs.
        noise: its first draw is the z at time 1; each step but the last draws once more if eta is not 0.
        logsnr: the map [B, C, h, w] of a time in [0, 1]; falls with time.
        eta: share of fresh noise; 1 is ancestral sampling (Ho et al., 2020, equation 7, the smaller variance).
    """
    z, here = noise(), logsnr(1.0)
    for step in range(num_steps - 1, 0, -1):
        there = logsnr(step / num_steps)
        z = _renoised(z, denoise(z, here), here, there, eta=eta, noise=noise)
        here = there
    return denoise(z, here)


def _renoised(z: Tensor, x0: Tensor, here: Tensor, there: Tensor, *, eta: float, noise: Noise) -> Tensor:
    """z at the next levels if x0 is right: alpha' x0 + sigma' (sqrt(1 - w^2) eps + w n), w as in `solvers`."""
    (alpha, sigma), (next_alpha, next_sigma) = variance_preserving(here), variance_preserving(there)
    w = eta * (-torch.expm1(here - there)).clamp(min=0).sqrt()
    moved = next_alpha * x0 + (1 - w.square()).sqrt() * (next_sigma / sigma) * (z - alpha * x0)
    return moved + w * next_sigma * noise() if eta else moved
