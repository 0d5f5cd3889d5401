"""Paths: signal and noise add up, the network's view and the velocity are the papers', times name levels."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generator.config import DiffusionConfig
from generator.path import (
    PATHS,
    beside,
    cosine_logsnr,
    cosine_time,
    flow_logsnr,
    flow_time,
    linear_flow,
    noise_to_signal,
    noised,
    variance_preserving,
)

Convert = Callable[[Tensor], Tensor]
LOGSNR = torch.linspace(-18, 18, 73, dtype=torch.float64)
X0, EPS = torch.randn(2, len(LOGSNR), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seen(path: str, z: Tensor, logsnr: Tensor, sigma_data: float = 1.0) -> Tensor:
    return beside(PATHS[path].input_scale(*variance_preserving(logsnr), sigma_data), z) * z


def velocity(path: str, logsnr: Tensor) -> Tensor:
    c_x, c_eps = (beside(value, X0) for value in PATHS[path].velocity(*variance_preserving(logsnr)))
    return c_x * X0 + c_eps * EPS


def test_every_choice_has_a_row() -> None:
    assert set(typing.get_args(typing.get_type_hints(DiffusionConfig)["path"])) == set(PATHS)


def test_variance_preserving_keeps_unit_variance() -> None:
    alpha, sigma = variance_preserving(LOGSNR)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(LOGSNR))


def test_flow_is_a_straight_line_in_its_time() -> None:
    alpha, sigma = linear_flow(LOGSNR)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(LOGSNR))
    torch.testing.assert_close(sigma, flow_time(LOGSNR))


@pytest.mark.parametrize("path", [variance_preserving, linear_flow])
def test_the_ratio_is_the_logsnr(path: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    alpha, sigma = path(LOGSNR)
    torch.testing.assert_close(2 * (alpha / sigma).log(), LOGSNR)
    torch.testing.assert_close(sigma / alpha, noise_to_signal(LOGSNR))


@pytest.mark.parametrize("path", [variance_preserving, linear_flow])
def test_coefficients_hold_to_the_ends_in_single_precision(path: Convert) -> None:
    for value, expected in zip(path(LOGSNR.float()), path(LOGSNR), strict=True):
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0)


def test_networks_see_what_the_papers_show_them() -> None:
    z, s, t = noised(X0, EPS, LOGSNR), noise_to_signal(LOGSNR)[:, None], flow_time(LOGSNR)[:, None]
    torch.testing.assert_close(seen("vp", z, LOGSNR), z)
    torch.testing.assert_close(seen("gvp", z, LOGSNR), z)
    torch.testing.assert_close(seen("flow", z, LOGSNR), (1 - t) * X0 + t * EPS)
    for sigma_data in (0.5, 1.0):
        edm = (X0 + s * EPS) / (s**2 + sigma_data**2).sqrt()
        torch.testing.assert_close(seen("ve", z, LOGSNR, sigma_data), edm)
    torch.testing.assert_close(seen("ve", z, LOGSNR), z)


@pytest.mark.parametrize("path", PATHS)
def test_without_any_signal_a_network_sees_the_noise(path: str) -> None:
    end = torch.full((len(EPS),), -torch.inf)
    torch.testing.assert_close(noised(X0, EPS, end), EPS)
    torch.testing.assert_close(seen(path, EPS, end), EPS)
    assert all(value.isfinite().all() for value in PATHS[path].velocity(*variance_preserving(end)))


# Each path in its own variables: time -> x_t, and time -> log SNR.
OWN: dict[str, tuple[Convert, Convert]] = {
    "vp":   (lambda t: torch.cos(t) * X0 + torch.sin(t) * EPS, lambda t: -2 * torch.log(torch.tan(t))),
    "gvp":  (lambda t: torch.cos(t * math.pi / 2) * X0 + torch.sin(t * math.pi / 2) * EPS, cosine_logsnr),
    "flow": (lambda t: (1 - t) * X0 + t * EPS, flow_logsnr),
    "ve":   (lambda t: X0 + t * EPS, lambda t: -2 * torch.log(t)),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_by_the_path_s_own_time(path: str) -> None:
    position, level = OWN[path]
    time, h = torch.linspace(0.02, 0.98, len(X0), dtype=torch.float64)[:, None], 1e-5
    slope = (position(time + h) - position(time - h)) / (2 * h)
    torch.testing.assert_close(velocity(path, level(time[:, 0])), slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("to_time", "to_logsnr"), [(flow_time, flow_logsnr), (cosine_time, cosine_logsnr)])
def test_times_name_levels(to_time: Convert, to_logsnr: Convert) -> None:
    time = to_time(LOGSNR)
    torch.testing.assert_close(to_logsnr(time), LOGSNR)
    assert bool((time.diff() < 0).all()), "time 0 must be data, time 1 noise"
    assert float(to_time(torch.tensor(0.0))) == pytest.approx(0.5)


def test_cosine_time_makes_alpha_a_cosine() -> None:
    time = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma = variance_preserving(cosine_logsnr(time))
    torch.testing.assert_close(alpha, torch.cos(time * torch.pi / 2))
    torch.testing.assert_close(sigma, torch.sin(time * torch.pi / 2))
