"""The codebook: nearest codes, losses and gradients against their closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.config import QuantizerConfig
from tokenizer.quantize import Codebook, nearest, normalize, rotation, squared_error, straight_through


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def test_nearest_is_the_smallest_distance_by_brute_force() -> None:
    vectors, book = unit(50, 4), unit(30, 4, seed=1)
    distances = (vectors[:, None] - book[None]).square().sum(-1)
    assert torch.equal(nearest(vectors, book), distances.argmin(-1))


@pytest.mark.parametrize("limit", [1, 30, 100, 149, 10**6])
def test_chunks_give_what_the_whole_gives(limit: int) -> None:
    vectors, book = unit(5, 7, 4), unit(30, 4, seed=1)
    assert torch.equal(nearest(vectors, book, max_similarities=limit), (vectors @ book.T).argmax(-1))


def test_no_chunk_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    argmax = Tensor.argmax
    monkeypatch.setattr(Tensor, "argmax", lambda self, dim: sizes.append(self.numel()) or argmax(self, dim=dim))
    nearest(unit(100, 4), unit(30, 4, seed=1), max_similarities=200)
    assert max(sizes) <= 200 and sum(sizes) == 100 * 30


def test_codes_do_not_depend_on_the_length_of_vectors_or_codes() -> None:
    quantizer, z = Codebook(16, 4, QuantizerConfig()), torch.randn(2, 5, 4)
    codes = quantizer(z)[1]
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(16, 1) + 0.5)
    assert torch.equal(quantizer(7 * z)[1], codes)
    assert torch.equal(quantizer.nearest(z), codes)


def test_quantised_vectors_are_the_unit_codes() -> None:
    quantizer, z = Codebook(16, 4, QuantizerConfig()), torch.randn(2, 5, 4)
    quantised, codes, _, stats = quantizer(z)
    assert torch.allclose(quantised, quantizer.lookup(codes), atol=1e-6)
    assert torch.allclose(quantised.norm(dim=-1), torch.ones(2, 5))
    assert torch.equal(stats["vectors"], normalize(z))
    assert torch.equal(quantizer.nearest(quantizer.lookup(codes)), codes)


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 4)])
def test_losses_are_the_squared_distance_to_the_code(reduction: str, divisor: int) -> None:
    quantizer = Codebook(16, 4, QuantizerConfig(reduction=reduction))
    z = torch.randn(2, 5, 4)
    _, codes, losses, _ = quantizer(z)
    cosine = (normalize(z) * quantizer.lookup(codes)).sum(-1)
    expected = (2 - 2 * cosine).mean() / divisor  # |a - b|^2 of unit vectors
    assert torch.allclose(losses["codebook"], expected, atol=1e-6)
    assert torch.allclose(losses["commitment"], expected, atol=1e-6)
    assert squared_error(torch.ones(1, 4), torch.zeros(1, 4), reduction).item() == 4 / divisor


def test_each_loss_moves_its_own_side_only() -> None:
    quantizer, z = Codebook(16, 4, QuantizerConfig()), torch.randn(2, 5, 4, requires_grad=True)
    losses = quantizer(z)[2]
    to_z, to_book = torch.autograd.grad(losses["codebook"], [z, quantizer.codebook], allow_unused=True)
    assert to_z is None and to_book.abs().sum() > 0
    to_z, to_book = torch.autograd.grad(losses["commitment"], [z, quantizer.codebook], allow_unused=True)
    assert to_z.abs().sum() > 0 and to_book is None


def test_straight_through_gradient_passes_through_the_normalisation() -> None:
    """d(z/|z|)/dz = (I - u u^T) / |z|, applied to the gradient that reaches the code."""
    quantizer, z = Codebook(16, 4, QuantizerConfig()), torch.randn(2, 5, 4, requires_grad=True)
    upstream = torch.randn(2, 5, 4)
    (gradient,) = torch.autograd.grad(quantizer(z)[0], z, upstream)
    direction, length = normalize(z.detach()), z.detach().norm(dim=-1, keepdim=True)
    expected = (upstream - direction * (direction * upstream).sum(-1, keepdim=True)) / length
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_rotation_gradient_is_the_inverse_rotation() -> None:
    z_unit, code = normalize(unit(3, 4).double()), normalize(unit(3, 4, seed=1).double())
    z = z_unit.clone().requires_grad_()
    value = rotation(z, code)
    assert torch.allclose(value, code)
    (gradient,) = torch.autograd.grad(value, z, code)
    assert torch.allclose(gradient, z_unit)  # what points along the code comes back along z
    jacobian = torch.autograd.functional.jacobian(lambda row: rotation(row, code[0]), z_unit[0])
    assert torch.allclose(jacobian @ jacobian.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.det(jacobian), torch.ones((), dtype=torch.float64))


def test_straight_through_is_the_identity_for_gradients() -> None:
    z, code = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (gradient,) = torch.autograd.grad(straight_through(z, code).sum(), z)
    assert torch.equal(gradient, torch.ones(3, 4))


def test_autocast_leaves_the_codebook_in_float32() -> None:
    quantizer, z = Codebook(64, 8, QuantizerConfig()), torch.randn(2, 50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantised, codes, losses, _ = quantizer(z)
        low = quantizer(z.bfloat16())[0]
        assert torch.equal(quantizer.nearest(z), codes)
    assert quantised.dtype == low.dtype == losses["codebook"].dtype == torch.float32
    assert torch.equal(codes, (F.normalize(z, dim=-1) @ F.normalize(quantizer.codebook, dim=-1).T).argmax(-1))
