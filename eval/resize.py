"""Resize rules: how an image comes to the size of a network.

The rule can move a Frechet distance more than the models that are compared (Parmar et al. 2022, arXiv 2104.11222), so
each has a name and a wording that goes into the protocol. Values are 0 .. 255 before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rule(NamedTuple):
    """A way to resize."""

    resize: Callable[[Tensor, int], Tensor]
    """(float32 [B, 3, H, W], S) -> [B, 3, S, S]."""
    told: str
    """What a protocol says of it, where {size} is S."""


def resized(images: Tensor, size: int, rule: str) -> Tensor:
    """uint8 or float [B, 3, H, W] in 0 .. 255 -> float32 [B, 3, size, size]; images of that size keep their values."""
    images = images.float()
    return images if images.shape[-2:] == (size, size) else RULES[rule].resize(images, size)


def tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's resize_bilinear, which FID was defined on: pixel i is taken at i * H / S."""
    return _interpolated(_interpolated(images, 3, size), 2, size)


def clean(images: Tensor, size: int) -> Tensor:
    """Clean-fid's rule: Pillow's bicubic filter on unrounded channels, widened where it shrinks; it may overshoot."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


def antialias(images: Tensor, size: int) -> Tensor:
    """Bilinear, with the filter widened where it shrinks."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _interpolated(images: Tensor, axis: int, size: int) -> Tensor:
    """Linear interpolation along one axis, at positions i * length / size; the last pixel is repeated."""
    length = images.shape[axis]
    steps = torch.arange(size, dtype=images.dtype, device=images.device)
    position = steps * torch.tensor(length / size, dtype=images.dtype)  # [S]
    low = position.long()
    share = (position - low).view([-1 if axis == other else 1 for other in range(4)])
    first = images.index_select(axis, low)
    second = images.index_select(axis, (low + 1).clamp(max=length - 1))
    return first + (second - first) * share


RULES = {
    "tf1": Rule(tf1, "TF1 bilinear to {size}, no antialias"),
    "clean": Rule(clean, "bicubic antialiased to {size}"),
    "antialias": Rule(antialias, "bilinear antialiased to {size}"),
}
