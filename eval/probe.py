"""Linear probe: how much class information lies in frozen features, read off by multinomial logistic regression.

Penalty and tap are chosen on a held-out part of the training images; test images only ever give the final accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.statistics import Estimate, proportion

BLOCK = 4096  # rows that are held in float64 at a time
TOP = 5


class Labelled(NamedTuple):
    """Features float [N, D] of images and their classes int64 [N], on one device."""

    features: Tensor
    labels: Tensor


class Choice(NamedTuple):
    """A penalty and the held-out accuracy that speaks for it.

    `at_end` says that an end of the grid is better than its neighbour, so that a wider grid may hold a better one.
    """

    c: float
    held_out: float
    at_end: bool
    weights: Tensor


class TapScore(NamedTuple):
    """Result of one tap: `held_out` decides between taps, `top1` and `top5` on test images are reported.

    `setting` is what was chosen on held-out images: the inverse penalty C, or the learning rate of an online probe.
    """

    tap: str
    setting: float
    held_out: float
    at_end: bool
    top1: Estimate
    top5: Estimate | None


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Features [N, D] shifted and scaled by the training part's mean and deviation; constant features become 0."""
    mean = train.mean(0, dtype=torch.float64)
    squares = sum(((part.double() - mean).square().sum(0) for part in train.split(BLOCK)), torch.zeros_like(mean))
    std = (squares / max(1, len(train) - 1)).sqrt()
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)

    def scaled(x: Tensor) -> Tensor:
        return torch.cat([((part.double() - mean) * scale).float() for part in x.split(BLOCK)])

    return [scaled(x) for x in (train, *others)]


class Span(NamedTuple):
    """Features along their principal axes, of which N images have no more than N of D; the penalty keeps weights out of
    all other directions."""

    x: Tensor
    """[N, R]: the features along the axes."""
    axes: Tensor
    """[D, R], orthonormal."""
    variances: Tensor
    """float64 [R]: mean squares along them."""


def span_of(features: Tensor) -> Span:
    """All that `fit_logistic` needs to know of the shape of features [N, D]."""
    count, dim = features.shape
    wide = count < dim  # then the products of images with each other are fewer than those of dimensions
    products = features.new_zeros(min(count, dim), min(count, dim), dtype=torch.float64)
    for part in (features.T if wide else features).split(BLOCK):
        products.addmm_(part.double().T, part.double())
    squares, axes = torch.linalg.eigh(products)
    noise = torch.finfo(torch.float32).eps ** 2 * count * squares[-1]  # of features' own rounding
    kept = squares > noise.clamp(min=1e-30)
    squares, axes = squares[kept], axes[:, kept]
    if wide:
        axes = features.T @ (axes / squares.sqrt()).to(features.dtype)  # [D, R]
    axes = axes.to(features.dtype)
    return Span(features @ axes, axes, squares / count)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    c: float,
    span: Span | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Weights [D + 1, K] (last row: bias) of the minimum of sum of losses + ||W||^2 / (2 c), as scikit-learn's C.

    L-BFGS searches weights along the principal axes, in units in which the loss's second derivative at 0,
    X^T X / (N K) + 1 / (c N) but for the coupling of classes, is 1. There all directions are about equally steep, so
    that tens of steps suffice where correlated features, such as pixels, take many hundreds.

    Args:
        features: [N, D], standardised.
        labels: int64 [N] in 0 .. num_classes - 1.
        span: `span_of` the features, if it is known already.
        start: weights to begin at; absent: zeros.
    """
    ridge = 1 / (c * len(features))
    x, axes, variances = span_of(features) if span is None else span
    scale = (variances / num_classes + ridge).rsqrt().to(x.dtype)[:, None]  # [R, 1]
    first = features.new_zeros(features.shape[1] + 1, num_classes) if start is None else start
    along, bias = (axes.T @ first[:-1] / scale).requires_grad_(True), first[-1].clone().requires_grad_(True)
    solver = torch.optim.LBFGS([along, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        weights = scale * along  # [R, K]
        loss = F.cross_entropy(x @ weights + bias, labels) + ridge / 2 * weights.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return torch.cat([axes @ (scale * along.detach()), bias.detach()[None]])


def predict(features: Tensor, weights: Tensor) -> Tensor:
    """Logits [N, K] of features [N, D] under weights [D + 1, K]."""
    return features @ weights[:-1] + weights[-1]


def top_hits(logits: Tensor, labels: Tensor, top: int = 1) -> int:
    """How many rows [N, K] have their label [N] among the `top` largest; a label beyond K is never there."""
    return int((logits.topk(top, dim=1).indices == labels[:, None]).sum())


def held_out_split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded indices of the part to fit on and of the part held out.

    Raises:
        ValueError: too few images for both parts.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = round(n * share)
    if held < 1 or held >= n:
        raise ValueError(
            f"eval.probe.held_out={share} of {n} labelled training images leaves one part empty: take another share, or"
            " a higher eval.probe.num_train"
        )
    return order[held:], order[:held]


def choose_penalty(
    train: Tensor, labels: Tensor, *, num_classes: int, c_grid: Sequence[float], held_out: float, seed: int
) -> Choice:
    """The penalty with the best accuracy on held-out training images; of equals the strongest penalty."""
    fitted, held = (rows.to(train.device) for rows in held_out_split(len(train), held_out, seed))
    x, held_x = standardise(train[fitted], train[held])
    span, start, found = span_of(x), None, []
    for c in sorted(c_grid):
        start = fit_logistic(x, labels[fitted], num_classes=num_classes, c=c, span=span, start=start)
        found.append((c, top_hits(predict(held_x, start), labels[held]) / len(held), start))
    accuracies = [accuracy for _, accuracy, _ in found]
    best = accuracies.index(max(accuracies))
    c, accuracy, weights = found[best]
    return Choice(c, accuracy, at_end=at_open_end(accuracies), weights=weights)


def at_open_end(accuracies: Sequence[float]) -> bool:
    """Whether the best of a grid, of equals the first, stands at an end and is better than its neighbour."""
    best = list(accuracies).index(max(accuracies))
    if len(accuracies) < 2 or 0 < best < len(accuracies) - 1:
        return False
    return accuracies[best] > accuracies[1 if best == 0 else -2]


def count_classes(labels: Tensor) -> int:
    """Classes 0 .. K - 1 that the training labels [N] speak of.

    Raises:
        ValueError: fewer than two of them occur.
    """
    if len(labels.unique()) < 2:
        raise ValueError("a linear probe needs training labels of at least two classes")
    return int(labels.max()) + 1


def tap_score(tap: str, logits: Tensor, labels: Tensor, *, setting: float, held_out: float, at_end: bool) -> TapScore:
    """The score of a tap from the logits [N, K] of test images; top-5 only where there are more than five classes.

    A test image of a class beyond K counts as wrong.
    """
    top1, top5 = (
        proportion(top_hits(logits, labels, top), len(labels)) if logits.shape[1] > top or top == 1 else None
        for top in (1, TOP)
    )
    assert top1 is not None
    return TapScore(tap, setting, held_out, at_end, top1, top5)


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
    """Probe one representation: features [N, D] with labels int64 [N], all on one device.

    The classes are those of the training images; a test image of another one counts as wrong.

    Raises:
        ValueError: fewer than two classes.
    """
    num_classes = count_classes(train_labels)
    choice = choose_penalty(train, train_labels, num_classes=num_classes, c_grid=c_grid, held_out=held_out, seed=seed)
    x, test_x = standardise(train, test)
    weights = fit_logistic(x, train_labels, num_classes=num_classes, c=choice.c, start=choice.weights)
    answers = predict(test_x, weights)
    return tap_score(tap, answers, test_labels, setting=choice.c, held_out=choice.held_out, at_end=choice.at_end)


def best_tap(curve: Sequence[TapScore]) -> TapScore:
    """The tap with the best held-out accuracy; of equals the first."""
    return max(curve, key=lambda score: score.held_out)
