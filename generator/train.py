"""Train a generator on the codes or latents of a run: the door, and the autoregressive task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from generator.autoregressive import Autoregressive, build_network, null_unknown
from generator.config import AutoregressiveConfig, DiffusionConfig
from generator.diffusion import DiffusionTask
from tokenizer.model import Tokenizer, load_tokenizer

VALIDATION_IMAGES = 2048
VALIDATION_BATCH = 64
PREVIEW_IMAGES = 16


class AutoregressiveTask(Task):
    """Next-code prediction: mean cross-entropy in nats per token; the null label replaces a share of the labels.

    Raises:
        ValueError: labels beyond the shards' class names, or guidance where there is nothing to guide by.
    """

    averaged = ("network",)

    def __init__(
        self, *, config: AutoregressiveConfig, shards: Shards, test_shards: Shards, tokenizer: Tokenizer
    ) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        self.unigram_entropy = test_shards.unigram_entropy()
        card = generator_card(config, shards, tokenizer)
        self.network = build_network(config.model, card)
        self.generator = Autoregressive(self.network, card)
        self.generator.check_guidance(config.sample.guidance)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"network": adamw(self.network, config.train)}

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        """batch: codes int64 [B, T], labels int64 [B]."""
        dropped = rng.uniform() < self.config.model.label_dropout                 # [B]
        return {"loss": self._cross_entropy(batch["codes"], batch["labels"].masked_fill(dropped, -1))}

    def validate(self) -> dict[str, float]:
        """Nats per token and bits per image of held-out codes, beside the nats of each code's mere frequency."""
        nats = [self._cross_entropy(codes, labels) * len(codes) for codes, labels in self._test_batches()]
        nll = float(torch.stack(nats).sum()) / self._num_validation
        bits = nll * self.network.length / math.log(2)
        return {"nll": nll, "bits_per_image": bits, "unigram_entropy": self.unigram_entropy}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class."""
        if hasattr(self.network.head.weight, "full_tensor"):
            return {}  # FSDP gathers sharded weights for forward only, not for decoding
        settings = dataclasses.asdict(self.config.sample) | {"compile": False}
        labels = spread_labels(PREVIEW_IMAGES, self.network.num_classes)
        codes = self.generator.sample(labels, range(PREVIEW_IMAGES), **settings)
        return {"samples": self.tokenizer.to(self._device).decode(codes).cpu()}

    def _cross_entropy(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Mean over all codes [B, T] given labels [B], of which those below 0 become the null label."""
        null = self.network.num_classes
        labels = torch.where((labels < 0) | (null == 0), null, labels)
        logits = self.modules["network"](codes, labels)                           # [B, T, K]
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes [B, T] and labels [B] of held-out images, spread evenly: test sets are often sorted by class."""
        indices = np.arange(self._num_validation) * len(self.test_shards) // self._num_validation
        for rows in np.split(indices, range(VALIDATION_BATCH, len(indices), VALIDATION_BATCH)):
            batch = self.test_shards.load(rows)
            yield batch["codes"].to(self._device), batch["labels"].to(self._device)

    @property
    def _num_validation(self) -> int:
        return min(len(self.test_shards), VALIDATION_IMAGES)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def train_generator(
    *,
    run: RunConfig,
    data: DataConfig,
    config: AutoregressiveConfig | DiffusionConfig,
    family: str,
    device: Device,
) -> Path:
    """Train one family on `run.folder/codes`, or resume it; returns its folder, which ends with model.json.

    Raises:
        ValueError: the tokenizer or the codes are missing or do not belong together, or the folder was begun otherwise.
    """
    if family != family_of(config):
        raise ValueError(f"family={family!r} does not fit the section {type(config).__name__}")
    tokenizer = load_tokenizer(run.folder)
    shards, test_shards = (
        open_shards(run.folder / "codes" / split, fingerprint=tokenizer.fingerprint) for split in ("train", "test")
    )
    torch.manual_seed(mix(run.seed, 4))
    folder = run.folder / family
    task: Task
    if isinstance(config, AutoregressiveConfig):
        task = AutoregressiveTask(config=config, shards=shards, test_shards=test_shards, tokenizer=tokenizer)
    else:
        task = DiffusionTask(config=config, shards=shards, test_shards=test_shards, tokenizer=tokenizer)
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
        save_model(folder, weights["network"], generator_card(config, shards, tokenizer))
    device.barrier()
    return folder


def family_of(config: AutoregressiveConfig | DiffusionConfig) -> str:
    """The name of a section's family: of its folder and of its scores."""
    return "autoregressive" if isinstance(config, AutoregressiveConfig) else "diffusion"


def generator_card(
    config: AutoregressiveConfig | DiffusionConfig, shards: Shards, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What `model.json` must hold to rebuild a generator; training and sampling settings are told, but name no model.

    Raises:
        ValueError: a label of the codes has no class name.
    """
    names = list(shards.meta["class_names"])
    null_unknown(torch.from_numpy(shards.labels), len(names))
    told = to_dict(config)
    names = [] if config.model.label_dropout == 1 else names
    return {
        "kind": "generator",
        "family": family_of(config),
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
