"""From images to scores: every extractor sees every batch once, then sets of features are held against each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.device import exact_products
from engine.images import ImageSet
from engine.log import progress
from eval.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from eval.features import Extractor, score_name
from eval.protocol import Record, protocol, record
from eval.statistics import GROUPS, Gaussian, Moments, proportion

PAIRWISE_IMAGES = 10_000  # kernel distance, precision and recall compare all pairs of at most so many images per side


class Outputs(NamedTuple):
    """What one extractor says of N images, on the CPU."""

    features: Tensor
    """float32 [N, D]."""
    logits: Tensor | None
    """float32 [N, K]."""


class Judged(NamedTuple):
    """A set of images as all extractors see it; `pixels` identifies it by content."""

    n: int
    pixels: str
    outputs: dict[str, Outputs]


def judge(
    extractors: Sequence[Extractor], batches: Iterable[Tensor], *, device: torch.device, total: int = 0, title: str = ""
) -> Judged:
    """Run all extractors over batches of uint8 images [B, 3, H, W], in full float32 whatever the run's precision.

    Raises:
        ValueError: there is no image.
    """
    digest, seen = hashlib.sha256(), 0
    parts: dict[str, list[tuple[Tensor, Tensor | None]]] = {extractor.name: [] for extractor in extractors}
    told = progress(total=total, title=title, unit="image", enabled=bool(title))
    with torch.inference_mode(), exact_products(), told as bar:
        for images in batches:
            digest.update(images.contiguous().numpy().tobytes())
            for extractor in extractors:
                features, logits = extractor.outputs(images.to(device))
                parts[extractor.name].append((features.float().cpu(), None if logits is None else logits.float().cpu()))
            seen += len(images)
            bar.update(len(images))
    if not seen:
        raise ValueError(f"{title or 'a score'}: there is no image to judge")
    return Judged(seen, digest.hexdigest()[:16], {name: _joined(rows) for name, rows in parts.items()})


def data_facts(images: ImageSet) -> dict[str, Any]:
    """What a protocol says of the data; size and crop must agree between two scores, the rest is told."""
    told = images.identity()
    return {"size": images.size, "crop": told.get("crop"), "data": told}


def sample_scores(
    subject: str,
    generated: Judged,
    real: Judged,
    extractors: Sequence[Extractor],
    *,
    main: str,
    facts: Mapping[str, Any],
) -> list[Record]:
    """Scores of generated images against real ones, per extractor; kid, precision and recall under the `main` one only.

    `facts` go into each protocol: what was scored, and on which data.
    """
    records = []
    for extractor in extractors:
        stated = dict(facts, features=extractor.identity(), reference=real.pixels)
        stated.update(num_real=real.n, num_generated=generated.n)
        mine, theirs = generated.outputs[extractor.name], real.outputs[extractor.name]
        name, estimate = score_name("fd", extractor.name), frechet_distance(mine.features, gaussian(theirs))
        records.append(record(name, subject, estimate, n=generated.n, protocol=protocol(**stated)))
        if mine.logits is not None:
            name, estimate = score_name("is", extractor.name), inception_score(mine.logits)
            splits = protocol(**stated, settings={"splits": 10, "shuffle_seed": 0})
            records.append(record(name, subject, estimate, n=generated.n, protocol=splits))
        if extractor.name == main:
            records += _pairwise_scores(subject, mine.features, theirs.features, stated)
    return records


def reconstruction_distances(
    reconstructed: Judged, originals: Judged, extractors: Sequence[Extractor], *, facts: Mapping[str, Any]
) -> list[Record]:
    """rfid or rfd_<features>: reconstructions against the very images that they reconstruct; needs twenty of them."""
    records: list[Record] = []
    if reconstructed.n < 2 * GROUPS:
        print(f"rfd left out: {reconstructed.n} test images are too few, it takes {2 * GROUPS}")
        return records
    for extractor in extractors:
        name, theirs = score_name("rfd", extractor.name), gaussian(originals.outputs[extractor.name])
        estimate = frechet_distance(reconstructed.outputs[extractor.name].features, theirs)
        stated = protocol(
            **facts,
            features=extractor.identity(),
            reference=originals.pixels,
            num_real=originals.n,
            num_generated=reconstructed.n,
        )
        records.append(record(name, "tokenizer", estimate, n=reconstructed.n, protocol=stated))
    return records


def class_accuracy(
    subject: str, generated: Judged, labels: Tensor, extractor: Extractor, *, facts: Mapping[str, Any]
) -> Record:
    """Share of generated images that the data set's classifier takes for the class that was asked, labels int64 [N]."""
    logits = generated.outputs[extractor.name].logits
    assert logits is not None
    estimate = proportion(int((logits.argmax(1) == labels).sum()), generated.n)
    stated = protocol(**facts, features=extractor.identity(), num_generated=generated.n)
    return record("class_accuracy", subject, estimate, n=generated.n, protocol=stated)


def gaussian(outputs: Outputs) -> Gaussian:
    """Mean and covariance of the features."""
    return Moments.of(outputs.features).gaussian()


def draw_indices(candidates: np.ndarray, num: int, seed: int) -> np.ndarray:
    """`num` of the candidate indices in a seeded random order, so that a class-sorted set gives every class; 0: all."""
    order = np.random.default_rng(seed).permutation(candidates)
    return order[:num] if num else order


def drawn_batches(images: ImageSet, indices: np.ndarray, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The images at `indices`, centre crop, in this order."""
    for start in range(0, len(indices), batch_size):
        yield images.load(indices[start : start + batch_size])


def png_batches(folder: Path, num: int, *, size: int, batch_size: int) -> Iterator[Tensor]:
    """000000.png ... of a folder as uint8 [B, 3, size, size].

    Raises:
        ValueError: a file is missing, unreadable or of another size.
    """
    for start in range(0, num, batch_size):
        names = [folder / f"{index:06d}.png" for index in range(start, min(start + batch_size, num))]
        yield torch.stack([_read_png(path, size) for path in names])


def _read_png(path: Path, size: int) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error}); delete its folder and sample again") from error
    if pixels.shape[:2] != (size, size):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ValueError(f"{path} has {found} pixels, but data.size={size}: sample again or set data.size")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pairwise_scores(subject: str, mine: Tensor, theirs: Tensor, stated: Mapping[str, Any]) -> list[Record]:
    mine, theirs = mine[:PAIRWISE_IMAGES], theirs[:PAIRWISE_IMAGES]
    stated = {**stated, "num_real": len(theirs), "num_generated": len(mine)}
    precision, recall = precision_recall(mine, theirs)
    kernel, balls = {"kernel": "(x.y / D + 1)^3", "pairs": "all"}, {"k": 3}
    kid = kernel_distance(mine, theirs)
    scores = (("kid", kid, kernel), ("precision", precision, balls), ("recall", recall, balls))
    return [
        record(name, subject, estimate, n=len(mine), protocol=protocol(**stated, settings=settings))
        for name, estimate, settings in scores
    ]


def _joined(rows: Sequence[tuple[Tensor, Tensor | None]]) -> Outputs:
    features = torch.cat([row[0] for row in rows])
    logits = [row[1] for row in rows if row[1] is not None]
    return Outputs(features, torch.cat(logits) if logits else None)
