"""The codebook: losses, gradients and moving averages against their closed forms, in both geometries."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.bottleneck import rotation, squared_error, straight_through
from tokenizer.config import QuantizerConfig, TokenizerLossConfig
from tokenizer.entropy import code_entropy
from tokenizer.quantize import SMOOTHING, Codebook
from tokenizer.similarity import nearest, normalize

PLAIN = QuantizerConfig(normalize=False)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


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


def test_rotation_of_any_length_is_the_rotation_times_the_ratio_of_lengths() -> None:
    z, code = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    value = rotation(z, code)
    assert torch.allclose(value, code)
    (gradient,) = torch.autograd.grad(value, z, code)
    ratio = code.norm(dim=-1, keepdim=True) / z.detach().norm(dim=-1, keepdim=True)
    assert torch.allclose(gradient, ratio**2 * z)  # turned back, and scaled by the ratio instead of its inverse
    jacobian = torch.autograd.functional.jacobian(lambda row: rotation(row, code[0]), z[0])
    assert torch.allclose(jacobian @ jacobian.T, ratio[0] ** 2 * torch.eye(4, dtype=torch.float64))
    assert torch.det(jacobian) > 0


def test_rotation_of_opposite_and_zero_vectors_stays_finite() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    value = rotation(z, torch.tensor([[-2.0, 0.0], [3.0, 4.0]]))
    assert value.tolist() == [[-2, 0], [0, 0]]
    assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()


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


def test_without_normalisation_vectors_and_codes_keep_their_lengths() -> None:
    quantizer, z = Codebook(32, 4, PLAIN), torch.randn(2, 50, 4, requires_grad=True)
    assert quantizer.codebook.norm(dim=1).mean().item() == pytest.approx(1, abs=0.2)
    quantised, codes, losses, stats = quantizer(z)
    assert torch.equal(codes, (z[..., None, :] - quantizer.codebook).square().sum(-1).argmin(-1))
    assert torch.allclose(quantised, quantizer.codebook[codes], atol=1e-6)
    assert torch.equal(stats["vectors"], z.detach()) and torch.equal(quantizer.latents(z), z)
    expected = (z - quantizer.codebook[codes]).square().mean()
    assert torch.allclose(losses["codebook"], expected) and torch.allclose(losses["commitment"], expected)
    (gradient,) = torch.autograd.grad(quantised, z, torch.ones(2, 50, 4))
    assert torch.equal(gradient, torch.ones(2, 50, 4))


def test_both_geometries_start_from_the_same_draws() -> None:
    books = []
    for config in (QuantizerConfig(), PLAIN, QuantizerConfig(update="ema")):
        torch.manual_seed(0)
        books.append(Codebook(16, 4, config).codebook)
    assert torch.allclose(normalize(books[1]), books[0]) and torch.equal(books[2], books[0])


def vectors_by_code(quantizer: Codebook, z: Tensor) -> tuple[Tensor, Tensor]:
    """How often each code was chosen, and the sum of the latents that chose it."""
    _, codes, _, stats = quantizer(z)
    counts = torch.bincount(codes.flatten(), minlength=quantizer.vocab_size).float()
    sums = torch.zeros_like(quantizer.codebook).index_add_(0, codes.flatten(), stats["vectors"].flatten(0, 1))
    return counts, sums


@pytest.mark.parametrize("unit", [True, False])
def test_moving_averages_follow_their_closed_form(unit: bool) -> None:
    quantizer = Codebook(8, 4, QuantizerConfig(update="ema", ema_decay=0.9, normalize=unit))
    start, steps = quantizer.codebook.detach().clone(), [torch.randn(2, 30, 4) for _ in range(3)]
    counts, sums = torch.ones(8), start.clone()
    for z in steps:
        chosen, added = vectors_by_code(quantizer, z)
        quantizer.ema_update(chosen, added)
        counts, sums = 0.9 * counts + 0.1 * chosen, 0.9 * sums + 0.1 * added
    smoothed = (counts + SMOOTHING) / (counts.sum() + 8 * SMOOTHING) * counts.sum()
    expected = sums / smoothed[:, None]
    expected = normalize(expected) if unit else expected
    assert torch.allclose(quantizer.codebook, expected, atol=1e-6) and not torch.allclose(expected, start, atol=1e-3)
    assert torch.allclose(quantizer.ema_counts, counts) and torch.allclose(quantizer.ema_sums, sums)


def test_moving_codes_have_no_gradient_no_codebook_loss_and_a_forward_pass_leaves_them() -> None:
    quantizer = Codebook(8, 4, QuantizerConfig(update="ema"))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert quantizer(torch.randn(2, 5, 4))[2].keys() == {"commitment"}
    assert not quantizer.codebook.requires_grad and before.keys() == {"codebook", "ema_counts", "ema_sums"}
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert Codebook(8, 4, QuantizerConfig()).state_dict().keys() == {"codebook"}


def test_averages_begin_anew_at_codes_set_from_outside() -> None:
    quantizer = Codebook(8, 4, QuantizerConfig(update="ema", normalize=False))
    rows = torch.arange(8) < 3
    quantizer.ema_update(torch.full((8,), 5.0), torch.randn(8, 4))
    with torch.no_grad():
        quantizer.codebook[rows] = 7.0
    kept = quantizer.ema_sums[~rows].clone()
    quantizer.restart_averages(rows)
    assert (quantizer.ema_sums[rows] == 7).all() and (quantizer.ema_counts[rows] == 1).all()
    assert torch.equal(quantizer.ema_sums[~rows], kept)
    quantizer.ema_update(torch.zeros(8), torch.zeros(8, 4))
    assert torch.allclose(quantizer.codebook[rows], torch.tensor(7.0), atol=1e-2)
    Codebook(8, 4, QuantizerConfig()).restart_averages()  # nothing to do


@pytest.mark.parametrize("unit", [True, False])
def test_the_entropy_loss_is_there_in_training_if_it_has_a_weight(unit: bool) -> None:
    loss = TokenizerLossConfig(entropy=0.1, entropy_temperature=0.5)
    quantizer, z = Codebook(16, 4, QuantizerConfig(normalize=unit), loss), torch.randn(2, 5, 4)
    found = quantizer(z)[2]["entropy"]
    assert torch.allclose(found, code_entropy(quantizer.latents(z), quantizer._book(), temperature=0.5, unit=unit))
    assert torch.autograd.grad(found, quantizer.codebook)[0].abs().sum() > 0
    assert "entropy" not in quantizer.eval()(z)[2]
    assert "entropy" not in Codebook(16, 4, QuantizerConfig(), TokenizerLossConfig())(z)[2]


def test_brute_force_agrees_on_a_realistic_size() -> None:
    z, book = normalize(torch.randn(3000, 8)), normalize(torch.randn(1024, 8))
    assert torch.equal(nearest(z, book), (z @ book.T).argmax(-1))
