"""Paths from data to noise, each noise level named by lambda = log SNR = ln(alpha^2 / sigma^2).

+inf is clean data, -inf is pure noise. Between network and solver all latents are variance preserving,

    z = alpha x0 + sigma eps,    alpha^2 + sigma^2 = 1,

which is finite at both ends. A path decides only at what scale the network sees z, and what its own derivative is.
Times are only names of levels: t = 0 is data, t = 1 is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Path:
    """What a path adds to its log SNR; both functions begin with the alpha and sigma of `variance_preserving`."""

    input_scale: Callable[[Tensor, Tensor, float], Tensor]
    """(alpha, sigma, sigma_data) -> what the network sees, over z."""
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(alpha, sigma) -> c_x, c_eps: the derivative of the path by its own time is c_x x0 + c_eps eps."""


def variance_preserving(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha^2 + sigma^2 = 1 (Kingma et al., 2021, section 3.1): log SNR of any shape -> alpha, sigma of that shape."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def linear_flow(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha + sigma = 1: the line x_t = (1 - t) x0 + t eps (Lipman et al., 2023) with t = sigmoid(-lambda / 2)."""
    return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)


def noised(x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """z = alpha x0 + sigma eps: data and noise [B, ...], log SNR [B] or a map [B, ...] -> [B, ...]."""
    alpha, sigma = (beside(value, x0) for value in variance_preserving(logsnr))
    return alpha * x0 + sigma * eps


def beside(values: Tensor, x: Tensor) -> Tensor:
    """One number for each row of x [B, ...], shaped to broadcast against it: [B] -> [B, 1, ...].

    A map [B, ...] of numbers has its shape already.
    """
    return values if values.ndim == x.ndim else values.reshape(-1, *(1,) * (x.ndim - 1))


# vp:   x_t = z. The time is an angle, alpha = cos, sigma = sin; its velocity is v (Salimans & Ho, 2022).
# gvp:  the same with time t in [0, 1], angle pi t / 2 (Albergo & Vanden-Eijnden, 2023; SiT counts t the other way).
# flow: x_t = (1 - t) x0 + t eps = z / (alpha + sigma).
# ve:   x_t = x0 + s eps = z / alpha, with s as time; seen as c_in x_t, c_in^-2 = s^2 + sigma_data^2 (Karras et al.,
#       2022), here multiplied out because s has no end.
PATHS: dict[str, Path] = {
    "vp": Path(
        input_scale=lambda alpha, sigma, sigma_data: torch.ones_like(alpha),
        velocity=lambda alpha, sigma: (-sigma, alpha),
    ),
    "flow": Path(
        input_scale=lambda alpha, sigma, sigma_data: 1 / (alpha + sigma),
        velocity=lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(sigma)),
    ),
    "gvp": Path(
        input_scale=lambda alpha, sigma, sigma_data: torch.ones_like(alpha),
        velocity=lambda alpha, sigma: (-sigma * (math.pi / 2), alpha * (math.pi / 2)),
    ),
    "ve": Path(
        input_scale=lambda alpha, sigma, sigma_data: (sigma.square() + (sigma_data * alpha).square()).rsqrt(),
        velocity=lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(sigma)),
    ),
}


def noise_to_signal(logsnr: Tensor) -> Tensor:
    """s = sigma / alpha, the same on every path; x_t / alpha = x0 + s eps."""
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
