"""Targets: every one holds the same knowledge on every path, and its error has a known size in x0."""

from __future__ import annotations

import typing
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from generator.config import DiffusionConfig
from generator.denoiser import DiT
from generator.diffusion import Diffusion, over_latents
from generator.objective import TARGETS, WEIGHTS, output_to_x0, target_of, x0_gain, x0_to_eps
from generator.path import PATHS, noise_to_signal
from generator.solvers import SampleNoise, solve
from generator.steps import solver_levels

SHAPE = (2, 4, 4)
LOGSNR = torch.linspace(-10, 10, 21, dtype=torch.float64)


def draw(path: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, eps, alpha, sigma, x_t."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, len(LOGSNR), 3, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = (value[:, None, None, None] for value in PATHS[path](LOGSNR))
    return x, eps, alpha, sigma, alpha * x + sigma * eps


def test_every_choice_has_a_row() -> None:
    hints = typing.get_type_hints(DiffusionConfig)
    assert set(typing.get_args(hints["target"])) == set(TARGETS)
    assert set(typing.get_args(hints["weight"])) == set(WEIGHTS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", TARGETS)
def test_conversions_round_trip(kind: str, path: str) -> None:
    x, eps, alpha, sigma, x_t = draw(path)
    x0 = output_to_x0(kind, target_of(kind, x, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(x0, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(x0_to_eps(x0, x_t, alpha, sigma), eps, rtol=0, atol=1e-9)


def test_targets_are_those_of_the_papers() -> None:
    x, eps, alpha, sigma, x_t = draw("vp")
    torch.testing.assert_close(target_of("eps", x, eps, alpha, sigma), eps)
    torch.testing.assert_close(target_of("x0", x, eps, alpha, sigma), x)
    v = target_of("v", x, eps, alpha, sigma)
    torch.testing.assert_close(alpha * x_t - sigma * v, x)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps)


def test_velocity_is_the_slope_of_the_flow() -> None:
    x, eps, alpha, sigma, x_t = draw("flow")
    h = 1e-3
    moved = (1 - sigma - h) * x + (sigma + h) * eps
    torch.testing.assert_close((moved - x_t) / h, target_of("velocity", x, eps, alpha, sigma))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", TARGETS)
def test_gain_turns_an_output_error_into_an_x0_error(kind: str, path: str) -> None:
    x, eps, alpha, sigma, x_t = draw(path)
    output = target_of(kind, x, eps, alpha, sigma)
    error = output_to_x0(kind, output + 0.5, x_t, alpha, sigma) - x
    torch.testing.assert_close(error.square().mean((1, 2, 3)), 0.25 * x0_gain(kind, *PATHS[path](LOGSNR)))


def test_gains_of_the_variance_preserving_path() -> None:
    alpha, sigma = PATHS["vp"](LOGSNR)
    torch.testing.assert_close(x0_gain("eps", alpha, sigma), torch.exp(-LOGSNR))
    torch.testing.assert_close(x0_gain("v", alpha, sigma), torch.sigmoid(-LOGSNR))
    torch.testing.assert_close(x0_gain("x0", alpha, sigma), torch.ones_like(LOGSNR))


def test_plain_weight_is_one() -> None:
    torch.testing.assert_close(WEIGHTS["plain"](LOGSNR, LOGSNR.exp()), torch.ones_like(LOGSNR))


class ExactNetwork(nn.Module):
    """The best possible network for standard normal latents of deviation 0.5, on any path, with any target."""

    latent_shape, num_classes, blocks = SHAPE, 0, ()

    def __init__(self, path: str, target: str) -> None:
        super().__init__()
        self.path, self.target = PATHS[path], target
        self.register_buffer("positions", torch.zeros(1))

    def forward(self, x_t: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        alpha, sigma = (over_latents(value) for value in self.path(logsnr))
        x0 = gaussian(x_t / alpha, logsnr)
        return target_of(self.target, x0, x0_to_eps(x0, x_t, alpha, sigma), alpha, sigma)


def gaussian(x: Tensor, logsnr: Tensor) -> Tensor:
    return x * 0.25 / (0.25 + over_latents(noise_to_signal(logsnr)) ** 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_paths_and_targets_pose_the_same_problem(path: str, target: str) -> None:
    config = {"path": path, "target": target, "model": {"label_dropout": 0.0}}
    card = {"config": config, "num_classes": 0, "class_names": [], "tokenizer_fingerprint": "grey"}
    generator = Diffusion(cast(DiT, ExactNetwork(path, target)), card)
    levels = solver_levels("cosine", 8, first=-10.0, last=10.0)
    expected = solve(gaussian, SampleNoise([3, 4], SHAPE), levels, solver="heun")
    made = generator.sample(None, [3, 4], solver="heun", num_steps=8)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-4)
