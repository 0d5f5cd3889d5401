"""What an experiment will cost, told within seconds: networks are built on the meta device and nothing is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import part_rows
from engine.config import RunConfig, TrainConfig, to_dict
from engine.device import choose_precision
from engine.flops import TRAINING_FACTOR, forward_flops, saved_bytes
from engine.shards import open_shards
from engine.sources import open_images
from eval.variants import samplings
from generator.autoregressive import build_network
from generator.condition import condition_of
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.curriculum import Curriculum
from generator.diffusion import build_denoiser
from generator.learned_schedule import LearnedSchedule, rate_flops
from generator.schedule import build_schedule
from generator.train import reads_codes
from tokenizer.adversary import passes_per_step
from tokenizer.config import TokenizerConfig
from tokenizer.costs import training_passes, untrained
from tokenizer.discriminator import build_discriminator
from tokenizer.encode import SPLITS, Split, borrowed_tokenizer, encode_flops
from tokenizer.model import Tokenizer, count_parameters, to_pixels
from tokenizer.perceptual import PERCEPTUAL_PASSES, open_perceptual
from tokenloom.experiment import Experiment

ASSUMED_CLASSES = 1000
FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A network to train, under its loss, and inputs of one image, all on the meta device."""

    name: str
    network: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[..., Tensor]
    tokens: int
    train: TrainConfig
    factor: float = TRAINING_FACTOR
    """Operations of a training step, per image, in forward passes."""
    beside: int = 0
    """Bytes of frozen weights that each process needs in the step beside the network's."""
    judges: bool = False
    """Whether the network is a part of the tokenizer's training, whose images it judges."""


class Trained(nn.Module):
    """A network with its loss, as one module."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.network, self.loss = stage.network, stage.loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(self.network, *inputs)


def dry_run(experiment: Experiment) -> str:
    """Sizes, operations and memory of every stage, and where results will lie; the images are not opened.

    The number of processes is WORLD_SIZE's, as torchrun sets it.

    Raises:
        ValueError: sizes that do not fit each other, a batch that processes and parts do not divide, or clusters of
            noise levels that the schedule does not draw from.
    """
    run, world = experiment.run, int(os.environ.get("WORLD_SIZE", "1"))
    classes, origin = num_classes(experiment)
    place, precision, remark = imagined_device(run)
    with torch.device("meta"):
        stages = list(build_stages(experiment, classes))
    if not stages:
        told = "tokenizer.model.architecture=pixels" if run.tokenizer is None else f"run.tokenizer={run.tokenizer}"
        raise ValueError(f"{told}, and no generator: there is nothing to train")
    columns = [stage_facts(stage, run, world, place, precision) for stage in stages]
    size = f"{experiment.data.size} x {experiment.data.size}"
    head = [
        f"{run.name}: images of {size} pixels from {experiment.data.source}, {classes:,} classes ({origin})",
        f"{world} process{'es' if world > 1 else ''}{f' ({run.parallel})' if world > 1 else ''}, {precision}{remark}",
    ]
    if run.tokenizer is not None:
        head.append(f"tokenizer and codes are those of {run.tokenizer}: they are not trained here")
    elif not experiment.tokenizer.model.learned:
        head.append("latents are the pixels: the tokenizer measures their mean and deviation and trains nothing")
    elif experiment.tokenizer.encoder_from is not None:
        head.append("the tokenizer's encoder and bottleneck are frozen: they count forwards alone, its decoder in full")
    if experiment.autoregressive is not None and not reads_codes(experiment.autoregressive):
        head.append("each autoregressive step encodes its images: that and the frozen tokenizer's weights are counted")
    conditions = [family.condition for _, family in experiment.generators()]
    if any(each.kind == "text" and each.text.encoder != "bytes" for each in conditions):
        head.append("the frozen text encoder, which reads each distinct text once, counts nowhere")
    if experiment.diffusion is not None and experiment.diffusion.curriculum.least_steps:
        curriculum, steps = experiment.diffusion.curriculum, experiment.diffusion.train.steps
        head.append(
            f"the curriculum takes at least {curriculum.least_steps:,} of the {steps:,} diffusion steps before the last"
            f" of its {curriculum.num_clusters} stages, which trains all noise levels"
        )
    return "\n".join([*head, "", *table([stage.name for stage in stages], columns), "", *where(experiment)])


def build_stages(experiment: Experiment, classes: int) -> Iterator[Stage]:
    """The networks that the experiment trains, on the current device."""
    if experiment.run.tokenizer is None:
        tokenizer = untrained(experiment.tokenizer, experiment.data.size)
        if experiment.tokenizer.model.learned:
            yield from tokenizer_stages(experiment, tokenizer)
    else:
        tokenizer = borrowed_tokenizer(experiment.run, experiment.data).to(torch.get_default_device())
    for name, family in experiment.generators():
        card = {
            "config": to_dict(family), "class_names": [], "grid": tokenizer.grid,
            "codes_per_token": tokenizer.quantizer.codes_per_token,
            "vocab_size": tokenizer.vocab_size, "latent_shape": tokenizer.latent_shape,
            "num_classes": 0 if family.model.label_dropout == 1 else classes,
        }  # fmt: skip
        yield generator_stage(name, family, card, tokenizer)


def tokenizer_stages(experiment: Experiment, tokenizer: Tokenizer) -> Iterator[Stage]:
    """The tokenizer, and the networks that judge its images in training."""
    section, size = experiment.tokenizer, experiment.data.size
    images = torch.empty(1, 3, size, size)
    yield Stage(
        name="tokenizer", network=tokenizer, inputs=(images,), loss=reconstruction, tokens=math.prod(tokenizer.grid),
        train=section.train, factor=training_passes(tokenizer),
    )  # fmt: skip
    if section.loss.perceptual:
        yield perceptual_stage(section, images)
    if section.loss.adversarial:
        yield discriminator_stage(section, images)


def perceptual_stage(section: TokenizerConfig, images: Tensor) -> Stage:
    """The network of the perceptual loss."""
    network = open_perceptual(section.loss.perceptual_network, image_size=images.shape[-1], blank=True)
    return Stage(
        name="perceptual", network=network, inputs=(images.clone().requires_grad_(), images), loss=distance, tokens=0,
        train=section.train, factor=PERCEPTUAL_PASSES, judges=True,
    )  # fmt: skip


def discriminator_stage(section: TokenizerConfig, images: Tensor) -> Stage:
    """The tokenizer's opponent."""
    config = section.discriminator
    return Stage(
        name="discriminator", network=build_discriminator(config, images.shape[-1]), inputs=(images,), loss=judgement,
        tokens=0, train=section.train, factor=passes_per_step(config), judges=True,
    )  # fmt: skip


def generator_stage(
    name: str, family: AutoregressiveConfig | DiffusionConfig, card: dict[str, Any], tokenizer: Tokenizer
) -> Stage:
    """The network of one family, for the codes or latents that the card describes."""
    if isinstance(family, AutoregressiveConfig):
        return autoregressive_stage(name, family, card, tokenizer)
    with torch.device("cpu"):  # where its numbers are computed; refuses clusters without draws before any training
        Curriculum(family.curriculum, build_schedule(family.schedule), steps=family.train.steps)
    dit, latents = build_denoiser(family.model, card), torch.empty(1, *card["latent_shape"])
    inputs = latents, torch.empty(1), null_row(card)
    factor = float(TRAINING_FACTOR + (family.objective.kind == "consistency"))  # whose teacher is the network itself
    if rates := rate_flops(dit.learned_schedule, inputs[2]):
        factor += TRAINING_FACTOR * rates / forward_flops(dit, *inputs)
    return Stage(
        name=name, network=dit, inputs=inputs, loss=denoising,
        tokens=math.prod(card["grid"]) // family.model.patch_size**2, train=family.train, factor=factor,
    )  # fmt: skip


def autoregressive_stage(name: str, family: AutoregressiveConfig, card: dict[str, Any], tokenizer: Tokenizer) -> Stage:
    """The autoregressive network; with codes=on_the_fly the frozen tokenizer encodes the images of each step."""
    vim = build_network(family.model, card, random_order=family.order.kind == "random")
    codes, told = torch.empty(1, vim.length, dtype=torch.int64), null_row(card)
    factor, beside = float(TRAINING_FACTOR), 0
    if not reads_codes(family):
        with torch.device("cpu"):  # which operations are counted on: what they allocate must lie there too
            factor += encode_flops(tokenizer) / forward_flops(vim, codes, told)
        beside = FLOAT * count_parameters(tokenizer)
    return Stage(
        name=name, network=vim, inputs=(codes, told), loss=next_code, tokens=vim.length, train=family.train,
        factor=factor, beside=beside,
    )  # fmt: skip


def null_row(card: dict[str, Any]) -> Tensor:
    """A row [1, ...] of the card's condition without values, on the current device."""
    with torch.device("cpu"):  # texts are split into numbers
        null = condition_of(card).null(1)
    return torch.empty(null.shape, dtype=null.dtype)


def reconstruction(network: nn.Module, images: Tensor) -> Tensor:
    """The tokenizer's loss, but for its weights."""
    output, _, losses, _ = network(images)
    return (to_pixels(output).float() - images).square().mean() + sum(losses.values())


def distance(network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """The perceptual loss."""
    return network(images, target).mean()


def judgement(network: nn.Module, images: Tensor) -> Tensor:
    """The discriminator's loss on images of one kind."""
    return F.softplus(network(images).float()).mean()


def next_code(network: nn.Module, codes: Tensor, condition: Tensor) -> Tensor:
    """The autoregressive loss."""
    return F.cross_entropy(network(codes, condition).flatten(0, 1).float(), codes.flatten())


def denoising(network: nn.Module, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
    """The diffusion loss, but for weights and penalties; times [B] stand for log SNRs where those are not learned."""
    learned = network.learned_schedule
    levels = learned(time, condition) if isinstance(learned, LearnedSchedule) else time
    return (network(latents, levels, condition).float() - latents).square().mean()


def stage_facts(stage: Stage, run: RunConfig, world: int, place: str, precision: str) -> dict[str, str]:
    """A column of the table."""
    train = stage.train
    share = part_rows(train.batch_size, 0, world * train.accumulate).stop
    batch = [tensor.expand(share, *tensor.shape[1:]).clone() for tensor in stage.inputs]
    parameters, forward = count_parameters(stage.network), forward_flops(stage.network, *stage.inputs)
    learning = sum(parameter.numel() for parameter in stage.network.parameters() if parameter.requires_grad)
    seen = train.steps * train.batch_size
    kept = 1 if stage.judges else 1 + bool(train.ema) + len(train.ema_widths)  # weight, averages
    state = FLOAT * (kept * parameters + 3 * learning)  # gradient, two moments of AdamW
    state //= world if run.parallel == "fsdp" and not stage.judges else 1
    state += stage.beside
    activations = saved_bytes(Trained(stage), *batch, bf16=precision == "bf16", device=place)
    activations *= 3 if stage.judges and learning else 1  # real, reconstructed to learn, reconstructed to teach
    return {
        "parameters": quantity(parameters),
        "tokens per image": f"{stage.tokens:,}" if stage.tokens else "",
        "forward per image": quantity(forward, "FLOP"),
        "training per image": quantity(stage.factor * forward, "FLOP"),
        "steps x batch": f"{train.steps:,} x {train.batch_size:,}",
        "images seen": quantity(seen),
        "training in all": quantity(stage.factor * forward * seen, "FLOP"),
        "memory per process": memory(state + activations),
        "  weights, gradients, AdamW, EMA": memory(state),
        "  saved for the backward pass": memory(activations),
        "  images at a time": f"{share:,}",
    }


def num_classes(experiment: Experiment) -> tuple[int, str]:
    """The number of classes and where it comes from; images are opened only if they are embedded."""
    for split in encoded_splits(experiment):
        codes = experiment.run.tokenizer_folder / "codes" / split
        if (codes / "meta.json").is_file():
            return len(open_shards(codes).meta["class_names"]), f"as in {codes}"
    if experiment.data.source == "digits":
        return len(open_images(experiment.data, "test").class_names), "as in the data"
    return ASSUMED_CLASSES, "assumed: the images are not opened"


def encoded_splits(experiment: Experiment) -> tuple[Split, ...]:
    """The splits that are encoded: both, but the test split alone where every generator encodes as it trains."""
    families = [family for _, family in experiment.generators()]
    return SPLITS if not families or any(map(reads_codes, families)) else ("test",)


def imagined_device(run: RunConfig) -> tuple[str, str, str]:
    """Device type to imagine, precision, and a remark if this machine cannot imagine the run's device."""
    found = torch.cuda.is_available()
    if run.device != "cuda" or found:
        place = "cuda" if found and run.device != "cpu" else "cpu"
        known = run.precision if run.precision != "auto" else choose_precision("auto", torch.device(place))
        return place, known, f" on {place}"
    precision = "fp32" if run.precision == "fp32" else "bf16"
    return "cpu", precision, " on cuda; saved bytes as on a CPU: this machine has no GPU, whose attention saves less"


def table(names: list[str], columns: list[dict[str, str]]) -> list[str]:
    """Lines of a table with a row for each fact and a column for each stage."""
    rows = list(dict.fromkeys(key for column in columns for key in column))
    width = max(map(len, rows))
    widths = [max(len(name), *map(len, column.values())) for name, column in zip(names, columns, strict=True)]
    cells = [["", *names], *([row, *(column.get(row, "") for column in columns)] for row in rows)]
    return [
        "  ".join([first.ljust(width), *(cell.rjust(size) for cell, size in zip(rest, widths, strict=True))]).rstrip()
        for first, *rest in cells
    ]


def where(experiment: Experiment) -> list[str]:
    """Where the results will lie."""
    names = [name for name, _ in experiment.generators()]
    own = experiment.run.tokenizer is None
    folders = ["tokenizer/", *(f"codes/{split}/" for split in encoded_splits(experiment))] if own else []
    folders += [f"{name}/" for name in names]
    drawn = [each.subject for each in samplings(experiment.eval, dict(experiment.generators()))]
    folders += [*(f"samples/{name}/" for name in drawn), "eval/metrics.json", "report.html"]
    state = "exists: finished stages are kept" if experiment.run.folder.exists() else "new"
    return [f"results in {experiment.run.folder}/ ({state})", f"  {'  '.join(folders)}"]


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix, such as 1.23 G."""
    value = float(f"{value:.3g}")
    power = min(int(math.log10(value)) // 3, 7) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}{unit}".rstrip()


def memory(size: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"
