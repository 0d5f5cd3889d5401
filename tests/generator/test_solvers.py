"""Solvers: exact where theory is exact, of the order they claim, equal to diffusers, and guided as the formula says."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionSampleConfig
from generator.path import flow_time, noise_to_signal, variance_preserving
from generator.solvers import ODE_SOLVERS, SDE_SOLVERS, SampleNoise, ddim, euler, guided, heun, solve
from generator.steps import STEPS, solver_levels

SOLVERS = [*ODE_SOLVERS, *SDE_SOLVERS]
DEVIATION = 0.6


def gaussian(x: Tensor, logsnr: Tensor) -> Tensor:
    """The exact denoiser of data N(0, DEVIATION^2)."""
    s = noise_to_signal(logsnr)[:, None]
    return x * DEVIATION**2 / (DEVIATION**2 + s**2)


def integration_error(solver: str, num_steps: int) -> float:
    """Relative error against the closed form x(0) = x(s) c / sqrt(c^2 + s^2)."""
    levels = solver_levels("cosine", num_steps, first=-6.0, last=10.0)
    noise = SampleNoise([0, 1], (16,))
    end = solve(gaussian, noise, levels, solver=solver, dtype=torch.float64)
    s = math.exp(3.0)
    exact = s * SampleNoise([0, 1], (16,))().double() * DEVIATION / math.hypot(DEVIATION, s)
    return float((end - exact).norm() / exact.norm())


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(DiffusionSampleConfig)["solver"])) == set(SOLVERS)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    errors = [integration_error(solver, num_steps) for num_steps in (64, 128, 256)]
    observed = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert observed == pytest.approx([order, order], abs=0.15)
    assert errors[-1] < 0.02


def test_ddim_without_fresh_noise_is_euler() -> None:
    levels, x = solver_levels("flow", 7, first=-8.0, last=8.0), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ddim(gaussian, x, levels, noise=lambda: x, eta=0.0), euler(gaussian, x, levels))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_a_constant_denoiser_is_solved_exactly(solver: str, steps: str, num_steps: int) -> None:
    answer = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    levels = solver_levels(steps, num_steps, first=-10.0, last=10.0)
    end = solve(lambda x, logsnr: answer, SampleNoise([0, 1], (3, 4)), levels, solver=solver)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, answer, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_asks_at_its_levels_in_order(solver: str) -> None:
    asked: list[Tensor] = []

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        assert logsnr.shape == (2,)
        asked.append(logsnr[0])
        return x * 0

    levels = solver_levels("logsnr", 4, first=-4.0, last=4.0)
    solve(denoise, SampleNoise([0, 1], (3,)), levels, solver=solver)
    expected = levels.float()
    if solver == "heun":
        expected = torch.cat([torch.stack([expected[:-1], expected[1:]], dim=1).flatten(), expected[-1:]])
    torch.testing.assert_close(torch.stack(asked), expected)


def test_ancestral_sampling_keeps_the_variance_of_the_data() -> None:
    levels = solver_levels("cosine", 200, first=-8.0, last=10.0)
    end = solve(gaussian, SampleNoise(range(64), (256,)), levels, solver="ddim", eta=1.0)
    assert float(end.std()) == pytest.approx(DEVIATION, abs=0.01)
    other = solve(gaussian, SampleNoise(range(64), (256,)), levels, solver="ddim", eta=0.0)
    assert float((end - other).abs().mean()) > 0.1, "eta=1 must add fresh noise"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_depends_on_its_seed_alone(eta: float) -> None:
    levels = solver_levels("cosine", 6, first=-8.0, last=10.0)
    together = solve(gaussian, SampleNoise([7, 8, 9], (4,)), levels, solver="ddim", eta=eta)
    alone = solve(gaussian, SampleNoise([9], (4,)), levels, solver="ddim", eta=eta)
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])


def test_heun_is_the_trapezoid_rule_of_the_flow() -> None:
    """dx_t/dt = eps - x0 on x_t = (1 - t) x0 + t eps, written out for two steps."""
    levels = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    t, t_next = flow_time(levels)

    def slope(x_t: Tensor, t: Tensor, logsnr: Tensor) -> Tensor:
        return (x_t - gaussian(x_t / (1 - t), logsnr.expand(3))) / t

    x_t = (1 - t) * x
    first = slope(x_t, t, levels[0])
    second = slope(x_t + (t_next - t) * first, t_next, levels[1])
    x_next = x_t + (t_next - t) * (first + second) / 2
    torch.testing.assert_close(heun(gaussian, x, levels), gaussian(x_next / (1 - t_next), levels[1].expand(3)))


@pytest.mark.parametrize("steps", STEPS)
def test_few_heun_steps_from_much_noise_beat_few_euler_steps(steps: str) -> None:
    levels = solver_levels(steps, 10, first=-10.0, last=10.0)
    s, x = math.exp(5.0), math.exp(5.0) * torch.randn(3, 4, dtype=torch.float64)
    exact = x * DEVIATION / math.hypot(DEVIATION, s)
    errors = [(solver(gaussian, x, levels) - exact).norm() for solver in (heun, euler)]
    assert float(errors[0]) < 0.5 * float(errors[1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_agrees_with_diffusers(eta: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    retained = scheduler.alphas_cumprod[scheduler.timesteps].double()
    logsnr, network = torch.logit(retained), torch.nn.Linear(8, 8)
    eps, fresh = torch.randn(4, 8), torch.randn(20, 4, 8)

    with torch.no_grad():
        theirs = eps
        for time, noise in zip(scheduler.timesteps, fresh, strict=True):
            theirs = scheduler.step(network(theirs), time, theirs, eta=eta, variance_noise=noise).prev_sample
        alpha, _ = variance_preserving(logsnr[0])
        draws = iter(fresh)
        ours = ddim(predicts_eps(network), eps.double() / alpha, logsnr, noise=lambda: next(draws), eta=eta)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-4)


def predicts_eps(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser of a network that predicts eps on the variance-preserving path."""

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        alpha, _ = (value[:, None] for value in variance_preserving(logsnr))
        return x - noise_to_signal(logsnr)[:, None] * network((alpha * x).float()).double()

    return denoise


def labelled(x: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
    return x * 0.1 + labels[:, None].float()


def test_guidance_extrapolates_from_the_null_label() -> None:
    x, logsnr, labels = torch.randn(3, 4), torch.zeros(3), torch.tensor([0, 1, 2])
    conditional, unconditional = labelled(x, logsnr, labels), labelled(x, logsnr, torch.full((3,), 5))
    for weight in (0.0, 0.5, 3.0):
        combined = guided(labelled, labels, null=5, weight=weight)(x, logsnr)
        torch.testing.assert_close(combined, unconditional + weight * (conditional - unconditional))


def test_guidance_one_asks_the_conditional_network_alone() -> None:
    x, logsnr, labels = torch.randn(3, 4), torch.zeros(3), torch.tensor([0, 1, 2])
    sizes: list[int] = []

    def counted(x: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x))
        return labelled(x, logsnr, labels)

    torch.testing.assert_close(guided(counted, labels, null=5, weight=1)(x, logsnr), labelled(x, logsnr, labels))
    guided(counted, labels, null=5, weight=2)(x, logsnr)
    assert sizes == [3, 6]


def test_bad_settings_are_refused() -> None:
    levels, noise = torch.zeros(1), SampleNoise([0], (2,))
    with pytest.raises(ValueError, match=r"diffusion\.sample\.solver='rk4' is unknown"):
        solve(gaussian, noise, levels, solver="rk4")
    with pytest.raises(ValueError, match=r"eta=0\.5 needs solver=ddim: heun adds no noise"):
        solve(gaussian, noise, levels, solver="heun", eta=0.5)
