"""What reconstructions and discriminators are trained on: pure functions, all in float32.

Images come in [-1, 1]; the pixel losses count pixels from 0 to 1, as the weights of ViT-VQGAN (arXiv 2110.04627,
second-hand) do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAPLACE_MARGIN = 0.1  # epsilon: pixels from 0 to 1 are squeezed into [epsilon, 1 - epsilon], where the logit is finite
LAPLACE_LIMIT = 7.0  # of |ln b|
ADAPTIVE_LIMIT = 1e4


def l2(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of images in [-1, 1], counted in pixels from 0 to 1."""
    return (images.float() - target.float()).square().mean() / 4


def l1(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of images in [-1, 1], counted in pixels from 0 to 1."""
    return (images.float() - target.float()).abs().mean() / 2


def logit_laplace(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood per value under the logit-Laplace distribution (DALL-E, arXiv 2102.12092; second-hand).

    `|logit(y) - mu| / b + ln b + ln 2 + ln(y (1 - y))` of the squeezed pixel y; a density over y in (0, 1).

    Args:
        output: [B, 6, H, W], three channels of mu, then three of ln b, which is clamped to [-7, 7].
        target: [B, 3, H, W] in [-1, 1].
    """
    mu, log_b = output.float().chunk(2, dim=1)  # [B, 3, H, W] each
    log_b = log_b.clamp(-LAPLACE_LIMIT, LAPLACE_LIMIT)
    y = (1 - 2 * LAPLACE_MARGIN) * (target.float() + 1) / 2 + LAPLACE_MARGIN
    error = (torch.logit(y) - mu).abs() * torch.exp(-log_b)
    return (error + log_b + math.log(2) + torch.log(y * (1 - y))).mean()


def logit_laplace_mean(output: Tensor) -> Tensor:
    """The image that logit-Laplace output [B, 6, H, W] stands for: [B, 3, H, W] in [-1, 1], from mu alone."""
    mu = output.float().chunk(2, dim=1)[0]
    pixels = (torch.sigmoid(mu) - LAPLACE_MARGIN) / (1 - 2 * LAPLACE_MARGIN)
    return 2 * pixels.clamp(0, 1) - 1


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, `10 log10(255^2 / mse)`; equal images count as 100.

    Args:
        images, target: uint8 [B, 3, H, W].

    Returns:
        float32 [B].
    """
    error = (images.float() - target.float()).square().mean(dim=(1, 2, 3))  # [B]
    return (10 * torch.log10(255.0**2 / error)).clamp(max=100)


def non_saturating_generator(fake: Tensor) -> Tensor:
    """`-ln sigmoid(D(x^))`, the non-saturating loss of Goodfellow et al. 2014; fake: logits of any shape."""
    return F.softplus(-fake.float()).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """`-D(x^)`, the generator's side of the hinge game; fake: logits of any shape."""
    return -fake.float().mean()


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`-ln sigmoid(D(x)) - ln(1 - sigmoid(D(x^)))`; the two terms are added, not averaged."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`max(0, 1 - D(x)) + max(0, 1 + D(x^))`; the two terms are added, not averaged."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


GENERATOR_LOSSES = {"non_saturating": non_saturating_generator, "hinge": hinge_generator}
DISCRIMINATOR_LOSSES = {"non_saturating": logistic_discriminator, "hinge": hinge_discriminator}


def gradient_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """R1 of Mescheder et al. 2018 without its factor gamma / 2: the mean over images of `sum |grad_x D(x)|^2`.

    Where D gives an image several logits, D(x) is their mean. The result is differentiable with respect to D's
    weights, all of which get a gradient, if only of zeros: processes that share them wait for every one.

    Args:
        images: [B, 3, H, W] in [-1, 1], real ones.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = discriminator(images).float().flatten(1)  # [B, n]
        (gradient,) = torch.autograd.grad(logits.mean(1).sum(), images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean() + 0 * logits.sum()


def lecam(real: Tensor, fake: Tensor, mean_real: Tensor | float, mean_fake: Tensor | float) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021), of logits against moving averages of the opposite side's.

    `E max(0, D(x) - mean_fake)^2 + E max(0, mean_real - D(x^))^2`; the averages are numbers without gradient.
    """
    above = F.relu(real.float() - mean_fake).square().mean()
    below = F.relu(mean_real - fake.float()).square().mean()
    return above + below


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """VQGAN's factor of the adversarial loss (Esser et al. 2021): it asks for as much as the reconstruction does.

    `|reconstruction| / (|adversarial| + 1e-4)`, clamped to [0, 10000]; a scalar without gradient.

    Args:
        reconstruction, adversarial: the two losses' gradients in the decoder's last weight, or their norms.
    """
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)
    return ratio.clamp(0, ADAPTIVE_LIMIT).detach()
