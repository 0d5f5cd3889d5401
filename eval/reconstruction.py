"""How well a tokenizer gives images back, and how much of its codebook it uses: functions of uint8 images and codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.images import to_float

MAX_PSNR = 100.0


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB [B] of uint8 images [B, 3, H, W] in pairs; peak 255, equal ones count as 100."""
    error = (images.double() - others.double()).square().mean(dim=(1, 2, 3))
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MAX_PSNR)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair [B] in [-1, 1] (Wang et al. 2004); uint8 images [B, 3, H, W].

    11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, only windows that lie inside the
    image, mean over windows and channels.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(images.shape[2:])}")
    x, y = images.double(), others.double()
    mu_x, mu_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mu_x**2, _blur(y * y) - mu_y**2
    covariance = _blur(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def code_counts(codes: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs, int64 [K], in codes of any shape."""
    return torch.bincount(codes.flatten(), minlength=vocab_size)


def usage(counts: Tensor) -> float:
    """Share of the codebook that occurs at all."""
    return float((counts > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the code frequencies: K when all are used alike, 1 when only one is."""
    p = counts.double() / counts.sum()
    return float(torch.special.entr(p).sum().exp())


def batch_usage(codes: Tensor, vocab_size: int, *, batch_size: int = 256) -> Tensor:
    """Share of the codebook used within each full batch of images; codes [N, T] -> [N // batch_size]."""
    full = codes[: len(codes) // batch_size * batch_size]
    shares = [usage(code_counts(batch, vocab_size)) for batch in full.split(batch_size)] if len(full) else []
    return torch.tensor(shares, dtype=torch.float64)


def lpips_distance(network: nn.Module, images: Tensor, others: Tensor) -> Tensor:
    """LPIPS of each pair [B]; uint8 images [B, 3, H, W]."""
    return network(to_float(images), to_float(others))


def _blur(x: Tensor) -> Tensor:
    """Separable Gaussian window over the valid region: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    offsets = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).repeat(x.shape[1], 1)  # [C, 11]
    rows = F.conv2d(x, window[:, None, :, None], groups=x.shape[1])
    return F.conv2d(rows, window[:, None, None, :], groups=x.shape[1])
