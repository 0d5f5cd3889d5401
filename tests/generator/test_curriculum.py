"""Curricula: the draws of each stage lie where they should, and as often as the schedule has them there."""

from __future__ import annotations

import functools
import itertools
import typing
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from generator.clusters import DIVISIONS
from generator.config import CURRICULUM_KEYS, STAGED, CurriculumConfig, MixedScheduleConfig, ScheduleConfig
from generator.curriculum import PLACES, Curriculum, asymmetric_distribution, end_of_change, final_schedule
from generator.objective import TARGETS, WEIGHTS, Objective
from generator.path import PATHS, flow_time, noised
from generator.schedule import MAX_LOGSNR, SCHEDULES, Schedule, build_schedule

SETTINGS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in SCHEDULES},
    "zero terminal": {"kind": "ddpm", "zero_terminal": True},
    "mixture": {"kind": "cosine", "mixed": MixedScheduleConfig(kind="laplace", share=0.3)},
}
every_schedule = pytest.mark.parametrize("name", SETTINGS)
LAPLACE = build_schedule(ScheduleConfig(kind="laplace"))
U = torch.linspace(0.001, 0.999, 1001)
ENDS = torch.tensor([0.0, 1 - 2**-24])  # of what a uniform draw in float32 can be
N = 5


@functools.cache
def schedule_of(name: str) -> Schedule:
    return build_schedule(ScheduleConfig(**SETTINGS[name]))


@functools.cache
def shared(name: str, kind: Any, **settings: Any) -> Curriculum:
    """One for many tests: each sets the stage that it looks at."""
    config = CurriculumConfig(kind=kind, num_clusters=N, **settings)
    return Curriculum(config, schedule_of(name), steps=100)


def at_stage(curriculum: Curriculum, stage: int) -> Curriculum:
    assert curriculum.pacing is not None
    curriculum.pacing.stage = stage
    return curriculum


def build(kind: Any = "progressive", steps: int = 101, schedule: Schedule = LAPLACE, **settings: Any) -> Curriculum:
    return Curriculum(CurriculumConfig(kind=kind, **settings), schedule, steps=steps)


def uniform_draws(num: int, seed: int = 0) -> Tensor:
    return torch.rand(num, generator=torch.Generator().manual_seed(seed))


def likely(logsnr: Tensor, schedule: Schedule, low: float = 0.0, high: float = 1.0) -> bool:
    """Whether draws can be of the schedule between its quantiles `low` and `high` (Kolmogorov-Smirnov, at 1 %).

    Draws at the ends of the range of training stand for all beyond, and are left out.
    """
    inside = logsnr[logsnr.abs() < np.float32(MAX_LOGSNR)]
    ends = schedule.cdf(torch.tensor([-MAX_LOGSNR, MAX_LOGSNR])).tolist()
    low, high = max(low, ends[0]), min(high, ends[1])
    shares = ((schedule.cdf(inside) - low) / (high - low)).clamp(0, 1)
    return len(inside) > 400 and stats.kstest(shares.numpy(), "uniform").pvalue > 0.01


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(CurriculumConfig)["kind"])) == set(PLACES)


OTHER_VALUES: dict[str, Any] = {
    "pacing": "fixed", "patience": 7, "smoothing": 0.5, "min_improvement": 0.1, "stage_steps": 9,
    "threshold": 0.4, "ratio": 3.0, "cluster": 2, "start": 1.0, "end": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kinds in CURRICULUM_KEYS.items() for kind in kinds])
def test_a_key_that_a_kind_may_have_changes_its_course(key: str, kind: str) -> None:
    losses = uniform_draws(500).tolist()

    def course(**settings: Any) -> tuple[list[bool], list[float]]:
        curriculum = build(kind, num_clusters=3, **settings)
        return [curriculum.after_step(loss) for loss in losses], curriculum.draw(U, 50).tolist()

    beside = {"stage_steps": 300} if key == "pacing" else {}
    assert course(**{key: OTHER_VALUES[key]}, **beside) != course(**beside)


# Stages


@pytest.mark.parametrize("clusters", DIVISIONS)
@pytest.mark.parametrize("kind", STAGED)
@every_schedule
def test_draws_of_a_stage_lie_in_its_clusters_and_reach_both_ends(name: str, kind: str, clusters: str) -> None:
    """A_n = C_(N-n+1) .. C_N from the noisiest on, C_1 .. C_n in the reverse."""
    curriculum = shared(name, kind, clusters=clusters)
    levels = curriculum.edge_levels  # [N + 1], rising: of cluster N to 1
    for stage in range(1, N + 1):
        low, high = (levels[0], levels[stage]) if kind == "easy_to_hard" else (levels[N - stage], levels[N])
        logsnr = at_stage(curriculum, stage).draw(torch.cat([ENDS[:1], U, ENDS[1:]]), 0)
        assert bool((logsnr.diff() >= 0).all())
        assert logsnr[0] == low and logsnr[-1] <= high and curriculum.active_levels(0) == (low, high)
        if high < np.float32(MAX_LOGSNR):
            assert float(high - logsnr[-1]) < 1e-4
        clusters_drawn = set(curriculum.cluster_of(logsnr[1:-1]).tolist())
        assert clusters_drawn == set(range(N - stage + 1, N + 1) if kind == "easy_to_hard" else range(1, stage + 1))


@pytest.mark.parametrize("kind", STAGED)
@every_schedule
def test_the_last_stage_is_plain_training(name: str, kind: str) -> None:
    """To the bit, and in distribution."""
    curriculum, u = at_stage(shared(name, kind), N), uniform_draws(4000)
    logsnr = curriculum.draw(u, 0)
    assert torch.equal(logsnr, schedule_of(name)(u)) and torch.equal(logsnr, shared(name, "uniform").draw(u, 0))
    assert curriculum.active == (0.0, 1.0) and likely(logsnr, schedule_of(name))


@pytest.mark.parametrize("kind", STAGED)
@every_schedule
def test_a_stage_draws_as_the_schedule_does_within_it(name: str, kind: str) -> None:
    for stage in (1, 3):
        curriculum = at_stage(shared(name, kind, clusters="noise_level"), stage)
        edges = curriculum.edges.tolist()
        low, high = (0.0, edges[stage]) if kind == "easy_to_hard" else (edges[N - stage], 1.0)
        logsnr = curriculum.draw(uniform_draws(2000, seed=stage), 0)
        assert likely(logsnr, schedule_of(name), low, high)
        assert not likely(logsnr, schedule_of(name))


@every_schedule
def test_the_easiest_levels_are_the_noisiest(name: str) -> None:
    """Whichever way a path counts its time: the mean log SNR rises with the stages, and falls in the reverse."""
    easy, anti = shared(name, "easy_to_hard"), shared(name, "anti")
    for curriculum, sign in ((easy, 1), (anti, -1)):
        means = torch.stack([at_stage(curriculum, stage).draw(U, 0).mean() for stage in range(1, N + 1)])
        assert bool((sign * means.diff() > 0).all())


def test_a_flow_begins_at_its_noise() -> None:
    """x_t = (1 - t) x0 + t eps: stage n has t in [1 - n / N, 1], where SiT's code counts 1 - t."""
    for stage in range(1, N + 1):
        time = flow_time(at_stage(shared("uniform_time", "easy_to_hard"), stage).draw(torch.cat([ENDS, U]), 0))
        assert float(time.min()) == pytest.approx(max(1 - stage / N, 1e-4), abs=1e-6)
        assert float(time.max()) == pytest.approx(1 - 1e-4, abs=1e-6)


def test_the_reverse_mirrors_a_symmetric_schedule() -> None:
    for name, stage in itertools.product(("cosine", "laplace", "cauchy", "uniform_time"), range(1, N + 1)):
        easy, anti = (at_stage(shared(name, kind), stage) for kind in ("easy_to_hard", "anti"))
        torch.testing.assert_close(anti.draw(U, 0), -easy.draw(U.flip(0), 0), rtol=1e-5, atol=1e-4)


@every_schedule
def test_a_single_cluster_is_drawn_alone_throughout(name: str) -> None:
    for cluster in range(1, N + 1):
        settings: dict[str, Any] = {"clusters": "noise_level", "num_clusters": N, "cluster": cluster}
        curriculum = build("single", schedule=schedule_of(name), **settings)
        logsnr = curriculum.draw(uniform_draws(1200), 0)
        assert set(curriculum.cluster_of(logsnr).tolist()) == {cluster}
        assert likely(logsnr, schedule_of(name), *curriculum.edges[[N - cluster, N - cluster + 1]].tolist())
        assert (curriculum.stage, curriculum.num_stages, curriculum.state_dict()) == (1, 1, {})
        assert not curriculum.after_step(1.0) and torch.equal(curriculum.draw(U, 99), curriculum.draw(U, 0))
        assert torch.equal(curriculum.final(U), schedule_of(name)(U))


@every_schedule
def test_clusters_are_told_by_their_edges(name: str) -> None:
    for clusters in DIVISIONS:
        curriculum = shared(name, "uniform", clusters=clusters)
        u = uniform_draws(2000).double()
        u = u[(u[:, None] - curriculum.edges).abs().amin(1) > 1e-6]
        expected = N - torch.searchsorted(curriculum.edges[1:-1].contiguous(), u)
        assert torch.equal(curriculum.cluster_of(curriculum.draw(u, 0)), expected)
    everything = build("uniform", num_clusters=1)
    assert bool((everything.cluster_of(everything.draw(U, 0)) == 1).all())


def test_the_losses_move_the_stages_and_the_state_keeps_them() -> None:
    settings: dict[str, Any] = {"num_clusters": 3, "patience": 1, "smoothing": 0.0}
    curriculum = build("easy_to_hard", **settings)
    assert [curriculum.after_step(1.0) for _ in range(8)] == [False, False, True, False, False, True, False, False]
    assert curriculum.stage == curriculum.num_stages == 3
    middle, resumed = build("anti", **settings), build("anti", **settings)
    for loss in (3.0, 4.0, 5.0, 1.0, 2.0):
        middle.after_step(loss)
    resumed.load_state_dict(middle.state_dict())
    for loss in (4.0, 2.0, 7.0):
        assert torch.equal(middle.draw(U, 5), resumed.draw(U, 5)) and middle.active == resumed.active
        assert middle.after_step(loss) == resumed.after_step(loss)


def test_every_schedule_path_target_and_weight_trains_in_the_first_and_the_last_stage() -> None:
    """Draw, noise, target and weight are finite, and no weight is negative."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 16, 4, generator=generator)
    u = torch.cat([ENDS, torch.linspace(0.01, 0.99, 14)])
    for name, kind, stage in itertools.product(SCHEDULES, STAGED, (1, N)):
        logsnr = at_stage(shared(name, kind), stage).draw(u, 0)
        z = noised(x0, eps, logsnr)
        for path, target, weight in itertools.product(PATHS, TARGETS, WEIGHTS):
            objective = Objective(path=path, target=target, weight=weight, sigma_data=0.5)
            output = 0.1 * objective.network_input(z, logsnr)
            errors = (output - objective.target_of(x0, eps, logsnr)).square().mean(1)
            weights = objective.weight(logsnr)
            assert bool((weights * errors).isfinite().all() and (weights >= 0).all()), (
                name,
                kind,
                path,
                target,
                weight,
            )


# SpeeD


def speed_masses(mirror: int, threshold: int, ratio: float, num: int = 1000) -> np.ndarray:
    """Share of each time step in SpeeD's batches: a draw t and its mirror m - t, or t - m from m on, in equal parts."""
    shares = np.where(np.arange(num) < threshold, ratio, 1.0)
    shares /= shares.sum()
    masses = shares / 2
    for time in range(num):
        masses[mirror - time if time < mirror else time - mirror] += shares[time] / 2
    return masses


@pytest.mark.parametrize(("threshold", "ratio"), [(0.7, 2.0), (0.3, 5.0), (0.7, 1.0), (0.5, 0.5)])
def test_asymmetric_draws_are_those_of_speeds_batches(threshold: float, ratio: float) -> None:
    """At all thousand steps of DDPM, to the width of a step; m = 642 by their code."""
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    mirror = int(np.argmax(np.gradient(np.sqrt(1 - bar)) < 1e-4)) + 1
    assert mirror == 642 and end_of_change(schedule_of("ddpm")) == 0.642
    curriculum = build("asymmetric", schedule=schedule_of("ddpm"), threshold=threshold, ratio=ratio)
    times = 1 - curriculum.place(torch.linspace(0, 1, 100_001).double()[:-1])
    drawn = np.searchsorted(np.sort(times.numpy()), np.arange(1, 1001) / 1000) / len(times)
    expected = speed_masses(mirror, round(1000 * threshold), ratio).cumsum()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=0.003)


def test_masses_of_asymmetric_draws_by_hand() -> None:
    """Density 1.5 before time 0.5 and 0.5 after; mirrored at 0.5, all that is mirrored comes to lie before it."""
    times, masses = asymmetric_distribution(0.5, 3.0, 0.5)
    np.testing.assert_allclose(times, [0, 0.5, 1])
    np.testing.assert_allclose(masses, [0, (0.75 + 1) / 2, 1])
    times, masses = asymmetric_distribution(0.5, 3.0, 1.0)  # mirrored at 1, early and late times change places
    np.testing.assert_allclose(masses, times)
    times, masses = asymmetric_distribution(0.7, 1.0, 0.6)  # 1.5 before 0.4, 1 before 0.6, 0.5 after
    np.testing.assert_allclose(np.interp([0.4, 0.6, 1], times, masses), [0.6, 0.8, 1])


@every_schedule
def test_asymmetric_draws_rise_and_reach_both_ends(name: str) -> None:
    curriculum = shared(name, "asymmetric")
    place = curriculum.place(torch.cat([ENDS[:1], U, ENDS[1:]]).double())
    assert place[0] == 0 and 1 - 1e-6 < place[-1] < 1 and bool((place.diff() > 0).all())
    assert curriculum.active == (0.0, 1.0) and curriculum.num_stages == 1


def test_the_end_of_change() -> None:
    """sigma = sin(pi t / 2) of the cosine grows by 1e-4 in a thousandth of time where cos(pi t / 2) = 0.2 / pi."""
    assert end_of_change(schedule_of("cosine")) == pytest.approx(np.arccos(0.2 / np.pi) * 2 / np.pi, abs=2e-3)
    assert end_of_change(schedule_of("edm")) == 1.0  # sigma still grows fast in the last thousandth
    assert end_of_change(schedule_of("cauchy")) > 0.9  # though it hardly grows in the first
    assert end_of_change(build_schedule(ScheduleConfig(kind="ddpm", location=60.0))) == 0.0


# Schedules that move


def test_uniform_is_the_schedule_throughout() -> None:
    for step in (0, 50, 100):
        assert torch.equal(build("uniform").draw(U, step), LAPLACE(U))
    assert final_schedule(CurriculumConfig(), LAPLACE) == LAPLACE


def test_progressive_moves_the_schedule_along_a_line() -> None:
    curriculum = build(start=3.0, end=-1.0)
    for step, shift in ((0, 3.0), (25, 2.0), (75, 0.0), (100, -1.0)):
        assert curriculum.shift(step) == pytest.approx(shift)
        torch.testing.assert_close(curriculum.draw(U, step), LAPLACE(U) + shift)
    means = torch.stack([curriculum.draw(U, step).mean() for step in range(101)])
    torch.testing.assert_close(means, torch.linspace(3.0, -1.0, 101), rtol=0, atol=1e-4)
    assert torch.equal(curriculum.final(U), curriculum.draw(U, 100))


def test_a_training_that_is_over_or_has_one_step_is_at_its_end() -> None:
    assert build(end=-1.5).shift(500) == -1.5
    assert build(steps=1, end=-1.5).shift(0) == -1.5


def test_a_step_draws_by_its_share_of_the_training() -> None:
    """So a training that goes on to more steps than it began with draws as a longer one does there."""
    for short, long in ((0, 0), (50, 100), (100, 200)):
        assert torch.equal(build(steps=101).draw(U, short), build(steps=201).draw(U, long))
    assert build(steps=201).shift(100) != build(steps=101).shift(100)


def test_the_schedule_ends_where_the_last_step_draws() -> None:
    mixed = build_schedule(ScheduleConfig(kind="cosine", mixed=MixedScheduleConfig(kind="cauchy", location=1.0)))
    for schedule in (LAPLACE, mixed):
        config = CurriculumConfig(kind="progressive", start=3.0, end=-1.5)
        ended = final_schedule(config, schedule)
        torch.testing.assert_close(ended(U), Curriculum(config, schedule, steps=7).final(U))
        torch.testing.assert_close(ended.cdf(ended.inverse(U)), U.double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(ended.pdf(U - 1.5), schedule.pdf(U))


def test_draws_stay_in_the_range_of_training_and_rise_with_u() -> None:
    """Moved before they are clamped: what lies far outside comes back in."""
    curriculum = build(start=30.0, end=-18.0)
    for step in range(0, 101, 20):
        logsnr = curriculum.draw(torch.cat([torch.zeros(1), U]), step)
        assert logsnr.dtype == torch.float32 and bool((logsnr.diff() >= 0).all())
        assert float(logsnr.abs().max()) <= float(torch.tensor(MAX_LOGSNR))
    assert bool((curriculum.draw(U, 0) == torch.tensor(MAX_LOGSNR)).all())
    torch.testing.assert_close(curriculum.final(U[500:501]), torch.tensor([-18.0]))
    assert curriculum.active_levels(0) == (pytest.approx(-MAX_LOGSNR), pytest.approx(MAX_LOGSNR))
