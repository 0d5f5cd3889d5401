import numpy as np
import pytest
import torch

from eval.statistics import GROUPS, Moments, jackknife, load_gaussian, mean_of, proportion, save_gaussian


def features(n: int, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + 7


def test_moments_are_numpys_mean_and_covariance() -> None:
    x = features(40)
    gaussian = Moments.of(x).gaussian()
    np.testing.assert_allclose(gaussian.mu, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    assert gaussian.n == 40


def test_streaming_equals_batch_and_merging_is_associative() -> None:
    x = features(60)
    a, b, c = (Moments.of(part) for part in x.split([7, 20, 33]))
    whole = Moments.of(x)
    for merged in ((a + b) + c, a + (b + c), c + a + b):
        assert merged.n == whole.n
        torch.testing.assert_close(merged.sum, whole.sum, rtol=1e-13, atol=0)
        torch.testing.assert_close(merged.outer, whole.outer, rtol=1e-13, atol=0)


def test_taking_a_part_out_undoes_merging() -> None:
    a, b = Moments.of(features(9)), Moments.of(features(12, seed=1))
    torch.testing.assert_close((a + b - b).gaussian().sigma, a.gaussian().sigma, rtol=1e-10, atol=1e-10)


def test_one_vector_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        Moments.of(features(1)).gaussian()


def test_reference_file_has_the_layout_of_pytorch_fid(tmp_path) -> None:
    gaussian = Moments.of(features(30)).gaussian()
    save_gaussian(tmp_path / "reference.npz", gaussian)
    with np.load(tmp_path / "reference.npz") as stored:
        assert stored["mu"].shape == (5,)
        assert stored["sigma"].shape == (5, 5)
    again = load_gaussian(tmp_path / "reference.npz")
    assert torch.equal(again.sigma, gaussian.sigma)
    assert again.n == 30


def test_a_reference_without_mu_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="needs mu and sigma"):
        load_gaussian(tmp_path / "images.npz")
    with pytest.raises(ValueError, match="no such file"):
        load_gaussian(tmp_path / "absent.npz")


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = features(GROUPS, 1)[:, 0].double()
    left_out = [float((x.sum() - value) / (GROUPS - 1)) for value in x]
    value, interval = jackknife(float(x.mean()), left_out)
    assert interval is not None
    assert (interval[1] - value) / 2.2622 == pytest.approx(float(x.std()) / GROUPS**0.5, rel=1e-9)


def test_intervals_of_means_cover_the_truth_about_95_times_in_100() -> None:
    draws = torch.randn(1000, 50, generator=torch.Generator().manual_seed(3))
    covered = [low <= 0 <= high for low, high in (mean_of(row).interval or (1, -1) for row in draws)]
    assert 0.92 < sum(covered) / len(covered) < 0.97


def test_wilsons_interval() -> None:
    value, interval = proportion(8, 10)
    assert value == 0.8
    assert interval == pytest.approx((0.4902, 0.9433), abs=1e-3)  # Newcombe 1998, method 3, recomputed
    assert proportion(10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-3)
    with pytest.raises(ValueError, match="at least 1 image"):
        proportion(0, 0)
