import math

import numpy as np
import pytest
import torch

from eval.manifold import NEIGHBOURS, manifold_scores, nearest


def normal(n: int, d: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def brute_force(y: np.ndarray, x: np.ndarray, k: dict[str, int]) -> dict[str, float]:
    """The four definitions, by subtraction of every pair."""
    distances = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2)
    radius = lambda a, k: np.sort(distances(a, a), axis=1)[:, k]
    between = distances(y, x)  # [M, N]
    return {
        "precision": (between <= radius(x, k["precision"])).any(1).mean(),
        "recall": (between <= radius(y, k["recall"])[:, None]).any(0).mean(),
        "density": (between <= radius(x, k["density"])).sum(1).mean() / k["density"],
        "coverage": (between <= radius(x, k["coverage"])).any(0).mean(),
    }


@pytest.mark.parametrize("k", [NEIGHBOURS, {"precision": 1, "recall": 4, "density": 2, "coverage": 7}])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_scores_are_those_of_the_definitions(k: dict[str, int], shift: float) -> None:
    y, x = 1.2 * normal(90, 5, 0) + 0.4 + shift, normal(120, 5, 1) + shift
    found = manifold_scores(y, x, k)
    assert list(found) == ["precision", "recall", "density", "coverage"]
    assert {name: score.value for name, score in found.items()} == pytest.approx(
        brute_force(y.numpy(), x.numpy(), k), abs=1e-12
    )
    assert all(0 < score.value < 1.2 for score in found.values())


def test_scores_do_not_depend_on_blocks(monkeypatch) -> None:
    y, x = normal(60, 4, 0), normal(70, 4, 1)
    whole = manifold_scores(y, x)
    monkeypatch.setattr("eval.manifold.BLOCK", 8)
    assert manifold_scores(y, x) == whole


def test_a_line_by_hand() -> None:
    """Real 0, 1, 3, 7 with k = 1 reach 1, 1, 2, 4: their balls are [-1, 1], [0, 2], [1, 5], [3, 11]. Generated 0.5 lies
    in the first two of them, 4 in the last two, 12 and 20 in none. Generated 0.5, 4, 12, 20 reach 3.5, 3.5, 8, 8, and
    [-3, 4] and [0.5, 7.5] hold all real ones."""
    real, generated = (torch.tensor(each)[:, None] for each in ([0.0, 1.0, 3.0, 7.0], [0.5, 4.0, 12.0, 20.0]))
    scores = manifold_scores(generated, real, dict.fromkeys(NEIGHBOURS, 1))
    assert {name: score.value for name, score in scores.items()} == {
        "precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 1.0,
    }  # fmt: skip


def test_an_outlier_makes_the_density_small_and_the_precision_full() -> None:
    """Naeem et al. 2020: one far real image has a ball that holds all generated ones between."""
    real = torch.cat([normal(200, 2, 0), torch.tensor([[60.0, 0.0]]).double()])
    generated = normal(200, 2, 1) + torch.tensor([20.0, 0.0])
    scores = manifold_scores(generated, real)
    assert scores["precision"].value == 1.0
    assert scores["density"].value == pytest.approx(1 / 5)
    assert scores["coverage"].value == pytest.approx(1 / 201)


def test_equal_and_disjoint_sets() -> None:
    x = normal(50, 4, 0)
    assert [score.value for score in manifold_scores(x, x + 100).values()] == [0.0, 0.0, 0.0, 0.0]
    copied = manifold_scores(x, x)
    assert (copied["precision"].value, copied["recall"].value, copied["coverage"].value) == (1.0, 1.0, 1.0)
    assert copied["density"].value == pytest.approx(6 / 5)  # each ball holds its centre and five neighbours


def test_copies_of_one_image_are_in_balls_of_no_radius() -> None:
    x = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)).repeat(12, 1) * 30
    assert [score.value for score in manifold_scores(x, x).values()] == pytest.approx([1.0, 1.0, 12 / 5, 1.0])


def test_one_mode_of_two_is_precise_but_recalls_half() -> None:
    real = torch.cat([normal(200, 2, 0), normal(200, 2, 1, shift=50.0)])
    scores = manifold_scores(normal(400, 2, 2), real)
    assert scores["precision"].value > 0.9
    assert scores["recall"].value == pytest.approx(0.5, abs=0.05)
    assert scores["coverage"].value == pytest.approx(0.5, abs=0.05)


def test_density_and_coverage_of_equal_distributions_have_their_expectations() -> None:
    """Density 1, coverage 1 - prod (N - j) / (M + N - j) over j = 1 .. k (Naeem et al. 2020)."""
    n, m, k = 60, 40, 5
    scores = [manifold_scores(normal(m, 3, 2 * seed), normal(n, 3, 2 * seed + 1)) for seed in range(100)]
    density, coverage = (np.array([score[name].value for score in scores]) for name in ("density", "coverage"))
    expected = 1 - math.prod((n - j) / (m + n - j) for j in range(1, k + 1))
    assert abs(density.mean() - 1) < 3 * density.std() / math.sqrt(100)
    assert abs(coverage.mean() - expected) < 3 * coverage.std() / math.sqrt(100)


def test_more_than_k_images_are_needed() -> None:
    with pytest.raises(ValueError, match="k=5 need more than 5 images on each side, got 5 and 9"):
        manifold_scores(normal(5, 2, 0), normal(9, 2, 0))


@pytest.mark.parametrize("k", [1, 6])
def test_nearest_is_the_brute_force_order(k: int, monkeypatch) -> None:
    queries, points = normal(30, 5, 0, shift=100.0).float(), normal(41, 5, 1, shift=100.0).float()
    expected = np.linalg.norm(queries.double().numpy()[:, None] - points.double().numpy()[None], axis=2)
    for block in (1 << 22, 30):
        monkeypatch.setattr("eval.manifold.BLOCK", block)
        distances, indices = nearest(queries, points, k=k)
        assert torch.equal(indices, torch.from_numpy(expected.argsort(axis=1)[:, :k]))
        np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :k], rtol=1e-12)


def test_a_memorised_image_is_at_distance_zero() -> None:
    points = 1000 * normal(50, 200, 0).float()
    distances, indices = nearest(points[[7, 3]], points, k=2)
    assert indices[:, 0].tolist() == [7, 3]
    assert distances[:, 0].tolist() == [0.0, 0.0]
    assert (distances[:, 1] > 1000).all()


def test_nearest_needs_k_points() -> None:
    with pytest.raises(ValueError, match="the 3 nearest of 2 images"):
        nearest(normal(4, 2, 0), normal(2, 2, 1), k=3)
