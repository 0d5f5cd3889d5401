"""Linear probe: how much class information lies in frozen features, read off by multinomial logistic regression.

Penalty and tap are chosen on a held-out part of the training images; test images only ever give the final accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.statistics import Estimate, proportion


class Choice(NamedTuple):
    """A penalty and the held-out accuracy that speaks for it."""

    c: float
    held_out: float


class TapScore(NamedTuple):
    """Result of one tap: `held_out` decides between taps, `test` is reported."""

    tap: str
    c: float
    held_out: float
    test: Estimate


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Features [N, D] shifted and scaled by the training part's mean and deviation; constant features become 0."""
    mean, std = train.double().mean(0), train.double().std(0)
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)
    return [((x.double() - mean) * scale).float() for x in (train, *others)]


def fit_logistic(
    features: Tensor, labels: Tensor, *, num_classes: int, c: float, start: Tensor | None = None
) -> Tensor:
    """Weights [D + 1, K] (last row: bias) of the minimum of sum of losses + ||W||^2 / (2 c), as scikit-learn's C."""
    x = torch.cat([features, features.new_ones(len(features), 1)], dim=1)  # [N, D + 1]
    weights = x.new_zeros(x.shape[1], num_classes) if start is None else start.clone()
    weights.requires_grad_(True)
    solver = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        penalty = weights[:-1].square().sum() / (2 * c * len(x))
        loss = F.cross_entropy(x @ weights, labels) + penalty
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def predict(features: Tensor, weights: Tensor) -> Tensor:
    """Classes int64 [N]."""
    return (features @ weights[:-1] + weights[-1]).argmax(1)


def held_out_split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded indices of the part to fit on and of the part held out.

    Raises:
        ValueError: too few images for both parts.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = round(n * share)
    if held < 1 or held >= n:
        raise ValueError(f"eval.probe.held_out={share} of {n} training images leaves one part empty")
    return order[held:], order[:held]


def choose_penalty(
    train: Tensor, labels: Tensor, *, num_classes: int, c_grid: Sequence[float], held_out: float, seed: int
) -> Choice:
    """The penalty with the best accuracy on held-out training images; of equals the strongest penalty."""
    fitted, held = held_out_split(len(train), held_out, seed)
    x, held_x = standardise(train[fitted], train[held])
    weights, choices = None, []
    for c in sorted(c_grid):
        weights = fit_logistic(x, labels[fitted], num_classes=num_classes, c=c, start=weights)
        accuracy = (predict(held_x, weights) == labels[held]).double().mean()
        choices.append(Choice(c, float(accuracy)))
    return max(choices, key=lambda choice: (choice.held_out, -choice.c))


def probe_tap(
    tap: str,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    c_grid: Sequence[float],
    held_out: float,
    seed: int = 0,
) -> TapScore:
    """Probe one representation: features [N, D] with labels int64 [N].

    The classes are those of the training images; a test image of another one counts as wrong.

    Raises:
        ValueError: fewer than two classes.
    """
    num_classes = int(train_labels.max()) + 1
    if len(train_labels.unique()) < 2:
        raise ValueError("a linear probe needs training labels of at least two classes")
    choice = choose_penalty(train, train_labels, num_classes=num_classes, c_grid=c_grid, held_out=held_out, seed=seed)
    x, test_x = standardise(train, test)
    weights = fit_logistic(x, train_labels, num_classes=num_classes, c=choice.c)
    hits = int((predict(test_x, weights) == test_labels).sum())
    return TapScore(tap, choice.c, choice.held_out, proportion(hits, len(test_labels)))


def probe_curve(
    taps: Mapping[str, tuple[Tensor, Tensor]],
    train_labels: Tensor,
    test_labels: Tensor,
    *,
    c_grid: Sequence[float],
    held_out: float,
    seed: int = 0,
) -> list[TapScore]:
    """One score per tap, for taps {name: (train features, test features)}."""
    return [
        probe_tap(tap, train, train_labels, test, test_labels, c_grid=c_grid, held_out=held_out, seed=seed)
        for tap, (train, test) in taps.items()
    ]


def best_tap(curve: Sequence[TapScore]) -> TapScore:
    """The tap with the best held-out accuracy; of equals the first."""
    return max(curve, key=lambda score: score.held_out)
