"""Timing in this process: real training steps, repeated calls, peak memory, and what the machine is."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.batches import Batches, Source, StepRandom
from engine.config import RunConfig, TrainConfig
from engine.device import Device, cpu_quota
from engine.loop import fit
from engine.task import Task

WARM_UP = 1  # repetitions before the clock starts: libraries load, memory is first touched, networks are compiled
LEAST = 3  # repetitions that a median needs
FOREVER = 10**9


class Enough(Exception):
    """Ends a training loop whose steps have been timed."""


class Stopwatch(Task):
    """Another task, timed from the end of one step to the end of the next until `seconds` are over."""

    def __init__(self, task: Task, *, seconds: float, device: Device) -> None:
        self.task, self.device, self.seconds = task, device, seconds
        self.modules, self.optimizers = task.modules, task.optimizers
        self.averaged, self.auxiliary = task.averaged, task.auxiliary
        self.ends: list[float] = []

    def before_step(self) -> None:
        self.task.before_step()

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        return self.task.step(batch, rng)

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        self.task.after_step(step, metrics, rng)
        self.ends.append(time.perf_counter())
        # All processes stop at one step, or the others would wait for this one for ever.
        elapsed = float(self.device.mean(torch.tensor(sum(self.times), device=self.device.device)))
        if len(self.times) >= LEAST and elapsed >= self.seconds:
            raise Enough

    @property
    def times(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        ends = self.ends[WARM_UP - 1 :]
        return [end - begun for begun, end in itertools.pairwise(ends)]


def time_steps(
    task: Task, source: Source, *, train: TrainConfig, run: RunConfig, device: Device, seconds: float
) -> list[float]:
    """Seconds of each of some optimizer steps of the training loop itself, without logs, previews and checkpoints."""
    watched = Stopwatch(task, seconds=seconds, device=device)
    train = replace(
        train, steps=FOREVER, log_every=FOREVER, checkpoint_every=FOREVER, preview_every=0,
        snapshot_every=FOREVER if train.snapshot_every else 0,
    )  # fmt: skip
    batches = Batches(source, batch_size=train.batch_size, seed=run.seed)
    heard = io.StringIO()  # the loop's progress bar counts towards FOREVER
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough), contextlib.redirect_stderr(heard):
        fit(watched, batches, train=train, run=run, device=device, folder=Path(folder), identity={})
    return watched.times


def time_calls(function: Callable[[], Any], *, device: Device, seconds: float) -> list[float]:
    """Seconds of each call of a function that is called until `seconds` are over, without the warm-up."""
    times: list[float] = []
    while sum(times[WARM_UP:]) < seconds:
        times.append(seconds_of(function, device))
    return times[WARM_UP:]


def seconds_of(function: Callable[[], Any], device: Device) -> float:
    """Seconds of one call, the device's work included."""
    begun = time.perf_counter()
    function()
    if device.device.type == "cuda":
        torch.cuda.synchronize(device.device)
    return time.perf_counter() - begun


def reset_peak(device: Device) -> None:
    """Begin a new peak of memory; where the system cannot, on a CPU, `peak_bytes` counts from the process's start."""
    if device.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device.device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: Device) -> int:
    """Most memory held since `reset_peak`: on the GPU by tensors, on a CPU by the whole process."""
    if device.device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(device: Device, run: RunConfig) -> dict[str, Any]:
    """What the figures were measured on, JSON-ready."""
    gpu = torch.cuda.get_device_name(device.device) if device.device.type == "cuda" else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cpu_quota": cpu_quota(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "gpu": gpu,
        "processes": device.world,
        "precision": device.precision,
        "compile": run.compile,
        "torch": torch.__version__,
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
