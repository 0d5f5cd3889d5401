"""Latent diffusion: the generator around a trained denoiser, and the task that trains one.

A training draw is u -> lambda = schedule(u) -> alpha, sigma = path(lambda) -> x_t = alpha x + sigma eps -> network ->
target; sampling asks the same network for x0 at the levels where a solver stops. Both speak in log SNR alone, so
schedule, path, target, weight, solver and steps are chosen independently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.config import to_dict
from engine.loop import Task
from engine.optim import adamw
from engine.shards import Shards
from generator.autoregressive import null_unknown
from generator.config import DenoiserModelConfig, DiffusionConfig, DiffusionSampleConfig
from generator.denoiser import DiT
from generator.objective import WEIGHTS, output_to_x0, target_of, x0_gain
from generator.path import PATHS
from generator.schedule import build_schedule
from generator.solvers import SampleNoise, guided, solve
from generator.steps import solver_levels
from tokenizer.model import Tokenizer

FEATURE_LOGSNR = 2.0
VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 16


class Diffusion(nn.Module):
    """A denoiser with all that sampling needs; `card` is what `train_generator` writes beside the weights."""

    family = "diffusion"

    def __init__(self, network: DiT, card: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.path, self.target = PATHS[card["config"]["path"]], card["config"]["target"]
        self.label_dropout: float = card["config"]["model"]["label_dropout"]
        self.num_classes: int = card["num_classes"]
        self.class_names = tuple(card["class_names"])
        self.tokenizer_fingerprint: str = card["tokenizer_fingerprint"]
        self.fingerprint: str = card.get("fingerprint", "")
        self.taps = tuple(f"block_{number}" for number in range(1, len(network.blocks) + 1))

    @classmethod
    def from_card(cls, card: dict[str, Any], weights: dict[str, Tensor]) -> Diffusion:
        """Rebuild a saved generator, in eval mode."""
        network = build_denoiser(DenoiserModelConfig(**card["config"]["model"]), card)
        network.load_state_dict(weights)
        return cls(network, card).eval().requires_grad_(False)

    def denoise(self, x: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        """Estimate of the clean latents x0 [B, C, h, w] from x = x0 + s eps, the solvers' variable; fp32."""
        alpha, sigma = (over_latents(value) for value in self.path(logsnr))
        x_t = alpha * x
        output = self.network(x_t, logsnr, labels).to(x.dtype)
        return output_to_x0(self.target, output, x_t, alpha, sigma)

    @torch.inference_mode()
    def sample(self, labels: Tensor | None, seeds: Sequence[int], **settings: Any) -> Tensor:
        """Latents float32 [B, C, h, w], one for each seed; row k depends on seed k and label k alone.

        Args:
            labels: int64 [B] in 0 .. num_classes - 1; -1 or None samples without a class.
            seeds: B integers.
            settings: keys of DiffusionSampleConfig.

        Raises:
            ValueError: a label or a setting out of range, or guidance of a network without a trained null label.
        """
        chosen = DiffusionSampleConfig(**settings)
        self.check_guidance(chosen.guidance)
        device = self.network.positions.device
        rows = self._label_rows(labels, len(seeds)).to(device)                     # [B]
        denoise = guided(self.denoise, rows, null=self.num_classes, weight=chosen.guidance)
        levels = solver_levels(chosen.steps, chosen.num_steps, first=chosen.first_logsnr, last=chosen.last_logsnr)
        noise = SampleNoise(seeds, self.network.latent_shape, device=device)
        return solve(denoise, noise, levels, solver=chosen.solver, eta=chosen.eta)

    def check_guidance(self, guidance: float) -> None:
        """Raise ValueError if guidance is asked of a network that did not learn both a class and no class."""
        if guidance != 1 and not (self.num_classes and self.label_dropout):
            raise ValueError(
                f"diffusion.sample.guidance={guidance} compares a class with none, but this generator learned only one"
                " of them: use guidance=1, or train on labels with diffusion.model.label_dropout above 0"
            )

    @torch.inference_mode()
    def features(self, latents: Tensor, tap: str) -> Tensor:
        """Tokens after block n (`tap` = "block_<n>", from 1), averaged: [B, D].

        The latents [B, C, h, w] carry a little noise: FEATURE_LOGSNR, or l if the tap is "block_<n>@<l>". They meet
        the null label, so that no class leaks, and one fixed noise, so that no row depends on the others.

        Raises:
            ValueError: an unknown tap, or latents of another shape.
        """
        depth, level = self._parse_tap(tap)
        self.network.check_latents(latents)
        logsnr = latents.new_full((len(latents),), level)                          # [B]
        eps = SampleNoise([0], self.network.latent_shape, device=latents.device)()
        alpha, sigma = (over_latents(value) for value in self.path(logsnr))
        null = torch.full((len(latents),), self.num_classes, device=latents.device)
        tokens = self.network.activations(alpha * latents + sigma * eps, logsnr, null, depth=depth)
        return tokens.float().mean(1)

    def _parse_tap(self, tap: str) -> tuple[int, float]:
        """Number of blocks to run, and log SNR."""
        block, at, level = tap.partition("@")
        try:
            return self.taps.index(block) + 1, float(level) if at else FEATURE_LOGSNR
        except ValueError as error:
            known = f"{self.taps[0]} .. {self.taps[-1]}, or block_<n>@<log SNR>"
            raise ValueError(f"tap={tap!r} is unknown: use {known}") from error

    def _label_rows(self, labels: Tensor | None, rows: int) -> Tensor:
        labels = torch.full((rows,), -1) if labels is None else labels
        if len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for {rows} samples: give one label for each")
        return null_unknown(labels, self.num_classes)


class DiffusionTask(Task):
    """Trains a denoiser on latents; the null label replaces a share of the labels, and unknown ones.

    Raises:
        ValueError: labels beyond the shards' class names, latents that the patches do not fit, or guidance where there
            is nothing to guide by.
    """

    averaged = ("network",)

    def __init__(
        self, *, config: DiffusionConfig, shards: Shards, test_shards: Shards, tokenizer: Tokenizer
    ) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        card = _card(config, shards, tokenizer)
        self.network = build_denoiser(config.model, card)
        self.generator = Diffusion(self.network, card)
        self.generator.check_guidance(config.sample.guidance)
        schedule = config.schedule
        self.schedule = build_schedule(schedule.kind, location=schedule.location, scale=schedule.scale)
        self.modules: dict[str, nn.Module] = {"network": self.network}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"network": adamw(self.network, config.train)}

    def step(self, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        latents, labels = batch["latents"].float(), batch["labels"]
        u, eps = rng.uniform(), rng.normal(*latents.shape[1:])                     # [B], [B, C, h, w]
        dropped = rng.uniform() < self.config.model.label_dropout                  # [B]
        errors = self.errors(latents, labels.masked_fill(dropped, -1), self.schedule(u), eps)
        return {"loss": errors.mean(), **loss_by_quarter(errors.detach(), u)}

    def errors(self, x: Tensor, labels: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
        """Weighted mean squared errors in target space [B], of latents and noise [B, C, h, w] at log SNR [B]."""
        kind, (alpha, sigma) = self.config.target, PATHS[self.config.path](logsnr)
        weight = WEIGHTS[self.config.weight](logsnr, x0_gain(kind, alpha, sigma))  # [B]
        alpha, sigma = over_latents(alpha), over_latents(sigma)                    # [B, 1, 1, 1]
        null = self.network.num_classes
        rows = torch.where((labels < 0) | (null == 0), null, labels)               # [B]
        output = self.modules["network"](alpha * x + sigma * eps, logsnr, rows)
        return weight * (output.float() - target_of(kind, x, eps, alpha, sigma)).square().flatten(1).mean(1)

    def validate(self) -> dict[str, float]:
        """Loss on held-out latents, with the same noise at the same evenly spread levels every time."""
        measured = [(self.errors(*arguments), u) for *arguments, u in self._test_batches()]
        errors, u = (torch.cat(column) for column in zip(*measured, strict=True))
        return {key: float(value) for key, value in {"loss": errors.mean(), **loss_by_quarter(errors, u)}.items()}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, sorted by class, from the same seeds every time."""
        num_classes = self.generator.num_classes
        labels = torch.arange(PREVIEW_IMAGES) * num_classes // PREVIEW_IMAGES if num_classes else None
        latents = self.generator.sample(labels, range(PREVIEW_IMAGES), **dataclasses.asdict(self.config.sample))
        return {"samples": self.tokenizer.to(latents.device).from_latents(latents).cpu()}

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The arguments x, labels, logsnr, eps of `errors`, then u [B], over evenly spread held-out latents."""
        num = min(VALIDATION_IMAGES, len(self.test_shards))
        indices = np.arange(num) * len(self.test_shards) // num
        generator = torch.Generator().manual_seed(0)
        spread = (torch.randperm(num, generator=generator) + 0.5) / num            # [num]
        device = self.network.positions.device
        for rows in torch.arange(num).split(self.config.sample.batch_size):
            batch = self.test_shards.load(indices[rows.numpy()])
            eps = torch.randn(batch["latents"].shape, generator=generator)
            u = spread[rows].to(device)
            yield batch["latents"].to(device).float(), batch["labels"].to(device), self.schedule(u), eps.to(device), u


def _card(config: DiffusionConfig, shards: Shards, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the generator of a run in training must know."""
    names = list(shards.meta["class_names"])
    null_unknown(torch.as_tensor(np.asarray(shards.labels)), len(names))
    names = [] if config.model.label_dropout == 1 else names
    return {
        "config": to_dict(config),
        "num_classes": len(names),
        "class_names": names,
        "latent_shape": tokenizer.latent_shape,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def build_denoiser(model: DenoiserModelConfig, card: dict[str, Any]) -> DiT:
    """The network for the latent shape and number of classes that a card names."""
    depth, width, heads = model.shape
    return DiT(
        tuple(card["latent_shape"]),
        depth=depth,
        width=width,
        heads=heads,
        patch_size=model.patch_size,
        num_classes=card["num_classes"],
        mlp_ratio=model.mlp_ratio,
    )


def loss_by_quarter(errors: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Loss in each quarter of the schedule's draws u [B], 1 the least noisy.

    Four times each quarter's part of the mean: unlike a mean over the quarter's own samples it exists when a small
    batch has none there, and averages over parts and processes to the right number.
    """
    quarter = 4 - (4 * u).long()                                                   # [B], in 1 .. 4
    return {f"loss_quarter_{q}": 4 * (errors * (quarter == q)).mean() for q in range(1, 5)}


def over_latents(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
