"""Guidance: its formula, where it acts, what it costs, and what rescaling and another network change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from generator.guidance import guided, rescaled
from generator.path import variance_preserving
from generator.solvers import solve
from generator.steps import solver_levels

NULL = torch.full((3,), 5)
LABELS = torch.tensor([0, 1, 2])


def labelled(z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
    return z * 0.1 + labels[:, None].float() + logsnr[:, None]


def weaker(z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
    return z * 0.3 + 0.9 * labels[:, None].float()


class Counted:
    """A denoiser that notes how many rows each call has."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        self.sizes.append(len(z))
        return labelled(z, logsnr, labels)


def at(level: float) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.full((3,), level)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_classifier_free_guidance_extrapolates_from_the_null_label(scale: float) -> None:
    conditional, unconditional = labelled(*at(0), LABELS), labelled(*at(0), NULL)
    combined = guided(labelled, LABELS, null=NULL, scale=scale)(*at(0))
    torch.testing.assert_close(combined, unconditional + scale * (conditional - unconditional))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_autoguidance_extrapolates_from_the_weaker_network_under_the_same_label(scale: float) -> None:
    strong, weak = labelled(*at(1), LABELS), weaker(*at(1), LABELS)
    combined = guided(labelled, LABELS, null=NULL, scale=scale, guide=weaker)(*at(1))
    torch.testing.assert_close(combined, weak + scale * (strong - weak))
    itself = guided(labelled, LABELS, null=NULL, scale=scale, guide=labelled)(*at(1))
    torch.testing.assert_close(itself, strong)


def test_guidance_costs_one_call_of_twice_the_rows_and_no_guidance_nothing() -> None:
    denoise, guide = Counted(), Counted()
    torch.testing.assert_close(guided(denoise, LABELS, null=NULL, scale=1)(*at(0)), labelled(*at(0), LABELS))
    guided(denoise, LABELS, null=NULL, scale=2)(*at(0))
    guided(denoise, LABELS, null=NULL, scale=2, guide=guide)(*at(0))
    assert (denoise.sizes, guide.sizes) == ([3, 6, 3], [3])


@pytest.mark.parametrize(
    ("first", "last", "inside"),
    [
        (None, None, [-math.inf, -3.0, 0.1, 9.0]),
        (0.1, None, [0.1, 9.0]),
        (None, 0.1, [-math.inf, -3.0, 0.1]),
        (-3.0, 0.1, [-3.0, 0.1]),
    ],
)
def test_an_interval_guides_between_its_ends_alone(
    first: float | None, last: float | None, inside: list[float]
) -> None:
    """0.1 has no exact float32, in which networks are asked: ends count as inside all the same."""
    for level in (-math.inf, -3.0, 0.1, 9.0):
        denoise, guide = Counted(), Counted()
        interval: dict[str, Any] = {"null": NULL, "scale": 2.0, "first": first, "last": last, "rescale": 0.5}
        combined = guided(denoise, LABELS, **interval)(*at(level))
        guided(denoise, LABELS, **interval, guide=guide)(*at(level))
        assert (denoise.sizes, guide.sizes) == (([6, 3], [3]) if level in inside else ([3, 3], []))
        if level not in inside:
            torch.testing.assert_close(combined, labelled(*at(level), LABELS), rtol=0, atol=0)


def test_rescaling_returns_to_the_deviation_without_guidance() -> None:
    x0, reference = 3 * torch.randn(4, 2, 5, 5) + 1, torch.randn(4, 2, 5, 5)
    wanted, own = (each.flatten(1).std(1) for each in (reference, x0))
    torch.testing.assert_close(rescaled(x0, reference, 0.0), x0, rtol=0, atol=0)
    torch.testing.assert_close(rescaled(x0, reference, 1.0).flatten(1).std(1), wanted)
    torch.testing.assert_close(rescaled(x0, reference, 0.7).flatten(1).std(1), 0.7 * wanted + 0.3 * own)
    flat = torch.full((1, 2, 5, 5), 2.0)
    torch.testing.assert_close(rescaled(flat, reference[:1], 0.7), flat)


def test_rescaling_is_done_on_the_guided_estimate() -> None:
    """Lin et al. (2024), equations 15 and 16, on x0."""
    strong, weak = labelled(*at(0), LABELS), weaker(*at(0), LABELS)
    plain = weak + 4 * (strong - weak)
    ratio = strong.std(1, keepdim=True) / plain.std(1, keepdim=True)
    combined = guided(labelled, LABELS, null=NULL, scale=4, rescale=0.7, guide=weaker)(*at(0))
    torch.testing.assert_close(combined, 0.7 * ratio * plain + 0.3 * plain)


def test_guided_gaussians_have_a_closed_form() -> None:
    """Class data N(m, 1) guided against N(0, 2) with scale 2: dx/ds = s (2 (x - m) / (1 + s^2) - x / (2 + s^2)).

    Its homogeneous solution is (1 + s^2) / sqrt(2 + s^2), so noise eps ends at m (1 + ln(1 + sqrt 2) / sqrt 2) + eps /
    sqrt 2: further out than the class itself, and closer together.
    """

    def denoise(z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        alpha, sigma = (value[:, None] for value in variance_preserving(logsnr))
        variance = torch.where(labels == 2, 2.0, 1.0)[:, None]
        mean = torch.tensor([-1.0, 1.0, 0.0], dtype=z.dtype)[labels][:, None]
        return mean + variance * alpha / (variance * alpha**2 + sigma**2) * (z - alpha * mean)

    eps = torch.linspace(-2, 2, 5).expand(2, 5)
    levels = solver_levels("logsnr", 200, first=-20.0, last=20.0)
    combined = guided(denoise, torch.tensor([0, 1]), null=torch.tensor([2, 2]), scale=2.0)
    end = solve(combined, lambda: eps, levels, solver="heun", dtype=torch.float64)
    mean = torch.tensor([[-1.0], [1.0]]) * (1 + math.log(1 + math.sqrt(2)) / math.sqrt(2))
    torch.testing.assert_close(end, (mean + eps / math.sqrt(2)).double(), rtol=0, atol=2e-3)
