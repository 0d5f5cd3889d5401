"""The bottleneck of a variational autoencoder: divergence in closed form, noise in training alone, no codes."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tokenizer.continuous import Gaussian


def test_the_loss_is_the_divergence_from_a_standard_normal() -> None:
    z = torch.randn(2, 5, 8)
    mean, log_variance = z.chunk(2, dim=-1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    _, codes, losses, _ = Gaussian(4)(z)
    assert torch.allclose(losses["kl"], expected) and losses.keys() == {"kl"} and codes is None


def test_training_draws_from_the_distribution_and_repeats_with_the_seed() -> None:
    z = torch.tensor([1.5, -2.0, 0.6, -1.2]).expand(1, 40_000, 4)
    bottleneck = Gaussian(2)
    torch.manual_seed(0)
    first = bottleneck(z)[0]
    torch.manual_seed(0)
    assert torch.equal(bottleneck(z)[0], first)
    assert torch.allclose(first.mean(dim=(0, 1)), torch.tensor([1.5, -2.0]), atol=0.02)
    assert torch.allclose(first.var(dim=(0, 1)).log(), torch.tensor([0.6, -1.2]), atol=0.03)


def test_evaluation_and_latents_give_the_mean() -> None:
    bottleneck, z = Gaussian(4).eval(), torch.randn(2, 5, 8)
    assert torch.equal(bottleneck(z)[0], z[..., :4])
    assert torch.equal(bottleneck.latents(z), z[..., :4])
    assert torch.equal(bottleneck.snap(z[..., :4]), z[..., :4])


def test_extreme_variances_stay_finite() -> None:
    z = torch.tensor([0.0, 1e6]).expand(1, 3, 2).clone().requires_grad_()
    sample, _, losses, _ = Gaussian(1)(z)
    (gradient,) = torch.autograd.grad(losses["kl"] + sample.sum(), z)
    assert losses["kl"].isfinite() and gradient.isfinite().all()


def test_codes_are_refused_with_a_remedy() -> None:
    for ask in (Gaussian(4).nearest, Gaussian(4).lookup):
        with pytest.raises(ValueError, match=r"quantizer\.kind=kl has latents but no codes.*diffusion"):
            ask(torch.zeros(1, 1, 4))
