"""Memorisation: are generated images nearer to training images than real images that were not trained on are?

The sheet shows the most suspicious generated images beside their nearest training images; the score `copies` is the
share of generated images that lie nearer to a training image than 99 % of held-out real ones do. A generator that does
not copy has 1 % of them, as real images have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from engine.checkpoint import write_json
from eval.extraction import Extracted
from eval.features import Extractor
from eval.manifold import nearest
from eval.panel import Panel
from eval.pictures import Pictures
from eval.protocol import Record, protocol, record
from eval.sheets import save_sheet
from eval.statistics import Estimate, proportion

SHOWN = 5  # nearest training images beside each generated one
QUANTILE = 0.01  # of real images' distances; nearer than that is suspicious
LEAST_HELD_OUT = 100  # fewer distances have no such quantile


class Archive(NamedTuple):
    """All training images, and real ones that were not trained on, as the main network sees them."""

    training: Pictures
    features: Extracted
    held_out: Extracted | None
    pixels: list[str]


class Neighbours(NamedTuple):
    """Nearest training images of generated ones, the nearest pairs first."""

    rows: Tensor
    """int64 [N]: the generated images by their distance."""
    distances: Tensor
    """[N, k] to the k nearest training images."""
    indices: Tensor
    """int64 [N, k]: which these are."""
    typical: float
    """Median distance of a held-out real image to its nearest training image; of generated ones where there is none."""
    copies: Estimate | None
    """Share nearer than QUANTILE of the held-out real images are; None where these are too few."""


def open_archive(training: Pictures, held_out: Pictures, panel: Panel) -> Archive:
    """What memorisation is judged by (every process must call it)."""
    known, fresh = panel.see_main(training), panel.see_main(held_out)
    name = panel.main.name
    return Archive(training, known.outputs[name], fresh.outputs[name], [known.pixels, fresh.pixels])


def score_neighbours(
    subject: str,
    generated: Pictures,
    features: Extracted,
    archive: Archive,
    network: Extractor,
    *,
    rows: int,
    sheet: Path,
    facts: Mapping[str, Any],
) -> list[Record]:
    """Draw the sheet, and give the score `copies`, unless there are too few held-out images for it."""
    held_out = archive.held_out.rows() if archive.held_out else None
    found = find_neighbours(features.rows(), archive.features.rows(), held_out)
    stated = protocol(
        **facts,
        features=network.identity(),
        reference=archive.pixels,
        num_real=archive.training.count,
        num_generated=generated.count,
        settings={"quantile": QUANTILE, "held_out": 0 if held_out is None else len(held_out)},
    )
    write_sheet(sheet, found, generated, archive.training, rows=rows, told={"features": network.identity()})
    print(f"samples nearest to training images: {sheet}")
    if found.copies is None:
        print(f"copies left out: it takes {LEAST_HELD_OUT} real images that were not trained on")
        return []
    return [record("copies", subject, found.copies, n=generated.count, protocol=stated)]


def find_neighbours(generated: Tensor, training: Tensor, held_out: Tensor | None) -> Neighbours:
    """The nearest training images by Euclidean distance of features [N, D], [M, D], [H, D]."""
    distances, indices = nearest(generated, training, k=min(SHOWN, len(training)))
    rows = distances[:, 0].argsort(stable=True)
    usual, copies = distances[:, 0], None
    if held_out is not None and len(held_out) >= LEAST_HELD_OUT:
        usual = nearest(held_out, training, k=1)[0][:, 0]
        threshold = usual.double().quantile(QUANTILE)
        copies = proportion(int((distances[:, 0].double() < threshold).sum()), len(generated))
    return Neighbours(rows, distances[rows], indices[rows], float(usual.median()), copies)


def write_sheet(
    path: Path, found: Neighbours, generated: Pictures, training: Pictures, *, rows: int, told: dict[str, object]
) -> None:
    """Write `path` (PNG): on each line a generated image, then its nearest training images, each with its distance in
    terms of the typical one; and beside it .json with numbers and `told`."""
    lines = []
    for line in range(min(rows, len(found.rows))):
        row = int(found.rows[line])
        tiles = [(generated.load(row, row + 1)[0], f"sample {row}")]
        for index, distance in zip(found.indices[line].tolist(), found.distances[line].tolist(), strict=True):
            text = f"{distance / found.typical:.2f}" if found.typical > 0 else f"{distance:.3g}"
            tiles.append((training.load(index, index + 1)[0], text))
        lines.append(tiles)
    save_sheet(path, lines)
    shown = slice(0, len(lines))
    numbers = {
        "samples": found.rows[shown].tolist(),
        "training_images": found.indices[shown].tolist(),
        "distances": found.distances[shown].tolist(),
        "typical_distance": found.typical,
    }
    write_json(path.with_suffix(".json"), {**told, **numbers})
