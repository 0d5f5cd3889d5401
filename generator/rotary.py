"""Rotary positions in two dimensions: queries and keys are turned by the row and the column of their code.

RoFormer (Su et al., 2021) turns pairs of numbers by an angle that grows with the position, so that positions enter a
score by their distance alone. Here half of the pairs turn with the row and half with the column, as in LlamaGen (Sun et
al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 10000.0

Turns = tuple[Tensor, Tensor]  # cosines and sines, fp32, [..., 1, T, d / 2] each


@dataclass(frozen=True)
class Rotary:
    """Positions of a sequence -> turns. Computed anew at each call, in fp32: there is no table to move or to cast.

    Raises:
        ValueError: a head whose width is not a multiple of 4.
    """

    head_dim: int
    columns: int
    """Columns of the grid of cells."""
    codes_per_cell: int = 1
    """Codes that follow one another in each cell, at the same row and column."""

    def __post_init__(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"head_dim={self.head_dim} must be a multiple of 4 to turn by row and by column")

    def __call__(self, position: Tensor) -> Turns:
        """Turns [..., 1, T, d / 2] of what stands at `position` int64 [..., T]: 0 is the label, t is code t - 1."""
        steps = torch.arange(self.head_dim // 4, device=position.device, dtype=torch.float32)
        frequencies = BASE ** (-4 * steps / self.head_dim)  # [d / 4], radians per row or column
        angles = self.coordinates(position)[..., None] * frequencies  # [..., T, 2, d / 4]
        angles = angles.flatten(-2).unsqueeze(-3)  # [..., 1, T, d / 2]
        return angles.cos(), angles.sin()

    def coordinates(self, position: Tensor) -> Tensor:
        """(row, column) int64 [..., T, 2] of each position [..., T]: (0, 0) for the label, from (1, 1) for codes."""
        cell = (position - 1).div(self.codes_per_cell, rounding_mode="floor")
        place = torch.stack([cell.div(self.columns, rounding_mode="floor"), cell % self.columns], dim=-1) + 1
        return place * (position > 0)[..., None]


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """Turn the pairs (i, i + d / 2) of x [B, H, T, d], in fp32; shape and type stay."""
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)  # [B, H, T, d / 2] each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
