"""Distances between two sets of feature vectors, and the Inception Score: pure, in float64.

Features are [N, D] in any float type. Intervals are 95 % ones; what they hold fixed is said in each function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eval.statistics import GROUPS, T_975, Estimate, Gaussian, Moments, jackknife, proportion


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""
    return frechet_to(b)(a)


def frechet_to(reference: Gaussian) -> Callable[[Gaussian], float]:
    """`frechet` to a fixed reference, whose matrix root is taken once.

    Tr (A B)^1/2 equals the nuclear norm of A^1/2 B^1/2, which stays exact and real when a covariance is singular.

    Raises (the result):
        ValueError: the two have different dimensions.
    """
    root = _root(reference.sigma)

    def distance(other: Gaussian) -> float:
        if other.mu.shape != reference.mu.shape:
            sizes = f"{len(other.mu)} and {len(reference.mu)}"
            raise ValueError(f"Frechet distance between {sizes} dimensions: not the same features")
        shift = (other.mu - reference.mu).square().sum()
        overlap = torch.linalg.svdvals(_root(other.sigma) @ root).sum()
        return max(0.0, float(shift + other.sigma.trace() + reference.sigma.trace() - 2 * overlap))

    return distance


def frechet_distance(generated: Tensor, reference: Gaussian) -> Estimate:
    """Frechet distance of features [N, D] to a reference; the interval is over the draw of the generated images."""
    distance = frechet_to(reference)
    parts = [Moments.of(group) for group in _groups(generated)]
    whole = sum(parts[1:], parts[0])
    left_out = [distance((whole - part).gaussian()) for part in parts]
    return _not_negative(jackknife(distance(whole.gaussian()), left_out))


def kernel_distance(generated: Tensor, real: Tensor) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018); on Inception features this is KID.

    Over all pairs, not the mean over random subsets: same expectation, less variance. The interval is over both draws.
    """
    x, y = (list(_groups(features.double())) for features in (generated, real))
    within_x, within_y, between = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y)

    def mmd(keep: Tensor) -> float:
        n, m = (sum(len(group) for group, kept in zip(side, keep, strict=True) if kept) for side in (x, y))
        xx, yy, xy = (float(sums[keep][:, keep].sum()) for sums in (within_x, within_y, between))
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    left_out = [mmd(torch.arange(GROUPS) != group) for group in range(GROUPS)]
    return jackknife(mmd(torch.ones(GROUPS, dtype=torch.bool)), left_out)


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> tuple[Estimate, Estimate]:
    """Improved precision and recall: the share inside the other set's k-neighbour balls (Kynkaanniemi et al. 2019).

    Each interval holds the balls fixed.

    Raises:
        ValueError: a set with no more than k vectors.
    """
    if min(len(generated), len(real)) <= k:
        sizes = f"{len(generated)} and {len(real)}"
        raise ValueError(f"precision and recall with k={k} need more than {k} images on each side, got {sizes}")
    x, y = generated.double(), real.double()
    return _inside(x, y, _radii(y, k)), _inside(y, x, _radii(x, k))


def inception_score(logits: Tensor, *, splits: int = GROUPS, seed: int = 0) -> Estimate:
    """Mean over shuffled splits of exp E[KL(p(y|x) || p(y))], for logits [N, K] (Salimans et al. 2016).

    Raises:
        ValueError: fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception Score over {splits} splits needs at least {splits} images, got {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    log_p = logits.double().cpu().log_softmax(1)[order]  # [N, K]
    scores = torch.stack([_exp_divergence(part) for part in log_p.tensor_split(splits)])
    if splits != GROUPS:
        return Estimate(float(scores.mean()), None)
    reach = T_975 * float(scores.std()) / splits**0.5
    return Estimate(float(scores.mean()), (float(scores.mean()) - reach, float(scores.mean()) + reach))


def _root(sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(sigma)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # [D, D]


def _groups(features: Tensor) -> Iterator[Tensor]:
    """Random groups of equal size: samples come in turns of their classes, which strided groups would take apart."""
    if len(features) < 2 * GROUPS:
        raise ValueError(f"an interval over {GROUPS} groups needs at least {2 * GROUPS} images, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return (features[order[group::GROUPS]] for group in range(GROUPS))


def _not_negative(estimate: Estimate) -> Estimate:
    low, high = estimate.interval or (0.0, 0.0)
    return Estimate(estimate.value, (max(0.0, low), high))


def _kernel_sums(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Sums of the kernel over every pair of groups [G, G]; a vector is never paired with itself."""
    sums = torch.zeros(len(x), len(y), dtype=torch.float64)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            kernel = (a @ b.T / a.shape[1] + 1) ** 3
            sums[i, j] = kernel.sum() - (kernel.trace() if a is b else 0)
    return sums


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance from each point to its k-th neighbour, itself not counted [N]."""
    return torch.cat([torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(1024)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Estimate:
    inside = torch.cat([(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(1024)])  # [N]
    return proportion(int(inside.sum()), len(points))


def _exp_divergence(log_p: Tensor) -> Tensor:
    log_marginal = log_p.exp().mean(0).log()  # [K]
    divergence = torch.where(log_p.isinf(), 0.0, log_p.exp() * (log_p - log_marginal)).sum(1)
    return divergence.mean().exp()
