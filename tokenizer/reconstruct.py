"""Images through the tokenizer and back, for scores and for looking at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.images import ImageSet
from engine.log import save_grid
from tokenizer.model import Tokenizer


class Reconstruction(NamedTuple):
    """One batch, on the CPU."""

    originals: Tensor
    """uint8 [B, 3, H, W]."""
    reconstructions: Tensor
    """uint8 [B, 3, H, W]."""
    codes: Tensor | None
    """int64 [B, T]; None where the bottleneck has none."""


def reconstruct(
    tokenizer: Tokenizer, images: ImageSet, *, batch_size: int = 64, start: int = 0, stop: int | None = None
) -> Iterator[Reconstruction]:
    """Reconstruct the readable images of [start, stop) in order, centre crop, on the tokenizer's own device."""
    device = tokenizer.latent_mean.device
    for batch in images.in_order(batch_size, start=start, stop=stop):
        made, codes = tokenizer.reconstruct(batch["images"].to(device))
        yield Reconstruction(batch["images"], made.cpu(), None if codes is None else codes.cpu())


def save_reconstructions(
    tokenizer: Tokenizer, images: ImageSet, path: Path, *, num: int = 32, columns: int = 4
) -> None:
    """Write a PNG of the first `num` images, each beside its reconstruction; `columns` pairs in a row."""
    pairs = [side_by_side(batch) for batch in reconstruct(tokenizer, images, stop=num)]
    save_grid(torch.cat(pairs), path, columns=2 * columns)


def side_by_side(batch: Reconstruction) -> Tensor:
    """Originals and reconstructions taking turns, uint8 [2 B, 3, H, W]."""
    return torch.stack([batch.originals, batch.reconstructions], dim=1).flatten(0, 1)
