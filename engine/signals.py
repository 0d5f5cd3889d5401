"""SIGTERM and SIGINT ask a run to stop; it finishes its step, saves, and leaves with the code that shells expect."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from engine.device import Device


class Interrupted(SystemExit):
    """A signal asked the run to stop and a checkpoint was written; the exit code is 128 + the signal's number."""


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(caught: list[int], device: Device) -> int:
    """The signal that any process received, or 0; all processes must ask."""
    number = caught[-1] if caught else 0
    if device.world == 1:
        return number
    flag = torch.tensor(number, device=device.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag)


def leave(number: int, where: str, *, speak: bool) -> NoReturn:
    """End the process as the signal asked, after a checkpoint was written."""
    if speak:
        told = f"{where}: stopped by {signal.Signals(number).name}; a checkpoint is written, the same command resumes"
        print(f"\n{told}", file=sys.stderr, flush=True)
    raise Interrupted(128 + number)
