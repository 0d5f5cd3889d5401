"""Small pictures for pages and documents: cut from grids, chosen by class, embedded as data URIs, laid out."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.checkpoint import write_atomic
from tokenloom.run_files import FAMILIES, RunFiles

GRID_GAP, GRID_TILE = 2, 64  # how engine.log.save_grid lays out its grids
OVERVIEW_BYTES = 300_000
OVERVIEW_COLUMNS, OVERVIEW_ROWS = 10, 3
INK, PAPER = (40, 40, 40), (255, 255, 255)


def read_picture(path: Path) -> np.ndarray | None:
    """uint8 [H, W, 3], or None if the file is missing or broken."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except OSError:
        return None


def cut_grid(path: Path, size: int) -> list[np.ndarray]:
    """The pictures [size, size, 3] of a grid that engine.log.save_grid wrote; none if it is not such a grid."""
    canvas, scale = read_picture(path), max(1, GRID_TILE // max(size, 1))
    pitch = size * scale + GRID_GAP
    if canvas is None or not size or any((length - GRID_GAP) % pitch for length in canvas.shape[:2]):
        return []
    rows, columns = ((length - GRID_GAP) // pitch for length in canvas.shape[:2])
    corners = [(GRID_GAP + row * pitch, GRID_GAP + column * pitch) for row in range(rows) for column in range(columns)]
    tiles = [canvas[top : top + size * scale : scale, left : left + size * scale : scale] for top, left in corners]
    while tiles and tiles[-1].min() == 255:  # places that the last row left free
        tiles.pop()
    return tiles


def last_pairs(run: RunFiles) -> list[tuple[np.ndarray, np.ndarray]]:
    """Test images and their reconstructions from the tokenizer's newest preview."""
    for _, path in reversed(run.previews("tokenizer", "reconstructions")):
        tiles = cut_grid(path, run.image_size())
        if tiles:
            return list(zip(tiles[::2], tiles[1::2], strict=False))
    return []


def rows_by_class(labels: Sequence[int], classes: Sequence[int], columns: int) -> list[list[int]]:
    """For each class the first `columns` samples of it."""
    return [[row for row, label in enumerate(labels) if label == each][:columns] for each in classes]


def shown_classes(*labels: Sequence[int], limit: int) -> list[int]:
    """Classes that occur anywhere, without the unknown (-1); of too many, `limit` evenly spread ones."""
    found = sorted({label for each in labels for label in each if label >= 0})
    if len(found) <= limit:
        return found
    return [found[place * len(found) // limit] for place in range(limit)]


def sample_path(run: RunFiles, family: str, row: int) -> Path:
    """Where a sample lies."""
    return run.folder / "samples" / family / f"{row:06d}.png"


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture of at most `side` pixels each way."""
    height, width = pixels.shape[:2]
    if max(height, width) <= side:
        return pixels
    new = round(width * side / max(height, width)), round(height * side / max(height, width))
    return np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.LANCZOS))


def montage(tiles: Sequence[np.ndarray], columns: int, gap: int) -> np.ndarray:
    """Equal pictures side by side on a transparent ground: uint8 [H, W, 4]."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width, :3] = tile
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def data_uri(pixels: np.ndarray) -> str:
    """A picture [H, W, 3 or 4] as an embedded PNG."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def png(pixels: np.ndarray) -> bytes:
    """A picture [H, W, 3 or 4] as the bytes of a PNG file; a grey one is stored in one channel."""
    image = Image.fromarray(pixels)
    if (pixels[..., :3] == pixels[..., :1]).all():
        image = image.convert("L" if pixels.shape[2] == 3 else "LA")
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def save_overview(run_folder: Path, path: Path) -> Path:
    """A PNG below 300 kB: originals, reconstructions, and samples of each generator with a column for each class.

    Raises:
        ValueError: the run has neither a preview of reconstructions nor samples.
    """
    panels = overview_panels(RunFiles(Path(run_folder)))
    if not panels:
        raise ValueError(f"{run_folder}: nothing to show yet; `tokenloom run` trains and samples")
    content = b""
    for side in (64, 56, 48, 40, 32, 24, 16):
        content = _drawn(panels, side)
        if len(content) < OVERVIEW_BYTES:
            break
    write_atomic(Path(path), content)
    return Path(path)


def overview_panels(run: RunFiles) -> list[tuple[str, list[np.ndarray]]]:
    """Titles and pictures, row by row in OVERVIEW_COLUMNS columns."""
    pairs = last_pairs(run)[: OVERVIEW_COLUMNS * OVERVIEW_ROWS]
    titles = ("originals", "reconstructions from codes")
    panels = [(title, [pair[side] for pair in pairs]) for side, title in enumerate(titles) if pairs]
    for family in FAMILIES:
        told = run.samples(family)
        tiles = [read_picture(sample_path(run, family, row)) for row in _overview_rows(told.get("labels", []))]
        if tiles and all(tile is not None for tile in tiles):
            by_class = ", by class" if max(told["labels"]) >= 0 else ""
            panels.append((f"{family} samples{by_class}", [tile for tile in tiles if tile is not None]))
    return panels


def _overview_rows(labels: Sequence[int]) -> list[int]:
    """Samples in reading order: one class per column, or simply the first where there are no classes."""
    classes = shown_classes(labels, limit=OVERVIEW_COLUMNS)
    if len(classes) < OVERVIEW_COLUMNS:
        return list(range(min(len(labels), OVERVIEW_COLUMNS * OVERVIEW_ROWS)))
    columns = rows_by_class(labels, classes, OVERVIEW_ROWS)
    return [column[row] for row in range(min(map(len, columns))) for column in columns]


def _drawn(panels: list[tuple[str, list[np.ndarray]]], side: int) -> bytes:
    """The panels two by two as PNG, each picture `side` pixels wide."""
    gap, head, margin = 3, 34, 24
    width = OVERVIEW_COLUMNS * (side + gap) - gap
    height = head + max(-(-len(tiles) // OVERVIEW_COLUMNS) for _, tiles in panels) * (side + gap) - gap
    across, down = min(2, len(panels)), -(-len(panels) // 2)
    canvas = Image.new("RGB", (across * (width + margin) + margin, down * (height + margin) + margin // 2), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=20)
    for number, (title, tiles) in enumerate(panels):
        left, top = margin + number % 2 * (width + margin), margin // 2 + number // 2 * (height + margin)
        draw.text((left, top), title, fill=INK, font=font)
        for index, tile in enumerate(tiles):
            row, column = divmod(index, OVERVIEW_COLUMNS)
            canvas.paste(_fitted(tile, side), (left + column * (side + gap), top + head + row * (side + gap)))
    return png(np.asarray(canvas))


def _fitted(pixels: np.ndarray, side: int) -> Image.Image:
    """Enlarged without smoothing, shrunk with it."""
    how = Image.Resampling.NEAREST if pixels.shape[0] <= side else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), how)
