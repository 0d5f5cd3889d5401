"""The bench on which speeds are measured: a row for each activity, beside the matrix rate found just before it."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from engine.batches import Batches, Source, part_rows
from engine.config import RunConfig, TrainConfig
from engine.device import Device
from engine.flops import TRAINING_FACTOR, matmul_rate
from engine.task import Task
from eval.stopwatch import peak_bytes, reset_peak, time_steps

EXPECTED_RATIO = 0.4  # of the matrix rate, to guess how much fits into that time
LEAST_IN_TIME = 4  # a batch is cut until so many steps fit

Row = dict[str, Any]


class Bench:
    """Measures one row after the other.

    Rows hold `name`, `batch_size`, the median `seconds` of `repetitions`, `images_per_second`, `tokens_per_second`,
    `peak_memory_bytes` and `note`; where operations are known also `flops_per_image`, `flops_per_second`,
    `matmul_flops_per_second`, `ratio` of the two and `dtype`. Images and tokens are those of all processes together,
    operations and memory those of one.
    """

    def __init__(self, run: RunConfig, device: Device, *, seconds: float) -> None:
        self.run, self.device, self.seconds = run, device, seconds
        self.rows: list[Row] = []
        self.rate, self.dtype = 0.0, torch.float32

    def begin(self, name: str, dtype: torch.dtype) -> None:
        """Start a new peak of memory, and find the matrix rate that the next row is compared with."""
        self.announce(name)
        self.rate, self.dtype = matmul_rate(dtype, self.device.device), dtype

    def announce(self, name: str) -> None:
        if self.device.is_main:
            print(f"measuring {name}", file=sys.stderr, flush=True)
        reset_peak(self.device)

    def end(
        self,
        name: str,
        times: list[float],
        *,
        images: float,
        batch_size: int,
        tokens: int = 0,
        flops: float = 0.0,
        note: str = "",
    ) -> None:
        """Add a row: in each of the `times` this process finished `images` of `tokens` each with `flops` operations."""
        seconds, world = statistics.median(times), self.device.world
        row: Row = {"name": name, "batch_size": batch_size, "seconds": seconds, "repetitions": len(times)}
        row["images_per_second"] = world * images / seconds
        row["tokens_per_second"] = world * images * tokens / seconds if tokens else None
        row |= {"peak_memory_bytes": peak_bytes(self.device), "note": note}
        if flops:
            row |= {"flops_per_image": flops / images, "flops_per_second": flops / seconds}
            row |= {"matmul_flops_per_second": self.rate, "ratio": flops / seconds / self.rate}
            row["dtype"] = str(self.dtype).removeprefix("torch.")
        self.rows.append(row)

    def affordable(self, flops: float, share: float) -> float:
        """How many times `flops` operations fit into a share of the time, guessed alike by all processes."""
        rate = float(self.device.mean(torch.tensor(self.rate, device=self.device.device)))
        return share * self.seconds * EXPECTED_RATIO * rate / flops

    def read(
        self, name: str, source: Source, batch_size: int, workers: int, *, limit: float = math.inf, note: str = ""
    ) -> None:
        """Reading batches as training does, but no more than `limit` rows, since thereafter they are cached."""
        self.announce(name)
        stream = Batches(source, batch_size=batch_size, seed=0, workers=workers).stream(0, range(1), 1)
        count, begun = 0, time.perf_counter()
        with closing(stream):  # type: ignore[type-var]
            while not count or (count + batch_size <= limit and time.perf_counter() - begun < self.seconds / 4):
                count += len(next(stream)["labels"])
        times = [time.perf_counter() - begun]
        self.end(
            name, times, images=count, batch_size=batch_size, note=", ".join(filter(None, [f"{workers} threads", note]))
        )

    def step(
        self, name: str, section: Any, source: Source, *, forward: int, tokens: int, build: Callable[[Any], Task],
        note: str = "",
    ) -> None:  # fmt: skip
        """Whole steps of the training loop, on the task that `build` makes of a section of the configuration.

        `forward` operations and `tokens` are those of one image. The batch shrinks if its step would take too long.
        """
        self.begin(name, torch.bfloat16 if self.device.precision == "bf16" else torch.float32)
        train = smaller_batch(
            section.train, self.device.world, self.affordable(TRAINING_FACTOR * forward, 1 / LEAST_IN_TIME)
        )
        task = build(replace(section, train=train))
        times = time_steps(task, source, train=train, run=self.run, device=self.device, seconds=self.seconds)
        images = train.batch_size // self.device.world
        self.end(
            name, times, images=images, batch_size=train.batch_size, tokens=tokens,
            flops=TRAINING_FACTOR * forward * images,
            note=", ".join(filter(None, [cut(train.batch_size, section.train.batch_size), note])),
        )  # fmt: skip


def smaller_batch(train: TrainConfig, world: int, most: float) -> TrainConfig:
    """The same training, but no process takes more than `most` images of a batch: fewer parts, then smaller ones."""
    part = part_rows(train.batch_size, 0, world * train.accumulate).stop
    parts = max(1, min(train.accumulate, int(most / part)))
    part = min(part, max(1, int(most)))
    return replace(train, batch_size=world * parts * part, accumulate=parts)


def cut(batch_size: int, configured: int) -> str:
    """A note, if the batch had to be cut."""
    return "" if batch_size == configured else f"batch cut from {configured:,}"


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ("", "batch", "images/s", "tokens/s", "GFLOP/s", "of matmul", "matmul GFLOP/s", "peak MiB", "")
    cells = [head, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(_line(row, widths) for row in cells)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers, note = cells
    aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=False))
    return "  ".join([name.ljust(widths[0]), *aligned, note]).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    operations = ("", "", "")
    if "ratio" in row:
        rate, best = row["flops_per_second"] / 1e9, row["matmul_flops_per_second"] / 1e9
        operations = (f"{rate:,.1f}", f"{row['ratio']:.2f}", f"{best:,.0f} {row['dtype']}")
    images, tokens = row["images_per_second"], row["tokens_per_second"]
    speeds = (f"{row['batch_size']:,}", f"{images:,.4g}", f"{tokens:,.4g}" if tokens else "")
    return (row["name"], *speeds, *operations, f"{row['peak_memory_bytes'] / 2**20:,.0f}", row["note"])
