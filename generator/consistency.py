"""Consistency models: one network call from any noise to the end of its trajectory (Song et al., 2023).

f(x, s) = c_skip x + c_out F(c_in x, lambda) with x = x0 + s eps is x itself at sigma_min, and is trained to agree with
itself at neighbouring noises. In the variance-preserving z of the solvers x = z / alpha, so that f stands where the x0
of a denoiser does; its only solver is `consistency`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from generator.consistency_config import ObjectiveConfig
from generator.objective import Objective
from generator.path import beside, variance_preserving


class ConsistencyObjective(Objective):
    """The parametrisation of Song & Dhariwal (2024), which is exact at sigma_min.

    With e = s - sigma_min and d = sigma_data: c_skip = d^2 / (e^2 + d^2), c_out = d e / sqrt(d^2 + s^2), c_in =
    1 / sqrt(s^2 + d^2), which is the input of the path ve. Levels beyond the range count as its ends: what is noisier
    as sigma_max, and what is less noisy is returned.
    """

    def __init__(self, config: ObjectiveConfig, *, sigma_data: float = 1.0) -> None:
        super().__init__(path="ve", sigma_data=sigma_data)
        self.rest = config.sigma_min
        self.lowest, self.highest = config.levels

    def to_x0(self, output: Tensor, z: Tensor, logsnr: Tensor) -> Tensor:
        """f, of the network's output F."""
        skip, out = self._scales(logsnr)
        return beside(skip, z) * self._signal(z, logsnr) + beside(out, z) * output

    def target_of(self, x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
        """The F for which f is x0; infinite at sigma_min."""
        skip, out = self._scales(logsnr)
        x = x0 + beside(torch.exp(-logsnr / 2), x0) * eps
        return (x0 - beside(skip, x) * x) / beside(out, x)

    def gain(self, logsnr: Tensor) -> Tensor:
        return self._scales(logsnr)[1].square()

    def _signal(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """x = z / alpha."""
        alpha, _ = variance_preserving(logsnr.clamp(min=self.lowest))
        return z / beside(alpha, z)

    def _scales(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out [B]; e is written so that it is 0 at sigma_min in any precision."""
        excess = self.rest * torch.expm1((self.highest - logsnr.clamp(self.lowest, self.highest)) / 2)
        s, d = self.rest + excess, self.sigma_data
        return d**2 / (excess.square() + d**2), d * excess * (d**2 + s.square()).rsqrt()


def objective_config(mapping: Mapping[str, Any]) -> ObjectiveConfig:
    """The section `objective` of a model's card or of a section `diffusion`; older ones have none."""
    return ObjectiveConfig(**mapping.get("objective", {}))


def build_objective(mapping: dict[str, Any]) -> Objective:
    """That of a model's card or of a section `diffusion` as a dict."""
    config = objective_config(mapping)
    if config.kind == "consistency":
        return ConsistencyObjective(config, sigma_data=mapping.get("sigma_data", 1.0))
    return Objective.from_config(mapping)


def pseudo_huber(x: Tensor, y: Tensor, *, scale: float, form: str) -> Tensor:
    """Distances [B] of latents [B, ...]: sqrt(|x - y|^2 + c^2) - c, c = scale sqrt(d) of d numbers each.

    `vector` takes the norm of the whole (Song & Dhariwal, 2024); `element` takes each number by itself,
    with the same c, and then their mean. Written without the difference, which would lose small distances.
    """
    gap = (x - y).flatten(1)  # [B, d]
    c = scale * math.sqrt(gap.shape[1])
    square = gap.square() if form == "element" else gap.square().sum(1, keepdim=True)  # [B, d] or [B, 1]
    return (square / ((square + c**2).sqrt() + c)).mean(1)
