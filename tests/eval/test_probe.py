import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from eval.probe import (
    TapScore,
    at_open_end,
    best_tap,
    choose_penalty,
    fit_logistic,
    held_out_split,
    predict,
    probe_tap,
    span_of,
    standardise,
    top_hits,
)
from eval.statistics import Estimate

C_GRID = (1e-3, 1e-1, 10.0)


def blobs(n: int, seed: int, *, classes: int = 4, d: int = 6, gap: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, d, generator=generator) + gap * torch.eye(classes, d)[labels], labels


def test_separable_classes_are_read_off_perfectly() -> None:
    score = probe_tap("tap", *blobs(200, 0, gap=12.0), *blobs(100, 1, gap=12.0), c_grid=C_GRID, held_out=0.1)
    assert score.top1.value == score.held_out == 1.0
    assert score.top5 is None  # four classes


def test_shuffled_labels_give_chance() -> None:
    (x, labels), test = blobs(2000, 0, classes=10, d=12), blobs(2000, 1, classes=10, d=12)
    shuffled = labels[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    score = probe_tap("tap", x, shuffled, *test, c_grid=C_GRID, held_out=0.1)
    assert score.top1.value == pytest.approx(0.1, abs=0.05) and score.held_out == pytest.approx(0.1, abs=0.08)
    assert score.top5 is not None and score.top5.value == pytest.approx(0.5, abs=0.08)


def test_choices_never_see_the_test_images() -> None:
    (x, labels), (test, test_labels) = blobs(200, 0, gap=1.5), blobs(100, 1, gap=1.5)
    taps = {"good": (x, test), "poor": (torch.randn(200, 3), torch.randn(100, 3))}
    hostile = {"good": (x, -test), "poor": (taps["poor"][0], torch.eye(4, 3)[test_labels] * 50)}
    picks = [
        best_tap(
            [
                probe_tap(tap, fit, labels, seen, test_labels, c_grid=C_GRID, held_out=0.2)
                for tap, (fit, seen) in each.items()
            ]
        )
        for each in (taps, hostile)
    ]
    assert picks[0][:3] == picks[1][:3]
    assert picks[0].tap == "good"
    assert picks[0].top1.value > picks[1].top1.value


def test_a_test_image_of_an_unseen_class_is_wrong_and_changes_no_choice() -> None:
    (x, labels), (test, test_labels) = blobs(200, 0, gap=1.5), blobs(100, 1, gap=1.5)
    strange = torch.where(torch.arange(100) < 10, 7, test_labels)
    known, unknown = (
        probe_tap("tap", x, labels, test, each, c_grid=C_GRID, held_out=0.2) for each in (test_labels, strange)
    )
    assert known[:3] == unknown[:3]
    assert unknown.top1.value < known.top1.value


def test_best_tap_looks_at_held_out_accuracy_only() -> None:
    a = TapScore("a", 1.0, 0.9, False, Estimate(0.1, None), None)
    b = TapScore("b", 1.0, 0.8, False, Estimate(0.99, None), None)
    assert best_tap([a, b]).tap == "a"


def test_logistic_regression_agrees_with_scikit_learn() -> None:
    x, labels = blobs(150, 0, gap=1.0)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(x.numpy(), labels.numpy())
    weights = fit_logistic(x, labels, num_classes=4, c=0.1)
    torch.testing.assert_close(weights[:-1].T, torch.from_numpy(theirs.coef_).float(), atol=1e-3, rtol=0)
    logits = torch.from_numpy(theirs.decision_function(x.numpy())).float()
    torch.testing.assert_close(predict(x, weights), logits - logits.mean(1, keepdim=True), atol=2e-3, rtol=0)


def test_digits_are_read_off_as_well_as_by_scikit_learn() -> None:
    pixels, classes = load_digits(return_X_y=True)
    x, labels = torch.from_numpy(pixels).float(), torch.from_numpy(classes)
    train, test = standardise(x[:1200], x[1200:])
    for c in (1e-4, 1e-2, 1.0, 100.0):
        theirs = LogisticRegression(C=c, tol=1e-7, max_iter=3000).fit(train.double().numpy(), classes[:1200])
        weights = fit_logistic(train, labels[:1200], num_classes=10, c=c)
        expected = theirs.score(test.double().numpy(), classes[1200:])
        assert top_hits(predict(test, weights), labels[1200:]) / 597 == pytest.approx(expected, abs=0.005)


def test_the_minimum_is_reached_where_features_are_correlated_and_the_penalty_weak() -> None:
    generator = torch.Generator().manual_seed(0)
    common, labels = torch.randn(600, 1, generator=generator), torch.arange(600) % 5
    x = standardise(20 * common + torch.randn(600, 40, generator=generator) + 2 * torch.eye(5, 40)[labels])[0]
    theirs = LogisticRegression(C=10.0, tol=1e-9, max_iter=20_000).fit(x.double().numpy(), labels.numpy())
    best = torch.from_numpy(np.vstack([theirs.coef_.T, theirs.intercept_]))

    def objective(weights: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(predict(x.double(), weights.double()), labels)
        return float(loss + weights[:-1].square().sum() / (2 * 10.0 * 600))

    assert objective(fit_logistic(x, labels, num_classes=5, c=10.0)) == pytest.approx(objective(best), abs=1e-5)


def test_more_features_than_images_and_a_start_elsewhere_change_no_answer() -> None:
    x, labels = blobs(60, 0, d=200, gap=2.0)
    cold = fit_logistic(x, labels, num_classes=4, c=1.0)
    warm = fit_logistic(x, labels, num_classes=4, c=1.0, span=span_of(x), start=torch.randn(201, 4))
    torch.testing.assert_close(predict(x, cold).softmax(1), predict(x, warm).softmax(1), atol=1e-3, rtol=0)


def test_an_end_of_the_grid_is_open_only_if_it_beats_its_neighbour() -> None:
    assert at_open_end([0.5, 0.4, 0.3]) and at_open_end([0.3, 0.4, 0.5])
    assert not at_open_end([0.4, 0.5, 0.3]) and not at_open_end([0.5, 0.5, 0.3]) and not at_open_end([0.5])
    x, labels = blobs(200, 0, gap=1.5)
    narrow = choose_penalty(x, labels, num_classes=4, c_grid=(1e-9, 1e-1), held_out=0.3, seed=0)
    assert narrow.at_end and narrow.c == 1e-1


def test_a_label_is_among_the_top_five() -> None:
    logits = torch.arange(7.0).repeat(4, 1)
    labels = torch.tensor([6, 2, 1, 99])
    assert [top_hits(logits, labels, top) for top in (1, 5, 6)] == [1, 2, 3]
    x, classes = blobs(140, 0, classes=7, d=7, gap=2.0)
    score = probe_tap("tap", x, classes, *blobs(140, 1, classes=7, d=7, gap=2.0), c_grid=C_GRID, held_out=0.2)
    assert score.top5 is not None and score.top1.value < score.top5.value <= 1


def test_scale_of_features_does_not_matter_and_constant_ones_vanish() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    wild = torch.cat([x * torch.tensor([1e-3, 1.0, 1e4]) + 5, torch.full((50, 1), 0.1)], dim=1)
    tame = standardise(wild)[0]
    torch.testing.assert_close(tame[:, :3].std(0), torch.ones(3), atol=1e-3, rtol=0)
    assert tame[:, 3].abs().max() == 0
    wide = wild[:, :3].double()
    torch.testing.assert_close(tame[:, :3], ((wide - wide.mean(0)) / wide.std(0)).float())


def test_penalty_is_strong_when_features_are_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(120, 100, generator=generator), torch.arange(120) % 2
    x[:, 0] += 2 * labels
    choice = choose_penalty(x, labels, num_classes=2, c_grid=(1e-2, 1e3), held_out=0.3, seed=0)
    assert choice.c == 1e-2


def test_of_equal_penalties_the_strongest_is_chosen() -> None:
    labels = torch.arange(60) % 3
    choice = choose_penalty(torch.zeros(60, 4), labels, num_classes=3, c_grid=(1.0, 0.01, 10.0), held_out=0.3, seed=0)
    assert choice.c == 0.01 and not choice.at_end


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


def test_more_dimensions_than_images_have_the_minimum_of_the_whole_space() -> None:
    draws = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 300, generator=draws), torch.randint(0, 3, (60,), generator=draws)
    [x] = standardise(torch.cat([x, x[:10]]))  # some images twice
    labels = torch.cat([labels, labels[:10]])
    span = span_of(x)
    assert span.x.shape == (70, 59)  # 60 of them apart, less the mean
    torch.testing.assert_close(span.x @ span.axes.T, x, rtol=0, atol=1e-5)
    for c in (1e-3, 1.0):
        weights = fit_logistic(x, labels, num_classes=3, c=c)
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x.numpy(), labels.numpy())
        torch.testing.assert_close(
            (weights[:-1] - weights[:-1].mean(1, keepdim=True)).T,
            torch.from_numpy(theirs.coef_).float(), rtol=0, atol=2e-4,
        )  # fmt: skip
