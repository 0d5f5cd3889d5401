"""Averages of any width from snapshots of a few: post-hoc EMA (Karras et al., 2024, arXiv:2312.02696, section 3.2).

A power-function average gives update tau of t the weight p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). The wanted
profile is approximated by a combination of the stored ones, in least squares; the same combination of the stored
weights is then the wanted average, as far as the profile is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.ema import power_exponent

Profile = tuple[int, float]  # number of updates t, width sigma_rel


def reconstruct(stored: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """Coefficients of the stored averages that come nearest to the wanted one, and how near.

    They sum to 1, so that weights which did not change in training come out as they were. A profile that is stored is
    taken as it is. Profiles that are stored must differ.

    Returns:
        float64 [N], and the norm of the rest of the profile over that of the wanted one.
    """
    if wanted in stored:
        return torch.tensor([float(each == wanted) for each in stored], dtype=torch.float64), 0.0
    among, across, own = (correlation(a, b) for a, b in ((stored, stored), (stored, [wanted]), ([wanted], [wanted])))
    norms = among.diagonal().sqrt()  # [N]
    gram, right = among / norms[:, None] / norms, across[:, 0] / norms  # of profiles of norm 1
    free, slope = torch.linalg.solve(gram, torch.stack([right, 1 / norms], dim=1)).unbind(1)
    lagrange = (1 - (free / norms).sum()) / (slope / norms).sum()
    scaled = free + lagrange * slope  # [N], for profiles of norm 1
    rest = own[0, 0] - 2 * scaled @ right + scaled @ gram @ scaled
    return scaled / norms, float((rest / own[0, 0]).clamp(min=0).sqrt())


def correlation(a: Sequence[Profile], b: Sequence[Profile]) -> Tensor:
    """Inner products of power-function profiles over time, float64 [A, B].

    The integral of p_a p_b is (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) (early / late)^gamma / late, where
    gamma belongs to the later of the two.
    """
    times = [torch.tensor([t for t, _ in each], dtype=torch.float64) for each in (a, b)]
    gammas = [torch.tensor([power_exponent(width) for _, width in each], dtype=torch.float64) for each in (a, b)]
    t_a, gamma_a, t_b, gamma_b = times[0][:, None], gammas[0][:, None], times[1], gammas[1]
    early, late = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)  # [A, B]
    gamma = torch.where(t_a >= t_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** gamma / late


def combine(files: Sequence[Path], coefficients: Tensor) -> dict[str, Tensor]:
    """The sum of coefficient times weights over safetensors files of one network, added in float64, tensor by tensor.

    Tensors of whole numbers are those of the last file.
    """
    with ExitStack() as stack:
        stored = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        return {name: _sum((each.get_tensor(name) for each in stored), coefficients) for name in stored[-1].keys()}


def _sum(values: Iterable[Tensor], coefficients: Tensor) -> Tensor:
    """One value at a time, as there may be hundreds of large ones."""
    total = torch.zeros((), dtype=torch.float64)
    for value, coefficient in zip(values, coefficients.tolist(), strict=True):
        total = torch.add(total, value.double(), alpha=coefficient)
    return total.to(value.dtype) if value.is_floating_point() else value
