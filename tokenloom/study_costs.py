"""What training and sampling cost: FLOPs counted on the meta device, and seconds measured on a few steps."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.flops import TRAINING_FACTOR, forward_flops, matmul_rate
from eval.variants import GeneratorConfig, samplings
from generator.config import DiffusionConfig
from tokenloom.dry_run import Stage, build_stages, imagined_device, num_classes
from tokenloom.experiment import Experiment

TIMED_STEPS = 2
TIMED_IMAGES = 16
LONG_STEP = 1.0  # seconds; longer ones are not measured but computed from the matrix-product rate


class Cost(NamedTuple):
    """FLOPs of one training step of a stage; an opponent's come on top from its first step on."""

    own: float
    opponent: float = 0.0
    start: int = 0

    def total(self, steps: int) -> float:
        """FLOPs of so many steps."""
        return steps * self.own + max(0, steps - self.start) * self.opponent

    def steps_within(self, budget: float) -> int:
        """Steps whose FLOPs come nearest to the budget."""
        before = self.start * self.own
        if budget <= before:
            return round(budget / self.own)
        return round((budget + self.start * self.opponent) / (self.own + self.opponent))


def training_costs(experiment: Experiment) -> dict[str, Cost]:
    """Cost of a step of each stage that is trained: tokenizer, autoregressive, diffusion, as far as they are there.

    The tokenizer's holds its discriminator's. Elementwise operations and optimisers do not count.
    """
    with torch.device("meta"):
        stages = list(build_stages(experiment, num_classes(experiment)[0]))
    costs = {stage.name: Cost(_flops(stage)) for stage in stages if not stage.judges}
    for judge in (stage for stage in stages if stage.judges):
        start = experiment.tokenizer.discriminator.start_step if judge.name == "discriminator" else 0
        tokenizer = costs["tokenizer"]
        if start:
            costs["tokenizer"] = Cost(tokenizer.own, _flops(judge), start)
        else:
            costs["tokenizer"] = tokenizer._replace(own=tokenizer.own + _flops(judge))
    return costs


def product_rate(run: RunConfig) -> float:
    """FLOP/s of a large matrix product in the run's precision, on as many threads as torch now has."""
    place, precision, _ = imagined_device(run)
    return matmul_rate(torch.bfloat16 if precision == "bf16" else torch.float32, place)


def step_seconds(experiment: Experiment, rate: float) -> tuple[dict[str, float], str]:
    """Seconds of a training step of each stage on this machine now, and in words how they were found.

    Measured on forward and backward passes of a few random images, without optimiser and data. Where even that would
    take long, computed from `rate`, the FLOP/s of a large matrix product, which no training reaches.
    """
    found = {}
    for name, cost in training_costs(experiment).items():
        found[name] = cost.own + cost.opponent
        if found[name] / rate * TIMED_IMAGES / getattr(experiment, name).train.batch_size > LONG_STEP:
            told = f"at least: computed at the {rate / 1e9:,.0f} GFLOP/s of a large matrix product"
            return {name: flops / rate for name, flops in found.items()}, told
    told = f"measured here and now on {TIMED_STEPS} steps of {TIMED_IMAGES} images, without optimiser and data"
    return _measured(experiment), told


def sampling_seconds(experiment: Experiment, rate: float) -> float:
    """Seconds that the network's forward passes take for all samples of one run that are scored, on this machine now.

    Measured as training steps are, or computed from `rate`. An autoregressive sample counts as one pass over the
    sequence, which code by code takes longer.
    """
    passes, seconds = sample_passes(experiment), 0.0
    for stage in build_stages(experiment, num_classes(experiment)[0]):
        if stage.name in passes:
            flops = forward_flops(stage.network, *stage.inputs)
            slow = flops / rate * TIMED_IMAGES > LONG_STEP
            bf16 = getattr(experiment, stage.name).sample.precision == "bf16"
            each = flops / rate if slow else _forward_seconds(stage, experiment.run, bf16=bf16)
            seconds += passes[stage.name] * each
    return seconds


def sample_passes(experiment: Experiment) -> dict[str, int]:
    """Forward passes of one image that all samples which are scored take, by family: variants and snapshots too."""
    passes: dict[str, int] = {}
    for _, family, config in samplings(experiment.eval, dict(experiment.generators())):
        passes[family] = passes.get(family, 0) + passes_per_sample(config)
    diffusion = experiment.diffusion
    if diffusion is not None and experiment.eval.snapshots and diffusion.train.snapshot_every:
        between = (diffusion.train.steps - 1) // diffusion.train.snapshot_every
        passes["diffusion"] += between * passes_per_sample(diffusion)
    return {family: count * experiment.eval.num_samples for family, count in passes.items()}


def passes_per_sample(config: GeneratorConfig) -> int:
    """Forward passes of the network for one sample; guidance counts as two passes, wherever it is limited to."""
    calls = 1
    if isinstance(config, DiffusionConfig):
        steps = len(config.sample.levels) or config.sample.num_steps
        calls = 2 * steps - 1 if config.sample.solver == "heun" else steps
    return calls * (1 if config.sample.guidance == 1 else 2)


def _flops(stage: Stage) -> float:
    """FLOPs of a training step."""
    return float(stage.factor * forward_flops(stage.network, *stage.inputs) * stage.train.batch_size)


def _measured(experiment: Experiment) -> dict[str, float]:
    """Seconds by stage; what judges the tokenizer's images counts as its."""
    place, precision, _ = imagined_device(experiment.run)
    found: dict[str, float] = {}
    for stage in build_stages(experiment, num_classes(experiment)[0]):
        owner = "tokenizer" if stage.judges else stage.name
        seconds = _seconds(stage, place, precision) * (stage.factor / TRAINING_FACTOR if stage.judges else 1)
        found[owner] = found.get(owner, 0.0) + seconds
    return found


def _seconds(stage: Stage, place: str, precision: str) -> float:
    """A batch's share of the quickest of a few forward and backward passes; the first one is not timed."""
    network = stage.network.to(place)
    batch = [_random(tensor, TIMED_IMAGES).to(place) for tensor in stage.inputs]
    times = []
    for _ in range(1 + TIMED_STEPS):
        begun = time.perf_counter()
        with torch.autocast(place, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = stage.loss(network, *batch)
        loss.backward()
        if place == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:]) * stage.train.batch_size / TIMED_IMAGES


@torch.no_grad()
def _forward_seconds(stage: Stage, run: RunConfig, *, bf16: bool) -> float:
    """Seconds per image of the quickest of a few forward passes; the first one is not timed."""
    place, _, _ = imagined_device(run)
    network = stage.network.to(place).eval()
    batch = [_random(tensor, TIMED_IMAGES).to(place) for tensor in stage.inputs]
    times = []
    for _ in range(1 + TIMED_STEPS):
        begun = time.perf_counter()
        with torch.autocast(place, dtype=torch.bfloat16, enabled=bf16):
            network(*batch)
        if place == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:]) / TIMED_IMAGES


def _random(like: Tensor, batch_size: int) -> Tensor:
    """A batch of inputs shaped like one of them: noise, or zeros for labels and codes."""
    shape = (batch_size, *like.shape[1:])
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype)
    return torch.randn(shape, requires_grad=like.requires_grad)
