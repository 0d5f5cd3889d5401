import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from eval import knn
from eval.knn import classify, neighbours, votes


@pytest.mark.parametrize("temperature", [0.07, None])
def test_digits_have_the_classes_that_scikit_learn_gives_them(temperature: float | None) -> None:
    pixels, classes = load_digits(return_X_y=True)
    bank, queries = pixels[:1200] + 0.01, pixels[1200:] + 0.01
    weights = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    theirs = KNeighborsClassifier(n_neighbors=20, metric="cosine", weights=weights).fit(bank, classes[:1200])
    found = classify(
        torch.from_numpy(queries), torch.from_numpy(bank), torch.from_numpy(classes[:1200]),
        k=20, num_classes=10, temperature=temperature,
    )  # fmt: skip
    assert (found.numpy() == theirs.predict(queries)).mean() > 0.998  # rounding may decide a tie
    assert (found.numpy() == classes[1200:]).mean() > 0.9


def test_neighbours_are_those_of_brute_force_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(50, 7, generator=generator), torch.randn(90, 7, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    expected = cosine.sort(dim=1, descending=True)
    for block in (1, 7, 1024):
        monkeypatch.setattr(knn, "BLOCK", block)
        similarity, rows = neighbours(queries, bank, 5)
        assert torch.equal(rows, expected.indices[:, :5])
        torch.testing.assert_close(similarity, expected.values[:, :5])


def test_the_length_of_features_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, bank = torch.randn(40, 6, generator=generator), torch.randn(80, 6, generator=generator)
    labels, lengths = torch.arange(80) % 3, torch.rand(80, 1, generator=generator) + 0.1
    plain, scaled = (classify(queries * 9, each, labels, k=5, num_classes=3) for each in (bank, bank * lengths))
    assert torch.equal(plain, scaled)


def test_a_near_neighbour_outvotes_two_far_ones_only_by_its_weight() -> None:
    similarity, labels = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[0, 1, 1]])
    assert votes(similarity, labels, num_classes=2, temperature=0.07).argmax() == 0
    assert votes(similarity, labels, num_classes=2, temperature=None).tolist() == [[1, 2]]
    sharp = votes(similarity, labels, num_classes=2, temperature=1e-3)
    assert sharp.isfinite().all() and sharp.argmax() == 0


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"knn_k=20 neighbours, but there are only 9 training images"):
        neighbours(torch.randn(2, 3), torch.randn(9, 3), 20)
