"""Relative entropy of consecutive marginals: closed forms, and the estimate for data that are points."""

import math

import numpy as np
import pytest
import torch

from generator.config import ScheduleConfig
from generator.marginals import (
    COORDINATES,
    even_times,
    gaussian_divergence,
    mixture_divergence,
    principal,
)
from generator.path import PATHS
from generator.schedule import MAX_LOGSNR, build_schedule


def levels(kind: str) -> torch.Tensor:
    return even_times(build_schedule(ScheduleConfig(kind=kind)))[1]  # type: ignore[arg-type]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_path_has_coordinates() -> None:
    assert set(COORDINATES) == set(PATHS)
    with pytest.raises(ValueError, match=r"diffusion\.path='vpp' is unknown; choose one of vp, gvp, flow, ve"):
        gaussian_divergence(torch.zeros(1), torch.ones(1), torch.ones(1), path="vpp")


def test_even_times_of_ddpm_are_its_own_steps() -> None:
    times, found = even_times(build_schedule(ScheduleConfig(kind="ddpm")))
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert times[0] == 0 and times[-1] == 1
    np.testing.assert_allclose(found.numpy(), np.log(bar / (1 - bar)), atol=1e-9)


def test_even_times_of_an_endless_schedule_lie_within() -> None:
    times, found = even_times(build_schedule(ScheduleConfig(kind="uniform_time")), num=4)
    assert times.tolist() == [0.125, 0.375, 0.625, 0.875]
    np.testing.assert_allclose(found.numpy(), 2 * np.log((1 - times.numpy()) / times.numpy()))
    clamped = levels("cauchy")
    assert clamped.abs().max() == MAX_LOGSNR and (clamped.diff() <= 0).all()


# Linear DDPM, T = 1000: by the variance of the data, KL of steps i + 1 and i in one dimension. Points without variance
# fall with noise, as the paper says of images; a variance in between rises first.
ORACLES = {
    0.0: {0: 2.06e-1, 9: 5.63e-3, 99: 8.20e-5, 299: 3.97e-6, 599: 2.56e-8, 899: 6.16e-12},
    0.25: {0: 3.2e-8, 9: 2.0e-7, 99: 4.6e-6, 299: 1.7e-6, 599: 1.4e-8},
}


@pytest.mark.parametrize(("variance", "oracles"), ORACLES.items())
def test_closed_form_has_the_reference_values(variance: float, oracles: dict[int, float]) -> None:
    found = levels("ddpm")
    divergence = gaussian_divergence(found[1:], found[:-1], torch.tensor([variance]).double(), path="vp")
    for index, value in oracles.items():
        digits = 3 if variance == 0 else 2
        assert float(divergence[index]) == pytest.approx(value, rel=0.6 * 10 ** (1 - digits))
    if variance == 0:
        assert (divergence.diff() < 0).all()


def test_data_of_unit_variance_do_not_change_on_a_variance_preserving_path() -> None:
    found = levels("ddpm")
    for path in ("vp", "gvp"):
        assert gaussian_divergence(found[1:], found[:-1], torch.ones(3).double(), path=path).max() < 1e-29
    assert gaussian_divergence(found[1:], found[:-1], torch.ones(3).double(), path="ve").min() > 1e-12


@pytest.mark.parametrize("path", list(COORDINATES))
def test_closed_form_is_that_of_two_gaussians(path: str) -> None:
    """Against torch's own divergence, with means, summed over dimensions."""
    noisier, cleaner = torch.tensor([-1.5]).double(), torch.tensor([0.5]).double()
    variances, means = torch.tensor([0.0, 0.3, 2.0]).double(), torch.tensor([1.0, -2.0, 0.0]).double()

    def marginal(level: torch.Tensor) -> torch.distributions.Normal:
        a, s = COORDINATES[path](level)
        return torch.distributions.Normal(a * means, (a.square() * variances + s.square()).sqrt())

    expected = torch.distributions.kl_divergence(marginal(noisier), marginal(cleaner)).sum()
    found = gaussian_divergence(noisier, cleaner, variances, means, path=path)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", list(COORDINATES))
@pytest.mark.parametrize("pair", [(-1.5, 0.5), (9.0, 9.2), (-10.118, -10.098)])
def test_one_point_has_the_divergence_of_two_gaussians(path: str, pair: tuple[float, float]) -> None:
    point = torch.randn(1, 50, dtype=torch.float64, generator=seeded())
    found = mixture_divergence(*pair, point, path=path, draws=20, generator=seeded())
    noisier, cleaner = (torch.tensor([level], dtype=torch.float64) for level in pair)
    expected = float(gaussian_divergence(noisier, cleaner, torch.zeros(50).double(), point[0], path=path))
    assert found.value == pytest.approx(expected, rel=1e-7) and found.error < 1e-7 * expected


@pytest.mark.parametrize("path", ["vp", "flow", "ve"])
@pytest.mark.parametrize("pair", [(1.0, 1.1), (-1.0, -0.5), (-4.0, -3.9)])
def test_many_points_of_a_gaussian_have_its_divergence(path: str, pair: tuple[float, float]) -> None:
    """Points at the normal's quantiles; with noise wider than their distances they cannot be told from it."""
    quantiles = torch.special.ndtri((torch.arange(2000).double() + 0.5) / 2000)
    points = torch.stack([0.6 * quantiles, 0.2 + 0.3 * quantiles[torch.randperm(2000, generator=seeded())]], dim=1)
    variances, means = principal(points)
    found = mixture_divergence(*pair, points, path=path, draws=4000, generator=seeded(1))
    noisier, cleaner = (torch.tensor([level], dtype=torch.float64) for level in pair)
    expected = float(gaussian_divergence(noisier, cleaner, variances, means, path=path))
    assert found.error < 0.1 * expected
    assert abs(found.value - expected) < 4 * found.error + 0.01 * expected


def test_estimate_is_exact_where_noise_does_not_join_the_points() -> None:
    """In many dimensions r is 0 in every draw there; the mean of r - 1 - ln r would be too small by 1."""
    points = 5 * torch.randn(300, 64, dtype=torch.float64, generator=seeded())
    found = mixture_divergence(6.0, 7.0, points, path="vp", draws=200, generator=seeded())
    ends = (torch.tensor([level], dtype=torch.float64) for level in (6.0, 7.0))
    expected = float(gaussian_divergence(*ends, torch.zeros(64), points.square().mean(0).sqrt(), path="vp"))
    assert expected > 10 and found.value == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("pair", [(-2.0, 0.0), (-1.0, 1.0), (-1.0, 2.0), (0.0, 3.0)])
def test_corners_of_a_cube_have_the_sum_over_their_axes(pair: tuple[float, float]) -> None:
    """Components overlap, and the larger steps change much: 0.1 to 23 nats, on each axis by quadrature."""
    dim, x = 10, torch.linspace(-40, 40, 20_001, dtype=torch.float64)

    def log_density(level: float) -> torch.Tensor:
        a, s = COORDINATES["vp"](torch.tensor(level, dtype=torch.float64))
        both = torch.logaddexp(-(x - a).square() / (2 * s**2), -(x + a).square() / (2 * s**2))
        return both - torch.log(2 * s * math.sqrt(2 * math.pi))

    noisier, cleaner = map(log_density, pair)
    expected = dim * float(torch.trapezoid(noisier.exp() * (noisier - cleaner), x))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * dim)
    for seed in (1, 2):
        found = mixture_divergence(*pair, corners, path="vp", draws=1024, generator=seeded(seed))
        assert abs(found.value - expected) < 3 * found.error and found.error < 0.1 * expected


def test_estimate_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(30, 4, dtype=torch.float64, generator=seeded())
    whole = mixture_divergence(-1.0, -0.9, points, path="vp", draws=50, generator=seeded())
    monkeypatch.setattr("generator.marginals.BLOCK", 100)
    parts = mixture_divergence(-1.0, -0.9, points, path="vp", draws=50, generator=seeded())
    assert parts == pytest.approx(whole, rel=1e-9)


def test_principal_axes_keep_variance_and_length_of_the_mean() -> None:
    points = torch.randn(500, 3, generator=seeded()) @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0]]) + 1
    variances, means = principal(points)
    assert float(variances.min()) == pytest.approx(0, abs=1e-12)
    assert float(variances.sum()) == pytest.approx(float(points.double().var(0, correction=0).sum()))
    assert math.isclose(float(means.norm()), float(points.double().mean(0).norm()))
