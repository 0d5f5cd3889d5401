import math

import numpy as np
import pytest
import torch

from eval.distances import frechet, frechet_distance, inception_score, kernel_distance, precision_recall
from eval.statistics import Gaussian, Moments


def normal(n: int, d: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_frechet_of_diagonal_gaussians_in_closed_form() -> None:
    a = Gaussian(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 4.0]).double()), 10)
    b = Gaussian(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([9.0, 0.25]).double()), 10)
    assert frechet(a, b) == pytest.approx(3**2 + (1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_frechet_is_symmetric_and_sees_rotation() -> None:
    turn = torch.linalg.qr(normal(4, 4, 0)).Q
    spread = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    a, b = Gaussian(torch.zeros(4).double(), spread, 9), Gaussian(torch.zeros(4).double(), turn @ spread @ turn.T, 9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10)
    assert frechet(a, b) > 0.1


def test_frechet_agrees_with_torch_fidelity() -> None:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(400, 24, 0), 1.5 * normal(300, 24, 1, shift=0.2) @ normal(24, 24, 2)
    theirs = metric_fid.fid_statistics_to_metric(
        metric_fid.fid_features_to_statistics(x), metric_fid.fid_features_to_statistics(y), verbose=False
    )["frechet_inception_distance"]
    assert frechet(Moments.of(x).gaussian(), Moments.of(y).gaussian()) == pytest.approx(theirs, rel=1e-6)


def test_distance_to_itself_is_zero_even_when_the_covariance_is_singular() -> None:
    x = normal(20, 64, 0)
    gaussian = Moments.of(x).gaussian()
    assert frechet(gaussian, gaussian) == pytest.approx(0, abs=1e-9)


def test_frechet_refuses_other_features() -> None:
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet(Moments.of(normal(9, 3, 0)).gaussian(), Moments.of(normal(9, 4, 0)).gaussian())


def test_frechet_interval_holds_the_value_and_shrinks_with_n() -> None:
    reference = Moments.of(normal(2000, 4, 0)).gaussian()
    widths = []
    for n in (100, 1600):
        value, interval = frechet_distance(normal(n, 4, 1, shift=1.0), reference)
        assert interval is not None
        assert interval[0] <= value <= interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] < widths[0] / 2


def test_kernel_distance_is_unbiased_on_equal_distributions() -> None:
    values = [kernel_distance(normal(40, 3, 2 * seed), normal(60, 3, 2 * seed + 1)).value for seed in range(200)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)


def test_kernel_distance_is_the_textbook_double_sum() -> None:
    x, y = normal(20, 3, 0), normal(25, 3, 1, shift=0.5)
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3
    xx, yy = kernel(x, x), kernel(y, y)
    expected = (xx.sum() - xx.trace()) / (20 * 19) + (yy.sum() - yy.trace()) / (25 * 24) - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y).value == pytest.approx(float(expected), rel=1e-10)


def test_too_few_images_for_an_interval() -> None:
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        kernel_distance(normal(19, 3, 0), normal(40, 3, 1))


def test_precision_and_recall_of_equal_and_of_disjoint_sets() -> None:
    x = normal(50, 4, 0)
    assert [score.value for score in precision_recall(x, x)] == [1.0, 1.0]
    assert [score.value for score in precision_recall(x, x + 100)] == [0.0, 0.0]


def test_one_mode_of_two_is_precise_but_recalls_half() -> None:
    real = torch.cat([normal(200, 2, 0), normal(200, 2, 1, shift=50.0)])
    precision, recall = precision_recall(normal(400, 2, 2), real)
    assert precision.value > 0.9
    assert recall.value == pytest.approx(0.5, abs=0.05)


def test_precision_needs_more_than_k_images() -> None:
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(normal(3, 2, 0), normal(9, 2, 0))


def test_inception_score_in_closed_form() -> None:
    certain = torch.eye(5).repeat(40, 1).log().clamp(min=-1e4)
    assert inception_score(certain, splits=1).value == pytest.approx(5, rel=1e-9)
    assert inception_score(torch.zeros(40, 5)).value == pytest.approx(1, rel=1e-12)


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
        score = frechet_distance(rows, Moments.of(real).gaussian()) if frechet else kernel_distance(rows, real)
        assert score.interval is not None
        return score.interval[1] - score.interval[0]

    assert width(features) < 3 * width(shuffled)
