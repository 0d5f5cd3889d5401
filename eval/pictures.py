"""A set of images that is to be judged, wherever they come from: read by index range, never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.images import ImageSet


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """`count` images of one size."""

    name: str
    """What messages and the progress bar call it."""
    count: int
    load: Callable[[int, int], Tensor]
    """(start, stop) -> uint8 [stop - start, 3, H, W]."""
    labels: Tensor | None = None
    """int64 [count], -1 where the class is not known."""
    class_names: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """What a protocol tells of the set, JSON-ready."""
    workers: int = 0
    """Threads that may call `load` ahead of the judge; 0 where it computes rather than reads."""

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B, 3, H, W]."""
        for start in range(0, self.count, batch_size):
            yield self.load(start, min(start + batch_size, self.count))

    def at(self, rows: np.ndarray) -> Pictures:
        """The images at `rows` [n], in that order."""

        def load(start: int, stop: int) -> Tensor:
            return torch.cat([self.load(int(row), int(row) + 1) for row in rows[start:stop]])

        labels = None if self.labels is None else self.labels[torch.from_numpy(rows)]
        return replace(self, count=len(rows), load=load, labels=labels)


def drawn(images: ImageSet, indices: np.ndarray, *, name: str, workers: int = 2) -> Pictures:
    """The images of a split at `indices` [N], centre crop, in this order.

    An unreadable image gives way to the next one, as in `ImageSet.load`; its label does so when it is loaded.
    """
    labels = torch.from_numpy(images.labels[indices]) if (images.labels >= 0).any() else None

    def load(start: int, stop: int) -> Tensor:
        batch = images.load(indices[start:stop])
        if labels is not None:
            labels[start:stop] = batch["labels"]
        return batch["images"]

    some = {"drawn": len(indices)} if len(indices) < len(images) else {}
    return Pictures(
        name=name, count=len(indices), load=load, labels=labels, class_names=images.class_names,
        facts={**images.identity(), **some}, workers=workers,
    )  # fmt: skip


def numbered(folder: Path, num: int, *, size: int, name: str) -> Pictures:
    """000000.png ... of a folder of samples; loading raises ValueError for one that is missing, unreadable or of
    another size."""

    def load(start: int, stop: int) -> Tensor:
        return torch.stack([_read_png(folder / f"{index:06d}.png", size) for index in range(start, stop)])

    return Pictures(name=name, count=num, load=load, workers=2)


def draw_indices(candidates: np.ndarray, num: int, seed: int) -> np.ndarray:
    """`num` of the candidate indices in a seeded random order, so that a class-sorted set gives every class; 0: all."""
    order = np.random.default_rng(seed).permutation(candidates)
    return order[:num] if num else order


def label_scheme(labels: Tensor | None) -> str | None:
    """How the classes of generated images, int64 [N], were asked for: `balanced` if each as often as any other (but for
    one), else `unbalanced`; None if none is known."""
    if labels is None or int(labels.max()) < 0:
        return None
    counts = torch.bincount(labels[labels >= 0])
    counts = counts[counts > 0]  # samples of some classes alone may still take turns
    return "balanced" if int(counts.max() - counts.min()) <= 1 and int(labels.min()) >= 0 else "unbalanced"


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
