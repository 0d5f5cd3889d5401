"""The learned schedule against closed forms and automatic differentiation, and what its penalties make of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generator.config import (
    ConditionConfig,
    CurriculumConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    MixedScheduleConfig,
    ScheduleConfig,
)
from generator.consistency_config import ObjectiveConfig
from generator.learned_config import LearnedScheduleConfig
from generator.learned_sampling import solve_map
from generator.learned_schedule import Course, LearnedSchedule, MonotoneTime, by_row, rate_flops
from generator.path import noised, variance_preserving
from generator.schedule import MAX_LOGSNR, build_schedule
from generator.solvers import SampleNoise, solve

SHAPE = 2, 4, 4
KINDS = ("scalar", "channel", "pixel")


def wild(module: nn.Module, seed: int = 0) -> Any:
    """The module with parameters far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim < 4 or parameter.shape[-1] == 1 else 0.05  # of the convolutions
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def build(per: str, *, told_image: bool | None = None, **settings: Any) -> LearnedSchedule:
    torch.manual_seed(0)
    config = LearnedScheduleConfig(per=per, hidden=16, **settings)  # type: ignore[arg-type]
    return LearnedSchedule(config, SHAPE, told_image=per == "pixel" if told_image is None else told_image)


def images(rows: int) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(1))


class Given(nn.Module):
    """A function of time and its derivatives in the place of a monotone network."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value: tuple[Tensor, Tensor, Tensor] = self.function(time)
        return value


# The functions of time


def test_the_derivatives_of_a_monotone_function_are_those_of_automatic_differentiation() -> None:
    function: MonotoneTime = wild(MonotoneTime(16)).double()
    time = torch.linspace(0, 1, 23, dtype=torch.float64, requires_grad=True)
    value, first, second = function(time)
    (expected,) = torch.autograd.grad(value.sum(), time, create_graph=True)
    (bend,) = torch.autograd.grad(expected.sum(), time)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, bend)
    assert value[0] == 0 and bool((value.diff() > 0).all())


@pytest.mark.parametrize("per", KINDS)
def test_gamma_falls_from_1_and_has_the_derivatives_of_automatic_differentiation(per: str) -> None:
    schedule = wild(build(per)).double()
    time = torch.linspace(0, 1, 9, dtype=torch.float64, requires_grad=True)
    rates = schedule.rates(images(1).double()).expand(
        9 if per == "pixel" else 1, *(-1,) * (3 if per != "scalar" else 0)
    )
    course = schedule.course(time, rates)
    assert course.gamma.shape == {"scalar": (9,), "channel": (9, 2, 1, 1), "pixel": (9, *SHAPE)}[per]
    assert bool((course.gamma[0] == 1).all()) and bool((course.gamma.diff(dim=0) < 0).all())
    numbers = course.gamma.flatten(1) if per != "scalar" else course.gamma[:, None]
    for place in range(numbers.shape[1]):
        (slope,) = torch.autograd.grad(numbers[:, place].sum(), time, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), time, retain_graph=True)
        torch.testing.assert_close(course.slope.reshape(numbers.shape)[:, place], slope)
        torch.testing.assert_close(course.bend.reshape(numbers.shape)[:, place], bend)
    torch.testing.assert_close(course.gamma, schedule.gamma(time, rates))
    speed = schedule.speed(time)[0].reshape(-1, *(1,) * (rates.ndim - 1))
    torch.testing.assert_close(course.residual, course.slope + rates * speed * course.gamma)


@pytest.mark.parametrize("per", KINDS)
def test_log_snr_is_that_of_gamma_and_stays_in_the_range_of_training(per: str) -> None:
    schedule = wild(build(per))
    time, condition = torch.tensor([0.0, 1e-6, 0.1, 0.5, 1.0]), images(5)
    logsnr = schedule(time, condition)
    assert logsnr.shape == ((5,) if per == "scalar" else (5, *SHAPE)) and logsnr.dtype == torch.float32
    exact = schedule.double()
    gamma = exact.gamma(time.double(), exact.rates(condition.double()).double())
    expected = torch.logit(gamma).clamp(-MAX_LOGSNR, MAX_LOGSNR).float()
    torch.testing.assert_close(logsnr, expected.expand_as(logsnr), rtol=1e-4, atol=1e-4)


def test_log_snr_has_finite_slopes_where_the_range_of_training_ends() -> None:
    schedule = build("scalar")
    with torch.no_grad():
        schedule.scale += 1000  # at the end nothing of the signal is left in float32
    logsnr = schedule(torch.tensor([0.0, 1.0]), images(2))
    assert logsnr.tolist() == pytest.approx([MAX_LOGSNR, -MAX_LOGSNR])
    logsnr.sum().backward()
    assert all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in schedule.parameters())


def test_a_schedule_keeps_single_precision_under_autocast() -> None:
    schedule, time = wild(build("pixel")), torch.rand(3)
    expected = schedule(time, images(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(schedule(time, images(3)), expected)


def test_a_pixel_is_told_by_the_image_around_it_and_all_rates_are_1_at_first() -> None:
    schedule, image = build("pixel"), images(1)
    torch.testing.assert_close(schedule.rates(image), torch.ones(1, *SHAPE))
    schedule = wild(schedule)
    rates, (other,) = schedule.rates(image), schedule.rates(image.index_fill(3, torch.tensor([3]), 5.0))
    assert bool((rates > 0).all()) and rates.std() > 0
    assert not torch.allclose(other[:, :, 2:], rates[0, :, :, 2:])


def test_a_channel_is_told_by_the_mean_over_the_image_if_there_is_one() -> None:
    schedule, two = build("channel", told_image=True), images(2)
    torch.testing.assert_close(schedule.rates(two), torch.ones(2, 2, 1, 1))
    schedule = wild(schedule)
    pixels = wild(build("pixel", told_image=True)).rates(two)  # the same weights
    found = schedule.rates(two)
    before_softplus = torch.log(torch.expm1(pixels)).mean((2, 3), keepdim=True)
    torch.testing.assert_close(found, torch.nn.functional.softplus(before_softplus))
    assert bool((found[0] != found[1]).all()) and "scale" not in dict(schedule.named_parameters())
    levels = schedule(torch.tensor([0.3, 0.3]), two)
    assert levels.shape == (2, *SHAPE)
    assert torch.equal(levels, levels[:, :, :1, :1].expand_as(levels)) and not torch.equal(levels[0], levels[1])
    time = torch.tensor([0.2, 0.9])
    together = schedule.penalties(schedule.course(time, found), found, two)
    alone = schedule.penalties(schedule.course(time[1:], found[1:]), found[1:], two[1:])
    torch.testing.assert_close(together.weighted(schedule.config)[1:], alone.weighted(schedule.config))
    assert build("scalar", told_image=True).of_image is None


def test_the_operations_of_rates_are_those_of_their_convolutions() -> None:
    row = torch.empty(1, *SHAPE)
    convolutions = 2 * 9 * 16 * (2 * 8 + 8 * 8 + 8 * 8 + 8 * 2)
    assert rate_flops(build("pixel", channels=8), row) == convolutions
    assert rate_flops(build("channel", told_image=True, channels=8), row) == convolutions
    assert rate_flops(build("channel"), row) == rate_flops(None, row) == 0


# The penalties


def test_penalties_of_a_course_that_keeps_the_constraint_and_falls_evenly() -> None:
    """gamma = 1 - c t: -ln(gamma) = -ln(1 - c t), beta = c / (1 - c t), and gamma'' = 0."""
    schedule, c = build("scalar", margin=0.1), 0.96
    with torch.no_grad():
        schedule.scale.fill_(math.log(math.expm1(1.0)))
    schedule.elapsed = Given(lambda t: (-torch.log1p(-c * t), c / (1 - c * t), (c / (1 - c * t)).square()))  # type: ignore[assignment]
    schedule.speed = Given(lambda t: (c / (1 - c * t), t, t))  # type: ignore[assignment]
    time, x0 = torch.tensor([0.0, 0.3, 0.7]), images(3)
    course = schedule.course(time, schedule.rates(x0))
    torch.testing.assert_close(course.gamma, 1 - c * time)
    torch.testing.assert_close(course.residual, torch.zeros(3), rtol=0, atol=1e-5)
    found = schedule.penalties(course, schedule.rates(x0), x0)
    torch.testing.assert_close(found.roughness, torch.zeros(3), rtol=0, atol=1e-5)
    ends = (c * 0.1) ** 2 + (1 - c * 0.9) ** 2
    torch.testing.assert_close(found.constraint, torch.full((3,), ends))
    left = torch.distributions.Normal(math.sqrt(1 - c) * x0, math.sqrt(c))
    divergence = torch.distributions.kl_divergence(left, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(found.prior, divergence.mean((1, 2, 3)))
    config = dataclasses.replace(schedule.config, constraint=3.0, prior=5.0, regularisation=7.0)
    expected = 3 * found.constraint + 5 * found.prior + 7 * found.roughness
    torch.testing.assert_close(found.weighted(config), expected)


@pytest.mark.parametrize("per", KINDS)
def test_penalties_are_means_over_the_numbers_of_each_row(per: str) -> None:
    schedule, time, x0 = wild(build(per)), torch.tensor([0.2, 0.9]), images(2)
    rates = schedule.rates(x0)
    together = schedule.penalties(schedule.course(time, rates), rates, x0)
    for row in range(2):
        own = rates[row : row + 1] if per == "pixel" else rates
        course = schedule.course(time[row : row + 1], own)
        alone = schedule.penalties(course, own, x0[row : row + 1])
        for name in ("constraint", "prior", "roughness"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row])
        gamma, slope = schedule.gamma(time[row : row + 1], own), course.slope
        start, end = (schedule.gamma(torch.tensor([at]), own) for at in (0.005, 0.995))
        by_hand = (slope + course.beta * gamma).square() + (start - 1).square() + end.square()
        torch.testing.assert_close(alone.constraint[0], by_hand.mean())


def fitted(per: str, *, regularisation: float, steps: int = 300) -> LearnedSchedule:
    """Fitted to the error of the best eps of Gaussian data: eps is easier to tell the less signal there is.

    With data of variance v its mean squared error is gamma v / (gamma v + 1 - gamma).
    """
    schedule, generator = build(per, regularisation=regularisation), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.03)
    for _ in range(steps):
        time, x0 = torch.rand(32, generator=generator), math.sqrt(0.3) * torch.randn(32, *SHAPE, generator=generator)
        rates = schedule.rates(x0)
        course = schedule.course(time, rates)
        error = 0.3 * course.gamma / (0.3 * course.gamma + 1 - course.gamma)
        held = schedule.penalties(course, rates, x0).weighted(schedule.config)
        optimizer.zero_grad()
        (by_row(error, 32) + held).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return schedule.requires_grad_(False)


def fall(course: Course) -> float:
    """Share of the time in which gamma falls from 0.9 to 0.1."""
    return float(((course.gamma < 0.9) & (course.gamma > 0.1)).float().mean())


def test_a_fit_keeps_the_constraints_and_without_the_regulariser_all_noise_comes_at_once() -> None:
    time, courses = torch.linspace(0, 1, 501), {}
    for name, regularisation in (("held", 0.002), ("free", 0.0)):
        schedule = fitted("scalar", regularisation=regularisation)
        courses[name] = schedule.course(time, schedule.rates(images(1)))
    start = build("scalar")
    before = start.requires_grad_(False).course(time, start.rates(images(1)))
    held, free = courses["held"], courses["free"]
    assert held.gamma[0] == 1 and float(held.gamma[-1]) < 0.01 < float(before.gamma[-1])
    assert float(held.residual.abs().mean()) < 0.05 * float(held.slope.abs().max())
    assert float(held.residual.abs().mean()) < 0.1 * float(before.residual.abs().mean())
    assert fall(free) < 0.8 * fall(held)
    assert float(free.bend.abs().max()) > 1.5 * float(held.bend.abs().max())
    assert float(free.bend.square().mean()) > 2 * float(held.bend.square().mean())


# As a schedule of log SNR


def test_as_a_schedule_it_has_the_log_snrs_of_its_times() -> None:
    schedule = wild(build("scalar"))
    found, time = schedule.as_schedule(), torch.tensor([0.05, 0.33, 0.5, 0.9, 1.0])
    torch.testing.assert_close(found(1 - time), schedule(time, images(5)).detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cdf(found.inverse(1 - time)), (1 - time).double())


def test_what_stands_for_a_learned_schedule_in_a_curriculum_is_its_time() -> None:
    u = torch.linspace(0, 1, 7)
    schedule = build_schedule(ScheduleConfig(kind="learned"))
    assert torch.equal(schedule(u), u) and torch.equal(schedule.cdf(u), u.double())
    assert schedule.pdf(torch.tensor([-0.1, 0.5, 1.1])).tolist() == [0, 1, 0]


# Sampling


def levels_of(schedule: LearnedSchedule, condition: Tensor) -> Any:
    rates = schedule.rates(condition)
    return lambda time: schedule.logsnr(torch.full((len(condition),), time), rates)


def blurred(z: Tensor, logsnr: Tensor) -> Tensor:
    """The best denoiser of Gaussian data of variance 0.3, whether levels are a map or one for each row."""
    alpha, sigma = variance_preserving(logsnr.reshape(len(z), *logsnr.shape[1:] or (1, 1, 1)))
    return 0.3 * alpha * z / (0.3 * alpha.square() + sigma.square())


@pytest.mark.parametrize(("eta", "solver"), [(1.0, "ddpm"), (0.0, "ddim"), (0.4, "ddim")])
def test_each_number_goes_its_way_as_if_all_had_its_levels(eta: float, solver: str) -> None:
    schedule = wild(build("pixel")).requires_grad_(False)
    levels_at = levels_of(schedule, images(2))
    found = solve_map(blurred, SampleNoise([3, 4], SHAPE), levels_at, num_steps=6, eta=eta)
    for place in ((0, 0, 0, 0), (1, 1, 2, 3)):
        own = torch.stack([levels_at(step / 6)[place] for step in range(6, 0, -1)])
        settings: dict[str, Any] = {"solver": solver, "eta": eta if solver == "ddim" else 0.0}
        expected = solve(blurred, SampleNoise([3, 4], SHAPE), own, **settings)
        torch.testing.assert_close(found[place], expected[place], rtol=1e-4, atol=1e-5)


def test_products_of_the_papers_steps_tend_to_gamma() -> None:
    """alpha_t = 1 - beta(t) / T, whose product misses gamma by O(1 / T) where gamma' = -beta gamma."""
    schedule = build("scalar").requires_grad_(False)
    schedule.speed = Given(lambda t: (schedule.elapsed(t)[1], t, t))  # type: ignore[assignment]
    rates = schedule.rates(images(1))
    misses = []
    for steps in (100, 200):
        time = torch.arange(1, steps + 1) / steps
        course = schedule.course(time, rates)
        misses.append(float(((1 - course.beta / steps).cumprod(0) - course.gamma).abs().max()))
    assert misses[1] < 0.6 * misses[0] < 0.02


def test_maps_of_one_level_are_noised_as_that_level() -> None:
    x0, eps, logsnr = images(2), images(2).flip(0), torch.tensor([-1.0, 2.0])
    full = logsnr[:, None, None, None].expand(2, *SHAPE)
    assert torch.equal(noised(x0, eps, full), noised(x0, eps, logsnr))


# What is refused


LEARNED = ScheduleConfig(kind="learned", learned=LearnedScheduleConfig(per="channel"))
MAPS = DiffusionSampleConfig(solver="ddpm", steps="time")


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        (LearnedScheduleConfig, {"margin": 0.5}, r"learned\.margin=0\.5 must lie between"),
        (LearnedScheduleConfig, {"hidden": 0}, r"learned\.hidden=0 must be at least 1"),
        (LearnedScheduleConfig, {"prior": -1.0}, r"learned\.prior=-1\.0 must be at least 0"),
        (LearnedScheduleConfig, {"learning_rate_factor": 0.0}, r"learning_rate_factor=0\.0 must be positive"),
        (LearnedScheduleConfig, {"channels": 8}, r"learned\.channels=8 has no effect with per=scalar"),
        (LearnedScheduleConfig, {"per": "row"}, r"learned\.per='row' must be one of pixel, channel, scalar"),
        (
            DiffusionConfig,
            {"schedule": ScheduleConfig(kind="learned", learned=LearnedScheduleConfig(per="channel", channels=8))},
            r"learned\.channels=8 has no effect with condition\.kind=class",
        ),
        (ScheduleConfig, {"learned": LearnedScheduleConfig(margin=0.1)}, r"has no effect with kind=cosine"),
        (ScheduleConfig, {"kind": "learned", "scale": 2.0}, r"schedule\.scale has no place in kind=learned"),
        (ScheduleConfig, {"kind": "learned", "mixed": MixedScheduleConfig()}, r"schedule\.mixed has no place"),
        (DiffusionConfig, {"weight": "min_snr"}, r"weight=min_snr with schedule\.kind=learned"),
        (DiffusionConfig, {"curriculum": CurriculumConfig(kind="asymmetric")}, r"curriculum\.kind=asymmetric"),
        (DiffusionConfig, {"curriculum": CurriculumConfig(clusters="logsnr")}, r"clusters=logsnr with schedule"),
        (
            DiffusionConfig,
            {"objective": ObjectiveConfig(kind="consistency"), "sample": DiffusionSampleConfig(solver="consistency")},
            r"objective\.kind=consistency",
        ),
        (DiffusionConfig, {"sample": DiffusionSampleConfig(steps="time", solver="heun")}, r"solver=heun knows one"),
        (DiffusionConfig, {"sample": DiffusionSampleConfig()}, r"sample\.steps=cosine with .*use steps=time"),
        (
            DiffusionConfig,
            {"sample": dataclasses.replace(MAPS, guidance_first=1.0)},
            r"sample\.guidance_first=1\.0 has no meaning",
        ),
        (
            DiffusionConfig,
            {"schedule": ScheduleConfig(kind="learned", learned=LearnedScheduleConfig(per="pixel"))},
            r"learned\.per=pixel .* condition\.kind=class",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(section: Any, settings: dict[str, Any], words: str) -> None:
    given = {"schedule": LEARNED, "sample": MAPS, **settings} if section is DiffusionConfig else settings
    with pytest.raises(ValueError, match=words):
        section(**given)


def test_what_can_be_learned_is_not_refused() -> None:
    pixel = ScheduleConfig(kind="learned", learned=LearnedScheduleConfig(per="pixel", channels=8))
    channel = ScheduleConfig(kind="learned", learned=LearnedScheduleConfig(per="channel", channels=8))
    for schedule in (pixel, channel):
        DiffusionConfig(schedule=schedule, condition=ConditionConfig(kind="image"), sample=MAPS)
    DiffusionConfig(schedule=ScheduleConfig(kind="learned"), target="eps")
