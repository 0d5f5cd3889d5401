"""Programs in processes of their own that need not import everything anew: a server has done it, and forks them.

Such a process can be killed, stopped by a signal, or be one of several that train together, as one begun from a shell
can; what it lacks is the launcher, which the tests of `torchrun` cover.
"""

import importlib
import multiprocessing
import os
import socket
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("forkserver")
ROOMS = ["engine.loop", "tokenizer.train", "generator.train", "eval.run", "tokenloom.pipeline", "tokenloom.report"]
LIBRARIES = ["accelerate", "jsonargparse", "rich.progress", "sklearn.datasets", "torch.distributed.fsdp"]
FORK.set_forkserver_preload([*LIBRARIES, *ROOMS])


def start(
    program: str, *arguments: Any, told: Path, environment: Mapping[str, str] | None = None, **named: Any
) -> BaseProcess:
    """Begin `module:function` with these arguments; what it prints goes to the end of the file `told`."""
    process = FORK.Process(target=_carry_out, args=(program, arguments, named, told, environment or {}), daemon=True)
    process.start()
    return process


def finish(process: BaseProcess, told: Path, seconds: float = 300) -> None:
    """Wait until a process has ended without an error."""
    process.join(seconds)
    assert process.exitcode == 0, f"exit code {process.exitcode}: {told.read_text()}"


def run(program: str, *arguments: Any, told: Path, **named: Any) -> None:
    """Carry a program out in one process."""
    finish(start(program, *arguments, told=told, **named), told)


def run_two(program: str, *arguments: Any, told: Path, **named: Any) -> None:
    """Carry a program out in two processes that know of each other as `torchrun` tells them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    files = [told.with_name(f"{told.name}-{rank}") for rank in "01"]
    ranks = [
        start(program, *arguments, told=file, environment=place | {"RANK": rank, "LOCAL_RANK": rank}, **named)
        for rank, file in zip("01", files, strict=True)
    ]
    for process, file in zip(ranks, files, strict=True):
        finish(process, file)


def _carry_out(
    program: str, arguments: Sequence[Any], named: dict[str, Any], told: Path, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    with open(told, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module, _, function = program.partition(":")
    getattr(importlib.import_module(module), function)(*arguments, **named)
