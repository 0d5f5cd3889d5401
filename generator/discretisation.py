"""The noises that a consistency model is trained on: how many there are at a step, which, and how often each is drawn.

A noise is s = sigma / alpha, so that x = x0 + s eps. The N noises of a step rise from sigma_min to sigma_max; pair i of
0 .. N - 2 is that of s_i and s_(i + 1), the neighbours that one sample meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.batches import StepRandom
from generator.consistency_config import ObjectiveConfig

# How many


def noise_count(config: ObjectiveConfig, step: int, steps: int) -> int:
    """N of a step, counted from 0, in a training of `steps` steps."""
    return COUNTS[config.discretisation](config, step, steps)


def _constant(config: ObjectiveConfig, step: int, steps: int) -> int:
    return config.span[0]


def _doubling(config: ObjectiveConfig, step: int, steps: int) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1)) (Song & Dhariwal, 2024).

    A training with fewer steps than stages doubles at every step and ends before s1.
    """
    least, most = config.span
    stage = max(1, math.floor(steps / (math.log2(most // least) + 1)))
    doublings = min(step // stage, most.bit_length())  # beyond it is s1 anyway
    return min(least * 2**doublings, most) + 1


def _sinusoidal(config: ObjectiveConfig, step: int, steps: int) -> int:
    """N(k) = ceil(|s0 + (s1 - s0) sin x|), x = floor(10 pi (k / K)^((rho - 1) / 4)) / 10 (Gokmen et al., 2024, code).

    It rises to s1 at 0.61 K and falls back almost to s0, as the last x is 3.1.
    """
    least, most = config.span
    x = math.floor(10 * math.pi * (step / steps) ** ((config.rho - 1) / 4)) / 10
    return math.ceil(abs(least + (most - least) * math.sin(x)))


COUNTS: dict[str, Callable[[ObjectiveConfig, int, int], int]] = {
    "constant":   _constant,
    "doubling":   _doubling,
    "sinusoidal": _sinusoidal,
}  # fmt: skip


# Which


def noises_of(config: ObjectiveConfig, count: int) -> Tensor:
    """The noises of a step that has `count` of them, rising, float64 [count].

    Gokmen et al. reuse predefined ones and do not tell which; here they are spread evenly over the largest grid.
    """
    if not config.predefined:
        return karras_noises(config, count)
    places = torch.linspace(0, config.largest - 1, count, dtype=torch.float64).round().long()
    return karras_noises(config, config.largest)[places]


def karras_noises(config: ObjectiveConfig, count: int) -> Tensor:
    """Equally spaced in s^(1 / rho) from sigma_min to sigma_max (Karras et al., 2022, equation 5), float64 [count]."""
    low, high = (sigma ** (1 / config.rho) for sigma in (config.sigma_min, config.sigma_max))
    return torch.linspace(low, high, count, dtype=torch.float64) ** config.rho


# How often


def draw_pairs(config: ObjectiveConfig, noises: Tensor, rng: StepRandom) -> Tensor:
    """The index of a pair of noises [N] for each row of this part of a batch, int64 [B]."""
    if config.noises == "lognormal":
        shares = lognormal_shares(noises, mean=config.mean, deviation=config.deviation)
        return lognormal_pairs(shares, rng.uniform())
    # Places are shuffled: which sample stands where in a batch must not decide its noise.
    device = rng.generator.device
    places = torch.randperm(rng.batch_size, generator=rng.generator, device=device)[rng.rows]  # [B]
    ranks = places / max(rng.batch_size - 1, 1)
    return polynomial_pairs(ranks, rng.normal(), count=len(noises), curve=config.curve)


def lognormal_shares(noises: Tensor, *, mean: float, deviation: float) -> Tensor:
    """Probabilities [N - 1] of the pairs: of a normal ln s between their noises (Song & Dhariwal, 2024)."""
    masses = torch.erf((noises.log() - mean) / (math.sqrt(2) * deviation)).diff()
    return masses / masses.sum()


def lognormal_pairs(shares: Tensor, u: Tensor) -> Tensor:
    """Pairs int64 [B] by uniform draws u [B] in [0, 1): the inverse of the cumulative shares [N - 1]."""
    edges = shares.cumsum(0).to(u.device)
    return torch.searchsorted(edges, u.double(), right=True).clamp(max=len(shares) - 1)


def polynomial_pairs(ranks: Tensor, normal: Tensor, *, count: int, curve: float) -> Tensor:
    """Pairs int64 [B] by places in the batch, ranks [B] in [0, 1], and normal draws [B] (Gokmen et al., 2024, code).

    Place r stands at r^curve (N - 2), from which a normal draw of mean N^(1/5) moves it, unless past the last pair but
    one: so the batch covers the pairs evenly, more of them where there is little noise. One that is much smaller than
    N leaves pairs out, as the draws move places by few pairs only.
    """
    base = ranks.double() ** curve * (count - 2)
    moved = base + normal.double() + count**0.2
    inside = (moved >= 0) & (moved < count - 2)
    return torch.where(inside, moved, base).long()
