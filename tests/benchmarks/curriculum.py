"""What curricula, and what is always logged of them, add to the time of a training step.

    python tests/benchmarks/curriculum.py [--preset tiny] [--batch 128] [--latents 4 8 8 --patch 2] [--kinds ...]

Added seconds would drown in the time of a DiT. So the steps of a network of one weight, which are otherwise those of a
training, are timed with and without; what they differ by is told as a share of the same step with the DiT. All are
the fastest of many turns that the variants take in one process: a mean also has what other work takes from it.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.batches import Batches, StepRandom
from engine.config import RunConfig, TrainConfig
from engine.device import setup
from engine.log import Metrics, Progress
from engine.loop import _Trainer
from engine.optim import build_optimizer
from engine.shards import ShardWriter, open_shards
from generator.config import DENOISER_PRESETS, CurriculumConfig, DenoiserModelConfig, DiffusionConfig
from generator.diffusion_task import DiffusionTask
from tokenizer.model import Tokenizer

LOG_EVERY = 50  # steps, as in the configurations
NUM_CLASSES = 10


class OneWeight(nn.Module):
    """Stands for the network where the time of all else counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        return self.weight * x


class Plain(DiffusionTask):
    """The schedule's own draws, and nothing told but means."""

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents = batch["latents"].float()
        u, eps = rng.uniform(), rng.normal(*latents.shape[1:])
        condition = self.conditions(batch, rng)
        logsnr = self.curriculum.schedule(u)
        errors = self.errors(latents, condition, logsnr, eps)
        losses = self.losses(errors, logsnr)
        return {"loss": losses.mean(), "error": errors.detach().mean(), "mean_logsnr": logsnr.mean()}

    def after_step(self, step: int, metrics: dict[str, float], rng: StepRandom) -> None:
        pass


class Latent:
    """Stands for the tokenizer of the shards."""

    code_fingerprint, grid, length, vocab_size = "benchmark", (1, 1), 1, 2

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.latent_shape = shape


def write_shards(folder: Path, num: int, shape: tuple[int, ...]) -> None:
    writer = ShardWriter(folder, views=("original",))
    writer.append(labels=torch.arange(num) % NUM_CLASSES, latents=torch.randn(num, 1, *shape))
    meta = {"tokenizer_fingerprint": "benchmark", "grid": [1, 1], "vocab_size": 2, "latent_shape": list(shape)}
    writer.close({**meta, "class_names": [str(number) for number in range(NUM_CLASSES)], "images": {}})


class Course:
    """A training whose steps are timed: those that end in a line of the log, and the others."""

    def __init__(self, args: argparse.Namespace, folder: Path, kind: str, *, network: nn.Module | None = None) -> None:
        shards = open_shards(folder.parent / "codes")
        train = TrainConfig(steps=10**6, batch_size=args.batch, log_every=LOG_EVERY, preview_every=0)
        settings: dict[str, Any] = {"num_clusters": args.clusters, **({} if kind == "plain" else {"kind": kind})}
        model = DenoiserModelConfig(preset=args.preset, patch_size=args.patch)
        config = DiffusionConfig(model=model, train=train, curriculum=CurriculumConfig(**settings))
        task = (Plain if kind == "plain" else DiffusionTask)(
            config=config, shards=shards, test_shards=shards, tokenizer=cast(Tokenizer, Latent(tuple(args.latents)))
        )
        if network is not None:
            task.modules["network"], task.optimizers["network"] = network, build_optimizer(network, train)
        run = RunConfig(device="cpu", precision="fp32", threads=args.threads)
        batches = Batches(shards, batch_size=args.batch, seed=0)
        self.trainer = _Trainer(task, batches, train=train, run=run, device=setup(run), folder=folder)
        self.trainer.since, self.trainer.since_step = time.monotonic(), 0
        self.metrics, self.bar = Metrics(folder), Progress(total=train.steps, title=kind, enabled=False)
        self.stream = itertools.cycle([batches.batch(step) for step in range(4)])
        self.silent: list[float] = []
        self.told: list[float] = []

    def go_on(self, num: int) -> None:
        """So many steps."""
        for _ in range(num):
            begun = time.perf_counter()
            self.trainer._one_step(self.stream)
            self.trainer._report(self.metrics, self.bar)
            kept = self.told if self.trainer.step % LOG_EVERY == 0 else self.silent
            kept.append(time.perf_counter() - begun)

    @property
    def seconds(self) -> float:
        """A step's, and its part of a line of the log."""
        silent = min(self.silent)
        return silent + (min(self.told) - silent if self.told else 0.0) / LOG_EVERY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("uniform", "easy_to_hard", "asymmetric", "progressive")
    parser.add_argument("--preset", choices=DENOISER_PRESETS, default="tiny")
    parser.add_argument("--latents", type=int, nargs=3, default=(4, 8, 8))
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name) / "codes", 4 * args.batch, tuple(args.latents))
        courses = {kind: Course(args, Path(name) / kind, kind, network=OneWeight()) for kind in ("plain", *args.kinds)}
        dit = Course(args, Path(name) / "network", "plain")
        for _ in range(args.repeats):
            for course in courses.values():
                course.go_on(LOG_EVERY)
            dit.go_on(1)
    plain = courses.pop("plain").seconds
    print(f"DiT {args.preset}, batch {args.batch}: {dit.seconds * 1e3:.1f} ms; one weight {plain * 1e3:.3f} ms")
    for kind, course in courses.items():
        added = course.seconds - plain
        print(f"{kind}, with what is logged of it: {added * 1e6:.0f} us more, {added / dit.seconds:.3%} of the step")


if __name__ == "__main__":
    main()
