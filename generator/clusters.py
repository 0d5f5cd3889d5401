"""Clusters of noise levels: contiguous parts of the noise axis, whose denoising is one task each.

A schedule turns u in [0, 1) into log SNR, rising; its own time is t = 1 - u. Cluster 1 has the least noise, cluster N
the most (Kim et al., 2025, arXiv:2403.10348; the numbering is theirs).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from generator.config import CurriculumConfig
from generator.path import flow_logsnr
from generator.schedule import Schedule, trainable

NUM_TIMES = 1000  # at which the clusters by log SNR look at a schedule


def cluster_edges(config: CurriculumConfig, schedule: Schedule) -> Tensor:
    """Edges of the clusters in u: float64 [N + 1], rising from 0, the noisy end of cluster N, to 1.

    Raises:
        ValueError: an unknown division, or one that leaves a cluster without draws.
    """
    if config.clusters not in DIVISIONS:
        known = ", ".join(DIVISIONS)
        raise ValueError(f"diffusion.curriculum.clusters={config.clusters!r} is unknown; choose one of {known}")
    edges = DIVISIONS[config.clusters](schedule, config.num_clusters)
    if bool((edges.diff() <= 0).any()):
        raise ValueError(
            f"diffusion.curriculum.clusters={config.clusters} with num_clusters={config.num_clusters} leaves clusters"
            " of which the schedule draws nothing: use fewer, or clusters=time"
        )
    return edges


def by_time(schedule: Schedule, num: int) -> Tensor:
    """Equal shares of the draws: equal intervals of time for DDPM, equal mass of the normal for EDM."""
    return torch.linspace(0, 1, num + 1, dtype=torch.float64)


def by_noise_level(schedule: Schedule, num: int) -> Tensor:
    """Equal intervals of linear-flow time sigma / (alpha + sigma), whatever the schedule."""
    inner = flow_logsnr(1 - torch.arange(1, num, dtype=torch.float64) / num)
    return torch.cat([torch.zeros(1).double(), schedule.cdf(inner), torch.ones(1).double()])


def by_logsnr(schedule: Schedule, num: int) -> Tensor:
    """Log SNRs of a cluster lie close together: `optimal_starts` over NUM_TIMES even times, ends included."""
    times = torch.arange(NUM_TIMES, dtype=torch.float64) / (NUM_TIMES - 1)
    values = trainable(schedule.inverse(1 - times)).double().numpy()  # [T], falling
    inner = [1 - (start - 0.5) / (NUM_TIMES - 1) for start in reversed(optimal_starts(values, num)[1:])]
    return torch.tensor([0.0, *inner, 1.0], dtype=torch.float64)


DIVISIONS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "time": by_time,
    "logsnr": by_logsnr,
    "noise_level": by_noise_level,
}


def optimal_starts(values: NDArray[np.float64], num: int) -> list[int]:
    """First indices of the `num` contiguous intervals of monotone values [T] that together cost the least.

    An interval l .. r costs the sum of |s(t) - s(c)| over it, with c = round((l + r + 1) / 2); a single value costs
    nothing (Go et al., 2023, arXiv:2306.00354, and their code). Exact, by dynamic programming in O(num T^2).

    Raises:
        ValueError: more intervals than values.
    """
    if not 1 <= num <= len(values):
        raise ValueError(f"{len(values)} values cannot be divided into {num} intervals")
    costs = interval_costs(values)  # [T, T]: of l .. r
    best = costs[0]  # [T]: of 0 .. r in the intervals so far
    cuts = []  # for each further interval, its best start by r
    for _ in range(num - 1):
        # total[l, r]: what 0 .. l - 1 costs in the intervals so far, and l .. r as one more.
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + costs
        cuts.append(total.argmin(0))
        best = total.min(0)
    starts, right = [], len(values) - 1
    for cut in reversed(cuts):
        starts.append(int(cut[right]))
        right = starts[-1] - 1
    return [0, *reversed(starts)]


def interval_costs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cost of every interval l .. r of monotone values [T]: [T, T], infinite where l > r."""
    index = np.arange(len(values))
    left, right = index[:, None], index[None, :]
    centre = np.minimum(np.round((left + right + 1) / 2).astype(int), right)
    sums = np.concatenate([[0.0], values.cumsum()])  # of the values before an index
    before = sums[centre] - sums[left] - (centre - left) * values[centre]
    after = sums[right + 1] - sums[centre + 1] - (right - centre) * values[centre]
    return np.where(left <= right, np.abs(before) + np.abs(after), np.inf)
