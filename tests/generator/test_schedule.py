"""Schedules: density, distribution and draws agree, and match the closed forms of the papers."""

from __future__ import annotations

import math
import typing

import pytest
import torch

from generator.config import ScheduleConfig
from generator.path import cosine_logsnr, flow_logsnr
from generator.schedule import MAX_LOGSNR, SCHEDULES, build_schedule

GRID = torch.linspace(-90, 90, 180_001, dtype=torch.float64)
SETTINGS = [(kind, None, None) for kind in SCHEDULES] + [(kind, -1.5, 0.7) for kind in SCHEDULES]


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(ScheduleConfig)["kind"])) == set(SCHEDULES)


@pytest.mark.parametrize(("kind", "location", "scale"), SETTINGS)
def test_density_integrates_to_the_distribution(kind: str, location: float | None, scale: float | None) -> None:
    schedule = build_schedule(kind, location=location, scale=scale)
    density = schedule.pdf(GRID)
    integral = torch.cumulative_trapezoid(density, GRID)
    torch.testing.assert_close(integral[-1], torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(integral, schedule.cdf(GRID)[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "location", "scale"), SETTINGS)
def test_the_distribution_inverts_a_draw(kind: str, location: float | None, scale: float | None) -> None:
    schedule = build_schedule(kind, location=location, scale=scale)
    u = torch.linspace(2e-4, 1 - 2e-4, 1001, dtype=torch.float64)
    logsnr = schedule(u)
    assert bool((logsnr.diff() > 0).all())
    torch.testing.assert_close(schedule.cdf(logsnr.double()), u, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_density_matches_a_histogram_of_draws(kind: str) -> None:
    schedule = build_schedule(kind)
    draws = schedule(torch.rand(400_000, generator=torch.Generator().manual_seed(0)))
    edges = torch.linspace(-8, 8, 33)
    density = draws.histogram(edges).hist / len(draws) / 0.5
    fine = torch.linspace(-8, 8, 3201)
    expected = schedule.pdf(fine[:-1].reshape(32, 100)).mean(1)
    torch.testing.assert_close(density, expected, rtol=0, atol=2e-3)


def test_closed_forms_of_the_papers() -> None:
    time, logsnr = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), torch.linspace(-9, 9, 37, dtype=torch.float64)
    cosine, flow, logit_normal = (build_schedule(kind) for kind in ("cosine", "uniform_time", "logit_normal"))
    torch.testing.assert_close(cosine(1 - time), cosine_logsnr(time).float())
    torch.testing.assert_close(flow(1 - time), flow_logsnr(time).float())
    torch.testing.assert_close(cosine.pdf(logsnr), 1 / torch.cosh(logsnr / 2) / (2 * math.pi))
    torch.testing.assert_close(flow.pdf(logsnr), 1 / torch.cosh(logsnr / 4) ** 2 / 8)
    normal = torch.distributions.Normal(0.0, 2.0)
    torch.testing.assert_close(logit_normal.pdf(logsnr), normal.log_prob(logsnr).exp())


def test_logit_normal_of_the_flow_time() -> None:
    mean, deviation = 0.4, 0.8
    schedule = build_schedule("logit_normal", location=-2 * mean, scale=2 * deviation)
    time = torch.sigmoid(-schedule(torch.rand(200_000, generator=torch.Generator().manual_seed(0))) / 2)
    logits = torch.logit(time)
    assert float(logits.mean()) == pytest.approx(mean, abs=0.01)
    assert float(logits.std()) == pytest.approx(deviation, abs=0.01)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_draws_stay_finite_and_clamped_at_the_ends(kind: str) -> None:
    logsnr = build_schedule(kind, scale=20.0)(torch.tensor([0.0, 1e-7, 0.5, 1 - 2**-24, 1 - 2**-25]))
    assert logsnr.dtype == torch.float32
    torch.testing.assert_close(logsnr[0], torch.tensor(-MAX_LOGSNR))
    torch.testing.assert_close(logsnr[3], torch.tensor(MAX_LOGSNR))
    assert float(logsnr[2]) == pytest.approx(0, abs=1e-5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.schedule\.kind='linear' is unknown"):
        build_schedule("linear")
    with pytest.raises(ValueError, match=r"diffusion\.schedule\.scale=0 must be positive"):
        build_schedule("cosine", scale=0)
