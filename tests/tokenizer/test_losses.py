"""Losses in closed form, against numerical integration and differentiation."""

import math

import pytest
import torch
from torch import Tensor, nn

from tokenizer.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    adaptive_weight,
    gradient_penalty,
    l1,
    l2,
    lecam,
    logit_laplace,
    logit_laplace_mean,
    psnr,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_l2_and_l1_count_pixels_from_0_to_1() -> None:
    black, grey = torch.full((2, 3, 4, 4), -1.0), torch.zeros(2, 3, 4, 4)
    assert l2(grey, black).item() == 0.25
    assert l1(grey, black).item() == 0.5


def test_counting_from_0_to_1_only_divides() -> None:
    images, target = noise(2, 3, 5, 7), noise(2, 3, 5, 7, seed=1)
    assert torch.equal(4 * l2(images, target), (images - target).square().mean())
    assert torch.equal(2 * l1(images, target), (images - target).abs().mean())


def test_errors_are_computed_in_float32() -> None:
    images, output = (torch.zeros(1, channels, 4, 4, dtype=torch.bfloat16) for channels in (3, 6))
    assert l2(images, images).dtype == l1(images, images).dtype == torch.float32
    assert logit_laplace(output, images).dtype == logit_laplace_mean(output).dtype == torch.float32


def test_psnr_of_a_constant_difference_per_image() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = images.clone()
    other[0], other[1] = 255, 1
    assert psnr(images, other).tolist() == pytest.approx([0.0, 20 * math.log10(255)])
    assert psnr(images, images).tolist() == [100, 100]


def laplace_output(mu: float, log_b: float) -> Tensor:
    return torch.cat([torch.full((1, 3, 1, 1), mu), torch.full((1, 3, 1, 1), log_b)], dim=1)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.3)])
def test_the_logit_laplace_density_integrates_to_one(mu: float, log_b: float) -> None:
    y = (torch.arange(20_000) + 0.5) / 20_000  # squeezed pixels over (0, 1)
    target = ((y - 0.1) / 0.8 * 2 - 1).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    output = laplace_output(mu, log_b)
    density = torch.vmap(lambda value: logit_laplace(output, value[None]))(target).neg().exp()
    assert density.mean().item() == pytest.approx(1, abs=2e-3)


def test_the_likelihood_is_highest_where_the_mean_is_the_target() -> None:
    target = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mu = torch.logit(0.8 * (target + 1) / 2 + 0.1)
    output = torch.cat([mu, torch.zeros_like(mu)], dim=1)
    torch.testing.assert_close(logit_laplace_mean(output), target)
    assert all(logit_laplace(output, target) < logit_laplace(output + shift, target) for shift in (-0.1, 0.1))


def test_the_mean_never_leaves_the_pixel_range() -> None:
    assert logit_laplace_mean(laplace_output(50, 0)).unique().tolist() == [1]
    assert logit_laplace_mean(laplace_output(-50, 0)).unique().tolist() == [-1]


def test_logit_laplace_gradients_agree_with_finite_differences() -> None:
    output, target = noise(1, 6, 2, 2), noise(1, 3, 2, 2, seed=1).clamp(-1, 1)
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(logit_laplace(output, target), output)
    for place in range(0, output.numel(), 5):
        step = torch.zeros(output.numel()).index_fill_(0, torch.tensor(place), 1e-2).view_as(output)
        slope = (logit_laplace(output + step, target) - logit_laplace(output - step, target)) / 2e-2
        assert gradient.flatten()[place].item() == pytest.approx(slope.item(), abs=2e-3)


def test_a_wild_scale_is_clamped() -> None:
    target = torch.full((1, 3, 1, 1), 0.5)
    for wild, limit in ((-50.0, -7.0), (50.0, 7.0)):
        values = [logit_laplace(laplace_output(0, log_b), target) for log_b in (wild, limit)]
        assert torch.equal(*values)


def test_the_games_in_closed_form() -> None:
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.0, 3.0])
    log1p = lambda values: sum(math.log1p(math.exp(value)) for value in values) / len(values)
    assert GENERATOR_LOSSES["non_saturating"](fake).item() == pytest.approx(log1p([0, -3]))
    assert DISCRIMINATOR_LOSSES["non_saturating"](real, fake).item() == pytest.approx(log1p([-2, 0.5]) + log1p([0, 3]))
    assert GENERATOR_LOSSES["hinge"](fake).item() == -1.5
    assert DISCRIMINATOR_LOSSES["hinge"](real, fake).item() == (0 + 1.5) / 2 + (1 + 4) / 2


def test_a_discriminator_that_knows_nothing_loses_ln_2_twice() -> None:
    nothing = torch.zeros(3, 1, 4, 4)
    assert DISCRIMINATOR_LOSSES["non_saturating"](nothing, nothing).item() == pytest.approx(2 * math.log(2))


class Bump(nn.Module):
    """A smooth toy discriminator with one logit or several per image."""

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(12, logits).double())
        self.bias = nn.Parameter(torch.zeros(logits, dtype=torch.double))

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.weight) + self.bias


def slopes(discriminator: nn.Module, image: Tensor) -> Tensor:
    """The gradient of an image's mean logit by central differences."""
    steps = torch.eye(12, dtype=torch.double).view(12, 3, 2, 2) * 1e-5
    return (discriminator(image + steps) - discriminator(image - steps)).mean(dim=1) / 2e-5


@pytest.mark.parametrize("logits", [1, 5])
def test_r1_agrees_with_numeric_differentiation(logits: int) -> None:
    discriminator, images = Bump(logits), noise(2, 3, 2, 2, seed=1).double()
    expected = sum(slopes(discriminator, image[None]).square().sum().item() for image in images) / 2
    assert gradient_penalty(discriminator, images).item() == pytest.approx(expected, rel=1e-4)


def test_r1_reaches_every_weight_and_no_image() -> None:
    discriminator, images = Bump(1), noise(2, 3, 2, 2).double().requires_grad_()
    with torch.no_grad():
        again = gradient_penalty(discriminator, images)
    penalty = gradient_penalty(discriminator, images)
    penalty.backward()
    assert torch.equal(again, penalty)
    assert discriminator.weight.grad.norm() > 0 and discriminator.bias.grad.tolist() == [0]
    assert images.grad is None


def test_lecam_in_closed_form() -> None:
    real, fake = torch.tensor([1.0, -3.0]), torch.tensor([0.5, -2.0])
    expected = ((1 + 0.5) ** 2 + 0) / 2 + ((0.25 - 0) ** 2 * 0 + (0.25 + 2) ** 2) / 2
    assert lecam(real, fake, mean_real=0.25, mean_fake=-0.5).item() == pytest.approx(expected)
    means = torch.tensor(0.25), torch.tensor(-0.5)
    assert torch.equal(lecam(real, fake, *means), lecam(real, fake, 0.25, -0.5))


def test_the_adaptive_weight_evens_out_two_gradients() -> None:
    layer = nn.Parameter(noise(3, 2))
    wanted, opposed = 3 * layer.sum(), layer[0].sum() / 2
    gradients = [torch.autograd.grad(loss, layer)[0] for loss in (wanted, opposed)]
    weight = adaptive_weight(*gradients)
    assert weight.item() == pytest.approx(3 * math.sqrt(6) / (math.sqrt(2) / 2 + 1e-4))
    assert torch.equal(weight, adaptive_weight(*(gradient.norm() for gradient in gradients)))
    assert not weight.requires_grad


def test_the_adaptive_weight_is_bounded() -> None:
    assert adaptive_weight(torch.tensor(1e9), torch.tensor(0.0)).item() == 1e4
    assert adaptive_weight(torch.tensor(0.0), torch.tensor(0.0)).item() == 0
