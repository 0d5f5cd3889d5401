import pytest
import torch

from eval.probe import (
    TapScore,
    best_tap,
    choose_penalty,
    fit_logistic,
    held_out_split,
    predict,
    probe_curve,
    probe_tap,
    standardise,
)
from eval.statistics import Estimate

C_GRID = (1e-3, 1e-1, 10.0)


def blobs(n: int, seed: int, *, classes: int = 4, d: int = 6, gap: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, d, generator=generator) + gap * torch.eye(classes, d)[labels], labels


def test_separable_classes_are_read_off_perfectly() -> None:
    score = probe_tap("tap", *blobs(200, 0, gap=12.0), *blobs(100, 1, gap=12.0), c_grid=C_GRID, held_out=0.1)
    assert score.test.value == 1.0
    assert score.held_out == 1.0


def test_shuffled_labels_give_chance() -> None:
    x, labels = blobs(400, 0)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    score = probe_tap("tap", x, shuffled, *blobs(400, 1), c_grid=C_GRID, held_out=0.1)
    assert 0.1 < score.test.value < 0.45


def test_choices_never_see_the_test_images() -> None:
    (x, labels), (test, test_labels) = blobs(200, 0, gap=1.5), blobs(100, 1, gap=1.5)
    taps = {"good": (x, test), "poor": (torch.randn(200, 3), torch.randn(100, 3))}
    hostile = {"good": (x, -test), "poor": (taps["poor"][0], torch.eye(4, 3)[test_labels] * 50)}
    picks = [best_tap(probe_curve(each, labels, test_labels, c_grid=C_GRID, held_out=0.2)) for each in (taps, hostile)]
    assert picks[0][:3] == picks[1][:3]
    assert picks[0].tap == "good"
    assert picks[0].test.value > picks[1].test.value


def test_a_test_image_of_an_unseen_class_is_wrong_and_changes_no_choice() -> None:
    (x, labels), (test, test_labels) = blobs(200, 0, gap=1.5), blobs(100, 1, gap=1.5)
    strange = torch.where(torch.arange(100) < 10, 7, test_labels)
    known, unknown = (
        probe_tap("tap", x, labels, test, each, c_grid=C_GRID, held_out=0.2) for each in (test_labels, strange)
    )
    assert known[:3] == unknown[:3]
    assert unknown.test.value < known.test.value


def test_best_tap_looks_at_held_out_accuracy_only() -> None:
    a = TapScore("a", 1.0, 0.9, Estimate(0.1, None))
    b = TapScore("b", 1.0, 0.8, Estimate(0.99, None))
    assert best_tap([a, b]).tap == "a"


def test_logistic_regression_agrees_with_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    x, labels = blobs(150, 0, gap=1.0)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(x.numpy(), labels.numpy())
    weights = fit_logistic(x, labels, num_classes=4, c=0.1)
    torch.testing.assert_close(weights[:-1].T, torch.from_numpy(theirs.coef_).float(), atol=2e-3, rtol=0)
    assert (predict(x, weights).numpy() == theirs.predict(x.numpy())).mean() > 0.99


def test_scale_of_features_does_not_matter_and_constant_ones_vanish() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    wild = torch.cat([x * torch.tensor([1e-3, 1.0, 1e4]) + 5, torch.full((50, 1), 0.1)], dim=1)
    tame = standardise(wild)[0]
    torch.testing.assert_close(tame[:, :3].std(0), torch.ones(3), atol=1e-3, rtol=0)
    assert tame[:, 3].abs().max() == 0


def test_penalty_is_strong_when_features_are_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(120, 100, generator=generator), torch.arange(120) % 2
    x[:, 0] += 2 * labels
    choice = choose_penalty(x, labels, num_classes=2, c_grid=(1e-2, 1e3), held_out=0.3, seed=0)
    assert choice.c == 1e-2


def test_held_out_parts_are_disjoint_and_seeded() -> None:
    fitted, held = held_out_split(50, 0.1, 3)
    assert sorted(fitted.tolist() + held.tolist()) == list(range(50))
    assert len(held) == 5
    assert torch.equal(held, held_out_split(50, 0.1, 3)[1])
    with pytest.raises(ValueError, match="leaves one part empty"):
        held_out_split(4, 0.1, 0)


def test_one_class_cannot_be_probed() -> None:
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match="at least two classes"):
        probe_tap("tap", x, torch.zeros(20).long(), x, torch.zeros(20).long(), c_grid=C_GRID, held_out=0.1)
