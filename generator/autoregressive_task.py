"""The training of an autoregressive generator: predict the next code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.device import gathered
from engine.images import ImageSet
from engine.optim import build_optimizer
from engine.shards import Shards
from engine.task import Task
from generator.autoregressive import Autoregressive, build_network
from generator.condition import preview_rows
from generator.config import AutoregressiveConfig
from generator.order import draw_orders, random_share
from generator.partial import paint_partial
from tokenizer.model import Tokenizer

VALIDATION_IMAGES = 2048
VALIDATION_BATCH = 64
PREVIEW_IMAGES = 16
STRIP = 8  # samples whose making is shown, and stages of it


class AutoregressiveTask(Task):
    """Next-code prediction: mean cross-entropy in nats per token; null replaces a share of the conditions.

    `card` is that of `generator_card`. Batches come from `source`; they hold codes, or images to encode where
    `config.codes` is on_the_fly.

    Raises:
        ValueError: a tokenizer without codes, guidance where there is nothing to guide by, or a source without what the
            condition is made of.
    """

    averaged = ("network",)

    def __init__(
        self,
        *,
        config: AutoregressiveConfig,
        card: dict[str, Any],
        source: Shards | ImageSet,
        test_shards: Shards,
        tokenizer: Tokenizer,
    ) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        self.network = build_network(config.model, card, random_order=config.order.kind == "random")
        self.unigram_entropy = test_shards.unigram_entropy()
        self.generator = Autoregressive(self.network, card)
        self.generator.check_guidance(config.sample.guidance)
        self.condition = self.generator.condition
        self.read, self.read_test = (self.condition.reader(each) for each in (source, test_shards))
        self.modules: dict[str, nn.Module] = {"network": self.network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"network": build_optimizer(self.network, config.train)}

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        """batch: labels int64 [B], or what else the condition is read from; codes int64 [B, T] or images uint8
        [B, 3, H, W]."""
        codes = self._codes(batch)  # [B, T]
        dropped = rng.uniform() < self.config.model.label_dropout  # [B]
        share = random_share(rng.step, self.config.train.steps, self.config.order)
        order = draw_orders(rng.uniform(), rng.uniform(codes.shape[1]), share) if share else None  # [B, T]
        told = self.read(batch, rng.uniform() if self.condition.draws else None)  # [B, ...]
        loss = self._cross_entropy(codes, self.condition.drop(told, dropped), order)
        if self.config.order.kind == "raster":
            return {"loss": loss}
        return {"loss": loss, "random_order": torch.full_like(loss, share)}

    def validate(self) -> dict[str, float]:
        """Nats per token and bits per image of held-out codes in raster order, beside the nats of each code's mere
        frequency and the share of these that is left."""
        nats = [self._cross_entropy(codes, condition) * len(codes) for codes, condition in self._test_batches()]
        nll, unigram = float(torch.stack(nats).sum()) / self._num_validation, self.unigram_entropy
        told = {"nll": nll, "bits_per_image": nll * self.network.length / math.log(2), "unigram_entropy": unigram}
        return told | {"nll_over_unigram": nll / unigram if unigram else math.inf}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class or of held-out texts, and a strip of how the first of them were made: a row
        for each of them, a column for each eighth of the codes.

        They are decoded in fp32 and without compilation, whatever the section `sample` says: bf16 samples of the
        finished run are others.
        """
        settings = dataclasses.asdict(self.config.sample) | {"compile": False, "precision": "fp32"}
        tokenizer, length = self.tokenizer.to(self._device), self.network.length
        stages = [-(-length * stage // STRIP) for stage in range(1, STRIP + 1)]
        partial: dict[int, Tensor] = {}
        told = preview_rows(self.condition, self.read_test, self.test_shards, PREVIEW_IMAGES)
        with gathered(self.network, "advance"):
            for done, codes in self.generator.stream(told, range(PREVIEW_IMAGES), **settings):
                if done in stages:
                    partial[done] = paint_partial(tokenizer, codes[:STRIP], done)  # [8, 3, H, W]
        strip = torch.stack([partial[done] for done in stages], dim=1)  # [8, 8, 3, H, W]
        return {"samples": tokenizer.decode(codes).cpu(), "partial": strip.flatten(0, 1).cpu()}

    def _codes(self, batch: dict[str, Tensor]) -> Tensor:
        """Codes [B, T] of a batch, whatever the autocast; on a CPU images get those that `encode_images` gives them.

        On a GPU products are TF32, and batches have other sizes, so codes beside a boundary of the codebook may differ.
        """
        if self.config.codes == "cached":
            return batch["codes"]
        with torch.autocast(self._device.type, enabled=False):
            return self.tokenizer.to(self._device).encode(batch["images"])

    def _cross_entropy(self, codes: Tensor, condition: Tensor, order: Tensor | None = None) -> Tensor:
        """Mean over all codes [B, T] given rows of the condition [B, ...].

        The codes are predicted in `order` [B, T], places on the grid, or in raster order.
        """
        logits = self.modules["network"](codes, condition, order)  # [B, T, K]
        targets = codes if order is None else codes.gather(1, order)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes [B, T], condition [B, ...] of held-out images, spread evenly: test sets are often sorted by class."""
        indices = np.arange(self._num_validation) * len(self.test_shards) // self._num_validation
        for rows in np.split(indices, range(VALIDATION_BATCH, len(indices), VALIDATION_BATCH)):
            batch = self.test_shards.load(rows)
            yield batch["codes"].to(self._device), self.read_test(batch, None).to(self._device)

    @property
    def _num_validation(self) -> int:
        return min(len(self.test_shards), VALIDATION_IMAGES)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device
