"""Promise: a run killed at any moment and started again ends with the very weights of an uninterrupted one."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
STAGES = ("tokenizer", "autoregressive", "diffusion")
KILLS = 10


def start(root: Path) -> subprocess.Popen[bytes]:
    words = ["run", "--config", SMOKE, f"--run.root={root}", "--run.device=cpu", "--eval.features=[random]"]
    words += [f"--{stage}.train.{key}" for stage in STAGES for key in ("steps=400", "checkpoint_every=20")]
    words += ["--run.threads=1", "--eval.probe.families=[pixels]"]
    staged = ("kind=easy_to_hard", "num_clusters=6", "patience=30", "smoothing=0.9")  # moved by the losses
    words += [f"--diffusion.curriculum.{key}" for key in staged]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    silent = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "tokenloom", *words], env=environment, stdout=silent, stderr=silent)


def weights(root: Path) -> dict[str, str]:
    files = {stage: root / "smoke" / stage / "model.safetensors" for stage in STAGES}
    return {stage: hashlib.sha256(path.read_bytes()).hexdigest() for stage, path in files.items()}


def survives(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill the process after so many seconds; true if it had ended by itself before."""
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_equals_uninterrupted(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds, expected = time.monotonic() - begun, weights(tmp_path / "whole")
    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        root = tmp_path / f"killed-{runs}"
        if not survives(start(root), moments.uniform(0.2, 0.7) * seconds):
            kills += 1
        if (root / "smoke" / "report.html").exists() or kills == KILLS:
            assert start(root).wait() == 0
            assert weights(root) == expected
            runs += 1
    print(f"killed {kills} times in {runs} runs; an uninterrupted run took {seconds:.0f} s")
