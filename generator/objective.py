"""What the network predicts, and how much each noise level counts.

Every target is a combination c_x x0 + c_eps eps whose coefficients depend on the noise level alone. One formula turns
any output back into x0: with z = alpha x0 + sigma eps, variance preserving,

    x0 = (c_eps z - sigma output) / (c_eps alpha - sigma c_x).

So a squared error of the output times gain = (sigma / (c_eps alpha - sigma c_x))^2 is one of x0. Weights are written
over the error of x0 and multiplied by the gain: each means the same whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from generator.path import PATHS, Path, beside, variance_preserving
from generator.schedule import MAX_LOGSNR

# (alpha, sigma, path, sigma_data) -> (c_x, c_eps); alpha and sigma are those of `variance_preserving`.
Coefficients = Callable[[Tensor, Tensor, Path, float], tuple[Tensor, Tensor]]
# (SNR [B], gamma, sigma_data) -> weight [B] of the squared error of x0.
Weight = Callable[[Tensor, float, float], Tensor]


def edm_output(alpha: Tensor, sigma: Tensor, path: Path, sigma_data: float) -> tuple[Tensor, Tensor]:
    """F = (x0 - c_skip x_t) / c_out with x_t = x0 + s eps (Karras et al., 2022, equation 8); -v if sigma_data is 1.

    There c_x = s / (sigma_data r), c_eps = -sigma_data / r with r^2 = s^2 + sigma_data^2; here multiplied by alpha.
    """
    r = (sigma.square() + (sigma_data * alpha).square()).sqrt()
    return sigma / (sigma_data * r), -sigma_data * alpha / r


TARGETS: dict[str, Coefficients] = {
    "eps":      lambda alpha, sigma, path, sigma_data: (torch.zeros_like(alpha), torch.ones_like(sigma)),  # Ho, 2020
    "x0":       lambda alpha, sigma, path, sigma_data: (torch.ones_like(alpha), torch.zeros_like(sigma)),
    "v":        lambda alpha, sigma, path, sigma_data: (-sigma, alpha),  # Salimans & Ho, 2022
    "velocity": lambda alpha, sigma, path, sigma_data: path.velocity(alpha, sigma),
    "F":        edm_output,
}  # fmt: skip

# None weighs the squared error of the output itself by 1; `learned` divides that by what the training fits to it.
WEIGHTS: dict[str, Weight | None] = {
    "plain":        None,
    "min_snr":      lambda snr, gamma, sigma_data: snr.clamp(max=gamma),      # Hang et al., 2023
    "soft_min_snr": lambda snr, gamma, sigma_data: snr / (1 + snr / gamma),   # S g / (S + g): Crowson et al., 2024
    "p2":           lambda snr, gamma, sigma_data: snr / (1 + snr) ** gamma,  # (1 + S)^-g of eps: Choi et al., 2022
    "edm":          lambda snr, gamma, sigma_data: snr + sigma_data**-2,      # (s^2 + sd^2) / (s sd)^2: Karras, 2022
    "learned":      None,
}  # fmt: skip

DEFAULT_GAMMA = {"min_snr": 5.0, "soft_min_snr": 5.0, "p2": 1.0}


class Objective:
    """One choice of path, target and weight, as the section `diffusion` of an experiment has them.

    Latents are [B, ...] and log SNRs [B]; arithmetic is in their own precision. A log SNR of -inf is allowed, but
    there eps, and velocity on the path ve, say nothing of x0.

    Raises:
        ValueError: a path, target or weight that is not in its table.
    """

    rest = 0.0
    """Noise s = sigma / alpha that an estimate of x0 still carries."""

    def __init__(
        self,
        *,
        path: str = "vp",
        target: str = "v",
        weight: str = "plain",
        weight_gamma: float | None = None,
        sigma_data: float = 1.0,
    ) -> None:
        for key, name, table in (("path", path, PATHS), ("target", target, TARGETS), ("weight", weight, WEIGHTS)):
            if name not in table:
                raise ValueError(f"diffusion.{key}={name!r} is unknown; choose one of {', '.join(table)}")
        self.path, self.target, self.sigma_data = PATHS[path], TARGETS[target], sigma_data
        self.x0_weight = WEIGHTS[weight]
        self.gamma = DEFAULT_GAMMA.get(weight, 1.0) if weight_gamma is None else weight_gamma

    @classmethod
    def from_config(cls, mapping: dict[str, Any]) -> Objective:
        """That of a model's card or a section as a dict; keys that it lacks have their defaults, others are left."""
        keys = ("path", "target", "weight", "weight_gamma", "sigma_data")
        return cls(**{key: mapping[key] for key in keys if key in mapping})

    def network_input(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """What the network sees of z."""
        return beside(self.path.input_scale(*variance_preserving(logsnr), self.sigma_data), z) * z

    def target_of(self, x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
        """What the network should predict."""
        c_x, c_eps = self._coefficients(*variance_preserving(logsnr))
        return beside(c_x, x0) * x0 + beside(c_eps, eps) * eps

    def to_x0(self, output: Tensor, z: Tensor, logsnr: Tensor) -> Tensor:
        """The clean latents that a prediction implies."""
        alpha, sigma = variance_preserving(logsnr)
        sigma = sigma.clamp(min=1e-30)  # of target x0 it cancels, though float32 may have none left
        c_x, c_eps = self._coefficients(alpha, sigma)
        return (beside(c_eps, z) * z - beside(sigma, z) * output) / beside(c_eps * alpha - sigma * c_x, z)

    def gain(self, logsnr: Tensor) -> Tensor:
        """Squared error of x0 over squared error of the output: 1 / SNR for eps, sigma^2 for v, 1 for x0."""
        alpha, sigma = variance_preserving(logsnr)
        c_x, c_eps = self._coefficients(alpha, sigma)
        return (sigma / (c_eps * alpha - sigma * c_x)).square()

    def weight(self, logsnr: Tensor) -> Tensor:
        """Factor [B] of the squared error of the output; beyond the range of training it is that of its end.

        So it is finite without any signal: Min-SNR then hardly weighs v, where Hang et al.'s code makes it 1.
        """
        if self.x0_weight is None:
            return torch.ones_like(logsnr)
        logsnr = logsnr.clamp(-MAX_LOGSNR, MAX_LOGSNR)
        return self.x0_weight(logsnr.exp(), self.gamma, self.sigma_data) * self.gain(logsnr)

    def _coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self.target(alpha, sigma, self.path, self.sigma_data)
