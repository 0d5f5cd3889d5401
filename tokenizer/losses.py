"""Reconstruction errors between images in [-1, 1]; pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def l2(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all pixels, in float32."""
    return (images.float() - target.float()).square().mean()


def l1(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over all pixels, in float32."""
    return (images.float() - target.float()).abs().mean()


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, `10 log10(255^2 / mse)`; equal images count as 100.

    Args:
        images, target: uint8 [B, 3, H, W].

    Returns:
        float32 [B].
    """
    error = (images.float() - target.float()).square().mean(dim=(1, 2, 3))  # [B]
    return (10 * torch.log10(255.0**2 / error)).clamp(max=100)
