"""Schedules: density, distribution and draws agree, and match the closed forms and tables of the papers."""

from __future__ import annotations

import math
import typing
from typing import Any

import pytest
import torch
from torch import Tensor

from generator.config import MixedScheduleConfig, ScheduleConfig
from generator.path import cosine_logsnr, flow_logsnr, flow_time, variance_preserving
from generator.schedule import (
    DISCRETE,
    MAX_LOGSNR,
    SCHEDULES,
    Schedule,
    build_schedule,
    ddpm_log_alphas_bar,
    iddpm_log_alphas_bar,
    step_logsnr,
)

GRID = torch.linspace(-90, 90, 180_001, dtype=torch.float64)
ENDS = [0.0, 1e-300, 1e-12, 2**-24, 1 - 2**-24, 1 - 1e-12]
MIXTURES = {
    "laplace and cosine": ("laplace", {"kind": "cosine", "share": 0.1}),
    "iddpm and cauchy": ("iddpm", {"kind": "cauchy", "share": 0.3, "location": -2.0}),
    "cauchy and edm": ("cauchy", {"kind": "edm", "share": 0.5}),
    "far apart": ("ddpm", {"kind": "ddpm", "share": 0.25, "location": 40.0}),  # nothing is drawn in between
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in SCHEDULES},
    **{f"{kind}, moved": {"kind": kind, "location": -1.5, "scale": 0.7} for kind in SCHEDULES},
    **{f"{kind}, zero terminal": {"kind": kind, "zero_terminal": True} for kind in DISCRETE},
    **{name: {"kind": kind, "mixed": MixedScheduleConfig(**mixed)} for name, (kind, mixed) in MIXTURES.items()},
}


def build(kind: Any, **settings: Any) -> Schedule:
    return build_schedule(ScheduleConfig(kind=kind, **settings))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_choice_has_a_row() -> None:
    for config, beside in ((ScheduleConfig, {"learned"}), (MixedScheduleConfig, set())):
        assert set(typing.get_args(typing.get_type_hints(config)["kind"])) == {*SCHEDULES, *beside}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_density_integrates_to_the_distribution(settings: dict[str, Any]) -> None:
    schedule = build(**settings)
    integral = schedule.cdf(GRID[0]) + torch.cumulative_trapezoid(schedule.pdf(GRID), GRID)
    steps = "dpm" in settings["kind"]  # the density jumps from knot to knot, and at the ends
    torch.testing.assert_close(integral, schedule.cdf(GRID)[1:], rtol=0, atol=1e-4 if steps else 2e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_distribution_undoes_the_quantile(settings: dict[str, Any]) -> None:
    schedule = build(**settings)
    inner = torch.linspace(1e-6, 1 - 1e-6, 2001, dtype=torch.float64)
    u = torch.cat([double(*ENDS[:4]), inner, double(*ENDS[4:])])
    logsnr = schedule.inverse(u)
    assert logsnr.dtype == torch.float64
    assert bool((logsnr.diff() >= 0).all() and (logsnr[4:-2].diff() > 0).all())
    torch.testing.assert_close(schedule.cdf(logsnr), u, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.cdf(double(-math.inf, math.inf)), double(0, 1), rtol=0, atol=0)
    assert bool((schedule.pdf(double(-math.inf, -1e6, 1e6, math.inf)) <= 1e-12).all())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_density_matches_a_histogram_of_draws(settings: dict[str, Any]) -> None:
    """Of one draw in each of 100,000 equal parts of [0, 1): what is left is not chance but the width of the bins."""
    schedule, num = build(**settings), 100_000
    u = (torch.arange(num) + torch.rand(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)) / num
    edges = torch.linspace(-8, 8, 33)
    density = schedule(u).histogram(edges).hist.double() / num / 0.5
    fine = torch.linspace(-8, 8, 6401, dtype=torch.float64)
    expected = schedule.pdf((fine[:-1] + fine[1:]) / 2).reshape(32, 200).mean(1)
    torch.testing.assert_close(density, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_are_single_precision_finite_and_clamped(settings: dict[str, Any]) -> None:
    schedule = build(**settings)
    logsnr = schedule(double(*ENDS).float())
    assert logsnr.dtype == torch.float32
    assert bool((logsnr.abs() <= torch.tensor(MAX_LOGSNR)).all())
    assert bool((logsnr.diff() >= 0).all())


def test_closed_forms_of_the_papers() -> None:
    time, logsnr = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), torch.linspace(-9, 9, 37, dtype=torch.float64)
    cosine, flow, logit_normal, edm = (build(kind) for kind in ("cosine", "uniform_time", "logit_normal", "edm"))
    torch.testing.assert_close(cosine.inverse(1 - time), cosine_logsnr(time))
    torch.testing.assert_close(flow.inverse(1 - time), flow_logsnr(time))
    torch.testing.assert_close(cosine.pdf(logsnr), 1 / torch.cosh(logsnr / 2) / (2 * math.pi))
    torch.testing.assert_close(flow.pdf(logsnr), 1 / torch.cosh(logsnr / 4) ** 2 / 8)
    torch.testing.assert_close(logit_normal.pdf(logsnr), torch.distributions.Normal(0.0, 2.0).log_prob(logsnr).exp())
    torch.testing.assert_close(edm.pdf(logsnr), torch.distributions.Normal(2.4, 2.4).log_prob(logsnr).exp())
    torch.testing.assert_close(build("laplace").pdf(logsnr), torch.exp(-logsnr.abs() / 0.5))
    torch.testing.assert_close(build("cauchy").pdf(logsnr), 1 / (math.pi * (1 + logsnr**2)))
    shifted, scaled = build("cosine", location=1.3), build("cosine", scale=1 / 2)
    torch.testing.assert_close(shifted.inverse(1 - time), 1.3 + cosine_logsnr(time))
    torch.testing.assert_close(scaled.pdf(logsnr), 2 / (2 * math.pi) / torch.cosh(2 * logsnr / 2))


def test_laplace_in_numbers() -> None:
    """The schedule of Hang & Gu (2024) with mu = 0, b = 0.5: SNR (2 t)^-b below t = 1/2 and (2 (1 - t))^b above."""
    time = double(0.01, 0.1, 0.25, 0.5)
    logsnr = build("laplace").inverse(1 - time)
    torch.testing.assert_close(logsnr.exp(), (2 * time) ** -0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(build("laplace").inverse(time), -logsnr, rtol=0, atol=1e-12)
    torch.testing.assert_close(logsnr, double(1.9560, 0.8047, 0.3466, 0), rtol=0, atol=6e-5)
    alpha, sigma = variance_preserving(logsnr)
    torch.testing.assert_close(alpha, double(0.93600, 0.83125, 0.76537, 0.70711), rtol=0, atol=6e-6)
    torch.testing.assert_close(sigma, double(0.35199, 0.55589, 0.64359, 0.70711), rtol=0, atol=6e-6)


def test_logit_normal_of_the_flow_time() -> None:
    mean, deviation = 0.4, 0.8
    schedule = build("logit_normal", location=-2 * mean, scale=2 * deviation)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logits = torch.logit(flow_time(schedule.inverse(u)))
    assert float(logits.mean()) == pytest.approx(mean, abs=1e-4)
    assert float(logits.std()) == pytest.approx(deviation, abs=1e-3)


def test_edm_draws_its_lognormal_noise() -> None:
    """ln sigma ~ N(-1.2, 1.2^2)."""
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    log_sigma = -build("edm").inverse(u) / 2
    torch.testing.assert_close(torch.special.ndtr((log_sigma + 1.2) / 1.2), 1 - u, rtol=0, atol=1e-12)


# The discrete schedules


def test_ddpm_in_numbers() -> None:
    assert float(ddpm_log_alphas_bar()[-1].exp()) == pytest.approx(4.03583e-5, rel=1e-5)
    assert float((ddpm_log_alphas_bar()[-1] / 2).exp()) == pytest.approx(0.0063528, rel=1e-5)
    schedule = build("ddpm")
    torch.testing.assert_close(schedule.inverse(double(0, 1)), double(-10.1177, 9.2102), rtol=0, atol=6e-5)
    crossings = (1 - schedule.cdf(double(5.0, 1.0).log())) * 999
    assert crossings.ceil().tolist() == [130, 259], "the first steps with an SNR below 5, and below 1"


def test_iddpm_in_numbers() -> None:
    bar = iddpm_log_alphas_bar().exp()
    assert float(bar[499]) == pytest.approx(0.493844, abs=1e-6)
    assert float(bar[-1]) == pytest.approx(2.43e-9, rel=2e-3)


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_steps_are_those_of_diffusers(kind: str, zero_terminal: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = {"ddpm": {"beta_schedule": "linear"}, "iddpm": {"beta_schedule": "squaredcos_cap_v2"}}[kind]
    peer = diffusers.DDIMScheduler(rescale_betas_zero_snr=zero_terminal, **betas)
    ours = torch.sigmoid(step_logsnr(DISCRETE[kind](), zero_terminal=zero_terminal))
    torch.testing.assert_close(ours, peer.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_step_i_of_a_discrete_schedule_has_time_i_over_999(kind: str, zero_terminal: bool) -> None:
    schedule = build(kind, zero_terminal=zero_terminal)
    knots = step_logsnr(DISCRETE[kind](), zero_terminal=zero_terminal)
    time = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(schedule.inverse(1 - time), knots, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.cdf(knots), 1 - time, rtol=0, atol=1e-12)
    between, gaps = (knots[1:] + knots[:-1]) / 2, knots[:-1] - knots[1:]
    inner = slice(None, -1 if zero_terminal else None)
    torch.testing.assert_close((schedule.pdf(between) * gaps)[inner], torch.full_like(gaps, 1 / 999)[inner])


@pytest.mark.parametrize("kind", DISCRETE)
def test_zero_terminal_ends_without_signal_and_begins_as_before(kind: str) -> None:
    plain, ending = build(kind), build(kind, zero_terminal=True)
    assert float(ending.inverse(double(0))) == -math.inf
    assert float(ending(torch.zeros(1))) == pytest.approx(-MAX_LOGSNR)
    torch.testing.assert_close(ending.inverse(double(1)), plain.inverse(double(1)), rtol=0, atol=1e-9)
    u = torch.linspace(0, 0.9 / 999, 10, dtype=torch.float64)
    ratio = torch.exp(ending.inverse(u) / 2)  # alpha / sigma, a line to 0
    torch.testing.assert_close(ratio, u * 999 * torch.exp(ending.inverse(double(1 / 999)) / 2))


# Mixtures


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    first, second = build("laplace"), build("cosine", location=1.0)
    mixed = build("laplace", mixed=MixedScheduleConfig(kind="cosine", location=1.0, share=0.2))
    for function in ("cdf", "pdf"):
        parts = [getattr(schedule, function)(GRID) for schedule in (first, second)]
        torch.testing.assert_close(getattr(mixed, function)(GRID), 0.8 * parts[0] + 0.2 * parts[1])


def test_a_mixture_with_itself_is_itself() -> None:
    u = torch.linspace(0, 0.999, 500, dtype=torch.float64)
    mixed = build("cauchy", mixed=MixedScheduleConfig(kind="cauchy", share=0.4))
    torch.testing.assert_close(mixed.inverse(u), build("cauchy").inverse(u))


def test_between_parts_far_apart_the_quantile_jumps() -> None:
    """A quarter of the draws lies 40 above the rest."""
    quantile = build("ddpm", mixed=MixedScheduleConfig(kind="ddpm", share=0.25, location=40.0)).inverse
    assert float(quantile(double(0.7499))) < 10 < 29 < float(quantile(double(0.7501)))


def test_bad_settings_are_refused() -> None:
    wrong: Any = "linear"
    with pytest.raises(ValueError, match=r"diffusion\.schedule\.kind='linear' is unknown"):
        build(wrong)
    with pytest.raises(ValueError, match=r"diffusion\.schedule\.scale=0 must be positive"):
        build("cosine", scale=0)
    with pytest.raises(ValueError, match=r"zero_terminal rescales the last step of ddpm and iddpm"):
        build("cosine", zero_terminal=True)
