"""How far two sets of features cover each other, judged by nearest neighbours: pure, in float64, in bounded memory.

Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) and density and coverage (Naeem et al. 2020,
arXiv 2002.09797). A ball reaches from a vector to its k-th neighbour in its own set, itself not counted, and holds its
boundary. The generated vectors are y_1 .. y_M with balls B(y), the real ones x_1 .. x_N with balls B(x):

    precision   share of y in some B(x)            recall     share of x in some B(y)
    density     mean over y of #{x : y in B(x)} / k           coverage   share of x with some y in B(x)

Intervals are 95 % ones over the draw of those vectors of which the share or mean is taken, with the balls, or what lies
in them, held fixed. When both sets are drawn anew, they hold the expectation 80 to 92 times in 100.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eval.statistics import BLOCK, Estimate, bootstrap, proportion, require_finite

NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}  # k of the papers
SLACK = 1e-12  # of squared lengths: what rounding may do to a vector that lies on the boundary of a ball


class _Counts(NamedTuple):
    """Who lies in whose ball."""

    precise: Tensor
    """bool [M]: y in some B(x)."""
    recalled: Tensor
    """bool [N]: x in some B(y)."""
    dense: Tensor
    """int64 [M]: number of B(x) that hold y."""
    covered: Tensor
    """bool [N]: B(x) holds some y."""


def manifold_scores(generated: Tensor, real: Tensor, neighbours: Mapping[str, int] = NEIGHBOURS) -> dict[str, Estimate]:
    """precision, recall, density, coverage of features [M, D] and [N, D], each at its k, from one pass over all pairs.

    Raises:
        ValueError: a set with no more than k vectors, or features that are not finite.
    """
    counts = _count(generated, real, neighbours)
    density = counts.dense.double() / neighbours["density"]  # [M], skewed: few vectors lie in many balls
    return {
        "precision": _share(counts.precise),
        "recall": _share(counts.recalled),
        "density": bootstrap(lambda weights: weights @ density, len(density)),
        "coverage": _share(counts.covered),
    }


def nearest(queries: Tensor, points: Tensor, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest points [P, D] of each query [Q, D]: Euclidean distances float64 [Q, k], ascending, and indices.

    Raises:
        ValueError: fewer than k points, or features that are not finite.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"the {k} nearest of {len(points)} images: k must be between 1 and their number")
    require_finite(queries)
    require_finite(points)
    chunks = points.split(max(k, BLOCK // points.shape[1]))
    starts = range(0, len(points), len(chunks[0]))
    found = [_nearest_of(queries, chunk, min(k, len(chunk))) for chunk in chunks]
    distances = torch.cat([each for each, _ in found], 1)
    indices = torch.cat([start + each for start, (_, each) in zip(starts, found, strict=True)], 1)
    return _first(distances, indices, k)


def _nearest_of(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order by squares, then the distances by subtraction: of equal vectors they are exactly 0."""
    points, distances, indices = points.double(), [], []
    for rows, squares in _squared_distances(queries, points):
        indices.append(squares.topk(k, largest=False).indices)  # [B, k]
        distances.append(torch.stack([(rows - points[column]).norm(dim=1) for column in indices[-1].T], 1))
    return torch.cat(distances), torch.cat(indices)


def _first(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :k], indices.gather(1, order[:, :k])


def _count(generated: Tensor, real: Tensor, k: Mapping[str, int]) -> _Counts:
    least = max(k.values())
    if min(len(generated), len(real)) <= least:
        sizes = f"{len(generated)} and {len(real)}"
        raise ValueError(f"neighbours up to k={least} need more than {least} images on each side, got {sizes}")
    y, x = _centred(generated, real)
    around_y = nearest(y, y, k=k["recall"] + 1)[0]  # [M, k + 1], itself first
    around_x = nearest(x, x, k=max(k["precision"], k["density"], k["coverage"]) + 1)[0]
    reach = {name: _reach(x, around_x[:, k[name]]) for name in ("precision", "density", "coverage")}  # each [N]
    return _held(y, x, reach, _reach(y, around_y[:, k["recall"]]))


def _held(y: Tensor, x: Tensor, reach: Mapping[str, Tensor], reach_y: Tensor) -> _Counts:
    precise, dense, start = [], [], 0
    recalled, covered = (torch.zeros(len(x), dtype=torch.bool) for _ in range(2))
    for rows, squares in _squared_distances(y, x):  # [B, D], [B, N]
        precise.append((squares <= reach["precision"]).any(1))
        dense.append((squares <= reach["density"]).sum(1))
        covered |= (squares <= reach["coverage"]).any(0)
        recalled |= (squares <= reach_y[start : start + len(rows), None]).any(0)
        start += len(rows)
    return _Counts(torch.cat(precise), recalled, torch.cat(dense), covered)


def _squared_distances(queries: Tensor, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some queries after others, float64 [B, D], and their squared distances to all points [B, P]."""
    points = points.double()
    lengths = points.square().sum(1)  # [P]
    for rows in queries.split(max(1, BLOCK // len(points))):
        rows = rows.double()
        squares = torch.addmm(lengths, rows, points.T, alpha=-2)  # [B, P]
        yield rows, squares.add_(rows.square().sum(1, keepdim=True))


def _centred(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Both about the real mean: |x|^2 + |y|^2 - 2 x.y keeps most digits where lengths are like distances."""
    mean = real.double().mean(0)
    return generated.double() - mean, real.double() - mean


def _reach(centres: Tensor, radii: Tensor) -> Tensor:
    """Squared radii [N], with room for the rounding of a squared distance."""
    squares = radii.square()
    return squares + SLACK * (squares + centres.square().sum(1))


def _share(hits: Tensor) -> Estimate:
    return proportion(int(hits.sum()), len(hits))
