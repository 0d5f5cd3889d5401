"""Carries out the runs of a study: each in processes of its own, a few at a time, resumable, failures kept apart.

A run that has ended leaves study.json in its folder: the settings that it was scored under, and its seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from engine.checkpoint import write_atomic, write_json
from engine.config import difference, to_dict, to_yaml
from engine.log import clock
from engine.resume import completed
from engine.signals import caught_signals, leave
from generator.config import AutoregressiveConfig, DiffusionConfig
from tokenloom.experiment import Experiment
from tokenloom.study_plan import Run

COMMANDS = {
    "tokenizer": (("tokenizer",), ("eval", "--only", "reconstruction")),
    "shared": (("tokenizer",), ("encode",)),
    "generator": (("generator",), ("eval", "--only", "fid")),
    "all": (("run",),),
}
PROGRAM = (sys.executable, "-m", "tokenloom")
GLANCE = 0.1  # seconds between looks at the processes
LOG = "study.log"


class Job:
    """A run on its way: one command after the other, output in study.log."""

    def __init__(self, run: Run, stages: str) -> None:
        self.run, self.waiting = run, deque(COMMANDS[stages])
        run.folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(run.folder)
        self.resumed = any(run.folder.glob("*/checkpoints/step-*")) or any(run.folder.glob("*/model.json"))
        write_atomic(run.folder / "config.yaml", to_yaml(run.experiment).encode())
        self.log: IO[bytes] = open(run.folder / LOG, "ab")
        self.begun = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self._next()

    def poll(self) -> int | None:
        """Exit code once all commands have ended or one has failed; starts the next when one has ended well."""
        assert self.process is not None
        code = self.process.poll()
        if code == 0 and self.waiting:
            self._next()
            return None
        if code is not None:
            self._close()
        return code

    def stop(self) -> None:
        """Ask the process to save and leave, and wait for that."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self._close()

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def _next(self) -> None:
        command, *options = self.waiting.popleft()
        words = [*PROGRAM, command, "--config", str(self.run.folder / "config.yaml"), *options]
        # A group of its own: a key press reaches the study alone, which then asks each process once. The lock goes
        # along, so that a run whose study was killed is not started a second time while it still computes.
        self.process = subprocess.Popen(
            words, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0,
            pass_fds=(self.lock,),
        )  # fmt: skip

    def _close(self) -> None:
        if not self.log.closed:
            self.log.close()
            os.close(self.lock)


class Ledger:
    """What is known of the times that runs take."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.rates: dict[str, list[float]] = {}  # seconds per FLOP of finished runs, by row
        for run in runs:
            seconds = finished(run).get("seconds")
            if seconds:
                self.add(run, seconds)

    def add(self, run: Run, seconds: float) -> None:
        """A run took so long; one that trains nothing (pixels) says nothing of the others."""
        if run.flops:
            self.rates.setdefault(run.row, []).append(seconds / run.flops)

    def expected(self, run: Run) -> float:
        """Seconds that a run should take, by others of its row, else by all; infinite if none has ended yet."""
        rates = self.rates.get(run.row) or [rate for row in self.rates.values() for rate in row]
        return run.flops * sum(rates) / len(rates) if rates else float("inf")


def finished(run: Run) -> dict[str, Any]:
    """study.json of a run that has ended under its present settings; empty if there is none."""
    told = _read(run.folder / "study.json")
    return told if _settings(told, run) == run.settings else {}


def changed_settings(run: Run) -> list[str]:
    """Dotted keys in which a run that has ended differs from what the study now asks."""
    told = _read(run.folder / "study.json")
    return list(difference(_settings(told, run), run.settings)) if "settings" in told else []


def _settings(told: dict[str, Any], run: Run) -> dict[str, Any]:
    """The settings of a run that has ended; keys that are younger than it had their defaults.

    What is told of another run's tokenizer has none: there a younger key counts as unchanged.
    """
    stored = told.get("settings", {})
    known = to_dict(Experiment(autoregressive=AutoregressiveConfig(), diffusion=DiffusionConfig()))
    taken = stored.get("tokenizer", {})
    if "fingerprint" in taken:
        stored, known = {**stored, "tokenizer": {**run.settings["tokenizer"], **taken}}, {**known, "tokenizer": {}}
    return completed(stored, {key: known[key] for key in stored if key != "run" and stored[key]})


def carry_out(runs: Sequence[Run], *, stages: str, jobs: int, title: str) -> dict[str, str]:
    """Do the runs that are not finished, `jobs` at a time, and return what went wrong by name of the run.

    A run that takes the network of another row waits for that row's run of its seed, which must be among `runs`, and
    is not begun if that goes wrong.

    Raises:
        Interrupted: SIGINT or SIGTERM came; all processes have saved and left.
    """
    todo = _to_do(runs)
    ledger, problems = Ledger(runs), dict[str, str]()
    print(f"{title}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(runs) - len(todo)} done before", flush=True)
    waiting, active = deque(todo), list[Job]()
    with caught_signals() as caught:
        try:
            while waiting or active:
                if caught:
                    _stop(active, caught[-1], title)
                while len(active) < jobs and (run := _ready(waiting, active)) is not None:
                    trouble = _start(run, runs, stages, active)
                    if trouble:
                        problems[run.name] = trouble
                for job in list(active):
                    code = job.poll()
                    if code is None:
                        continue
                    active.remove(job)
                    trouble = _ended(job, code, ledger)
                    if trouble:
                        problems[job.run.name] = trouble
                    done = len(todo) - len(waiting) - len(active)
                    print(_line(job, trouble, done, len(todo), _left(waiting, active, ledger) / jobs), flush=True)
                time.sleep(GLANCE)
        finally:
            for job in active:
                job.kill()
    return problems


def _to_do(runs: Sequence[Run]) -> list[Run]:
    """Runs that are not finished, and those that take a network of these: they may have to be done again."""
    providers = {(run.row, run.seed): run for run in runs}

    def due(run: Run) -> bool:
        return not finished(run) or any(due(providers[name, run.seed]) for name in run.taken.values())

    return [run for run in runs if due(run)]


def _ready(waiting: deque[Run], active: Sequence[Job]) -> Run | None:
    """The first waiting run that takes the network of no run which is still to end; it no longer waits."""
    pending = {(run.row, run.seed) for run in [*waiting, *(job.run for job in active)]}
    for run in waiting:
        if all((name, run.seed) not in pending for name in run.taken.values()):
            waiting.remove(run)
            return run
    return None


def _start(run: Run, runs: Sequence[Run], stages: str, active: list[Job]) -> str:
    """Begin a run, unless it turns out to be finished; returns why it cannot be begun."""
    for provider in (each for each in runs if each.seed == run.seed and each.row in run.taken.values()):
        if not finished(provider):
            return f"not begun: it takes the network of {provider.name}, which is not finished"
    if finished(run):
        return ""
    try:
        active.append(Job(run, stages))
    except BlockingIOError:
        return "another process is still at it; wait for it or stop it"
    return ""


def _ended(job: Job, code: int, ledger: Ledger) -> str:
    """Keep what a finished run took; what went wrong otherwise."""
    if code != 0:
        return f"ended with exit code {code}: {_last_words(job.run.folder / LOG)}"
    seconds = None if job.resumed else round(job.seconds, 1)  # of a resumed run only a part is known
    write_json(job.run.folder / "study.json", {"settings": job.run.settings, "seconds": seconds})
    if seconds:
        ledger.add(job.run, seconds)
    return ""


def _line(job: Job, trouble: str, done: int, total: int, left: float) -> str:
    told = f"FAILED, see {job.run.folder / LOG}" if trouble else f"done in {clock(job.seconds)}"
    rest = f", about {clock(left)} left" if done < total else ""
    return f"[{done}/{total}] {job.run.name}: {told}{rest}"


def _left(waiting: Sequence[Run], active: Sequence[Job], ledger: Ledger) -> float:
    """Seconds of computing that are left, by the times of the runs before."""
    begun = sum(max(0.0, ledger.expected(job.run) - job.seconds) for job in active)
    return begun + sum(ledger.expected(run) for run in waiting)


def _stop(active: Sequence[Job], number: int, title: str) -> None:
    print(f"{title}: stopping {len(active)} runs, which save first", file=sys.stderr, flush=True)
    for job in active:
        if job.process is not None:
            job.process.terminate()
    for job in active:
        job.stop()
    leave(number, title, speak=True)


def _lock(folder: Path) -> int:
    """An open file that no other process may lock until it and its children have closed it.

    Raises:
        BlockingIOError: another process has it.
    """
    descriptor = os.open(folder / "study.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("tokenloom: ") if lines else "it said nothing"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
