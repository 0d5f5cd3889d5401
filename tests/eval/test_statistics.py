import numpy as np
import pytest
import scipy.stats
import torch

from eval.statistics import (
    GROUPS,
    Moments,
    bootstrap,
    group_of_rows,
    grouped_moments,
    jackknife,
    mean_of,
    proportion,
)


def features(n: int, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + 7


def assert_equal_moments(a: Moments, b: Moments) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.scatter, b.scatter, rtol=1e-12, atol=1e-10)


def test_moments_are_numpys_mean_and_covariance() -> None:
    x = features(40)
    gaussian = Moments.of(x).gaussian()
    np.testing.assert_allclose(gaussian.mu, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    assert gaussian.n == 40


def test_a_mean_far_from_zero_costs_the_covariance_no_digits() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = Moments.of(x).gaussian().sigma
    far = x + 1e5
    merged = sum((Moments.of(part) for part in far.split(60)), Moments.of(far[:0]))
    grouped = grouped_moments(far.split(60), 500)
    for moments in (Moments.of(far), merged, sum(grouped[1:], grouped[0])):
        torch.testing.assert_close(moments.gaussian().sigma, near, rtol=1e-8, atol=1e-9)


def test_streaming_equals_batch_and_merging_is_associative() -> None:
    x = features(60)
    a, b, c = (Moments.of(part) for part in x.split([7, 20, 33]))
    for merged in ((a + b) + c, a + (b + c), c + a + b):
        assert_equal_moments(merged, Moments.of(x))


def test_taking_a_part_out_undoes_merging() -> None:
    a, b = Moments.of(features(9)), Moments.of(features(12, seed=1))
    assert_equal_moments(a + b - b, a)
    assert_equal_moments(a + Moments.of(features(0)), a)


@pytest.mark.parametrize("size", [1, 7, 101])
def test_moments_of_groups_do_not_depend_on_the_parts(size: int) -> None:
    x, group = features(101), group_of_rows(101)
    for index, moments in enumerate(grouped_moments(x.split(size), 101)):
        assert_equal_moments(moments, Moments.of(x[group == index]))


def test_groups_are_equal_random_and_of_at_least_two() -> None:
    group = group_of_rows(105)
    assert sorted(set(group.bincount().tolist())) == [10, 11]
    assert not torch.equal(group, torch.arange(105) % GROUPS)
    assert torch.equal(group, group_of_rows(105))
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        group_of_rows(19)


@pytest.mark.parametrize("promised", [39, 41])
def test_parts_must_hold_as_many_images_as_was_said(promised: int) -> None:
    with pytest.raises(ValueError, match="promised"):
        grouped_moments(features(40).split(10), promised)


def test_one_vector_has_no_covariance_and_no_value_no_mean() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        Moments.of(features(1)).gaussian()
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        mean_of(torch.zeros(0))
    assert mean_of(torch.ones(1)) == (1.0, None)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = features(GROUPS, 1)[:, 0].double()
    left_out = [float((x.sum() - value) / (GROUPS - 1)) for value in x]
    value, interval = jackknife(float(x.mean()), left_out)
    assert interval is not None
    assert (interval[1] - value) / 2.262157 == pytest.approx(float(x.std()) / GROUPS**0.5, rel=1e-6)


def test_intervals_of_means_cover_the_truth_about_95_times_in_100() -> None:
    draws = torch.randn(1000, 50, generator=torch.Generator().manual_seed(3))
    assert 0.92 < coverage([mean_of(row).interval for row in draws], 0.0) < 0.97


@pytest.mark.parametrize(("n", "least", "most"), [(20, 0.90, 0.96), (200, 0.92, 0.97)])
def test_bootstrap_intervals_cover_the_mean_of_skewed_values(n: int, least: float, most: float) -> None:
    draws = torch.empty(400, n, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(4))
    intervals = [bootstrap(lambda w, x=row: w @ x, n, repeats=400).interval for row in draws]
    assert least < coverage(intervals, 1.0) < most


def test_bootstrap_intervals_cover_shares_and_ratios() -> None:
    random = torch.Generator().manual_seed(5)
    hits = torch.rand(400, 100, generator=random, dtype=torch.float64) < 0.3
    shares = [bootstrap(lambda w, x=row: w @ x, 100, repeats=400).interval for row in hits.double()]
    assert 0.92 < coverage(shares, 0.3) < 0.98
    x, rest = torch.empty(2, 400, 100, dtype=torch.float64).exponential_(generator=random)
    pairs = zip(x, rest, strict=True)
    ratios = [bootstrap(lambda w, a=a, b=a + c: (w @ a) / (w @ b), 100, repeats=400) for a, c in pairs]
    assert 0.92 < coverage([ratio.interval for ratio in ratios], 0.5) < 0.98


def test_a_bootstrap_of_a_mean_agrees_with_the_normal_interval_and_repeats() -> None:
    x = features(2000, 1)[:, 0].double()
    estimate, normal = bootstrap(lambda weights: weights @ x, 2000), mean_of(x)
    assert estimate.value == pytest.approx(normal.value, rel=1e-12)
    assert estimate.interval == pytest.approx(normal.interval, abs=0.1 * (normal.interval[1] - normal.interval[0]))
    assert bootstrap(lambda weights: weights @ x, 2000) == estimate


def test_a_bootstrap_of_equal_values_has_no_width_and_needs_four_images() -> None:
    assert bootstrap(lambda weights: 0 * weights.sum(1) + 3.0, 8) == (3.0, (3.0, 3.0))
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        bootstrap(lambda weights: weights.sum(1), 3)


def coverage(intervals: list[tuple[float, float] | None], truth: float) -> float:
    return sum(low <= truth <= high for low, high in (interval or (1, -1) for interval in intervals)) / len(intervals)


def test_wilsons_interval() -> None:
    assert proportion(8, 10).value == 0.8
    for hits, n in ((8, 10), (0, 7), (10, 10), (812, 1000)):
        expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert proportion(hits, n).interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    with pytest.raises(ValueError, match="at least 1 image"):
        proportion(0, 0)
