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
from generator.schedule import MAX_LOGSNR, Schedule, trainable

NUM_TIMES = 1000  # at which the clusters by log SNR look at a schedule


def cluster_edges(config: CurriculumConfig, schedule: Schedule) -> Tensor:
    """Edges of the clusters in u: float64 [N + 1], rising from 0, the noisy end of cluster N, to 1.

    Raises:
        ValueError: a division that leaves a cluster without draws.
    """
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
    return schedule.cdf(flow_logsnr(torch.linspace(1, 0, num + 1, dtype=torch.float64)))


def by_logsnr(schedule: Schedule, num: int) -> Tensor:
    """Log SNRs of a cluster lie close together: `optimal_starts` over `even_levels`, edges midway between two times."""
    starts = optimal_starts(even_levels(schedule), num)
    inner = [1 - (start - 0.5) / (NUM_TIMES - 1) for start in reversed(starts[1:])]
    return torch.tensor([0.0, *inner, 1.0], dtype=torch.float64)


def even_levels(schedule: Schedule) -> NDArray[np.float64]:
    """Log SNRs at NUM_TIMES even times, both ends included, falling: those of the steps of DDPM.

    An end beyond the range of training, where continuous schedules have none, is taken half a step inside: clamped to
    the range it would lie so far from its neighbour as to be a cluster of its own, of half a step.
    """
    times = torch.arange(NUM_TIMES, dtype=torch.float64) / (NUM_TIMES - 1)
    half = 0.5 / (NUM_TIMES - 1)
    levels, inside = schedule.inverse(1 - times), schedule.inverse(1 - times.clamp(half, 1 - half))
    return trainable(torch.where(levels.abs() <= MAX_LOGSNR, levels, inside)).double().numpy()


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
