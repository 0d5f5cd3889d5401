"""KLUB against closed forms of Gaussian data: Lemma 3.3, its normaliser, its best stop, and the estimate of it all."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from generator.descent import Cost, halved, places, sweep, total
from generator.klub import anchors, draw_noise, gap, normaliser, step_bounds
from generator.path import beside, noise_to_signal

STEPS = [(0.1, 0.5, 0.5), (1.0, 5.0, 1.0), (0.002, 80.0, 0.5), (0.0067, 148.0, 1.0), (100.0, 148.0, 1.0), (1, 1.01, 2)]
# Levels that descent reaches from Karras steps between noise 80 and 0.002 on Gaussian data of deviation 0.5.
CONVERGED = [80, 0.35204, 0.17565, 0.09719, 0.05526, 0.03169, 0.01822, 0.01048, 0.00603, 0.00347, 0.002]


def logsnr(noise: float) -> float:
    return -2 * math.log(noise)


def integrated(end: float, start: float, c: float) -> float:
    density = lambda t: t**-3 * (1 / (t * t + c * c) - 1 / (start * start + c * c))
    return quad(density, end, start, epsabs=0, epsrel=1e-12, limit=200)[0]


def gaussian_cost(c: float) -> Cost:
    """KLUB of Gaussian data of deviation c, over c^4 d."""
    return lambda start, end: normaliser(math.exp(-end / 2), math.exp(-start / 2), c)


def gaussian_denoise(c: float) -> object:
    """The posterior mean of x0 ~ N(0, c^2)."""

    def denoise(z: Tensor, levels: Tensor) -> Tensor:
        noise = noise_to_signal(levels)
        return beside(c**2 * (1 + noise.square()).sqrt() / (noise.square() + c**2), z) * z

    return denoise


def draws(num: int, c: float, shape: tuple[int, ...] = (2, 3, 3)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x0, noise, fresh = (torch.randn(num, *shape, generator=random) for _ in range(3))
    return c * x0, noise, fresh, (torch.arange(num) + torch.rand(num, generator=random).double()) / num


@pytest.mark.parametrize(("end", "start", "c"), STEPS)
def test_the_normaliser_is_the_integral(end: float, start: float, c: float) -> None:
    assert normaliser(end, start, c) == pytest.approx(integrated(end, start, c), rel=1e-10)


def test_the_normaliser_is_the_published_one() -> None:
    a, b, c = 0.1, 0.5, 0.5
    written = (
        (a**-2 - b**-2) / 2 * (c**-2 - 1 / (b * b + c * c))
        - math.log(b / a) / c**4
        + math.log((b * b + c * c) / (a * a + c * c)) / (2 * c**4)
    )
    assert normaliser(a, b, c) == pytest.approx(written, rel=1e-10)


def test_a_gap_is_the_difference_of_both_terms() -> None:
    noise = np.array([0.1, 0.3, 0.7])
    np.testing.assert_allclose(gap(noise, 0.7, 0.5), 1 / (noise**2 + 0.25) - 1 / (0.49 + 0.25), atol=1e-15)


@pytest.mark.parametrize(("end", "start", "c"), STEPS)
def test_noise_levels_are_drawn_as_often_as_they_should_be(end: float, start: float, c: float) -> None:
    """Of evenly spread draws, as large a share lies below a level as the density has below it."""
    drawn = draw_noise((torch.arange(4000) + 0.5) / 4000, end, start, c)
    assert end <= float(drawn.min()) and float(drawn.max()) <= start
    for share in (0.1, 0.5, 0.9):
        level = end ** (1 - share) * start**share
        density = lambda t: t**-3 * (1 / (t * t + c * c) - 1 / (start * start + c * c))
        below = quad(density, end, level, epsabs=0, epsrel=1e-10, limit=200)[0] / integrated(end, start, c)
        assert float((drawn < level).double().mean()) == pytest.approx(below, abs=1e-3)


@pytest.mark.parametrize(("end", "start", "c"), [(0.1, 0.5, 0.5), (1.0, 5.0, 1.0), (0.02, 2.0, 0.5)])
@pytest.mark.parametrize("sigma_data", [None, 0.8])
def test_the_estimate_is_lemma_3_3_integrated(end: float, start: float, c: float, sigma_data: float | None) -> None:
    """c^4 d times the normaliser, whichever deviation the noise levels are drawn for."""
    chosen, denoise = draws(20_000, c), gaussian_denoise(c)
    anchor = anchors(denoise, chosen[0], chosen[1], logsnr(start))
    found = step_bounds(
        denoise,
        anchor,
        chosen,
        start=logsnr(start),
        end=logsnr(end),
        sigma_data=c if sigma_data is None else sigma_data,
    )
    expected = c**4 * 18 * integrated(end, start, c)
    error = float(found.std()) / math.sqrt(len(found))
    assert error < 0.01 * expected
    assert float(found.mean()) == pytest.approx(expected, abs=4 * error)


def test_a_bound_is_nothing_where_the_estimate_does_not_move() -> None:
    chosen = draws(8, 1.0)
    constant = lambda z, levels: torch.ones_like(z)
    found = step_bounds(constant, torch.ones_like(chosen[0]), chosen, start=-2.0, end=3.0, sigma_data=1.0)
    assert found.dtype == torch.float64 and found.tolist() == [0.0] * 8


# Descent


@pytest.mark.parametrize(
    ("end", "start", "c", "best"), [(0.1, 0.5, 0.5, 0.200625), (1.0, 5.0, 1.0, 1.503767), (0.002, 80.0, 0.5, None)]
)
def test_the_best_stop_of_a_gaussian_triple_is_found(end: float, start: float, c: float, best: float | None) -> None:
    squared = end * start * (end * start + math.sqrt((end**2 + c * c) * (start**2 + c * c)))
    formula = math.sqrt(squared / (end**2 + start**2 + c * c))
    assert best is None or formula == pytest.approx(best, rel=1e-5)
    stops = [logsnr(start), (logsnr(start) + logsnr(end)) / 2, logsnr(end)]
    for _ in range(12):
        stops = sweep(stops, gaussian_cost(c), [1], candidates=11)
    assert math.exp(-stops[1] / 2) == pytest.approx(formula, rel=1e-3)


def test_the_estimate_has_its_best_stop_where_the_closed_form_has_it() -> None:
    """Without the normaliser all stops of Gaussian data would be alike."""
    end, start, c = 0.1, 0.5, 0.5
    chosen, denoise = draws(2000, c, (2, 8, 8)), gaussian_denoise(c)

    def cost(here: float, there: float) -> float:
        anchor = anchors(denoise, chosen[0], chosen[1], here)
        return float(step_bounds(denoise, anchor, chosen, start=here, end=there, sigma_data=c).mean())

    stops = [logsnr(start), logsnr(0.4), logsnr(end)]
    for _ in range(8):
        stops = sweep(stops, cost, [1], candidates=9)
    assert math.exp(-stops[1] / 2) == pytest.approx(0.200625, rel=1e-3)


def test_the_bound_never_rises_and_ends_at_a_schedule_that_is_useless_for_sampling() -> None:
    """KLUB-optimal is not KL-optimal: all levels but the first crowd at low noise (why the descent ends early)."""
    roots = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 11, dtype=torch.float64)
    stops, cost = [logsnr(root**7) for root in roots.tolist()], gaussian_cost(0.5)
    bounds = [total(stops, cost)]
    for _ in range(120):
        stops = sweep(stops, cost, range(1, 10), candidates=15)
        bounds.append(total(stops, cost))
    assert all(after <= before for before, after in pairwise(bounds))
    assert bounds[-1] < 0.1 * bounds[0]
    assert [math.exp(-stop / 2) for stop in stops] == pytest.approx(CONVERGED, rel=3e-3)


def kl_of_euler(noises: list[float], c: float) -> float:
    """KL divergence of Euler's samples at the last noise, from N(0, c^2 + t^2) of the true ones, per dimension."""
    variance = c * c + noises[0] ** 2
    for start, end in pairwise(noises):
        slope = start / (start**2 + c * c)  # dx/dt = (x - D) / t
        variance *= (1 + (end - start) * slope) ** 2
    ratio = variance / (c * c + noises[-1] ** 2)
    return 0.5 * (ratio - 1 - math.log(ratio))


def test_the_best_steps_of_eulers_method_on_a_gaussian_are_those_of_the_tangent() -> None:
    """Theorem 3.1, against the bound's own optimum, which is far from it."""
    c, low, high = 0.5, math.atan(0.002 / 0.5), math.atan(80 / 0.5)
    tangent = [c * math.tan(high + share * (low - high) / 10) for share in range(11)]
    published = [80, 3.05353, 1.51713, 0.97365, 0.68509, 0.49888, 0.36319, 0.25535, 0.16354, 0.08072, 0.002]
    assert tangent == pytest.approx(published, rel=1e-4)
    least = kl_of_euler(tangent, c)
    for index in range(1, 10):
        for factor in (0.98, 1.02):
            moved = [noise * factor if place == index else noise for place, noise in enumerate(tangent)]
            assert kl_of_euler(moved, c) > least
    assert kl_of_euler([float(noise) for noise in CONVERGED], c) > 10 * least


def test_candidates_lie_on_both_sides_and_come_closer() -> None:
    found = places(-4.0, 0.0, 1.0, 7)
    assert found == pytest.approx([0, -2, -0.4, -0.08, 0.5, 0.1, 0.02])


def test_a_stop_that_no_candidate_beats_stays_where_it_is() -> None:
    flat: Cost = lambda start, end: 1.0
    assert sweep([0.0, 1.0, 5.0], flat, [1], candidates=11) == [0.0, 1.0, 5.0]
    rewarded: Cost = lambda start, end: (end - start) ** 2
    moved = sweep([0.0, 1.0, 5.0, 6.0], rewarded, [1], candidates=3)
    assert moved == [0.0, 3.0, 5.0, 6.0]  # half of the way; the others are not free


def test_halving_puts_a_stop_in_the_middle_of_every_step() -> None:
    assert halved([-4.0, 0.0, 1.0]) == [-4.0, -2.0, 0.0, 0.5, 1.0]
