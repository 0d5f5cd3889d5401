"""Statistics of feature vectors: mergeable float64 moments, and 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

GROUPS = 10
REPEATS = 1000  # resamplings of a bootstrap
Z_975 = 1.959963984540054
NOT_FINITE = "features that are not finite numbers cannot be scored: check the weights of the network that gave them"
BLOCK = 1 << 22  # numbers held at once by what works in blocks: 32 MB of float64


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
    """Count, mean [D] and scatter [D, D] about it, in float64; `a + b` merges, `a - b` takes a part out again.

    About the mean, since sums of squares about 0 lose the covariance of features whose mean is far from 0: 16 digits
    less twice the digits of mean / deviation (Chan, Golub & LeVeque 1983).
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features [N, D]."""
        x = features.double().cpu()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        step = other.mean - self.mean
        between = torch.outer(step, step * (self.n * other.n / max(n, 1)))  # [D, D]
        return Moments(n, self.mean + step * (other.n / max(n, 1)), between.add_(self.scatter).add_(other.scatter))

    def __sub__(self, other: Moments) -> Moments:
        n = self.n - other.n
        step = (self.mean - other.mean) * (self.n / max(n, 1))  # from the part's mean to that of the rest
        between = torch.outer(step, step * (-n * other.n / max(self.n, 1)))
        return Moments(n, other.mean + step, between.add_(self.scatter).sub_(other.scatter))

    def gaussian(self) -> Gaussian:
        """Mean and covariance (denominator n - 1, as numpy.cov).

        Raises:
            ValueError: fewer than two vectors, or one that is not finite.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        if not self.scatter.diagonal().isfinite().all():
            raise ValueError(NOT_FINITE)
        return Gaussian(self.mean, self.scatter / (self.n - 1), self.n)


def require_finite(features: Tensor) -> None:
    """Raise ValueError if a feature [N, D] is not finite; no comparison with it is true, so a share would hide it."""
    if not features.isfinite().all():
        raise ValueError(NOT_FINITE)


def group_of_rows(n: int, groups: int = GROUPS, seed: int = 0) -> Tensor:
    """A random group of equal size for each of n rows, int64 [N].

    At random, because samples come in turns of their classes, which groups of every tenth row would take apart.

    Raises:
        ValueError: fewer than two rows for a group.
    """
    if n < 2 * groups:
        raise ValueError(f"an interval over {groups} groups needs at least {2 * groups} images, got {n}")
    group = torch.empty(n, dtype=torch.int64)
    group[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] = torch.arange(n) % groups
    return group


def grouped_moments(parts: Iterable[Tensor], n: int, *, groups: int = GROUPS, seed: int = 0) -> list[Moments]:
    """Moments of equal random groups of n features, which come in parts [n_i, D]: one pass, and groups x D x D numbers.

    Raises:
        ValueError: fewer than two rows for a group, or the parts do not hold n rows.
    """
    group, seen, sums = group_of_rows(n, groups, seed), 0, None
    for part in parts:
        x = part.double().cpu()
        sums = sums or _SumsAbout(x.mean(0), groups)
        sums.add(x, group[seen : seen + len(x)])
        seen += len(x)
    if sums is None or seen != n:
        raise ValueError(f"features of {n} images were promised, got {seen}")
    return sums.moments()


class _SumsAbout:
    """Sums of rows and of their outer products about one shift near the mean, in place, by groups."""

    def __init__(self, shift: Tensor, groups: int) -> None:
        dim = len(shift)
        self.shift = shift
        self.counts = [0] * groups
        self.sums = [shift.new_zeros(dim) for _ in range(groups)]
        self.outer = [shift.new_zeros(dim, dim) for _ in range(groups)]

    def add(self, x: Tensor, group: Tensor) -> None:
        """Add rows [N, D] to their groups [N]."""
        if len(group) != len(x):
            raise ValueError("the parts hold more images than were promised")
        for index, (sums, outer) in enumerate(zip(self.sums, self.outer, strict=True)):
            rows = x[group == index] - self.shift
            self.counts[index] += len(rows)
            sums.add_(rows.sum(0))
            outer.addmm_(rows.T, rows)

    def moments(self) -> list[Moments]:
        """One for each group; the sums are used up."""
        found = zip(self.counts, self.sums, self.outer, strict=True)
        return [Moments(n, self.shift + sums / n, outer.addr_(sums, sums, alpha=-1 / n)) for n, sums, outer in found]


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """Delete-a-group jackknife: `left_out[i]` is the score without group i (Efron & Tibshirani 1993, ch. 11)."""
    groups = len(left_out)
    mean = math.fsum(left_out) / groups
    variance = (groups - 1) / groups * math.fsum((x - mean) ** 2 for x in left_out)
    reach = student(groups - 1) * math.sqrt(variance)
    return Estimate(value, (value - reach, value + reach))


def bootstrap(statistic: Callable[[Tensor], Tensor], n: int, *, repeats: int = REPEATS, seed: int = 0) -> Estimate:
    """A statistic of n images and its bootstrap interval, for what is cheap to find again under other weights.

    `statistic` turns weights [R, N] of the images, float64, each row summing to 1, into values [R]; that of a mean of
    `values` is `lambda weights: weights @ values`. Bias-corrected and accelerated (Efron 1987), the acceleration from
    groups left out; with Student's quantile for the normal's, to cover at few images too (Hesterberg 2015): of
    means and shares of 100 images or more it holds the truth 93 to 95 times in 100. A statistic that is biased at n
    images, as an entropy is, has an interval for its value on endlessly many, and its bias must be small beside that.

    Raises:
        ValueError: fewer than four images.
    """
    if n < 4:
        raise ValueError(f"a bootstrap needs at least 4 images, got {n}")
    value = float(statistic(torch.full((1, n), 1 / n, dtype=torch.float64))[0])
    drawn = torch.cat([statistic(weights) for weights in _resamplings(n, repeats, seed)]).double()  # [R]
    below = float(((drawn < value).sum() + (drawn <= value).sum()) / (2 * repeats))
    shift = float(scipy.special.ndtri(min(max(below, 1 / repeats), 1 - 1 / repeats)))
    skew = _acceleration(statistic(_without_groups(n, seed)).double())
    reach = math.sqrt(n / (n - 1)) * student(n - 1)
    shares = [float(scipy.special.ndtr(shift + z / max(0.1, 1 - skew * z))) for z in (shift - reach, shift + reach)]
    low, high = drawn.quantile(torch.tensor(shares, dtype=torch.float64)).tolist()
    return Estimate(value, (low, high))


def mean_of(values: Tensor) -> Estimate:
    """Mean of independent values [N] with its normal interval; none for one value.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("a mean needs at least 1 image, got 0")
    x = values.double()
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, None)
    reach = Z_975 * float(x.std()) / math.sqrt(len(x))
    return Estimate(mean, (mean - reach, mean + reach))


def proportion(hits: int, n: int) -> Estimate:
    """Share of hits with Wilson's score interval (Wilson 1927).

    Raises:
        ValueError: no image.
    """
    if n < 1:
        raise ValueError("a share needs at least 1 image, got 0")
    p, z = hits / n, Z_975
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, (max(0.0, min(p, centre - reach)), min(1.0, max(p, centre + reach))))


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    return float(scipy.special.stdtrit(freedom, 0.975))


def _resamplings(n: int, repeats: int, seed: int) -> Iterator[Tensor]:
    """Weights of images drawn with replacement, [R, N] float64 in blocks of bounded size."""
    random, block = torch.Generator().manual_seed(seed), max(1, BLOCK // n)
    for start in range(0, repeats, block):
        rows = min(block, repeats - start)
        cells = torch.randint(n, (rows, n), generator=random) + n * torch.arange(rows)[:, None]  # [R, N]
        yield torch.bincount(cells.flatten(), minlength=rows * n).view(rows, n).double() / n


def _without_groups(n: int, seed: int) -> Tensor:
    """Weights [G, N], each without one of G random groups."""
    groups = min(n // 2, 50)
    weights = (group_of_rows(n, groups, seed) != torch.arange(groups)[:, None]).double()
    return weights / weights.sum(1, keepdim=True)


def _acceleration(left_out: Tensor) -> float:
    """Skewness of the jackknife's influences [G], a sixth of it (Efron & Tibshirani 1993, eq. 14.15)."""
    influence = left_out.mean() - left_out
    spread = float(influence.square().sum())
    return float(influence.pow(3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
