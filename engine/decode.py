"""Encoded pictures of any kind -> RGB -> a square crop."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# Kept part of the shorter side in a random crop: ADM's range (Dhariwal and Nichol 2021).
LEAST_KEPT = 0.8
GREY_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def decode(data: bytes | Image.Image) -> Image.Image:
    """An 8-bit RGB picture, upright by its EXIF flag; transparency lies on white, 16-bit grey is scaled to 8 bits.

    Raises:
        Exception: whatever Pillow raises on cut or broken data; ValueError for samples without a defined white level.
    """
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in GREY_16_BIT:
        image = _narrow(image)
    if image.mode == "F":
        raise ValueError("floating-point samples have no defined white level; save it with 8 or 16 bits per channel")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _narrow(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: 65535 becomes 255. Pillow's own conversion would clip at 255."""
    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise ValueError("32-bit samples have no defined white level; save it with 8 or 16 bits per channel")
    return Image.fromarray(((samples + 128) // 257).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: box halvings, then bicubic until the shorter side is `size` (Dhariwal and Nichol 2021, code).

    Scores in the literature are measured on this crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, scale: float, top: float, left: float) -> Image.Image:
    """A square of 80 to 100 % of the shorter side, anywhere; `scale`, `top`, `left` are draws in [0, 1).

    The aspect ratio stays: a generator would learn the distortion.
    """
    side = min(image.size) * (1 - (1 - LEAST_KEPT) * scale)
    x, y = left * (image.width - side), top * (image.height - side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side), reducing_gap=3.0)
