"""Smaller images as a condition: from files or pixels to the latents of the image enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.decode import decode
from tokenizer.model import Tokenizer
from tokenizer.smaller import enlarge, shrink

BATCH = 64  # images per pass of the encoder


def smaller_latents(tokenizer: Tokenizer, paths: Sequence[Path], *, factor: int) -> Tensor:
    """The condition that image files make: latents float32 [B, C, h, w] on the CPU.

    A file has the tokenizer's image size, and is shrunk by the factor, or is the smaller image itself.

    Raises:
        ValueError: no file, or one that is missing, no image, or of another size.
    """
    if not paths:
        raise ValueError("no image is given: name at least one file")
    images = torch.cat([_read_small(Path(path), tokenizer.image_size, factor) for path in paths])
    return enlarged_latents(tokenizer, images, factor=factor)


def enlarged_latents(tokenizer: Tokenizer, images: Tensor, *, factor: int) -> Tensor:
    """The condition that images uint8 [B, 3, s, s], smaller by the factor, make: latents float32 [B, C, h, w] on the
    CPU.

    They have the 16 bits of latents on disk, so that a file says what the same image of the test split says.

    Raises:
        ValueError: images of another kind or size.
    """
    size = tokenizer.image_size
    small = size // factor
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"smaller images are {images.dtype} {list(images.shape)}: give uint8 [B, 3, s, s]")
    if tuple(images.shape[2:]) != (small, small):
        found = f"{images.shape[3]} x {images.shape[2]} pixels"
        raise ValueError(f"smaller images have {found}, but this generator takes {small} x {small}: scale or crop them")
    device = tokenizer.latent_mean.device
    parts = [tokenizer.to_latents(enlarge(part, size).to(device)).cpu() for part in images.cpu().split(BATCH)]
    return torch.cat(parts).half().float()


def _read_small(path: Path, size: int, factor: int) -> Tensor:
    """A file as a smaller image, uint8 [1, 3, size / factor, size / factor]."""
    small = size // factor
    try:
        picture = decode(path.read_bytes())
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow's readers raise nearly anything
        raise ValueError(f"{path}: not a readable image ({error}); give the path of an image file") from error
    if picture.size not in ((size, size), (small, small)):
        found = f"{picture.width} x {picture.height} pixels"
        wanted = f"{small} x {small}, or of {size} x {size}, which are shrunk"
        raise ValueError(f"{path} has {found}, but this generator takes images of {wanted}: scale or crop it")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    return pixels if picture.size == (small, small) else shrink(pixels, factor)
