"""The smaller version of an image: shrunk, and enlarged again, so that it has the place for what it lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_factor(size: int, factor: int) -> None:
    """Raise ValueError unless images of `size` pixels can be shrunk by the factor."""
    if size % factor:
        divisors = ", ".join(str(each) for each in range(2, size + 1) if size % each == 0)
        raise ValueError(f"tokenizer.low_resolution={factor} must divide data.size={size}: use one of {divisors}")


def shrink(images: Tensor, factor: int) -> Tensor:
    """Images uint8 [B, 3, S, S] -> [B, 3, S / factor, S / factor]: means of blocks, halves round up.

    In whole numbers, so that every device and batch size has the same pixels.
    """
    blocks = images.long().unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # [B, 3, s, factor, s, factor]
    area = factor**2
    return ((2 * blocks.sum(dim=(3, 5)) + area) // (2 * area)).to(torch.uint8)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Images uint8 [B, 3, s, s] -> [B, 3, size, size], bicubic (a = -0.75), halves round up.

    In float64, in which the interpolation by a power of two is exact.
    """
    wide = F.interpolate(images.double(), size=(size, size), mode="bicubic", align_corners=False)
    return (wide + 0.5).floor().clamp(0, 255).to(torch.uint8)


def smaller_version(images: Tensor, factor: int) -> Tensor:
    """Images uint8 [B, 3, S, S] -> of the same size, with what their smaller versions have left of them."""
    return enlarge(shrink(images, factor), images.shape[-1])
