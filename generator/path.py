"""Paths from data to noise, x_t = alpha x + sigma eps, each a function of lambda = log SNR = ln(alpha^2 / sigma^2).

The diffusion half speaks of noise levels in lambda alone: +inf is clean data, -inf is pure noise. Times are only
names of levels: t = 0 is data, t = 1 is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Path = Callable[[Tensor], tuple[Tensor, Tensor]]


def variance_preserving(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha^2 + sigma^2 = 1 (Kingma et al., 2021, section 3.1): log SNR of any shape -> alpha, sigma of that shape."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def linear_flow(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha + sigma = 1: the line x_t = (1 - t) x + t eps (Lipman et al., 2023) with t = sigmoid(-lambda / 2)."""
    return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)


PATHS: dict[str, Path] = {
    "vp":   variance_preserving,
    "flow": linear_flow,
}  # fmt: skip


def noise_to_signal(logsnr: Tensor) -> Tensor:
    """s = sigma / alpha, the same on every path; x_t / alpha = x + s eps."""
    return torch.exp(-logsnr / 2)


def flow_time(logsnr: Tensor) -> Tensor:
    """Time in (0, 1) at which the linear flow has this logSNR: t = sigma there."""
    return torch.sigmoid(-logsnr / 2)


def flow_logsnr(time: Tensor) -> Tensor:
    """Inverse of `flow_time`: 2 ln((1 - t) / t)."""
    return -2 * torch.logit(time)


def cosine_time(logsnr: Tensor) -> Tensor:
    """Time in (0, 1) at which the cosine schedule has this logSNR: (2 / pi) arctan(e^(-lambda / 2))."""
    return torch.atan(noise_to_signal(logsnr)) * (2 / math.pi)


def cosine_logsnr(time: Tensor) -> Tensor:
    """Inverse of `cosine_time`: 2 ln cot(pi t / 2) (Nichol & Dhariwal, 2021, without their offset)."""
    return -2 * torch.log(torch.tan(time * (math.pi / 2)))
