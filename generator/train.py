"""Train a generator on the codes or latents of a run: the door, and the autoregressive task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batches, StepRandom, mix
from engine.checkpoint import save_model
from engine.config import DataConfig, RunConfig, to_dict
from engine.device import Device
from engine.loop import Task, fit
from engine.optim import adamw
from engine.shards import Shards, open_shards
from generator.autoregressive import Autoregressive, build_network, check_codes
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.diffusion import DiffusionTask
from tokenizer.model import Tokenizer, load_tokenizer

VALIDATION_IMAGES = 2048
VALIDATION_BATCH = 64
PREVIEW_IMAGES = 16


class AutoregressiveTask(Task):
    """Next-code prediction: mean cross-entropy in nats per token, labels dropped at random."""

    averaged = ("network",)

    def __init__(
        self, config: AutoregressiveConfig, *, card: dict[str, Any], test_shards: Shards, tokenizer: Tokenizer
    ) -> None:
        self.config, self.card, self.test_shards, self.tokenizer = config, card, test_shards, tokenizer
        self.network = build_network(config.model, card)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"network": adamw(self.network, config.train)}
        Autoregressive(self.network, card).check_guidance(config.sample.guidance)

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        """batch: codes int64 [B, T], labels int64 [B]."""
        dropped = rng.uniform() < self.config.model.label_dropout                 # [B]
        return {"loss": self._cross_entropy(batch["codes"], batch["labels"].masked_fill(dropped, -1))}

    def validate(self) -> dict[str, float]:
        """Nats per token and bits per image of held-out codes, beside the entropy of their histogram."""
        nats, images = 0.0, 0
        counts = torch.zeros(self.network.vocab_size)
        for batch in self._test_batches():
            codes = batch["codes"].to(self._device)
            nats += float(self._cross_entropy(codes, batch["labels"].to(self._device))) * len(codes)
            images += len(codes)
            counts += torch.bincount(batch["codes"].flatten(), minlength=len(counts))
        nll = nats / images
        return {
            "nll": nll,
            "bits_per_image": nll * self.network.length / math.log(2),
            "unigram_entropy": float(torch.special.entr(counts.double() / counts.sum()).sum()),
        }

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class."""
        if hasattr(self.network.head.weight, "full_tensor"):
            return {}  # FSDP gathers sharded weights for forward only, not for decoding
        generator = Autoregressive(self.network, self.card)
        settings = dataclasses.asdict(self.config.sample) | {"compile": False}
        codes = generator.sample(spread_labels(PREVIEW_IMAGES, generator.num_classes), range(PREVIEW_IMAGES), **settings)
        return {"samples": self.tokenizer.to(self._device).decode(codes).cpu()}

    def _cross_entropy(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Mean over all codes [B, T] given labels [B], of which those below 0 become the null label."""
        null = self.network.num_classes
        labels = torch.where((labels < 0) | (null == 0), null, labels)
        logits = self.modules["network"](codes, labels)                           # [B, T, K]
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    def _test_batches(self) -> Iterator[dict[str, Tensor]]:
        stop = min(len(self.test_shards), VALIDATION_IMAGES)
        for start in range(0, stop, VALIDATION_BATCH):
            batch = self.test_shards.load(np.arange(start, min(start + VALIDATION_BATCH, stop)))
            check_codes(batch["codes"], self.network.vocab_size, self.network.length)
            yield batch

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def train_generator(
    *,
    run: RunConfig,
    data: DataConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: Literal["autoregressive", "diffusion"],
    device: Device,
) -> Path:
    """Train one family on `run.folder/codes`, or resume it; returns its folder, which ends with model.json.

    Raises:
        ValueError: the tokenizer or the codes are missing or do not belong together, or the folder was begun otherwise.
    """
    tokenizer = load_tokenizer(run.folder)
    shards, test_shards = (
        open_shards(run.folder / "codes" / split, fingerprint=tokenizer.fingerprint) for split in ("train", "test")
    )
    card = generator_card(config, family, shards, tokenizer)
    torch.manual_seed(mix(run.seed, 4))
    task = make_task(config, card=card, test_shards=test_shards, tokenizer=tokenizer)
    folder = run.folder / family
    weights = fit(
        task,
        Batches(shards, batch_size=config.train.batch_size, seed=run.seed, workers=data.workers),
        train=config.train,
        run=run,
        device=device,
        folder=folder,
        identity={"seed": run.seed, family: to_dict(config), "codes": shards.meta},
    )
    if device.is_main:
        save_model(folder, weights["network"], card)
    device.barrier()
    return folder


def make_task(
    config: AutoregressiveConfig | DiffusionConfig, *, card: dict[str, Any], test_shards: Shards, tokenizer: Tokenizer
) -> AutoregressiveTask | DiffusionTask:
    """The task of the family that the configuration belongs to."""
    if isinstance(config, AutoregressiveConfig):
        return AutoregressiveTask(config, card=card, test_shards=test_shards, tokenizer=tokenizer)
    return DiffusionTask(config, card=card, test_shards=test_shards, tokenizer=tokenizer)


def generator_card(
    config: AutoregressiveConfig | DiffusionConfig, family: str, shards: Shards, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What `model.json` must hold to rebuild a generator; training and sampling settings are told, but name no model.

    Raises:
        ValueError: a label of the codes has no class name.
    """
    names = list(shards.meta["class_names"])
    if len(shards.labels) and int(shards.labels.max()) >= len(names):
        raise ValueError(
            f"label {int(shards.labels.max())} in {shards.folder} is beyond its {len(names)} class names: encode again"
        )
    told = to_dict(config)
    names = [] if config.model.label_dropout == 1 else names
    return {
        "kind": "generator",
        "family": family,
        "config": {key: value for key, value in told.items() if key not in ("train", "sample")},
        "train": told["train"],
        "sample": told["sample"],
        "num_classes": len(names),
        "class_names": names,
        "grid": list(tokenizer.grid),
        "vocab_size": tokenizer.vocab_size,
        "latent_shape": list(tokenizer.latent_shape),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def spread_labels(num: int, num_classes: int) -> Tensor:
    """Labels int64 [num] in rising order, spread evenly over the classes; -1 where there are none."""
    if num_classes == 0:
        return torch.full((num,), -1)
    return torch.arange(num) * num_classes // num
