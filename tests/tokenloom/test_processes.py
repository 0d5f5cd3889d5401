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
