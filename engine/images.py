"""One split of an image source as uint8 tensors, by index: decoded, cropped, flipped, the unreadable ones replaced."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from engine.decode import center_crop, decode, random_crop

CACHE_BYTES = 1 << 30


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 in 0..255: halves round up, the rest is clamped. Undoes `to_float` exactly."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source knows of a split before anything is decoded."""

    labels: np.ndarray
    """int64 [N]; -1 where no label is known."""
    class_names: tuple[str, ...] = ()
    captions: list[str] | None = None
    read: Callable[[int], bytes | Image.Image]
    """The encoded file, or a picture that the source holds decoded; must allow calls from several threads."""
    name: Callable[[int], str]
    """What to call an image in a message."""
    digest: str
    """Changes with the data: sha256 over labels, names and sizes, or over the images themselves."""

    def subset(self, indices: np.ndarray) -> Listing:
        """The images at `indices`, in that order."""
        return replace(
            self,
            labels=self.labels[indices],
            captions=None if self.captions is None else [self.captions[i] for i in indices],
            read=lambda index: self.read(int(indices[index])),
            name=lambda index: self.name(int(indices[index])),
            digest=hashlib.sha256(self.digest.encode() + indices.astype(np.int64).tobytes()).hexdigest(),
        )


class UnreadableImage(Exception):
    """An image that cannot be read or decoded."""


class ImageSet:
    """One split of a source, square at `size` pixels. `load` may be called from several threads."""

    def __init__(
        self,
        listing: Listing,
        *,
        size: int,
        split: str,
        origin: dict[str, Any],
        crop: Literal["center", "random", "shift"] = "center",
        flip: bool = False,
        max_corrupt: int = 20,
        workers: int = 1,
    ) -> None:
        self.labels, self.class_names, self.captions = listing.labels, listing.class_names, listing.captions
        self.size, self.split = size, split
        self._listing, self._origin = listing, origin
        self._crop, self._flip = crop, flip
        self._max_corrupt, self._workers = max_corrupt, max(1, workers)
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        fits = len(self) * 3 * size * size <= CACHE_BYTES
        # The system hands out the pages of an empty array only when they are written.
        self._cache = np.empty((len(self), 3, size, size), np.uint8) if crop != "random" and fits else None
        self._cached = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> dict[str, Any]:
        """What a score's protocol records, JSON-ready. The crop is that of `in_order`, whatever training draws."""
        facts = {"split": self.split, "size": self.size, "n": len(self), "crop": "adm_center"}
        return {**self._origin, **facts, "digest": self._listing.digest}

    def content(self) -> dict[str, Any]:
        """`identity` without the path: the same images elsewhere are the same images."""
        return {key: value for key, value in self.identity().items() if key != "path"}

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """The images at `indices` [B]: {"images": uint8 [B, 3, S, S], "labels": int64 [B]}.

        Where there are captions, "rows" int64 [B] says which of them belong to the images.
        `draws`, float64 [B, 4] in [0, 1), say per image: mirror, scale, top, left of a random crop, as far as the
        set's crop and flip use them. None means centre crop and no mirror.
        An unreadable image gives way to the next readable one, with a warning.

        Raises:
            ValueError: more than max_corrupt images proved unreadable.
        """
        rows = [self._nearest(int(index), None if draws is None else draws[row]) for row, index in enumerate(indices)]
        return self._batch([index for index, _ in rows], [pixels for _, pixels in rows])

    def in_order(self, batch_size: int, *, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Every readable image of [start, stop) once, centre crop: as `load`, with "indices" int64 [B].

        Unreadable images are left out, so a batch may be smaller. A few batches are decoded ahead by threads.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        pending: deque[Future[dict[str, Tensor] | None]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            for first in range(start, stop, batch_size):
                pending.append(pool.submit(self._ordered, range(first, min(first + batch_size, stop))))
                if len(pending) > self._workers:
                    yield from _present(pending.popleft())
            while pending:
                yield from _present(pending.popleft())

    def _ordered(self, block: range) -> dict[str, Tensor] | None:
        found = {index: pixels for index in block if (pixels := self._try(index, None)) is not None}
        if not found:
            return None
        return {**self._batch(list(found), list(found.values())), "indices": torch.tensor(list(found))}

    def _batch(self, indices: list[int], pixels: list[np.ndarray]) -> dict[str, Tensor]:
        images = np.stack(pixels) if pixels else np.empty((0, 3, self.size, self.size), np.uint8)
        rows = {} if self.captions is None else {"rows": torch.tensor(indices, dtype=torch.int64)}
        return {"images": torch.from_numpy(images), "labels": torch.from_numpy(self.labels[indices]), **rows}

    def _nearest(self, index: int, draw: np.ndarray | None) -> tuple[int, np.ndarray]:
        """The image at `index`, or the first readable one after it, wrapping at the end."""
        for candidate in (*range(index, len(self)), *range(index)):
            pixels = self._try(candidate, draw)
            if pixels is not None:
                return candidate, pixels
        raise self._too_many()

    def _try(self, index: int, draw: np.ndarray | None) -> np.ndarray | None:
        if index in self._bad:
            return None
        try:
            return self._pixels(index, draw)
        except UnreadableImage as error:
            self._mark_bad(index, str(error))
            return None

    def _pixels(self, index: int, draw: np.ndarray | None) -> np.ndarray:
        """uint8 [3, S, S], through the cache where there is one."""
        if self._cache is None:
            pixels = self._decoded(index, draw)
        else:
            # Two threads may both decode an image; they write the same values, and the mark comes after them.
            if not self._cached[index]:
                self._cache[index] = self._decoded(index, None)
                self._cached[index] = True
            pixels = self._cache[index]
        if draw is None:
            return pixels
        if self._crop == "shift":
            pixels = shifted(pixels, *draw[2:4])
        return pixels[:, :, ::-1] if self._flip and draw[0] >= 0.5 else pixels

    def _decoded(self, index: int, draw: np.ndarray | None) -> np.ndarray:
        try:
            image = decode(self._listing.read(index))
            if draw is not None and self._crop == "random":
                image = random_crop(image, self.size, *draw[1:4])
            else:
                image = center_crop(image, self.size)
        except MemoryError:
            raise
        except Exception as error:  # broken files make Pillow's readers raise nearly anything
            unknown = isinstance(error, UnidentifiedImageError)
            raise UnreadableImage("no image format" if unknown else f"{type(error).__name__}: {error}") from error
        return np.asarray(image).transpose(2, 0, 1)

    def _mark_bad(self, index: int, reason: str) -> None:
        with self._lock:
            known = index in self._bad
            self._bad[index] = f"{self._listing.name(index)} ({reason})"
            count = len(self._bad)
        if count > self._max_corrupt:
            raise self._too_many()
        if not known:
            allowed = f"{count} so far, data.max_corrupt={self._max_corrupt} allowed"
            warnings.warn(f"left out unreadable image {self._bad[index]}; {allowed}", stacklevel=2)

    def _too_many(self) -> ValueError:
        shown = "; ".join(list(self._bad.values())[:10])
        rest = f"; and {len(self._bad) - 10} more" if len(self._bad) > 10 else ""
        facts = f"{len(self._bad)} of {len(self)} images cannot be read, data.max_corrupt={self._max_corrupt}"
        return ValueError(f"{facts}: {shown}{rest}. Repair or remove these files, or raise data.max_corrupt")


def shifted(pixels: np.ndarray, top: float, left: float) -> np.ndarray:
    """Pixels [3, S, S] moved by up to S / 16 either way, as the draws in [0, 1) say; edges are repeated."""
    size = pixels.shape[-1]
    reach = size // 16
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    y, x = (int(draw * (2 * reach + 1)) for draw in (top, left))
    return padded[:, y : y + size, x : x + size]


def _present(future: Future[dict[str, Tensor] | None]) -> Iterator[dict[str, Tensor]]:
    batch = future.result()
    if batch is not None:
        yield batch
