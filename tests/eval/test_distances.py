import math

import numpy as np
import pytest
import torch

from eval.distances import frechet, frechet_distance, inception_score, kernel_distance, kernel_distance_subsets
from eval.manifold import manifold_scores
from eval.statistics import Estimate, Gaussian, Moments, grouped_moments


def normal(n: int, d: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def gaussian(mu: torch.Tensor, sigma: torch.Tensor) -> Gaussian:
    return Gaussian(mu.double(), sigma.double(), 0)


def turn(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(d, d, seed)).Q


def frechet_score(features: torch.Tensor, reference: Gaussian) -> Estimate:
    return frechet_distance(grouped_moments([features], len(features)), reference)


def singular_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Frechet distance of two small sets without any covariance: Tr (A B)^1/2 = |Xc Yc^T|_* / sqrt((n - 1)(m - 1))."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    overlap = np.linalg.svd((xc @ yc.T).numpy(), compute_uv=False).sum() / math.sqrt(n * m)
    return float((x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() / n + yc.square().sum() / m - 2 * overlap)


@pytest.mark.parametrize("root", ["nuclear", "eigenvalues"])
@pytest.mark.parametrize("d", [1, 3, 40])
def test_frechet_of_commuting_gaussians_in_closed_form(d: int, root: str) -> None:
    """|m - w|^2 + sum (sqrt a - sqrt b)^2, for covariances with the same eigenvectors."""
    a, b = normal(2, d, 0).abs() + 0.1
    basis, m, w = turn(d, 1), normal(1, d, 2)[0], normal(1, d, 3, shift=1.0)[0]
    expected = float((m - w).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet(gaussian(m, basis * a @ basis.T), gaussian(w, basis * b @ basis.T), root=root)
    assert found == pytest.approx(expected, abs=1e-10 * float(a.sum() + b.sum()))


def test_frechet_of_gaussians_with_different_axes_in_closed_form() -> None:
    """In the plane Tr (A B)^1/2 = sqrt(Tr A B + 2 sqrt(det A det B)), for any two covariances."""
    for seed in range(20):
        x, y = normal(2, 2, 2 * seed), normal(2, 2, 2 * seed + 1)
        a, b = x @ x.T, y @ y.T
        overlap = math.sqrt((a @ b).trace() + 2 * math.sqrt(a.det() * b.det()))
        expected = float(a.trace() + b.trace()) - 2 * overlap
        zero = torch.zeros(2)
        tolerance = 1e-10 * float(a.trace() + b.trace())
        assert frechet(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected, abs=tolerance)
        assert frechet(gaussian(zero, b), gaussian(zero, a)) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (400, 30), (64, 65)])
def test_frechet_of_singular_covariances_keeps_its_digits(n: int, m: int) -> None:
    x, y = normal(n, 64, 0, shift=3.0), normal(m, 64, 1) @ normal(64, 64, 2) / 8
    found = frechet(Moments.of(x).gaussian(), Moments.of(y).gaussian())
    assert found == pytest.approx(singular_distance(x, y), rel=1e-10)


def test_frechet_of_ill_conditioned_covariances_keeps_its_digits() -> None:
    spread = torch.logspace(0, -5, 48, dtype=torch.float64)
    x, y = (normal(100, 48, seed) * spread @ normal(48, 48, 9) for seed in (0, 1))
    found = frechet(Moments.of(x).gaussian(), Moments.of(y).gaussian())
    assert found == pytest.approx(singular_distance(x, y), rel=1e-9)


@pytest.mark.parametrize("sigma", ["dead dimensions", "said to be of fewer images"])
def test_frechet_does_not_take_the_number_of_images_on_trust(sigma: str) -> None:
    spread = torch.ones(12).double()
    if sigma == "dead dimensions":
        spread[3:] = 0
    a, b = Gaussian(torch.zeros(12).double(), spread.diag(), 5), gaussian(torch.zeros(12), 4 * spread.diag())
    assert frechet(a, b) == pytest.approx(float(spread.sum()), rel=1e-9)
    assert frechet(b, a) == pytest.approx(float(spread.sum()), rel=1e-9)


def test_constant_features_are_apart_by_their_means_alone() -> None:
    flat, round_ = gaussian(torch.full((3,), 2.0), torch.zeros(3, 3)), gaussian(torch.zeros(3), torch.eye(3))
    assert frechet(flat, flat) == 0
    assert frechet(flat, round_) == frechet(round_, flat) == 15.0


def test_distance_to_itself_is_zero_even_when_the_covariance_is_singular() -> None:
    singular = Moments.of(normal(20, 64, 0)).gaussian()
    assert frechet(singular, singular) == pytest.approx(0, abs=1e-10)
    assert abs(frechet(singular, singular, root="eigenvalues")) > 1e-8


def test_frechet_refuses_other_features_and_other_roots() -> None:
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet(Moments.of(normal(9, 3, 0)).gaussian(), Moments.of(normal(9, 4, 0)).gaussian())
    with pytest.raises(ValueError, match="'sqrtm', choose one of nuclear, eigenvalues"):
        frechet(Moments.of(normal(9, 3, 0)).gaussian(), Moments.of(normal(9, 3, 0)).gaussian(), root="sqrtm")  # type: ignore[arg-type]


def test_frechet_interval_holds_the_value_and_shrinks_with_n() -> None:
    reference = Moments.of(normal(2000, 4, 0)).gaussian()
    widths = []
    for n in (100, 1600):
        value, interval = frechet_score(normal(n, 4, 1, shift=1.0), reference)
        assert interval is not None
        assert interval[0] <= value <= interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(("shift", "least", "most"), [(0.4, 0.91, 0.98), (0.0, 0.95, 1.0)])
def test_frechet_intervals_cover_the_expectation_at_this_number_of_images(
    shift: float, least: float, most: float
) -> None:
    """About 95 in 100; more where the distance is noise alone: the jackknife doubles its variance."""
    reference = gaussian(torch.zeros(6), torch.eye(6))
    scores = [frechet_score(normal(100, 6, seed, shift=shift), reference) for seed in range(200)]
    assert least < coverage(scores) <= most


def test_kernel_intervals_cover_the_expectation() -> None:
    scores = [kernel_distance(normal(60, 4, seed, shift=0.5), normal(80, 4, 999 + seed)) for seed in range(60)]
    assert 0.86 < coverage(scores) <= 1.0


def test_inception_score_intervals_cover_the_expectation() -> None:
    scores = [inception_score(3 * normal(200, 6, seed)) for seed in range(300)]
    assert 0.91 < coverage(scores) < 0.98


def coverage(scores: list[Estimate]) -> float:
    truth = sum(score.value for score in scores) / len(scores)
    held = [low <= truth <= high for low, high in (score.interval or (1, -1) for score in scores)]
    return sum(held) / len(held)


def test_kernel_distance_is_unbiased_on_equal_distributions_and_its_interval_holds_zero() -> None:
    scores = [kernel_distance(normal(40, 3, 2 * seed), normal(60, 3, 2 * seed + 1)) for seed in range(60)]
    values = np.array([score.value for score in scores])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.min() < 0 < values.max()
    assert np.mean([low <= 0 <= high for low, high in (score.interval or (1, -1) for score in scores)]) > 0.95


def test_kernel_distance_is_the_textbook_double_sum() -> None:
    x, y = normal(20, 3, 0), normal(25, 3, 1, shift=0.5)
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3
    xx, yy = kernel(x, x), kernel(y, y)
    expected = (xx.sum() - xx.trace()) / (20 * 19) + (yy.sum() - yy.trace()) / (25 * 24) - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y).value == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_one_number_that_is_not_finite_is_no_score(wrong: float) -> None:
    x, y = normal(40, 3, 0), normal(40, 3, 1)
    reference = Moments.of(y).gaussian()
    x[7, 2] = wrong
    scores = [
        lambda: frechet_score(x, reference),
        lambda: frechet(reference, Moments.of(x).gaussian()),
        lambda: kernel_distance(x, y),
        lambda: kernel_distance(y, x),
        lambda: kernel_distance_subsets(y, x, subsets=1, size=5),
        lambda: inception_score(x),
        lambda: manifold_scores(x, y),
        lambda: manifold_scores(y, x),
    ]
    for score in scores:
        with pytest.raises(ValueError, match="not finite numbers cannot be scored"):
            score()


def test_too_few_images_for_an_interval() -> None:
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        kernel_distance(normal(19, 3, 0), normal(40, 3, 1))


def test_kernel_distance_does_not_depend_on_blocks(monkeypatch) -> None:
    x, y = normal(50, 3, 0), normal(45, 3, 1, shift=0.5)
    whole = kernel_distance(x, y)
    monkeypatch.setattr("eval.distances.BLOCK", 8)
    blocks = kernel_distance(x, y)
    assert blocks.value == pytest.approx(whole.value, rel=1e-12)
    assert blocks.interval == pytest.approx(whole.interval, rel=1e-12)


def test_kernel_distance_over_subsets_of_everything_is_that_over_all_pairs() -> None:
    x, y = normal(30, 3, 0), normal(30, 3, 1, shift=0.5)
    subsets = kernel_distance_subsets(x, y, subsets=2, size=30)
    assert subsets.value == pytest.approx(kernel_distance(x, y).value, rel=1e-10)
    assert subsets.interval is None
    with pytest.raises(ValueError, match="subsets of 31 needs so many images on each side, got 30 and 30"):
        kernel_distance_subsets(x, y, size=31)


@pytest.mark.parametrize("sharp", [30.0, 1e4, math.inf])
def test_inception_score_in_closed_form(sharp: float) -> None:
    """K sharp and equally frequent classes score K, images that all look alike score 1."""
    certain = torch.where(torch.eye(5, dtype=torch.bool), 0.0, -sharp).repeat(40, 1)
    assert inception_score(certain, splits=1).value == pytest.approx(5, rel=1e-9)
    assert inception_score(torch.zeros(40, 5)).value == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.tensor([[0.0, -sharp]]).repeat(40, 1)).value == pytest.approx(1, rel=1e-12)


def test_inception_score_of_two_kinds_of_images_in_closed_form() -> None:
    """Half the images are sure of one class, half see both alike: exp(H(3/4, 1/4) - H(1/2, 1/2) / 2)."""
    logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0]]).repeat(50, 1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert inception_score(logits, splits=1).value == pytest.approx(math.exp(entropy), rel=1e-12)


def test_inception_score_does_not_depend_on_sorting_by_class() -> None:
    certain = torch.eye(4).repeat_interleave(100, 0) * 1e4
    assert inception_score(certain).value > 3.5
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(torch.zeros(9, 3))


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_intervals_do_not_widen_when_the_classes_take_turns(distance: str) -> None:
    """Samples come in the order of classes 0 .. 9, 0 .. 9, ...: no group may hold one class alone."""
    centres = torch.diag(torch.arange(1.0, 11.0))
    features = centres.repeat(60, 1) + 0.1 * normal(600, 10, 0)
    shuffled = features[torch.randperm(600, generator=torch.Generator().manual_seed(3))]
    real = centres.repeat(60, 1) + 0.1 * normal(600, 10, 1)

    def width(rows: torch.Tensor) -> float:
        frechet = distance == "frechet"
        score = frechet_score(rows, Moments.of(real).gaussian()) if frechet else kernel_distance(rows, real)
        assert score.interval is not None
        return score.interval[1] - score.interval[0]

    assert width(features) < 3 * width(shuffled)
