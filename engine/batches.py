"""Which samples make step k: a pure function of (seed, step, rank, world size), so a run resumes from its step alone.

A global batch is cut into parts: one for every process and accumulation round. Part p holds the same rows of the same
global batch however many processes there are, and so do the random draws that go with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

DRAWS = 4  # uniform numbers per sample for augmentation; each source says which it uses for what


class Source(Protocol):
    """What can be batched: a sized collection that loads rows, augmented as `draws` say."""

    def __len__(self) -> int: ...

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]: ...


class Batches:
    """Endless seeded batches over a source; each epoch visits every sample once, in its own order."""

    def __init__(self, source: Source, *, batch_size: int, seed: int, workers: int = 0) -> None:
        if len(source) == 0:
            raise ValueError("the data source is empty: nothing to train on")
        self.source, self.batch_size, self.seed, self.workers = source, batch_size, seed, workers

    def batch(self, step: int, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
        """Part `part` of `parts` of the global batch of `step`."""
        rows = part_rows(self.batch_size, part, parts)
        indices = global_indices(len(self.source), self.batch_size, self.seed, step)[rows]
        return self.source.load(indices, augmentation_draws(self.batch_size, self.seed, step)[rows])

    def stream(self, step: int, parts: range, of: int) -> Iterator[dict[str, Tensor]]:
        """The batches of `parts` of `of`, step after step from `step` on, read ahead by the worker threads."""
        wanted = ((k, part) for k in _count(step) for part in parts)
        if self.workers == 0:
            yield from (self.batch(k, part, of) for k, part in wanted)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="batches") as pool:
            ahead: list[Future[dict[str, Tensor]]] = []
            try:
                for k, part in wanted:
                    ahead.append(pool.submit(self.batch, k, part, of))
                    if len(ahead) > self.workers:
                        yield ahead.pop(0).result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


class StepRandom:
    """Random draws for one part of one step.

    Every call draws for the whole global batch and returns this part's rows, so sample i of the batch meets the same
    noise on one process or on many, in one piece or accumulated.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch_size: int,
        *,
        part: int = 0,
        parts: int = 1,
        device: torch.device | str = "cpu",
        stream: int = 2,
    ) -> None:
        self.step, self.batch_size, self.rows = step, batch_size, part_rows(batch_size, part, parts)
        self.generator = torch.Generator(device).manual_seed(mix(seed, step, stream))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, [rows, *shape]."""
        return torch.randn((self.batch_size, *shape), generator=self.generator, device=self.generator.device)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [rows, *shape]."""
        return torch.rand((self.batch_size, *shape), generator=self.generator, device=self.generator.device)[self.rows]

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 .. high - 1, [rows, *shape]."""
        size = (self.batch_size, *shape)
        return torch.randint(high, size, generator=self.generator, device=self.generator.device)[self.rows]


def part_rows(batch_size: int, part: int, parts: int) -> slice:
    """The rows of a global batch that belong to one part; all parts are equally long.

    Raises:
        ValueError: the parts would be unequal.
    """
    if batch_size % parts:
        raise ValueError(f"train.batch_size={batch_size} must be a multiple of processes x train.accumulate = {parts}")
    share = batch_size // parts
    return slice(part * share, (part + 1) * share)


def global_indices(num_samples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the samples of one global batch, int64 [batch_size]; epochs follow each other without a gap."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_samples)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(num_samples, seed, int(epoch))[offsets[chosen]]
    return indices


def augmentation_draws(batch_size: int, seed: int, step: int) -> np.ndarray:
    """Uniform numbers for the augmentation of one global batch, float64 [batch_size, DRAWS] in [0, 1)."""
    return np.random.default_rng([seed, step, 1]).random((batch_size, DRAWS))


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several integers (no sums: neighbouring seeds must not overlap)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(num_samples)


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1
