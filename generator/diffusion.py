"""Latent diffusion: the generator around a trained denoiser.

Training draws noise levels from a schedule; sampling asks the same network for x0 at the levels where a solver stops.
Both speak in log SNR alone, so schedule, path, target, weight, solver and steps are chosen independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from generator.condition import check_guidance, label_rows
from generator.config import DenoiserModelConfig, DiffusionSampleConfig, read_settings
from generator.denoiser import DiT
from generator.objective import output_to_x0
from generator.path import PATHS
from generator.solvers import SampleNoise, guided, solve
from generator.steps import solver_levels

FEATURE_LOGSNR = 2.0  # a little noise: less than the latents' own deviation, enough to make the network work


class Diffusion(nn.Module):
    """A denoiser with all that sampling needs; `card` is what `train_generator` writes beside the weights."""

    family = "diffusion"

    def __init__(self, network: DiT, card: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.card = network, card
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
        chosen = read_settings(DiffusionSampleConfig, "diffusion.sample", settings)
        self.check_guidance(chosen.guidance)
        device = self.network.positions.device
        rows = label_rows(labels, len(seeds), self.num_classes).to(device)         # [B]
        denoise = guided(self.denoise, rows, null=self.num_classes, weight=chosen.guidance)
        levels = solver_levels(chosen.steps, chosen.num_steps, first=chosen.first_logsnr, last=chosen.last_logsnr)
        noise = SampleNoise(seeds, self.network.latent_shape, device=device)
        return solve(denoise, noise, levels, solver=chosen.solver, eta=chosen.eta)

    def check_guidance(self, guidance: float) -> None:
        """Raise ValueError if guidance is asked of a network that did not learn both a class and no class."""
        check_guidance(self.family, guidance, num_classes=self.num_classes, label_dropout=self.label_dropout)

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


def over_latents(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
