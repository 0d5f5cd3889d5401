"""Solvers: exact where theory is exact, of the order they claim, true to the data's law, equal to diffusers."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionSampleConfig
from generator.path import variance_preserving
from generator.solvers import (
    CONSISTENCY_SOLVERS,
    ODE_SOLVERS,
    SDE_SOLVERS,
    Denoise,
    SampleNoise,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_maruyama,
    heun,
    sde_dpmpp_2m,
    solve,
)
from generator.steps import STEPS, solver_levels

SOLVERS = [*ODE_SOLVERS, *SDE_SOLVERS]
SETTINGS = [*((solver, 0.0) for solver in SOLVERS), ("ddim", 0.5)]
CENTRE, DEVIATION = 0.4, 0.6  # of Gaussian data
# Of a mixture of three Gaussians.
CENTRES = torch.tensor([-1.2, 0.3, 1.0], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
MEAN = (SHARES * CENTRES).sum()
MOMENTS = float(MEAN), float((SHARES * (DEVIATIONS**2 + CENTRES**2)).sum().sub(MEAN**2).sqrt())


def gaussian(z: Tensor, logsnr: Tensor, centre: float = 0.0) -> Tensor:
    """The exact denoiser of data N(centre, DEVIATION^2)."""
    alpha, sigma = (value[:, None] for value in variance_preserving(logsnr))
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return centre + gain * (z - alpha * centre)


def off_centre(z: Tensor, logsnr: Tensor) -> Tensor:
    return gaussian(z, logsnr, CENTRE)


def mixture(z: Tensor, logsnr: Tensor) -> Tensor:
    """The exact denoiser of the mixture: the posterior mean; curved in z."""
    alpha, sigma = (value.double()[:, None, None] for value in variance_preserving(logsnr))
    variance = alpha**2 * DEVIATIONS**2 + sigma**2  # [B, 1, K]
    error = z[..., None].double() - alpha * CENTRES  # [B, N, K]
    share = (SHARES.log() - variance.log() / 2 - error**2 / (2 * variance)).softmax(-1)
    return (share * (CENTRES + alpha * DEVIATIONS**2 / variance * error)).sum(-1).to(z)


def transported(z: Tensor, logsnr: Tensor) -> Tensor:
    """Where the probability flow takes z of mixture data: in one dimension it keeps every quantile."""
    alpha, sigma = variance_preserving(logsnr)

    def cdf(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        below = torch.special.ndtr((x[..., None] - alpha * CENTRES) / (alpha * DEVIATIONS).hypot(sigma))
        return (SHARES * below).sum(-1)

    quantile, low, high = cdf(z, alpha, sigma), torch.full_like(z, -10), torch.full_like(z, 10)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, torch.ones_like(alpha), torch.zeros_like(sigma)) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def contracted(z: Tensor, logsnr: Tensor) -> Tensor:
    """Where the probability flow takes z of centred Gaussian data: x(0) = x(s) c / sqrt(c^2 + s^2)."""
    alpha, sigma = variance_preserving(logsnr)
    return z * DEVIATION / (alpha * DEVIATION).hypot(sigma)


def starts(rows: int = 2, width: int = 16) -> Tensor:
    return SampleNoise(range(rows), (width,))().double()


def test_every_choice_has_a_row() -> None:
    known = typing.get_args(typing.get_type_hints(DiffusionSampleConfig)["solver"])
    assert set(known) == {*SOLVERS, *CONSISTENCY_SOLVERS}


@pytest.mark.parametrize(("denoise", "flow"), [(gaussian, contracted), (mixture, transported)])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver: str, order: int, denoise: Denoise, flow: Denoise) -> None:
    """Slope of log error over log steps, on levels evenly spaced in log SNR."""
    counts, errors = (16, 32, 64, 128), []
    for num_steps in counts:
        levels = solver_levels("logsnr", num_steps, first=-6.0, last=14.0)
        end = solve(denoise, SampleNoise(range(2), (16,)), levels, solver=solver, dtype=torch.float64)
        exact = flow(starts(), levels[0])
        errors.append(float((end - exact).norm() / exact.norm()))
    run = [math.log(count / counts[0]) for count in counts]
    rise = [math.log(errors[0] / error) for error in errors]
    slope = sum(x * y for x, y in zip(run[1:], rise[1:], strict=True)) / sum(x * x for x in run)
    assert slope == pytest.approx(order, abs=0.2)
    assert errors[-1] < (0.03 if order == 1 else 1e-3)


@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_ddim_on_unit_gaussian_data_shrinks_by_a_known_factor(num_steps: int) -> None:
    """With s = c tan(theta) at equal angles every Euler step is cos(step) cos(theta) / cos(theta'), and the exact flow
    to clean data cos(theta): the grid of least error (Sabour et al., 2024, theorem 3.1), for c = 1 the cosine's."""
    z, denoise = starts(), lambda z, logsnr: variance_preserving(logsnr)[0][:, None] * z
    levels = solver_levels("cosine", num_steps, first=-8.0, last=10.0)
    angle = math.atan(math.exp(4.0))
    end = solve(denoise, SampleNoise(range(2), (16,)), levels, solver="ddim", dtype=torch.float64)
    torch.testing.assert_close(end, z * math.cos(angle / num_steps) ** num_steps)
    if num_steps > 1:
        moved = levels.clone()
        for move in (-0.01, 0.01):
            moved[num_steps // 2] = levels[num_steps // 2] + move
            assert float(ddim(denoise, z, moved, noise=starts, eta=0).norm()) < float(end.norm())


def test_euler_along_the_flow_is_ddim_without_fresh_noise() -> None:
    levels = solver_levels("flow", 7, first=-8.0, last=8.0)
    torch.testing.assert_close(
        euler(mixture, starts(), levels), ddim(mixture, starts(), levels, noise=starts, eta=0.0), rtol=1e-12, atol=1e-12
    )


def test_ddpm_draws_from_the_posterior() -> None:
    """One step from x_t, x0 in the closed form of Ho et al. (2020), equation 7, over two distant levels."""
    levels, z, noise = torch.tensor([-1.0, 2.5], dtype=torch.float64), starts(), torch.randn(2, 16).double()
    (retained, kept), x0 = levels.sigmoid(), mixture(z, levels[:1].expand(2))
    alpha, beta = retained / kept, 1 - retained / kept
    mean = (kept.sqrt() * beta * x0 + alpha.sqrt() * (1 - kept) * z) / (1 - retained)
    expected = mean + (beta * (1 - kept) / (1 - retained)).sqrt() * noise

    seen: list[Tensor] = []
    ddpm(lambda z, logsnr: seen.append(z) or mixture(z, logsnr), z, levels, noise=lambda: noise)  # type: ignore[func-returns-value]
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize(("solver", "eta"), SETTINGS)
def test_a_constant_denoiser_is_solved_exactly(solver: str, eta: float) -> None:
    answer = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for steps, num_steps in itertools.product(STEPS.keys() - {"aligned"}, (1, 2, 9)):  # which are a model's own
        levels, noise = grid(steps, num_steps), SampleNoise([0, 1], (3, 4))
        end = solve(lambda z, logsnr: answer, noise, levels, solver=solver, eta=eta)
        assert end.dtype == torch.float32
        torch.testing.assert_close(end, answer, rtol=0, atol=1e-5)


def grid(steps: str, num_steps: int) -> Tensor:
    """Levels of any kind; the "schedule" of kind "time" is uniform in log SNR."""
    if steps == "time":
        return solver_levels("logsnr", num_steps, first=-10.0, last=10.0)
    listed = torch.linspace(-9, 9, num_steps).tolist() if steps == "list" else ()
    return solver_levels(steps, num_steps, first=-10.0, last=10.0, listed=listed)


@pytest.mark.parametrize(("solver", "eta"), SETTINGS)
@pytest.mark.parametrize("denoise", [off_centre, mixture])
def test_a_start_without_signal_is_the_limit_of_starts_with_little(solver: str, eta: float, denoise: Denoise) -> None:
    ends, little = [], -1e12 if "2m" in solver else -60.0  # multistep's extrapolation fades as 1 / -first
    for first in (-math.inf, little):
        levels = torch.cat([torch.tensor([first]), solver_levels("cosine", 6, first=-3.0, last=10.0)])
        ends.append(solve(denoise, SampleNoise([3], (8,)), levels, solver=solver, eta=eta, dtype=torch.float64))
    assert bool(ends[0].isfinite().all())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("solver", "eta"), SETTINGS)
def test_levels_with_hardly_any_noise_change_little(solver: str, eta: float) -> None:
    """Steps in the time of a Cauchy schedule have such; sigma there has no float32, and eps alone neither."""
    levels = solver_levels("logsnr", 40, first=-6.0, last=100.0)
    more = torch.cat([levels, torch.arange(103.0, 700.0, 3.0)])
    ends = [solve(off_centre, SampleNoise([3], (8,)), each, solver=solver, eta=eta) for each in (levels, more)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_asks_at_its_levels_in_order(solver: str) -> None:
    asked: list[Tensor] = []

    def denoise(z: Tensor, logsnr: Tensor) -> Tensor:
        assert logsnr.shape == (2,)
        asked.append(logsnr[0])
        return z * 0

    levels = solver_levels("logsnr", 4, first=-4.0, last=4.0)
    solve(denoise, SampleNoise([0, 1], (3,)), levels, solver=solver)
    expected = levels.float()
    if solver == "heun":
        expected = torch.cat([torch.stack([expected[:-1], expected[1:]], dim=1).flatten(), expected[-1:]])
    torch.testing.assert_close(torch.stack(asked), expected)


@pytest.mark.parametrize(
    ("solver", "eta"), [("ddpm", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("sde_dpmpp_2m", 0.0), ("euler_maruyama", 0.0)]
)
@pytest.mark.parametrize(
    ("denoise", "mean", "deviation"), [(off_centre, CENTRE, DEVIATION), (mixture, *MOMENTS)], ids=["one", "mixture"]
)
def test_stochastic_solvers_keep_mean_and_variance_of_the_data(
    solver: str, eta: float, denoise: Denoise, mean: float, deviation: float
) -> None:
    """20,480 numbers: standard errors are at most 0.007 of the mean and 0.005 of the deviation; the steps err by as
    little."""
    levels = solver_levels("flow", 200 if denoise is off_centre else 100, first=-10.0, last=10.0)
    end = solve(denoise, SampleNoise(range(64), (320,)), levels, solver=solver, eta=eta)
    assert float(end.mean()) == pytest.approx(mean, abs=0.02)
    assert float(end.std()) == pytest.approx(deviation, rel=0.02)
    without = solve(denoise, SampleNoise(range(64), (320,)), levels, solver="ddim", eta=0.0)
    assert float((end - without).abs().mean()) > 0.1, "fresh noise must matter"


def test_euler_maruyama_follows_score_and_velocity() -> None:
    """One step of dx = (v - w/2 score) dt + sqrt(w) dW, w = 2 t, with the score of Gaussian data's marginal."""
    levels, noise = torch.tensor([-2.0, -1.5], dtype=torch.float64), torch.randn(2, 16).double()
    t, t_next = (torch.sigmoid(-levels / 2)).tolist()
    z, (alpha, sigma) = starts(), variance_preserving(levels[0])
    x_t = z / (alpha + sigma)
    score = -(x_t - (1 - t) * CENTRE) / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    x0 = off_centre(z, levels[:1].expand(2))
    velocity = (x_t - (1 - t) * x0) / t - x0
    expected = x_t + (t_next - t) * (velocity - t * score) + math.sqrt(2 * t * (t - t_next)) * noise

    seen: list[Tensor] = []
    euler_maruyama(lambda z, logsnr: seen.append(z) or off_centre(z, logsnr), z, levels, noise=lambda: noise)  # type: ignore[func-returns-value]
    torch.testing.assert_close(seen[1] / sum(variance_preserving(levels[1])), expected)


@pytest.mark.parametrize(("solver", "eta"), SETTINGS)
def test_a_sample_depends_on_its_seed_alone(solver: str, eta: float) -> None:
    levels = solver_levels("cosine", 6, first=-8.0, last=10.0)
    together = solve(gaussian, SampleNoise([7, 8, 9], (4,)), levels, solver=solver, eta=eta)
    alone = solve(gaussian, SampleNoise([9], (4,)), levels, solver=solver, eta=eta)
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("steps", ["cosine", "flow", "logsnr", "karras"])
def test_few_heun_steps_from_much_noise_beat_few_euler_steps(steps: str) -> None:
    levels, z = solver_levels(steps, 10, first=-10.0, last=10.0), starts()
    errors = [(solver(gaussian, z, levels) - contracted(z, levels[0])).norm() for solver in (heun, euler)]
    assert float(errors[0]) < 0.5 * float(errors[1])


# Against diffusers, which must be given the same model: the mixture's denoiser, asked in each scheduler's own terms.


@pytest.fixture(scope="module")
def diffusers() -> typing.Any:
    return pytest.importorskip("diffusers")


def recorded(count: int) -> tuple[Tensor, Iterator[Tensor], Iterator[Tensor]]:
    """A start [4, 8], and the same fresh noise twice, float32."""
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(count + 1, 4, 8, generator=generator)
    return draws[0], iter(draws[1:]), iter(draws[1:])


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_agrees_with_diffusers(diffusers: typing.Any, eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample", timestep_spacing="leading")
    scheduler.set_timesteps(20)
    levels = torch.logit(scheduler.alphas_cumprod[scheduler.timesteps].double())
    z, theirs, ours = recorded(20)
    expected = z
    for time, level, noise in zip(scheduler.timesteps, levels, theirs, strict=True):
        x0 = mixture(expected, level.expand(4))
        expected = scheduler.step(x0, time, expected, eta=eta, variance_noise=noise).prev_sample
    end = ddim(mixture, z.double(), levels, noise=lambda: next(ours), eta=eta)
    torch.testing.assert_close(end.float(), expected, rtol=1e-4, atol=1e-4)


def test_ddpm_agrees_with_diffusers(diffusers: typing.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scheduler draws the noise itself; `fixed_small` is the posterior's variance."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, prediction_type="sample", variance_type="fixed_small")
    scheduler.set_timesteps(20)
    levels = torch.logit(scheduler.alphas_cumprod[scheduler.timesteps].double())
    z, theirs, ours = recorded(20)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(theirs))
    expected = z
    for time, level in zip(scheduler.timesteps, levels, strict=True):
        expected = scheduler.step(mixture(expected, level.expand(4)), time, expected).prev_sample
    end = ddpm(mixture, z.double(), levels, noise=lambda: next(ours))
    torch.testing.assert_close(end.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("karras", [False, True])
def test_multistep_agrees_with_diffusers(diffusers: typing.Any, kind: str, karras: bool) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=kind, solver_order=2, prediction_type="sample", use_karras_sigmas=karras
    )
    scheduler.set_timesteps(20)
    levels = -2 * scheduler.sigmas[:-1].double().log()
    z, theirs, ours = recorded(20)
    expected = z
    for time, level, noise in zip(scheduler.timesteps, levels, theirs, strict=True):
        x0 = mixture(expected, level.expand(4))
        expected = scheduler.step(x0, time, expected, variance_noise=noise).prev_sample
    if kind == "dpmsolver++":
        end = dpmpp_2m(mixture, z.double(), levels)
    else:
        end = sde_dpmpp_2m(mixture, z.double(), levels, noise=lambda: next(ours))
    torch.testing.assert_close(end.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "solver"), [("FlowMatchEulerDiscrete", euler), ("FlowMatchHeunDiscrete", heun)])
def test_flow_solvers_agree_with_diffusers(
    diffusers: typing.Any, name: str, solver: Callable[[Denoise, Tensor, Tensor], Tensor]
) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(shift=3.0)
    scheduler.set_timesteps(12)
    x_t = recorded(0)[0]
    times = scheduler.timesteps / 1000  # of each call: heun has two a step
    for time, scaled in zip(times, scheduler.timesteps, strict=True):
        level = -2 * torch.logit(time.double())
        alpha, sigma = variance_preserving(level)
        z = (alpha + sigma) * x_t.double()
        x0 = mixture(z, level.expand(4))
        velocity = (x_t - x0) / time.double()
        x_t = scheduler.step(velocity.float(), scaled, x_t).prev_sample
    levels = -2 * torch.logit(times.double().unique(sorted=True).flip(0))
    end = solver(mixture, sum(variance_preserving(levels[0])) * recorded(0)[0].double(), levels)
    torch.testing.assert_close(end.float(), x_t, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_refused() -> None:
    levels, noise = torch.zeros(1), SampleNoise([0], (2,))
    with pytest.raises(ValueError, match=r"diffusion\.sample\.solver='rk4' is unknown"):
        solve(gaussian, noise, levels, solver="rk4")
    for solver in ("heun", "ddpm"):
        with pytest.raises(ValueError, match=rf"eta=0\.5 needs solver=ddim: {solver} has no eta"):
            solve(gaussian, noise, levels, solver=solver, eta=0.5)
