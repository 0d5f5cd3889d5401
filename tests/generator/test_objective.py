"""Targets: every one holds the same knowledge, and its error has a known size in x0."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionConfig
from generator.objective import TARGETS, WEIGHTS, output_to_x0, target_of, x0_gain, x0_to_eps
from generator.path import PATHS

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
