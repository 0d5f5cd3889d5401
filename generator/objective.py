"""What the network predicts, and how much each noise level counts.

Every target is a combination c_x x + c_eps eps whose coefficients depend on the noise level alone. One formula then
turns any output back into x0: with x_t = alpha x + sigma eps,

    x0 = (c_eps x_t - sigma output) / (c_eps alpha - sigma c_x).

alpha and sigma must broadcast against the latents: [B, 1, 1, 1] for [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (alpha, sigma) -> (c_x, c_eps)
Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# (log SNR [B], gain [B]) -> weight [B] of the squared error in target space; gain turns it into a squared error of x0.
Weight = Callable[[Tensor, Tensor], Tensor]

TARGETS: dict[str, Coefficients] = {
    "eps":      lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(sigma)),   # Ho et al., 2020
    "x0":       lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(sigma)),
    "v":        lambda alpha, sigma: (-sigma, alpha),                                     # Salimans & Ho, 2022
    "velocity": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(sigma)),   # eps - x: Lipman et al., 2023
}  # fmt: skip

WEIGHTS: dict[str, Weight] = {
    "plain": lambda logsnr, gain: torch.ones_like(logsnr),
}


def target_of(kind: str, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should predict: data x and noise eps [B, C, h, w] -> [B, C, h, w]."""
    c_x, c_eps = TARGETS[kind](alpha, sigma)
    return c_x * x + c_eps * eps


def output_to_x0(kind: str, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a prediction implies: output and x_t [B, C, h, w] -> x0 [B, C, h, w]."""
    c_x, c_eps = TARGETS[kind](alpha, sigma)
    return (c_eps * x_t - sigma * output) / (c_eps * alpha - sigma * c_x)


def x0_to_eps(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a clean estimate implies: x0 and x_t [B, C, h, w] -> eps [B, C, h, w]."""
    return (x_t - alpha * x0) / sigma


def x0_gain(kind: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Squared error of x0 over squared error of the output: 1 / SNR for eps, sigma^2 for v, 1 for x0."""
    c_x, c_eps = TARGETS[kind](alpha, sigma)
    return (sigma / (c_eps * alpha - sigma * c_x)).square()
