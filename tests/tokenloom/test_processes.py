"""Promise: two processes train to the weights of one, to rounding, through every stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from generator.config import CurriculumConfig
from generator.pacing import Pacing

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import forked

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
# Dropout draws other masks on other processes; bf16 rounds too coarsely to compare.
WORDS = ["--config", SMOKE, "--run.device=cpu", "--run.precision=fp32", "--autoregressive.model.dropout=0"]
RUN = ["run", *WORDS, "--eval.features=[random]", "--eval.probe.taps=[pixels]", "--eval.num_samples=20"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tokenloom"]


def execute(words: list[str], root: Path, *, processes: int = 1) -> None:
    """Carry a command out with `run.root` as given, in one process or in two."""
    carry_out(processes, "tokenloom.cli:main", [*words, f"--run.root={root}"], told=root / "told")


def carry_out(processes: int, program: str, *arguments: Any, told: Path) -> None:
    told.parent.mkdir(exist_ok=True)
    (forked.run if processes == 1 else forked.run_two)(program, *arguments, told=told)


def with_codes(smoke: Path, root: Path) -> Path:
    """A folder of runs where the run `smoke` has the other one's tokenizer and codes."""
    for stage in ("tokenizer", "codes"):
        shutil.copytree(smoke / stage, root / "smoke" / stage)
    return root


def largest_difference(one: Path, two: Path) -> float:
    """Of all weights of two models, which have the same names."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    return max((weights[key] - others[key]).abs().max().item() for key in weights)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of the smoke test's run, in one process."""
    root = tmp_path_factory.mktemp("one")
    execute(RUN, root)
    return root / "smoke"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_to_the_weights_of_one(smoke: Path, tmp_path: Path, parallel: str) -> None:
    """Copies of the weights under `torchrun`, shards of them in processes that find each other alike."""
    words = [*RUN, f"--run.parallel={parallel}"]
    if parallel == "ddp":
        place = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*TORCHRUN, *words, f"--run.root={tmp_path}"]
        done = subprocess.run(command, capture_output=True, text=True, env=place)
        assert done.returncode == 0, done.stderr
    else:
        execute(words, tmp_path, processes=2)
    for stage in ("tokenizer", "autoregressive", "diffusion"):
        assert largest_difference(smoke / stage, tmp_path / "smoke" / stage) < 1e-4, stage
    assert (tmp_path / "smoke" / "report.html").exists()


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
    words = ["tokenizer", *WORDS, *ADVERSARIAL, f"--run.parallel={parallel}"]
    words += ["--tokenizer.discriminator.adaptive=true"] if parallel == "ddp" else []  # FSDP refuses it
    for name, processes in (("one", 1), ("two", 2)):
        execute(words, tmp_path / name, processes=processes)
    folders = [tmp_path / name / "smoke" / "tokenizer" for name in ("one", "two")]
    assert largest_difference(*folders) < 1e-4
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    told = {"usage", "perplexity", "dead_codes", "revived", "logits_real", "logits_fake", "r1", "l2"}
    assert told <= logs[0][0].keys()
    for one, other in zip(*logs, strict=True):
        for key in told & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (key, one["step"])


# What a plain VIM on cached codes does not use: other blocks, images encoded in the step, a curriculum of orders.
UNUSUAL = [
    "--autoregressive.model.block=modern", "--autoregressive.codes=on_the_fly", "--autoregressive.order.kind=random",
    "--autoregressive.train.preview_every=10", "--diffusion=null", "--run.parallel=fsdp",
]  # fmt: skip


@pytest.mark.slow
def test_two_processes_with_shards_of_a_modern_transformer_train_and_preview_as_one(
    smoke: Path, tmp_path: Path
) -> None:
    one, two = (with_codes(smoke, tmp_path / name) for name in ("one", "two"))
    for root, processes in ((one, 1), (two, 2)):
        execute(["generator", *WORDS, *UNUSUAL], root, processes=processes)
    folders = [root / "smoke" / "autoregressive" for root in (one, two)]
    assert largest_difference(*folders) < 1e-4
    previews = [f"step-{step:08d}-{name}.png" for step in (10, 20, 30) for name in ("partial", "samples")]
    for folder in folders:
        assert sorted(path.name for path in (folder / "previews").iterdir()) == previews
    for name in previews:  # the seeds are the same; rounding may turn a code over here and there
        mine, theirs = (np.asarray(Image.open(folder / "previews" / name)) for folder in folders)
        assert (mine == theirs).mean() > 0.9, name
    first, last = (np.asarray(Image.open(folders[1] / "previews" / previews[at])) for at in (1, -1))
    assert (first != last).any()  # of the weights of their step


@pytest.mark.slow
def test_weights_are_whole_inside_gathered_and_shards_again_after_it(tmp_path: Path) -> None:
    forked.run_two("ranks:gather", told=tmp_path / "told")


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_processes(smoke: Path, tmp_path: Path) -> None:
    words = ["sample", "--config", str(smoke / "config.yaml"), "--count", "70", "--run.threads=1"]
    for name, processes in (("one", 1), ("two", 2)):
        out = ["--out", str(tmp_path / name)]
        carry_out(processes, "tokenloom.cli:main", [*words, *out], told=tmp_path / f"told-{name}")
    for family in ("autoregressive", "diffusion"):
        for index in range(70):
            first, second = (tmp_path / name / family / f"{index:06d}.png" for name in ("one", "two"))
            assert first.read_bytes() == second.read_bytes()


STAGED = [
    "--diffusion.curriculum.kind=easy_to_hard", "--diffusion.curriculum.num_clusters=4",
    "--diffusion.curriculum.patience=1", "--diffusion.curriculum.smoothing=0.5", "--diffusion.train.log_every=1",
    "--autoregressive=null",
]  # fmt: skip


@pytest.mark.slow
def test_processes_change_stage_with_the_same_step_though_their_own_losses_differ(smoke: Path, tmp_path: Path) -> None:
    def train(root: str, processes: int) -> list[list[list[float]]]:
        """Stages and losses of every step, by process."""
        folder = with_codes(smoke, tmp_path / root)
        words = ["generator", *WORDS[:-1], *STAGED, f"--run.root={folder}"]
        carry_out(processes, "ranks:watch", folder, words, told=folder / "told")
        return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]

    def logged(root: str) -> list[dict]:
        lines = (tmp_path / root / "smoke" / "diffusion" / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    (alone,) = train("one", 1)
    stages = [stage for stage, _ in alone]
    assert stages[-1] == 4
    config = CurriculumConfig(kind="easy_to_hard", num_clusters=4, patience=1, smoothing=0.5)
    ranks = train("two", 2)
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
    assert largest_difference(*(tmp_path / root / "smoke" / "diffusion" for root in ("one", "two"))) < 1e-4
