"""Given the same features and logits, our distances are torch-fidelity's."""

import pytest
import torch

from eval.distances import frechet, inception_score, kernel_distance_subsets
from eval.manifold import manifold_scores
from eval.statistics import Moments


def features(n: int, d: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    """float32 [N, D], correlated, skewed and not negative, as pooled features are."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99)) / d**0.5
    return (torch.randn(n, d, generator=random) @ mixing + shift).exp()


def torch_fidelity_fid(x: torch.Tensor, y: torch.Tensor) -> float:
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = [theirs.fid_features_to_statistics(each) for each in (x, y)]
    return theirs.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def our_fid(x: torch.Tensor, y: torch.Tensor, root: str) -> float:
    return frechet(Moments.of(x).gaussian(), Moments.of(y).gaussian(), root=root)  # type: ignore[arg-type]


@pytest.mark.parametrize("root", ["nuclear", "eigenvalues"])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_frechet_distance(root: str, shift: float) -> None:
    x, y = features(2000, 96, 0, shift=shift), features(1500, 96, 1)
    assert our_fid(x, y, root) == pytest.approx(torch_fidelity_fid(x, y), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_dimensions() -> None:
    """The two forms of the root come apart here: ours by eigenvalues follows torch-fidelity's, as far as such noise
    can be followed."""
    x, y = features(60, 128, 0), features(50, 128, 1)
    theirs = torch_fidelity_fid(x, y)
    assert our_fid(x, y, "eigenvalues") == pytest.approx(theirs, rel=1e-6)
    same = Moments.of(x).gaussian()
    assert frechet(same, same) < 1e-10 * float(same.sigma.trace())
    assert abs(torch_fidelity_fid(x, x)) > 1e-9 * float(same.sigma.trace())


@pytest.mark.parametrize(("n", "splits"), [(1000, 10), (997, 10), (50, 7)])
def test_inception_score(n: int, splits: int) -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * features(n, 20, 0)
    expected = theirs.isc_features_to_metric(logits, splits=splits)["inception_score_mean"]
    assert inception_score(logits, splits=splits).value == pytest.approx(expected, rel=1e-6)


def test_kernel_distance() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(500, 64, 0, shift=0.1), features(400, 64, 1)
    told = {"kid_subsets": 5, "kid_subset_size": 200, "rng_seed": 2020, "verbose": False}
    expected = theirs.kid_features_to_metric(x, y, **told)["kernel_inception_distance_mean"]
    assert kernel_distance_subsets(x, y, subsets=5, size=200).value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("n", [300, 700])
def test_precision_and_recall(n: int) -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = features(n, 8, 0, shift=0.1), features(500, 8, 1)
    expected = theirs.prc_features_to_metric(x, y, verbose=False)
    scores = manifold_scores(x, y)
    assert 0.1 < scores["precision"].value < 1
    assert scores["precision"].value == pytest.approx(expected["precision"], abs=1e-4)
    assert scores["recall"].value == pytest.approx(expected["recall"], abs=1e-4)
