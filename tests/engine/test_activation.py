"""GELU written out: the formula in float64 and its derivative, as exact as bf16 allows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import activation
from engine.activation import WrittenOut, gelu

HALF_A_STEP = 2.0**-8  # relative rounding of bf16


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch's formula and its derivative in float64."""
    x = x.detach().double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


@pytest.mark.parametrize("part", [64, 2**18])
def test_value_and_slope_are_rounded_once(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "PART", part)
    x = torch.linspace(-10, 10, 3003).reshape(3, 7, 143).bfloat16().requires_grad_()
    y = gelu(x)
    assert isinstance(y.grad_fn, WrittenOut._backward_cls) and y.dtype == torch.bfloat16 and y.shape == x.shape
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for ours, theirs in zip((y, slope), exact(x), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * HALF_A_STEP, atol=1e-6)


def test_gradients_are_scaled_by_the_slope() -> None:
    x, grad = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(5, 8).bfloat16()
    (ours,) = torch.autograd.grad(gelu(x), x, grad)
    torch.testing.assert_close(ours.double(), grad.double() * exact(x)[1], rtol=2.1 * HALF_A_STEP, atol=1e-6)


def test_the_input_stays_and_large_numbers_pass_or_vanish() -> None:
    x = torch.tensor([-1e15, -1e4, -0.0, 0.0, 1e15]).bfloat16()
    leaf = x.clone().requires_grad_()
    y = gelu(leaf)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(leaf.detach(), x)
    assert y.tolist() == [0, 0, 0, 0, float(x[-1])] and slope.tolist() == [0, 0, 0.5, 0.5, 1]


@pytest.mark.parametrize("kind", ["fp32", "no gradient", "strided"])
def test_elsewhere_it_is_torch_s(kind: str) -> None:
    x = torch.randn(6, 8, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    x = x.T if kind == "strided" else x
    x.requires_grad_(kind != "no gradient")
    y = gelu(x)
    assert not isinstance(y.grad_fn, WrittenOut._backward_cls)
    assert torch.equal(y, F.gelu(x, approximate="tanh"))
