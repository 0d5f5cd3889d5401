"""Promise: two processes train to the weights of one, to rounding, through every stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from generator.config import CurriculumConfig
from generator.pacing import Pacing

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


# Every part that processes must agree on: opponent, LeCam's means, moving codes, revival in every step, k-means start.
ADVERSARIAL = [
    "--tokenizer.loss.adversarial=0.1", "--tokenizer.discriminator.channels=8", "--tokenizer.discriminator.lecam=0.01",
    "--tokenizer.discriminator.channel_base=128", "--tokenizer.discriminator.r1_every=4",
    "--tokenizer.quantizer.update=ema", "--tokenizer.quantizer.revive_after=2", "--tokenizer.train.log_every=1",
    "--tokenizer.train.steps=8",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_agree_on_codebook_usage_and_opponent(tmp_path: Path, parallel: str) -> None:
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", []), ("two", two)):
        words = ["tokenizer", *WORDS[1:], *ADVERSARIAL, f"--run.root={tmp_path / name}", f"--run.parallel={parallel}"]
        words += ["--tokenizer.discriminator.adaptive=true"] if parallel == "ddp" else []  # FSDP refuses it
        command = [sys.executable, *launcher, "-m", "tokenloom", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    folders = [tmp_path / name / "smoke" / "tokenizer" for name in ("one", "two")]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-4
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    told = {"usage", "perplexity", "dead_codes", "revived", "logits_real", "logits_fake", "r1", "l2"}
    assert told <= logs[0][0].keys()
    for one, other in zip(*logs, strict=True):
        for key in told & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (key, one["step"])


# What a plain VIM on cached codes does not use: other blocks, images encoded in the step, a curriculum of orders.
UNUSUAL = [
    "--autoregressive.model.block=modern", "--autoregressive.codes=on_the_fly", "--autoregressive.order.kind=random",
    "--autoregressive.train.preview_every=10", "--diffusion=null",
]  # fmt: skip


@pytest.mark.slow
def test_two_processes_with_shards_of_a_modern_transformer_train_and_preview_as_one(tmp_path: Path) -> None:
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    commands: list[tuple[str, str, list[str]]] = [("tokenizer", "one", []), ("encode", "one", [])]
    commands += [("generator", "one", []), ("generator", "two", two)]
    for name, root, launcher in commands:
        if root == "two":
            for stage in ("tokenizer", "codes"):
                shutil.copytree(tmp_path / "one" / "smoke" / stage, tmp_path / "two" / "smoke" / stage)
        words = [name, *WORDS[1:], *UNUSUAL, f"--run.root={tmp_path / root}", "--run.parallel=fsdp"]
        command = [sys.executable, *launcher, "-m", "tokenloom", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    folders = [tmp_path / root / "smoke" / "autoregressive" for root in ("one", "two")]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-4
    previews = [f"step-{step:08d}-{name}.png" for step in (10, 20, 30) for name in ("partial", "samples")]
    for folder in folders:
        assert sorted(path.name for path in (folder / "previews").iterdir()) == previews
    for name in previews:  # the seeds are the same; rounding may turn a code over here and there
        mine, theirs = (np.asarray(Image.open(folder / "previews" / name)) for folder in folders)
        assert (mine == theirs).mean() > 0.9, name
    first, last = (np.asarray(Image.open(folders[1] / "previews" / previews[at])) for at in (1, -1))
    assert (first != last).any()  # of the weights of their step


# A network whose method `advance` is not its forward; its weights are shards, whole, and shards again.
GATHERED = """
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from engine.config import RunConfig
from engine.device import gathered, setup

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 4)

    def forward(self, x):
        return self.advance(x)

    def advance(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def shards(network):
    return [isinstance(weight, DTensor) for weight in network.parameters()]

device = setup(RunConfig(device="cpu", precision="fp32", threads=1, parallel="fsdp"))
torch.manual_seed(0)
plain, network = Stack(), Stack()
network.load_state_dict(plain.state_dict())
device.share(network, torch.optim.SGD(network.parameters()))
assert all(shards(network))
with gathered(network, "advance"), torch.no_grad():
    for _ in range(2):
        assert torch.equal(network.advance(torch.ones(3, 4)), plain(torch.ones(3, 4)))
        assert not any(shards(network))
assert all(shards(network))
network(torch.ones(3, 4))
assert all(shards(network.blocks))  # as before the block, a forward puts the weights of each unit away
"""


@pytest.mark.slow
def test_weights_are_whole_inside_gathered_and_shards_again_after_it(tmp_path: Path) -> None:
    (tmp_path / "gather.py").write_text(GATHERED)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "gather.py")]
    place = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, *two], capture_output=True, text=True, env={**os.environ, **place})
    assert done.returncode == 0, done.stderr


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


# Runs a command of tokenloom, and writes what this process alone saw of the diffusion's steps: stage and loss.
WATCHED = """
import json, os, sys
from pathlib import Path
from generator.diffusion_task import DiffusionTask
from tokenloom.cli import main

step, seen = DiffusionTask.step, []

def watched(self, batch, rng):
    figures = step(self, batch, rng)
    seen.append([self.curriculum.stage, figures["loss"].item()])
    return figures

DiffusionTask.step = watched
main(sys.argv[2:])
Path(sys.argv[1], "rank-" + os.environ.get("RANK", "0") + ".json").write_text(json.dumps(seen))
"""
STAGED = [
    "--diffusion.curriculum.kind=easy_to_hard", "--diffusion.curriculum.num_clusters=4",
    "--diffusion.curriculum.patience=1", "--diffusion.curriculum.smoothing=0.5", "--diffusion.train.log_every=1",
    "--autoregressive=null",
]  # fmt: skip


@pytest.mark.slow
def test_processes_change_stage_with_the_same_step_though_their_own_losses_differ(tmp_path: Path) -> None:
    (tmp_path / "watched.py").write_text(WATCHED)
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def train(root: str, *launcher: str) -> list[list[list[float]]]:
        """Stages and losses of every step, by process."""
        folder = tmp_path / root
        for stage in ("tokenizer", "codes") if root != "one" else ():
            shutil.copytree(tmp_path / "one" / "smoke" / stage, folder / "smoke" / stage)
        for name in ("tokenizer", "encode", "generator") if root == "one" else ("generator",):
            words = [name, *WORDS[1:-1], *STAGED, f"--run.root={folder}"]
            command = [sys.executable, *launcher, str(tmp_path / "watched.py"), str(folder), *words]
            done = subprocess.run(command, capture_output=True, text=True, env=place)
            assert done.returncode == 0, done.stderr
        return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]

    def logged(root: str) -> list[dict]:
        lines = (tmp_path / root / "smoke" / "diffusion" / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    def weights(root: str) -> dict:
        return load_file(tmp_path / root / "smoke" / "diffusion" / "model.safetensors")

    (alone,) = train("one")
    stages = [stage for stage, _ in alone]
    assert stages[-1] == 4
    config = CurriculumConfig(kind="easy_to_hard", num_clusters=4, patience=1, smoothing=0.5)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    ranks = train("two", *launcher)
    assert len(ranks) == 2
    for rank in ranks:
        assert [stage for stage, _ in rank] == stages
        pacing, own = Pacing(config, num_stages=4), []
        for _, loss in rank:
            own.append(pacing.stage)
            pacing.update(loss)
        assert own != stages  # where its own losses would have led
    for one, two in zip(logged("one"), logged("two"), strict=True):
        assert one.keys() == two.keys()
        assert one["curriculum/stage"] == two["curriculum/stage"]
        assert one["curriculum/draws"]["shares"] == pytest.approx(two["curriculum/draws"]["shares"], abs=2e-6)
        clusters = [key for key in one if key.startswith("loss_cluster/")]
        assert [one[key] for key in clusters] == pytest.approx([two[key] for key in clusters], rel=1e-3)
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4
