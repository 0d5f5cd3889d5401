"""The training of an autoregressive generator: predict the next code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.optim import adamw
from engine.shards import Shards
from engine.task import Task
from generator.autoregressive import Autoregressive, build_network
from generator.card import generator_card
from generator.condition import spread_labels, training_labels
from generator.config import AutoregressiveConfig
from tokenizer.model import Tokenizer

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
        rows = training_labels(labels, self.network.num_classes)                  # [B]
        logits = self.modules["network"](codes, rows)                             # [B, T, K]
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
