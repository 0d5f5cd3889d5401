"""Images of which only the first codes stand: what is not decoded yet is grey."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.model import Tokenizer

GREY = 128


def paint_partial(tokenizer: Tokenizer, codes: Tensor, done: int) -> Tensor:
    """Images uint8 [B, 3, H, W] of the first `done` codes of int64 [B, T]; the pixels of the other cells are grey.

    A cell of the grid stands once all its codes do. The decoder, which sees the whole grid, is given code 0 for those
    that do not stand, so what `codes` holds there does not matter, and cells change a little until the last one stands.

    Raises:
        ValueError: `done` is not in 0 .. T, or the codes are not this tokenizer's.
    """
    if not 0 <= done <= tokenizer.length:
        raise ValueError(f"done={done} must lie in 0 .. {tokenizer.length}, the number of codes of an image")
    standing = torch.arange(tokenizer.length, device=codes.device) < done  # [T]
    images = tokenizer.decode(codes.where(standing, 0))  # [B, 3, H, W]
    per_cell = tokenizer.quantizer.codes_per_token
    cells = standing.view(*tokenizer.grid, per_cell).all(-1)  # [h, w]
    patch = tokenizer.image_size // tokenizer.grid[0]
    return images.masked_fill(~cells.repeat_interleave(patch, 0).repeat_interleave(patch, 1), GREY)
