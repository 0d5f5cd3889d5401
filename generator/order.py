"""A curriculum on the order of codes: random orders first, raster in the end (RAR, Yu et al., 2024).

A network that predicts codes in random order is told two places at each step: where the code lies that it is to predict
(its position embedding) and where the code lies that it has just been given (its source embedding). In raster order the
one follows from the other, so that a finished network needs a single table again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.config import OrderConfig

POSITION, SOURCE = "position_embedding.weight", "source_embedding.weight"


def random_share(step: int, steps: int, config: OrderConfig) -> float:
    """The share of samples in random order at `step` of `steps`, counted from 0: 1, then linearly to 0."""
    start, end = config.anneal_start, config.anneal_end
    progress = step / steps
    if config.kind == "raster" or progress >= end:
        return 0.0
    return min(1.0, (end - progress) / (end - start)) if end > start else 1.0


def draw_orders(uniforms: Tensor, noise: Tensor, share: float) -> Tensor:
    """Orders int64 [B, T] of the codes: random where uniforms [B] in [0, 1) lie below `share`, raster elsewhere.

    A random order is that of the sample's noise [B, T].
    """
    raster = torch.arange(noise.shape[1], device=noise.device)  # [T]
    return torch.where((uniforms < share)[:, None], noise.argsort(dim=1), raster)


def source_positions(order: Tensor) -> Tensor:
    """What each step of an order [B, T] is given: 0, the label, then 1 + the place of the code before, int64 [B, T]."""
    return F.pad(order[:, :-1] + 1, (1, 0))


def fold_order(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a VIM with its source embedding added to its position embedding, the same network in raster order.

    Weights without a source embedding come back as they are.
    """
    folded = dict(weights)
    source = folded.pop(SOURCE, None)
    if source is not None:
        folded[POSITION] = folded[POSITION] + source[: len(folded[POSITION])]  # [T, D]
    return folded
