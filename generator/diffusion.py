"""Latent diffusion: the generator around a trained denoiser, and the task that trains one.

A training draw is u -> lambda = schedule(u) -> alpha, sigma = path(lambda) -> x_t = alpha x + sigma eps -> network ->
target; sampling asks the same network for x0 at the levels where a solver stops. Both speak in log SNR alone, so
schedule, path, target, weight, solver and steps are chosen independently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Source, StepRandom
from engine.loop import Task
from engine.optim import adamw
from generator.autoregressive import null_unknown
from generator.config import DenoiserModelConfig, DiffusionConfig, DiffusionSampleConfig
from generator.denoiser import DiT
from generator.objective import WEIGHTS, output_to_x0, target_of, x0_gain
from generator.path import PATHS
from generator.schedule import build_schedule
from generator.solvers import SampleNoise, guided, solve
from generator.steps import solver_levels

FEATURE_LOGSNR = 2.0  # a little noise: features of a denoiser classify best well away from both ends
VALIDATION_SAMPLES, VALIDATION_BATCH = 1024, 64
NUM_PREVIEWS = 16


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
        return cls(network, card).eval()

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
        chosen = sample_settings(settings)
        if chosen.guidance != 1 and not (self.num_classes and self.label_dropout):
            raise ValueError(
                f"guidance={chosen.guidance} compares a class with no class, but this generator learned only one of them"
                " (it needs labels and diffusion.model.label_dropout above 0): use guidance=1"
            )
        device = self.network.labels.weight.device
        denoise = guided(
            self.denoise, self._label_rows(labels, len(seeds)).to(device), null=self.num_classes, weight=chosen.guidance
        )
        levels = solver_levels(chosen.steps, chosen.num_steps, first=chosen.first_logsnr, last=chosen.last_logsnr)
        noise = SampleNoise(seeds, self.network.latent_shape, device=device)
        return solve(denoise, noise, levels, solver=chosen.solver, eta=chosen.eta)

    @torch.inference_mode()
    def features(self, latents: Tensor, tap: str) -> Tensor:
        """Activations after block i, averaged over the tokens: [B, D].

        `tap` is "block_i", or "block_i@l" for noise at log SNR l instead of FEATURE_LOGSNR. Latents [B, C, h, w] meet
        the null label, so that no class leaks, and one fixed noise, so that a row does not depend on the others.

        Raises:
            ValueError: an unknown tap, or latents of another shape.
        """
        block, _, level = tap.partition("@")
        if block not in self.taps:
            raise ValueError(f"tap={tap!r} must be one of {', '.join(self.taps)}, or block_i@<log SNR>")
        logsnr = latents.new_full((len(latents),), float(level) if level else FEATURE_LOGSNR)
        eps = SampleNoise([0], self.network.latent_shape, device=latents.device)()
        alpha, sigma = (over_latents(value) for value in self.path(logsnr))
        null = torch.full((len(latents),), self.num_classes, device=latents.device)
        tokens = self.network.activations(alpha * latents + sigma * eps, logsnr, null, depth=self.taps.index(block) + 1)
        return tokens.float().mean(1)

    def _label_rows(self, labels: Tensor | None, rows: int) -> Tensor:
        labels = torch.full((rows,), -1) if labels is None else labels
        if len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for {rows} samples: give one label for each")
        return null_unknown(labels, self.num_classes)


class Shards(Source, Protocol):
    """Latents on disk: `load` gives "latents" [B, C, h, w] and "labels" [B]."""

    labels: np.ndarray
    meta: dict[str, Any]


class Decoder(Protocol):
    """What this task asks of a tokenizer."""

    latent_shape: tuple[int, int, int]
    fingerprint: str

    def from_latents(self, latents: Tensor) -> Tensor: ...


class DiffusionTask(Task):
    """Trains a denoiser on shards of latents; the null label replaces a share of the labels, and unknown ones.

    Raises:
        ValueError: labels beyond the shards' class names, or latents that the network's patches do not fit.
    """

    averaged = ("network",)

    def __init__(
        self, *, config: DiffusionConfig, shards: Shards, test_shards: Shards | None, tokenizer: Decoder
    ) -> None:
        self.config, self.test_shards, self.tokenizer = config, test_shards, tokenizer
        card = diffusion_card(config, shards, tokenizer)
        null_unknown(torch.as_tensor(shards.labels), card["num_classes"])
        network = build_denoiser(config.model, card)
        self.generator = Diffusion(network, card)
        self.null: int = card["num_classes"]
        self.schedule = build_schedule(
            config.schedule.kind, location=config.schedule.location, scale=config.schedule.scale
        )
        self.modules = {"network": network}
        self.optimizers = {"network": adamw(network, config.train)}

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
        output = self.modules["network"](alpha * x + sigma * eps, logsnr, torch.where(labels < 0, self.null, labels))
        return weight * (output.float() - target_of(kind, x, eps, alpha, sigma)).square().flatten(1).mean(1)

    def validate(self) -> dict[str, float]:
        """Loss on held-out latents, with the same noise at the same evenly spread levels every time."""
        if self.test_shards is None:
            return {}
        pairs = [(self.errors(**batch, logsnr=self.schedule(u)), u) for batch, u in self._validation_batches()]
        errors, u = (torch.cat(column) for column in zip(*pairs, strict=True))
        return {key: float(value) for key, value in {"loss": errors.mean(), **loss_by_quarter(errors, u)}.items()}

    def preview(self) -> dict[str, Tensor]:
        """Decoded samples, the classes in turn, from the same seeds every time."""
        labels = torch.arange(NUM_PREVIEWS) % self.null if self.null else None
        settings = {key: getattr(self.config.sample, key) for key in DiffusionSampleConfig.__dataclass_fields__}
        latents = self.generator.sample(labels, range(NUM_PREVIEWS), **settings)
        return {"samples": self.tokenizer.from_latents(latents)}

    def _validation_batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The arguments x, labels, eps of `errors`, and u [B]."""
        assert self.test_shards is not None
        num = min(VALIDATION_SAMPLES, len(self.test_shards))
        rows = np.arange(num) * len(self.test_shards) // num
        generator = torch.Generator().manual_seed(0)
        spread = (torch.randperm(num, generator=generator) + 0.5) / num
        device = self.generator.network.labels.weight.device
        for chosen, u in zip(np.split(rows, range(VALIDATION_BATCH, num, VALIDATION_BATCH)), spread.split(VALIDATION_BATCH), strict=True):
            batch = self.test_shards.load(chosen)
            latents = batch["latents"].float()
            eps = torch.randn(latents.shape, generator=generator)
            arguments = {"x": latents, "labels": batch["labels"], "eps": eps}
            yield {key: value.to(device) for key, value in arguments.items()}, u.to(device)


def diffusion_card(config: DiffusionConfig, shards: Shards, tokenizer: Decoder) -> dict[str, Any]:
    """What a saved generator must know beside its weights."""


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
