"""What frozen networks say of a set of images: computed once, kept on disk, shared by processes.

    <cache>/<network's name>-<its hash>/<hash of the pixels>.safetensors        outputs for up to 512 images

A set goes through in chunks of 512 images. A chunk's file is named by what decides it, the network and the pixels, so
it serves every set and run in which the same images stand together, an interrupted extraction goes on where it was, and
nothing can be out of date. Of several processes each takes every so-many-th chunk; all can then read the whole. A chunk
does not depend on their number, and on the batch size only by rounding.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import WRITE_ERRORS, write_atomic
from engine.device import Device, exact_products
from engine.log import progress
from eval.pictures import Pictures

CHUNK = 512
EXTRACTION = 1  # raised whenever the same network would say something else of the same pixels


class Network(Protocol):
    """What `extract` asks: a frozen network, on the device of the run."""

    name: str

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> named outputs [B, ...]."""

    def identity(self) -> dict[str, Any]:
        """All that decides the outputs, JSON-ready."""


@dataclass(frozen=True)
class Extracted:
    """Outputs of one network for N images, read from disk as they are needed."""

    count: int
    files: tuple[Path, ...]
    chosen: tuple[int, ...] | None = None
    """Rising rows of the images of these files that count; None: all."""

    def parts(self, key: str = "features") -> Iterator[Tensor]:
        """One output, float32 [n, ...] chunk by chunk, in the order of the images."""
        for number, path in enumerate(self.files):
            part = _tensor(path, key)
            if self.chosen is None:
                yield part
                continue
            start = number * CHUNK
            first, last = (bisect_left(self.chosen, bound) for bound in (start, start + CHUNK))
            if first < last:
                yield part[torch.tensor(self.chosen[first:last]) - start]

    def rows(self, key: str = "features") -> Tensor:
        """One output of all images [N, ...]."""
        return torch.cat(list(self.parts(key)))

    def has(self, key: str) -> bool:
        """Whether the network gives such an output."""
        with safe_open(self.files[0], "pt") as stored:
            return key in stored.keys()

    def at(self, rows: Sequence[int]) -> Extracted:
        """Outputs for the images at some rows, in rising order."""
        rising = sorted(rows)
        chosen = rising if self.chosen is None else [self.chosen[row] for row in rising]
        return Extracted(len(rows), self.files, tuple(chosen))


@dataclass(frozen=True)
class Seen:
    """A set of images as several networks see it; `pixels` identifies the set by content."""

    count: int
    pixels: str
    outputs: dict[str, Extracted]

    def at(self, rows: Sequence[int]) -> Seen:
        """The images at some rows, in rising order."""
        told = json.dumps([self.pixels, sorted(rows)])
        outputs = {name: extracted.at(rows) for name, extracted in self.outputs.items()}
        return Seen(len(rows), hashlib.sha256(told.encode()).hexdigest()[:16], outputs)


def extract(
    networks: Sequence[Network],
    pictures: Pictures,
    *,
    cache: Path,
    device: Device,
    batch_size: int = 128,
    title: str = "",
) -> Seen:
    """Let every network see every image once, in full float32 whatever the run's precision.

    Every process of a run must call it; each loads and sees its own chunks, and returns the same.

    Args:
        batch_size: images per pass; at most 512 are taken.
        title: of the progress bar; none without one.

    Raises:
        ValueError: there is no image.
        OSError: the cache cannot be written; what it holds already is kept.
    """
    if not pictures.count:
        raise ValueError(f"{pictures.name}: there is no image to judge")
    folders = [folder_of(cache, network) for network in networks]
    starts = range(0, pictures.count, CHUNK)
    mine = starts[device.rank :: device.world]
    digests: dict[int, str] = {}
    total = sum(min(CHUNK, pictures.count - start) for start in mine)
    bar = progress(total=total, title=title, unit="image", enabled=bool(title) and device.is_main)
    with torch.inference_mode(), exact_products(), bar:
        for start, images in _ahead(pictures, mine, batch_size):
            digests[start] = _digest(images)
            for network, folder in zip(networks, folders, strict=True):
                path = folder / f"{digests[start]}.safetensors"
                if not _is_whole(path):
                    _write(path, _outputs(network, images, batch_size, device.device))
            bar.update(len(images))
    device.barrier()
    known = [digest for _, digest in sorted(device.collect(list(digests.items())))]
    return Seen(
        pictures.count,
        hashlib.sha256("".join(known).encode()).hexdigest()[:16],
        {
            network.name: Extracted(pictures.count, tuple(folder / f"{digest}.safetensors" for digest in known))
            for network, folder in zip(networks, folders, strict=True)
        },
    )


def folder_of(cache: Path, network: Network) -> Path:
    """Where the outputs of a network are kept."""
    told = json.dumps({"extraction": EXTRACTION, **network.identity()}, sort_keys=True)
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in network.name)
    return cache / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _ahead(pictures: Pictures, starts: Sequence[int], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Chunks uint8 [n, 3, H, W] with their first index; where it may be, the next is read while this one is judged."""
    spans = [
        [(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]
        for start in starts
        for stop in [min(start + CHUNK, pictures.count)]
    ]
    if not pictures.workers:
        for start, parts in zip(starts, spans, strict=True):
            yield start, torch.cat([pictures.load(*span) for span in parts])
        return
    pending: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(pictures.workers) as pool:
        try:
            for parts in spans:
                pending.append([pool.submit(pictures.load, *span) for span in parts])
                if len(pending) == 2:
                    yield _joined(starts[0], pending.popleft())
                    starts = starts[1:]
            if pending:
                yield _joined(starts[0], pending.popleft())
        finally:
            for rest in pending:
                for future in rest:
                    future.cancel()


def _joined(start: int, futures: Sequence[Future[Tensor]]) -> tuple[int, Tensor]:
    return start, torch.cat([future.result() for future in futures])


def _digest(images: Tensor) -> str:
    """Hash of uint8 images [n, 3, H, W] and of their size."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(memoryview(images.contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:32]


def _outputs(network: Network, images: Tensor, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for batch in images.split(min(batch_size, CHUNK)):
        for key, value in network.outputs(batch.to(device)).items():
            rows.setdefault(key, []).append(value.float().cpu())
    return {key: torch.cat(parts).contiguous() for key, parts in rows.items()}


def _write(path: Path, outputs: dict[str, Tensor]) -> None:
    """Put a chunk in place whole; two processes that write the same one write the same."""
    try:
        write_atomic(path, lambda draft: save_file(outputs, draft, metadata={"sha256": _hash(outputs)}))
    except WRITE_ERRORS as error:
        raise OSError(
            f"features not written to {path.parent}: {error}. Free some space (this folder may be deleted at any time)"
            " or name another with --eval.cache=FOLDER, and run the same command again"
        ) from error


def _tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as stored:
        return stored.get_tensor(key)


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}


def _is_whole(path: Path) -> bool:
    """Whether a chunk is there as it was written; a damaged one is named and computed again."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as stored:
            told = (stored.metadata() or {}).get("sha256")
        whole = told == _hash(_read(path))
    except (SafetensorError, OSError):
        whole = False
    if not whole:
        warnings.warn(f"{path}: cut or altered features are computed again", stacklevel=2)
    return whole


def _hash(outputs: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(outputs):
        digest.update(key.encode())
        digest.update(memoryview(outputs[key].contiguous().numpy()).cast("B"))
    return digest.hexdigest()
