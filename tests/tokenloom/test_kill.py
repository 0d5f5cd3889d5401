"""Promise: a run killed at any moment and started again ends with the very weights of an uninterrupted one."""

import hashlib
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import forked

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
STAGES = ("tokenizer", "autoregressive", "diffusion")
CADENCE = ("steps=60", "checkpoint_every=5", "batch_size=16")
KILLS = 10


def start(root: Path) -> BaseProcess:
    words = ["run", "--config", SMOKE, f"--run.root={root}", "--run.device=cpu", "--eval.features=[random]"]
    words += [f"--{stage}.train.{key}" for stage in STAGES for key in CADENCE]
    words += ["--run.threads=1", "--eval.probe.taps=[pixels]", "--eval.num_samples=20"]
    staged = ("kind=easy_to_hard", "num_clusters=6", "patience=4", "smoothing=0.7")  # moved by the losses
    words += [f"--diffusion.curriculum.{key}" for key in staged]
    return forked.start("tokenloom.cli:main", words, told=root.with_suffix(".txt"))


def weights(root: Path) -> dict[str, str]:
    files = {stage: root / "smoke" / stage / "model.safetensors" for stage in STAGES}
    return {stage: hashlib.sha256(path.read_bytes()).hexdigest() for stage, path in files.items()}


def survives(process: BaseProcess, seconds: float) -> bool:
    """Kill the process after so many seconds; true if it had ended by itself before."""
    process.join(seconds)
    if process.exitcode is not None:
        return process.exitcode == 0
    process.kill()
    process.join()
    return False


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_equals_uninterrupted(tmp_path: Path) -> None:
    forked.run("builtins:print", "The server has begun.", told=tmp_path / "first.txt")
    begun = time.monotonic()
    forked.finish(start(tmp_path / "whole"), tmp_path / "whole.txt")
    seconds, expected = time.monotonic() - begun, weights(tmp_path / "whole")
    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        root = tmp_path / f"killed-{runs}"
        if not survives(start(root), moments.uniform(0.1, 0.5) * seconds):
            kills += 1
        if (root / "smoke" / "report.html").exists() or kills == KILLS:
            forked.finish(start(root), root.with_suffix(".txt"))
            assert weights(root) == expected
            runs += 1
    print(f"killed {kills} times in {runs} runs; an uninterrupted run took {seconds:.0f} s")
