"""Sheets: pictures side by side in lines, a few words below each; the first picture of a line stands apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from engine.checkpoint import write_atomic

TILE, MARGIN, TEXT = 96, 4, 14  # pixels of the sheet

Tile = tuple[Tensor, str]
"""A picture uint8 [3, H, W], and the words below it."""


def save_sheet(path: Path, lines: Sequence[Sequence[Tile]]) -> None:
    """Write lines of pictures to `path` (PNG)."""
    columns, step = max(map(len, lines)), TILE + MARGIN
    sheet = Image.new("RGB", (columns * step + 3 * MARGIN, len(lines) * (step + TEXT) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for line, tiles in enumerate(lines):
        for column, (image, text) in enumerate(tiles):
            left = MARGIN + column * step + (2 * MARGIN if column else 0)
            top = MARGIN + line * (step + TEXT)
            sheet.paste(_picture(image), (left, top))
            draw.text((left + 2, top + TILE), text, fill="black")
    write_atomic(path, lambda draft: sheet.save(draft, format="PNG"))


def _picture(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] at the sheet's size: small images keep their pixels' edges."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    smooth = max(picture.size) > TILE
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
