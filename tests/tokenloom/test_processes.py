"""Promise: two processes train to the weights of one, to rounding, through every stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
# Dropout draws other masks on other processes; bf16 rounds too coarsely to compare.
WORDS = ["run", "--config", SMOKE, "--run.device=cpu", "--run.precision=fp32", "--autoregressive.model.dropout=0"]


def execute(root: Path, *launcher: str, parallel: str = "ddp") -> None:
    command = [sys.executable, *launcher, "-m", "tokenloom", *WORDS, f"--run.root={root}", f"--run.parallel={parallel}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, parallel: str) -> None:
    execute(tmp_path / "one")
    execute(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", parallel=parallel)
    for stage in ("tokenizer", "autoregressive", "diffusion"):
        one, two = (load_file(tmp_path / root / "smoke" / stage / "model.safetensors") for root in ("one", "two"))
        assert one.keys() == two.keys()
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4, stage
    assert (tmp_path / "two" / "smoke" / "report.html").exists()


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    execute(tmp_path)
    words = ["sample", "--config", str(tmp_path / "smoke" / "config.yaml"), "--count", "70", "--run.threads=1"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", []), ("two", two)):
        command = [sys.executable, *launcher, "-m", "tokenloom", *words, "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for family in ("autoregressive", "diffusion"):
        for index in range(70):
            first, second = (tmp_path / name / family / f"{index:06d}.png" for name in ("one", "two"))
            assert first.read_bytes() == second.read_bytes()
