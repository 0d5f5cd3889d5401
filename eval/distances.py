"""Distances between two sets of feature vectors, and the Inception Score: pure, in float64.

Features are [N, D] in any float type. Intervals are 95 % ones; what they hold fixed is said in each function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from eval.statistics import (
    BLOCK,
    GROUPS,
    NOT_FINITE,
    Estimate,
    Gaussian,
    Moments,
    group_of_rows,
    jackknife,
    require_finite,
    student,
)

Root = Literal["nuclear", "eigenvalues"]
PRECISION = torch.finfo(torch.float64).eps


def frechet(a: Gaussian, b: Gaussian, *, root: Root = "nuclear") -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""
    return frechet_to(b, root=root)(a)


def frechet_to(reference: Gaussian, *, root: Root = "nuclear") -> Callable[[Gaussian], float]:
    """`frechet` to a fixed reference B, whose matrix root is taken once.

    Tr (A B)^1/2 is taken as the nuclear norm of A^1/2 B^1/2, which stays exact and real when a covariance is singular;
    or with `root="eigenvalues"` as the sum of the real parts of the roots of the eigenvalues of A B, as torch-fidelity
    does. The two agree to 1e-10 or better where there are more images than dimensions. Where there are fewer, rounding
    of the eigenvalues 0 adds up, and the second is too small by 3e-8 to 1e-6 of the traces: below 0 for equal sets.

    Raises:
        ValueError: no such root; and the result: the two have different dimensions.
    """
    if root not in get_args(Root):
        raise ValueError(f"root of a Frechet distance: {root!r}, choose one of {', '.join(get_args(Root))}")
    half = _half(reference.sigma) if root == "nuclear" else None

    def distance(other: Gaussian) -> float:
        if other.mu.shape != reference.mu.shape:
            sizes = f"{len(other.mu)} and {len(reference.mu)}"
            raise ValueError(f"Frechet distance between {sizes} dimensions: not the same features")
        apart = (other.mu - reference.mu).square().sum() + other.sigma.trace() + reference.sigma.trace()
        if half is None:
            return float(apart) - 2 * _eigenvalue_overlap(other.sigma, reference.sigma)
        return max(0.0, float(apart) - 2 * _overlap(other, half))

    return distance


def frechet_distance(groups: Sequence[Moments], reference: Gaussian, *, root: Root = "nuclear") -> Estimate:
    """Frechet distance of generated images, as moments of random groups of them (`grouped_moments`), to a reference.

    The interval is over the draw of the generated images at this number of them; the reference is held fixed. It is
    wide, and holds the expectation 98 times in 100, where nothing but the number of images is behind the distance.
    Its reach is always that of the nuclear form, which is many times quicker.
    """
    distance = frechet_to(reference)
    whole = sum(groups[1:], groups[0])
    left_out = [distance((whole - part).gaussian()) for part in groups]
    found = (distance if root == "nuclear" else frechet_to(reference, root=root))(whole.gaussian())
    value, interval = jackknife(found, left_out)
    assert interval is not None
    return Estimate(value, (max(0.0, interval[0]), interval[1]))


def kernel_distance(generated: Tensor, real: Tensor) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018); on Inception features this is KID.

    Over all pairs, not the mean over random subsets: same expectation, less variance. The interval is over both draws.

    Raises:
        ValueError: fewer than twenty images on a side, or features that are not finite.
    """
    x, y = (_in_groups(features) for features in (generated, real))
    within_x, within_y, between = _sums_within(x), _sums_within(y), _sums_between(x, y)

    def mmd(keep: Tensor) -> float:
        n, m = (sum(len(group) for group, kept in zip(side, keep, strict=True) if kept) for side in (x, y))
        xx, yy, xy = (float(sums[keep][:, keep].sum()) for sums in (within_x, within_y, between))
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    left_out = [mmd(torch.arange(GROUPS) != group) for group in range(GROUPS)]
    return jackknife(mmd(torch.ones(GROUPS, dtype=torch.bool)), left_out)


def kernel_distance_subsets(
    generated: Tensor, real: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Estimate:
    """KID as torch-fidelity takes it: the mean of `kernel_distance` over random subsets, drawn as it draws them.

    Without an interval: the subsets overlap, so that their spread does not tell how far the mean may be off.

    Raises:
        ValueError: a set smaller than the subsets, or features that are not finite.
    """
    if min(len(generated), len(real)) < size:
        sizes = f"{len(generated)} and {len(real)}"
        raise ValueError(f"KID over subsets of {size} needs so many images on each side, got {sizes}; take all pairs")
    require_finite(generated)
    require_finite(real)
    random = np.random.RandomState(seed)
    draw = lambda rows: rows[torch.from_numpy(random.choice(len(rows), size, replace=False))].double()
    pairs, values = size * (size - 1), []
    for _ in range(subsets):
        x, y = [draw(generated)], [draw(real)]  # in this order: the seed's draws are shared
        within, between = float(_sums_within(x) + _sums_within(y)), float(_sums_between(x, y))
        values.append(within / pairs - 2 * between / size**2)
    return Estimate(math.fsum(values) / subsets, None)


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 2020) -> Estimate:
    """Mean over shuffled splits of exp E[KL(p(y|x) || p(y))], for logits [N, K] (Salimans et al. 2016).

    Order and splits are torch-fidelity's. The interval is over the draw of the images, at N / splits of them: a smaller
    split has a smaller score.

    Raises:
        ValueError: fewer images than splits, or logits that are not numbers.
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"an Inception Score over {splits} splits needs at least {splits} images, got {n}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
    bounds = [split * n // splits for split in range(splits + 1)]
    scores = torch.stack([_split_score(logits[order[start:stop]]) for start, stop in pairwise(bounds)])
    value = float(scores.mean())
    if not math.isfinite(value):
        raise ValueError(NOT_FINITE)
    if splits < 2:
        return Estimate(value, None)
    reach = student(splits - 1) * float(scores.std()) / splits**0.5
    return Estimate(value, (value - reach, value + reach))


def _half(sigma: Tensor) -> Tensor:
    """H [R, D] with H^T H = sigma, R its numerical rank: a root without the rows that rounding alone would fill."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(sigma) * PRECISION * values[-1]
    return (vectors[:, kept] * values[kept].sqrt()).T


def _overlap(other: Gaussian, half: Tensor) -> float:
    """Tr (A B)^1/2 for A = other.sigma, B = half^T half: the singular values s of A^1/2 half^T [D, R], summed.

    Their squares are the eigenvalues of half A half^T, found in a fifth of the time. Squaring costs digits: rounding
    of eps max s^2 moves s by that / 2s. Where this adds up to more than 1e-8 of the sum (the true error is a hundredth
    of it), the longer way is taken.
    """
    values = torch.linalg.eigvalsh(half @ other.sigma @ half.T)  # [R]
    noise = len(half) * PRECISION * values[-1:].clamp(min=0).sum()
    rank = min(len(half), other.n - 1) if other.n else len(half)  # n images span n - 1 dimensions about their mean
    null, values = values[: len(half) - rank], values[len(half) - rank :]
    singular = values.clamp(min=0).sqrt()
    lost = PRECISION * values[-1:].sum() * (0.5 / singular).sum()
    if lost <= 1e-8 * singular.sum() and bool((null.abs() <= noise).all()):
        return float(singular.sum())
    return float(torch.linalg.svdvals(_half(other.sigma) @ half.T).sum())


def _eigenvalue_overlap(a: Tensor, b: Tensor) -> float:
    """Through numpy, as torch-fidelity has it: of a singular product another solver's noise is another number."""
    values = np.linalg.eigvals(a.numpy() @ b.numpy()).astype(np.complex128)
    return float(np.sqrt(values).real.sum())


def _in_groups(features: Tensor) -> list[Tensor]:
    require_finite(features)
    group = group_of_rows(len(features))
    return [features[group == index].double() for index in range(GROUPS)]


def _sums_within(groups: Sequence[Tensor]) -> Tensor:
    """Sums of the kernel over every pair of groups of one set [G, G]; no vector is paired with itself."""
    sums = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for i, a in enumerate(groups):
        for j, b in enumerate(groups[: i + 1]):
            sums[i, j] = sums[j, i] = _kernel_sum(a, b)
        sums[i, i] -= _kernel_of(a.square().sum(1), a.shape[1]).sum()
    return sums


def _sums_between(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Sums of the kernel over every pair of groups of two sets [G, G]."""
    return torch.tensor([[_kernel_sum(a, b) for b in y] for a in x], dtype=torch.float64)


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    blocks = a.split(max(1, BLOCK // len(b)))
    return math.fsum(float(_kernel_of(rows @ b.T, a.shape[1]).sum()) for rows in blocks)


def _kernel_of(products: Tensor, dim: int) -> Tensor:
    """(x.y / D + 1)^3 for products x.y."""
    base = products.div(dim).add_(1)
    return base.square().mul_(base)


def _split_score(logits: Tensor) -> Tensor:
    """exp of the mutual information of image and class: entropy of the mean less mean entropy, for logits [N, K]."""
    p = logits.double().cpu().softmax(1)
    return (torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp()
