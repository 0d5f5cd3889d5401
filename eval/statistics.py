"""Statistics of feature vectors: mergeable float64 moments, their file, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GROUPS = 10
T_975 = 2.2622  # 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom
Z_975 = 1.95996


class Estimate(NamedTuple):
    """A number and its 95 % interval, if one could be had."""

    value: float
    interval: tuple[float, float] | None


class Gaussian(NamedTuple):
    """Mean [D] and unbiased covariance [D, D], float64, of n vectors (n = 0: the file did not say)."""

    mu: Tensor
    sigma: Tensor
    n: int


@dataclass(frozen=True)
class Moments:
    """Count, sum [D] and sum of outer products [D, D] in float64; `a + b` merges, `a - b` takes a part out again."""

    n: int
    sum: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features [N, D]."""
        x = features.double().cpu()
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.sum - other.sum, self.outer - other.outer)

    def gaussian(self) -> Gaussian:
        """Mean and covariance (denominator n - 1, as numpy.cov).

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        mu = self.sum / self.n
        return Gaussian(mu, (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1), self.n)


def save_gaussian(path: Path, gaussian: Gaussian) -> None:
    """Write `mu`, `sigma`, `n` as .npz: the layout that pytorch-fid and ADM's evaluator read."""
    np.savez(path, mu=gaussian.mu.numpy(), sigma=gaussian.sigma.numpy(), n=gaussian.n)


def load_gaussian(path: Path) -> Gaussian:
    """Read a reference file of this suite, pytorch-fid or ADM.

    Raises:
        ValueError: no such file, or one without `mu` and `sigma`.
    """
    if not Path(path).is_file():
        raise ValueError(f"reference statistics {path}: no such file; give an .npz with mu and sigma")
    with np.load(path, allow_pickle=False) as stored:
        if not {"mu", "sigma"} <= set(stored.files):
            raise ValueError(f"reference statistics {path}: has {sorted(stored.files)}, needs mu and sigma")
        n = int(stored["n"]) if "n" in stored.files else 0
        mu, sigma = (torch.from_numpy(stored[key].astype(np.float64)) for key in ("mu", "sigma"))
    return Gaussian(mu, sigma, n)


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """Delete-a-group jackknife: `left_out[i]` is the score without group i (Efron & Tibshirani 1993, ch. 11)."""
    assert len(left_out) == GROUPS
    mean = sum(left_out) / GROUPS
    variance = (GROUPS - 1) / GROUPS * sum((x - mean) ** 2 for x in left_out)
    reach = T_975 * math.sqrt(variance)
    return Estimate(value, (value - reach, value + reach))


def mean_of(values: Tensor) -> Estimate:
    """Mean of independent values [N] with its normal interval."""
    x = values.double()
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, None)
    reach = Z_975 * float(x.std()) / math.sqrt(len(x))
    return Estimate(mean, (mean - reach, mean + reach))


def proportion(hits: int, n: int) -> Estimate:
    """Share of hits with Wilson's score interval (Wilson 1927)."""
    if n < 1:
        raise ValueError("a share needs at least 1 image, got 0")
    p, z = hits / n, Z_975
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, (max(0.0, centre - reach), min(1.0, centre + reach)))
