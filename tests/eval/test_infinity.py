import numpy as np
import pytest
import torch

from eval.distances import frechet_to
from eval.infinity import POINTS, frechet_infinity, least_size
from eval.statistics import GROUPS, Gaussian, Moments

DIM = 8
STANDARD = Gaussian(torch.zeros(DIM).double(), torch.eye(DIM).double(), 0)


def normal(n: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_bias_of_few_images_is_gone(shift: float) -> None:
    """The distance of the distributions is |shift|^2 D; that of 200 images is clearly above."""
    distance, truth = frechet_to(STANDARD), DIM * shift**2
    sets = [normal(200, seed, shift=shift) for seed in range(30)]
    at_n = np.array([distance(Moments.of(x).gaussian()) for x in sets])
    at_infinity = np.array([frechet_infinity(x, STANDARD, points=5).value for x in sets])
    bias = float(at_n.mean() - truth)
    assert bias > 0.05
    assert abs(at_infinity.mean() - truth) < 0.2 * bias + 2 * at_infinity.std() / np.sqrt(30)


def test_intervals_cover_the_truth_and_hold_the_value() -> None:
    scores = [frechet_infinity(normal(160, seed, shift=0.5), STANDARD, points=3) for seed in range(60)]
    intervals = [score.interval or (1, -1) for score in scores]
    assert all(low < score.value < high for score, (low, high) in zip(scores, intervals, strict=True))
    assert 0.86 < np.mean([low <= 2.0 <= high for low, high in intervals]) <= 1.0


def test_each_distance_ticks_and_the_seed_repeats() -> None:
    ticks: list[int] = []
    score = frechet_infinity(normal(100, 0), STANDARD, tick=ticks.append)
    assert sum(ticks) == POINTS * (GROUPS + 1)
    assert score == frechet_infinity(normal(100, 0), STANDARD)
    assert score != frechet_infinity(normal(100, 0), STANDARD, seed=1)


def test_the_smallest_subset_is_sensible() -> None:
    assert least_size(50_000, 512) == 5_000
    assert least_size(50_000, 2048) == 8_192
    assert least_size(10_000, 2048) == 5_000


@pytest.mark.parametrize(("n", "least"), [(31, None), (100, 15), (100, 51)])
def test_too_few_images_are_refused(n: int, least: int | None) -> None:
    with pytest.raises(ValueError, match="draw 32 samples"):
        frechet_infinity(normal(n, 0), STANDARD, least=least)
    with pytest.raises(ValueError, match="at least 3 points"):
        frechet_infinity(normal(100, 0), STANDARD, points=2)
