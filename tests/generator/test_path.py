"""Paths: signal and noise add up, their ratio is the log SNR, and times name levels without loss."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionConfig
from generator.path import PATHS, cosine_logsnr, cosine_time, flow_logsnr, flow_time, noise_to_signal

Convert = Callable[[Tensor], Tensor]
LOGSNR = torch.linspace(-18, 18, 73, dtype=torch.float64)


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(DiffusionConfig)["path"])) == set(PATHS)


def test_variance_preserving_keeps_unit_variance() -> None:
    alpha, sigma = PATHS["vp"](LOGSNR)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(LOGSNR))


def test_flow_is_a_straight_line_in_its_time() -> None:
    alpha, sigma = PATHS["flow"](LOGSNR)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(LOGSNR))
    torch.testing.assert_close(sigma, flow_time(LOGSNR))


@pytest.mark.parametrize("name", PATHS)
def test_the_ratio_of_a_path_is_the_logsnr(name: str) -> None:
    alpha, sigma = PATHS[name](LOGSNR)
    torch.testing.assert_close(2 * (alpha / sigma).log(), LOGSNR)
    torch.testing.assert_close(sigma / alpha, noise_to_signal(LOGSNR))


@pytest.mark.parametrize("name", PATHS)
def test_paths_hold_to_the_ends_in_single_precision(name: str) -> None:
    alpha, sigma = PATHS[name](LOGSNR.float())
    expected_alpha, expected_sigma = PATHS[name](LOGSNR)
    torch.testing.assert_close(alpha, expected_alpha.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sigma, expected_sigma.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("to_time", "to_logsnr"), [(flow_time, flow_logsnr), (cosine_time, cosine_logsnr)])
def test_times_name_levels(to_time: Convert, to_logsnr: Convert) -> None:
    time = to_time(LOGSNR)
    torch.testing.assert_close(to_logsnr(time), LOGSNR)
    assert bool((time.diff() < 0).all()), "time 0 must be data, time 1 noise"
    assert float(to_time(torch.tensor(0.0))) == pytest.approx(0.5)


def test_cosine_time_makes_alpha_a_cosine() -> None:
    time = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma = PATHS["vp"](cosine_logsnr(time))
    torch.testing.assert_close(alpha, torch.cos(time * torch.pi / 2))
    torch.testing.assert_close(sigma, torch.sin(time * torch.pi / 2))
