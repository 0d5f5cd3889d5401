"""How fast each stage runs here: images, tokens and operations per second, beside the rate of a plain matrix product.

Networks have their configured sizes and random weights. A machine's speed wanders with its other work, so the
matrix rate is measured anew before every row, in the same process and the same precision.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoint import write_json
from engine.config import DataConfig, RunConfig
from engine.device import Device
from engine.flops import TRAINING_FACTOR, forward_flops
from engine.images import ImageSet
from engine.products import packed
from engine.shards import Shards, ShardWriter, open_shards
from engine.sources import open_images
from eval.bench import Bench, cut, table
from eval.stopwatch import machine, seconds_of, time_calls
from generator.autoregressive import VIM, build_network
from generator.card import generator_card
from generator.condition import condition_of, spread_labels
from generator.config import AutoregressiveConfig, AutoregressiveSampleConfig, DiffusionConfig
from generator.decoding import decode, guidance_at
from generator.denoiser import DiT
from generator.diffusion import Diffusion, build_denoiser
from generator.learned_schedule import rate_flops
from generator.train import build_task, reads_codes
from tokenizer.adversary import passes_per_step
from tokenizer.config import TokenizerConfig
from tokenizer.costs import training_passes, untrained
from tokenizer.discriminator import build_discriminator
from tokenizer.encode import borrowed_tokenizer, encode_flops
from tokenizer.model import Tokenizer
from tokenizer.perceptual import PERCEPTUAL_PASSES, open_perceptual
from tokenizer.train import TokenizerTask

RANDOM_ROWS = 512  # of codes, where the run has none yet
CAPTION = "a picture of nothing"  # of random codes
FIRST = 2  # codes or solver steps that are timed to guess how many fit


def speed(
    *,
    run: RunConfig,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    autoregressive: AutoregressiveConfig | None,
    diffusion: DiffusionConfig | None,
    device: Device,
    seconds: float = 10.0,
) -> list[dict[str, Any]]:
    """Measure every stage that the experiment has, print a table, and write `<run>/eval/speed.json`.

    About `seconds` are given to each activity, and one more to the matrix rate.

    Returns:
        A row for each activity, with the keys that `Bench` tells.

    Raises:
        ValueError: the images are not there, or sizes do not fit each other.
    """
    bench, path = Bench(run, device, seconds=seconds), run.folder / "eval" / "speed.json"
    images = open_images(data, "train")
    bench.read("image loading", images, tokenizer.train.batch_size, data.workers, limit=len(images))
    own = run.tokenizer is None
    fresh = Tokenizer(tokenizer.model, tokenizer.quantizer, image_size=data.size) if own else None
    model = (fresh or borrowed_tokenizer(run, data)).eval().requires_grad_(False)
    told = [family.condition.kind for family in (autoregressive, diffusion) if family is not None]
    with tempfile.TemporaryDirectory() as folder:
        shards, origin = usable_shards(run, model, images.class_names, Path(folder) / "codes", conditions=told)
        bench.read("code loading", shards, tokenizer.train.batch_size, data.workers, note=origin)
        if own and tokenizer.model.learned:
            measure_tokenizer(bench, tokenizer, images)
        if autoregressive:
            measure_autoregressive_step(bench, autoregressive, shards, model)
            measure_decoding(bench, autoregressive, generator_card(autoregressive, shards, model))
        if diffusion:
            measure_diffusion_step(bench, diffusion, shards, model)
            measure_solving(bench, diffusion, generator_card(diffusion, shards, model))
    if device.is_main:
        write_json(path, {"machine": machine(device, run), "rows": bench.rows})
        print(f"{table(bench.rows)}\nin {path}")
    return bench.rows


def measure_tokenizer(bench: Bench, config: TokenizerConfig, images: ImageSet) -> None:
    """Training steps of the tokenizer on random images of the size of real ones; its opponent plays from the first."""
    config = replace(config, discriminator=replace(config.discriminator, start_step=0, start_patience=0))
    model, size = untrained(config, images.size), images.size
    bench.step(
        "tokenizer step", config, RandomImages(size), forward=step_flops(model, config), tokens=math.prod(model.grid),
        note="" if config.encoder_from is None else "the decoder alone learns",
        build=lambda section: TokenizerTask(model, section, test=images, device=bench.device),
    )  # fmt: skip


def step_flops(model: Tokenizer, config: TokenizerConfig) -> int:
    """What a training step computes per image, over TRAINING_FACTOR: the tokenizer, the network of the perceptual loss
    and the opponent."""
    image = torch.empty(1, 3, model.image_size, model.image_size)
    flops = training_passes(model) * forward_flops(model, image)
    with torch.device("meta"):
        if config.loss.perceptual:
            network = config.loss.perceptual_network
            distance = open_perceptual(network, image_size=model.image_size, blank=True)
            flops += PERCEPTUAL_PASSES * forward_flops(distance, image, image)
        if config.loss.adversarial:
            opponent = build_discriminator(config.discriminator, model.image_size)
            flops += passes_per_step(config.discriminator) * forward_flops(opponent, image)
    return round(flops / TRAINING_FACTOR)


def measure_autoregressive_step(
    bench: Bench, config: AutoregressiveConfig, shards: Shards, tokenizer: Tokenizer
) -> None:
    """Training steps of the autoregressive generator; with codes=on_the_fly, each encodes random images first."""
    card = generator_card(config, shards, tokenizer)
    with torch.device("meta"):
        network = build_network(config.model, card)
    codes, encodes = torch.zeros(1, network.length, dtype=torch.int64), not reads_codes(config)
    forward = forward_flops(network, codes, condition_of(card).null(1))
    forward += round(encode_flops(tokenizer) / TRAINING_FACTOR) if encodes else 0
    bench.step(
        "autoregressive step", config, RandomImages(tokenizer.image_size) if encodes else shards,
        forward=forward, tokens=network.length, note="encodes its images, in fp32" if encodes else "",
        build=lambda section: build_task(section, shards, card, test_shards=shards, tokenizer=tokenizer),
    )  # fmt: skip


def measure_decoding(bench: Bench, config: AutoregressiveConfig, card: dict[str, Any]) -> None:
    """Sampling code by code with a cache: as many codes of the sequence as time allows.

    The cost of a code grows a little along the sequence, as more and more codes before it are attended to.
    """
    name, settings, device = "autoregressive sampling", config.sample, bench.device.device
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    bench.begin(name, dtype)
    network = build_network(config.model, card).to(device, dtype).eval().requires_grad_(False)
    length = network.length
    most = code_flops(network, length) * rows_per_image(settings, length)
    batch = min(settings.batch_size, max(1, int(bench.affordable(most, 1 / 32))))
    null = condition_of(card).null(batch).to(device)  # which costs as much as any other

    def draw(codes: int) -> Tensor:
        uniforms = torch.rand(batch, codes, device=device)
        return decode(packed(network, batch), null, uniforms, settings, null=null)

    codes = _fitting(draw, length, bench)
    times = time_calls(lambda: draw(codes), device=bench.device, seconds=bench.seconds / 2)
    flops = code_flops(network, (codes + 1) / 2) * rows_per_image(settings, codes)
    bench.end(
        name, times, images=batch * codes / length, batch_size=batch, tokens=length, flops=flops * batch * codes,
        note=", ".join(filter(None, [cut(batch, settings.batch_size), f"{codes:,} codes of {length:,}"])),
    )  # fmt: skip


def code_flops(network: VIM, seen: float) -> float:
    """Operations that decode one code of one row, which attends to the `seen` newest positions of its cache, and to the
    tokens of a condition that lead them."""
    one, whole = torch.zeros(1, dtype=torch.int64), network.leading + network.length
    least, most = (forward_flops(NextCode(network, window), one[:, None], one) for window in (1, whole))
    return least + (most - least) * (network.leading + seen - 1) / max(1, whole - 1)  # linear in what attention sees


def rows_per_image(settings: AutoregressiveSampleConfig, codes: int) -> float:
    """Rows of the network that an image takes on average: guidance reads one with the null label while it lasts."""
    guided = (step + 1 for step in range(codes) if guidance_at(step / codes, settings) != 1)
    return 1 + max(guided, default=0) / codes


def measure_diffusion_step(bench: Bench, config: DiffusionConfig, shards: Shards, tokenizer: Tokenizer) -> None:
    """Training steps of the diffusion generator; a consistency model is its own teacher, by one more forward pass."""
    card = generator_card(config, shards, tokenizer)
    with torch.device("meta"):
        network = build_denoiser(config.model, card)
    null = condition_of(card).null(1)
    forward = denoiser_flops(network, null) + rate_flops(network.learned_schedule, null)
    forward += round(forward / TRAINING_FACTOR) if config.objective.kind == "consistency" else 0
    bench.step(
        "diffusion step", config, shards, forward=forward, tokens=math.prod(network.grid),
        build=lambda section: build_task(section, shards, card, test_shards=shards, tokenizer=tokenizer),
    )  # fmt: skip


def measure_solving(bench: Bench, config: DiffusionConfig, card: dict[str, Any]) -> None:
    """Sampling with the configured solver: as many of its steps as time allows, counted as that part of an image.

    Other networks that sample with it are left out.
    """
    name, device = "diffusion sampling", bench.device.device
    bench.begin(name, torch.float32)
    generator = Diffusion(build_denoiser(config.model, card), card).to(device).eval().requires_grad_(False)
    null = generator.condition.null(1)
    flops, once = denoiser_flops(generator.network, null), rate_flops(generator.learned_schedule, null)
    batch = min(config.sample.batch_size, max(1, int(bench.affordable(2 * flops, 1 / 32))))
    told = spread_labels(batch, generator.num_classes) if generator.condition.kind == "class" else None
    sample = config.sample.previewed  # no levels are optimised for random weights
    total = len(sample.levels) or sample.num_steps
    alone = "" if sample.guide is None else "without its guide"
    sample = replace(sample, guide=None, outside=None, guidance=1.0 if alone else sample.guidance)
    evaluated: list[int] = []  # rows of each call of the network
    generator.network.register_forward_pre_hook(lambda _, inputs: evaluated.append(len(inputs[0])))

    def draw(steps: int) -> Tensor:
        evaluated.clear()
        settings = asdict(replace(sample, num_steps=steps, levels=sample.levels[:steps], batch_size=batch))
        return generator.sample(told, range(batch), **settings)

    steps = _fitting(draw, total, bench)
    times = time_calls(lambda: draw(steps), device=bench.device, seconds=bench.seconds / 2)
    done = f"{steps} steps of {total} with {sample.solver}"
    bench.end(
        name, times, images=batch * steps / total, batch_size=batch, flops=flops * sum(evaluated) + once * batch,
        note=", ".join(filter(None, [cut(batch, sample.batch_size), done, alone])),
    )  # fmt: skip


def denoiser_flops(network: DiT, condition: Tensor) -> int:
    """Operations of one call on one image, of which one row [1, ...] is told."""
    return forward_flops(network, torch.empty(1, *network.latent_shape), torch.empty(1), condition)


def _fitting(draw: Callable[[int], Tensor], most: int, bench: Bench) -> int:
    """How many codes or steps fit into a quarter of the time, at most all of them."""
    first = min(FIRST, most)
    draw(first)
    seconds = seconds_of(lambda: draw(first), bench.device)
    return min(most, max(first, int(first * bench.seconds / 4 / seconds)))


class NextCode(nn.Module):
    """One more code of a sequence whose cache holds `window` positions: what decoding calls again and again."""

    def __init__(self, network: VIM, window: int) -> None:
        super().__init__()
        self.network, self.window = network, window

    def forward(self, codes: Tensor, position: Tensor) -> Tensor:
        whole = self.network.caches(len(codes))
        caches = [cache.view(rows=slice(None), window=self.window, complete=True) for cache in whole]
        return self.network.advance(codes, None, position, caches)


class RandomImages:
    """Images without content, as many as are asked for."""

    def __init__(self, size: int) -> None:
        self.images = torch.randint(256, (16, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        return {
            "images": self.images[torch.from_numpy(indices)],
            "labels": torch.zeros(len(indices), dtype=torch.int64),
            "rows": torch.zeros(len(indices), dtype=torch.int64),
        }


def usable_shards(
    run: RunConfig,
    tokenizer: Tokenizer,
    class_names: tuple[str, ...],
    folder: Path,
    *,
    conditions: Collection[str] = (),
) -> tuple[Shards, str]:
    """The run's own codes if they have the tokenizer's sizes, else random ones written to `folder`, and which it is.

    Random ones have what these kinds of conditions are made of.
    """
    own = run.tokenizer_folder / "codes" / "train"
    sizes = {
        "grid": list(tokenizer.grid),
        "vocab_size": tokenizer.vocab_size,
        "latent_shape": list(tokenizer.latent_shape),
    }
    if (own / "meta.json").is_file():
        shards = open_shards(own)
        if {key: shards.meta[key] for key in sizes} == sizes:
            return shards, f"from {own}"
    labels = torch.arange(RANDOM_ROWS) % len(class_names) if class_names else torch.full((RANDOM_ROWS,), -1)
    with ShardWriter(folder, views=("original",), vocab_size=tokenizer.vocab_size or None) as writer:
        for label in labels.split(64):
            shape = len(label), 1, tokenizer.length
            codes = torch.randint(tokenizer.vocab_size, shape) if tokenizer.vocab_size else None
            latents = torch.randn(len(label), 1, *tokenizer.latent_shape)
            told: dict[str, Any] = {"smaller": latents} if "image" in conditions else {}
            told |= {"captions": len(label) * [CAPTION]} if "text" in conditions else {}
            writer.append(labels=label, codes=codes, latents=latents, **told)
        reduced = {"low_resolution": 2} if "image" in conditions else {}
        writer.close({**sizes, **reduced, "tokenizer_fingerprint": "", "class_names": list(class_names), "images": {}})
    return open_shards(folder), "random codes"
