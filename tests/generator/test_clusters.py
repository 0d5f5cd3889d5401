"""Clusters: the reference's starts, the cheapest division, and edges where each division says."""

from __future__ import annotations

import itertools
import typing
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from generator.clusters import DIVISIONS, NUM_TIMES, cluster_edges, interval_costs, optimal_starts
from generator.config import CurriculumConfig, MixedScheduleConfig, ScheduleConfig
from generator.path import flow_time
from generator.schedule import DISCRETE, SCHEDULES, Schedule, build_schedule, step_logsnr

DDPM, IDDPM = (step_logsnr(DISCRETE[kind](), zero_terminal=False).numpy() for kind in ("ddpm", "iddpm"))
# fmt: off
DDPM_20 = [0, 14, 39, 74, 119, 171, 230, 291, 355, 418, 480, 541, 600, 656, 709, 761, 812, 861, 908, 954]
IDDPM_20 = [0, 17, 44, 81, 128, 185, 251, 322, 400, 480, 561, 640, 714, 782, 843, 894, 935, 966, 987, 999]
RAW_20 = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14, 18, 23, 30, 40, 57, 84, 137, 260]
# fmt: on


def schedule_of(kind: Any, **settings: Any) -> Schedule:
    return build_schedule(ScheduleConfig(kind=kind, **settings))


def edges_of(clusters: Any, num: int, schedule: Schedule) -> Tensor:
    return cluster_edges(CurriculumConfig(clusters=clusters, num_clusters=num), schedule)


@pytest.mark.parametrize(
    ("values", "starts"),
    [(DDPM, [0, 153, 393, 623, 822]), (DDPM, DDPM_20), (IDDPM, IDDPM_20), (np.exp(DDPM), RAW_20)],
    ids=["ddpm in 5", "ddpm in 20", "iddpm in 20", "ddpm by raw SNR"],
)
def test_starts_of_a_thousand_steps(values: np.ndarray, starts: list[int]) -> None:
    """Raw SNR leaves nearly all clusters in the first 3 % of time, which is why its logarithm is taken."""
    assert optimal_starts(values, len(starts)) == starts


def slow_cost(values: np.ndarray, left: int, right: int) -> float:
    centre = min(round((left + right + 1) / 2), right)
    return sum(abs(value - values[centre]) for value in values[left : right + 1])


@pytest.mark.parametrize("seed", range(4))
def test_no_division_costs_less(seed: int) -> None:
    """Against all divisions of short arrays, rising and falling, with equal values among them."""
    random = np.random.default_rng(seed)
    values = np.sort(random.integers(0, 30, 9).astype(float))[:: 1 if seed % 2 else -1]
    costs = interval_costs(values)
    for left, right in itertools.product(range(9), repeat=2):
        expected = slow_cost(values, left, right) if left <= right else np.inf
        assert costs[left, right] == pytest.approx(expected)

    def cost(starts: tuple[int, ...]) -> float:
        return sum(slow_cost(values, left, end - 1) for left, end in itertools.pairwise((*starts, 9)))

    for num in range(1, 10):
        starts = optimal_starts(values, num)
        assert len(set(starts)) == num and starts == sorted(starts) and starts[0] == 0
        cheapest = min(cost((0, *inner)) for inner in itertools.combinations(range(1, 9), num - 1))
        assert cost(tuple(starts)) == pytest.approx(cheapest)


@pytest.mark.parametrize("num", [0, 4])
def test_as_many_intervals_as_values_at_most(num: int) -> None:
    with pytest.raises(ValueError, match=f"3 values cannot be divided into {num} intervals"):
        optimal_starts(np.arange(3.0), num)


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(CurriculumConfig)["clusters"])) == set(DIVISIONS)


@pytest.mark.parametrize("clusters", DIVISIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_edges_rise_from_noise_to_data(kind: str, clusters: str) -> None:
    edges = edges_of(clusters, 7, schedule_of(kind))
    assert edges.dtype == torch.float64 and edges.shape == (8,)
    assert edges[0] == 0 and edges[-1] == 1 and bool((edges.diff() > 0).all())


@pytest.mark.parametrize("clusters", DIVISIONS)
def test_one_cluster_is_all(clusters: str) -> None:
    assert edges_of(clusters, 1, schedule_of("edm")).tolist() == [0, 1]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_clusters_by_time_are_drawn_equally_often(kind: str) -> None:
    torch.testing.assert_close(edges_of("time", 8, schedule_of(kind)), torch.arange(9.0).double() / 8)


def test_clusters_by_time_of_edm_are_of_equal_mass() -> None:
    """ln sigma = -1.2 + 1.2 z, edges at z = Phi^-1(i / N)."""
    schedule = schedule_of("edm")
    log_sigma = -schedule.inverse(edges_of("time", 20, schedule))[1:-1] / 2
    expected = [-1.2 + 1.2 * NormalDist().inv_cdf(1 - i / 20) for i in range(1, 20)]
    torch.testing.assert_close(log_sigma, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_clusters_by_noise_level_are_equal_parts_of_flow_time(kind: str) -> None:
    schedule = schedule_of(kind)
    levels = schedule.inverse(edges_of("noise_level", 10, schedule))[1:-1]
    torch.testing.assert_close(flow_time(levels), 1 - torch.arange(1, 10).double() / 10, rtol=0, atol=1e-9)


def test_for_the_linear_flow_noise_level_is_time() -> None:
    schedule = schedule_of("uniform_time")
    torch.testing.assert_close(edges_of("noise_level", 10, schedule), edges_of("time", 10, schedule))


def test_clusters_by_logsnr_of_ddpm_hold_its_steps() -> None:
    """Each edge lies between the last step of one cluster and the first of the next."""
    edges = edges_of("logsnr", 20, schedule_of("ddpm"))
    u = 1 - torch.arange(1000).double() / 999  # of step 0, the least noisy, and so on
    cluster = 20 - torch.searchsorted(edges[1:-1].contiguous(), u)
    starts = [int((cluster == number).nonzero()[0]) for number in range(1, 21)]
    assert starts == DDPM_20 and bool((cluster.diff() >= 0).all())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_cluster_by_logsnr_is_but_an_end(kind: str) -> None:
    """Schedules without ends have draws far out in log SNR, which make no cluster of one time alone."""
    assert float(edges_of("logsnr", 20, schedule_of(kind)).diff().min()) > 5 / NUM_TIMES


def test_clusters_without_draws_are_refused() -> None:
    """Nothing is drawn between two schedules that lie far apart."""
    apart = schedule_of("ddpm", mixed=MixedScheduleConfig(kind="ddpm", share=0.25, location=40.0))
    with pytest.raises(ValueError, match=r"curriculum\.clusters=noise_level with num_clusters=20 .* clusters=time"):
        edges_of("noise_level", 20, schedule_of("ddpm", location=40.0))
    assert len(edges_of("time", 20, apart)) == 21
