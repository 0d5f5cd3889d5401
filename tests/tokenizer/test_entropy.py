"""Entropy losses against the formula on the whole token-by-code matrix, values and gradients."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenizer import entropy
from tokenizer.entropy import bit_entropy, code_entropy, entropy_of
from tokenizer.similarity import normalize


def whole(vectors: Tensor, book: Tensor, temperature: float) -> Tensor:
    """E[H(p)] - H(E[p]) as written, with p the softmax of minus the squared distances: [N, D], [K, D] -> scalar."""
    p = (-(vectors[:, None] - book).square().sum(-1) / temperature).softmax(-1)  # [N, K]
    return -(p * p.log()).sum(-1).mean() + (p.mean(0) * p.mean(0).log()).sum()


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("unit", [True, False])
def test_tiles_give_value_and_gradients_of_the_whole_matrix(unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "rows_at_once", lambda *_: 7)
    free = draws(3, 10, 4), draws(12, 4, seed=1)
    vectors, book = (normalize(each) for each in free) if unit else free
    expected = whole(vectors.flatten(0, 1), book, 0.7)
    found = code_entropy(vectors, book, temperature=0.7, unit=unit)
    assert torch.allclose(found, expected)
    gradients = (torch.autograd.grad(value, free, retain_graph=True) for value in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_bits_give_value_and_gradient_of_the_whole_matrix(dim: int) -> None:
    vectors, scale = draws(2, 9, dim), 0.5
    book = scale * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype=torch.float64)
    expected = whole(vectors.flatten(0, 1), book, 0.8)
    found = bit_entropy(vectors, scale=scale, temperature=0.8)
    assert torch.allclose(found, expected)
    (mine,), (theirs,) = torch.autograd.grad(found, vectors), torch.autograd.grad(expected, vectors)
    assert torch.allclose(mine, theirs)


def test_sure_and_even_use_is_minus_log_k_and_collapse_is_zero() -> None:
    book = torch.eye(8)
    assert code_entropy(book, book, temperature=1e-3, unit=True).item() == pytest.approx(-math.log(8))
    assert code_entropy(book[:1].expand(5, 8), book, temperature=1e-3, unit=True).item() == pytest.approx(0, abs=1e-6)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    assert bit_entropy(signs, scale=1.0, temperature=1e-2).item() == pytest.approx(-3 * math.log(2))


def test_vanished_probabilities_leave_gradients_finite() -> None:
    vectors, book = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = code_entropy(100 * vectors, book, temperature=0.01, unit=False)
    loss = loss + bit_entropy(100 * vectors, scale=1.0, temperature=0.01)
    gradients = torch.autograd.grad(loss, [vectors, book])
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_the_whole_matrix_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph holds on to between forward and backward is far less than N x K numbers."""
    monkeypatch.setattr(entropy, "rows_at_once", lambda *_: 50)
    kept: dict[int, int] = {}
    keep = lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.numel()) and tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        code_entropy(draws(1000, 4), draws(500, 4, seed=1), temperature=1.0, unit=True)
    assert sum(kept.values()) < 0.1 * 1000 * 500


def test_both_geometries_are_one_for_unit_codes() -> None:
    vectors, book = normalize(draws(20, 4)), normalize(draws(12, 4, seed=1))
    mine, theirs = (code_entropy(vectors, book, temperature=0.1, unit=unit) for unit in (True, False))
    assert torch.allclose(mine, theirs)


def test_entropy_of_an_even_distribution() -> None:
    assert entropy_of(torch.full((4, 4), 1 / 16)).item() == pytest.approx(math.log(16))
