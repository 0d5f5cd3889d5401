"""Averages that are reconstructed from snapshots, against the same averages tracked in training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.ema import PowerEma, power_exponent
from engine.posthoc import Profile, combine, correlation, reconstruct

EVERY, STEPS = 40, 800
Tracked = dict[float, dict[int, Tensor]]  # width -> step -> average [D]


class Walk(nn.Module):
    """Weights that walk at random, away from an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64,), 5.0, dtype=torch.float64))


@pytest.fixture(scope="module")
def tracked() -> Tracked:
    """Averages of a random walk, tracked step by step."""
    walk, generator = Walk(), torch.Generator().manual_seed(0)
    averages = {width: PowerEma(walk, width) for width in (0.05, 0.08, 0.1, 0.15)}
    found: Tracked = {width: {} for width in averages}
    for step in range(1, STEPS + 1):
        walk.weight.data.add_(torch.randn(64, generator=generator, dtype=torch.float64))
        for width, average in averages.items():
            average.update(walk)
            found[width][step] = average.shadow[0].clone()
    return found


def rebuilt(tracked: Tracked, stored: list[Profile], wanted: Profile) -> Tensor:
    coefficients, _ = reconstruct(stored, wanted)
    return torch.stack([tracked[width][step] for step, width in stored]).T @ coefficients


def error(tracked: Tracked, stored: list[Profile], wanted: Profile) -> float:
    """Root mean square distance to the tracked average, in steps of the walk."""
    return (rebuilt(tracked, stored, wanted) - tracked[wanted[1]][wanted[0]]).square().mean().sqrt().item()


def grid(last: int, widths: tuple[float, ...] = (0.05, 0.1)) -> list[Profile]:
    return [(step, width) for step in range(EVERY, last + 1, EVERY) for width in widths]


@pytest.mark.parametrize("width", [0.08, 0.15])
@pytest.mark.parametrize("step", [200, 400, STEPS])
def test_the_tracked_average_is_met(tracked: Tracked, width: float, step: int) -> None:
    """Much nearer than with the last snapshot alone, and than the stored averages themselves are."""
    met = error(tracked, grid(step), (step, width))
    stored = min(error(tracked, [(step, near)], (step, width)) for near in (0.05, 0.1))
    assert met < stored / 5
    assert met < error(tracked, grid(step)[-2:], (step, width)) / (2 if step == 200 else 4)


def test_more_snapshots_meet_it_better(tracked: Tracked) -> None:
    errors = [error(tracked, grid(STEPS)[-2 * count :], (STEPS, 0.08)) for count in (1, 2, 4, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * (tracked[0.05][STEPS] - tracked[0.1][STEPS]).square().mean().sqrt()


def test_snapshots_of_one_width_make_others_too(tracked: Tracked) -> None:
    own = error(tracked, [(STEPS, 0.1)], (STEPS, 0.08))
    assert error(tracked, grid(STEPS, (0.1,)), (STEPS, 0.08)) < own / 5


def test_what_is_stored_is_taken_as_it_is(tracked: Tracked) -> None:
    for wanted in ((400, 0.05), (STEPS, 0.1)):
        coefficients, rest = reconstruct(grid(STEPS), wanted)
        assert rest == 0 and coefficients.count_nonzero() == 1
        assert torch.equal(rebuilt(tracked, grid(STEPS), wanted), tracked[wanted[1]][wanted[0]])
        near, rest = reconstruct(grid(STEPS), (wanted[0], wanted[1] + 1e-9))  # and the equations agree
        torch.testing.assert_close(near, coefficients, rtol=0, atol=1e-6)
        assert rest < 1e-6


@pytest.mark.parametrize("stored", [grid(STEPS), grid(EVERY), [(3, 0.1), (100_000, 0.05), (2_000_000, 0.2)]])
@pytest.mark.parametrize("width", [0.02, 0.07, 0.27])
def test_weights_that_did_not_change_come_out_as_they_were(stored: list[Profile], width: float) -> None:
    coefficients, _ = reconstruct(stored, (stored[-1][0], width))
    assert coefficients.dtype == torch.float64
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_rest_is_the_part_of_the_profile_that_is_missed() -> None:
    """Against the profiles themselves, on a fine grid of time."""
    time = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * 400

    def profile(step: int, width: float) -> Tensor:
        power = power_exponent(width)
        return torch.where(time <= step, (power + 1) * (time / step) ** power / step, 0)

    stored, wanted = [(100, 0.05), (200, 0.1), (400, 0.05), (400, 0.1)], (400, 0.07)
    curves = torch.stack([profile(*each) for each in stored])
    gram = curves @ curves.T * (time[1] - time[0])
    torch.testing.assert_close(correlation(stored, stored), gram, rtol=1e-3, atol=1e-9)
    coefficients, rest = reconstruct(stored, wanted)
    missed = profile(*wanted) - coefficients @ curves
    assert rest == pytest.approx((missed.norm() / profile(*wanted).norm()).item(), rel=1e-3)
    for change in (torch.tensor([1.0, -1, 0, 0]), torch.tensor([0.0, 0, 1, -1])):  # other sums to 1 miss more
        for sign in (1, -1):
            assert (missed + 1e-3 * sign * change.double() @ curves).norm() > missed.norm()


def test_hundreds_of_snapshots_are_no_trouble() -> None:
    stored = [(step, width) for step in range(1000, 500_001, 1000) for width in (0.05, 0.1)]
    coefficients, rest = reconstruct(stored, (500_000, 0.15))
    assert rest < 1e-4 and coefficients.abs().sum() < 2


def test_files_are_added_tensor_by_tensor(tmp_path: Path) -> None:
    states = [{"a": torch.full((2,), value), "count": torch.tensor(int(value))} for value in (1.0, 2.0, 4.0)]
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    found = combine(files, torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64))
    assert torch.equal(found["a"], torch.full((2,), 4.5)) and found["a"].dtype == torch.float32
    assert found["count"] == 4
    (alone,) = (combine(files[1:2], torch.ones(1, dtype=torch.float64)),)
    assert torch.equal(alone["a"], load_file(files[1])["a"])
